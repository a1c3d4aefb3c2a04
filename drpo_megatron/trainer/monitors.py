"""What a trainer measures beside the loss, and when: gradient norms, a look into quantised layers, two gradients compared.

    every rollout              norm of the gradient by class of parameter          one pass over the gradients
    every `layers_every`       LayerProbe, in the first micro-batch                sums over operands that are there anyway
    every `gradient_every`     low-precision gradient against unquantised one      two forward-backward passes of one
                               and the routers' choices in both                    micro-batch, a copy of the gradients

All in the first optimiser step of a rollout, before it changes anything. Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from drpo_megatron.config.precision import MonitorSection
from drpo_megatron.metrics import Statistic
from drpo_megatron.trainer.gradients import CLASSES, owned_gradients, squared_norms
from drpo_megatron.trainer.layer_probe import LayerProbe
from drpo_megatron.trainer.low_precision import LowPrecision
from drpo_megatron.trainer.setup import Layout
from drpo_megatron.trainer.work import Work

Backward = Callable[[Work], object]
"""Forward and backward pass over all micro-batches of the work, gradients reduced."""


class Monitors:
    def __init__(
        self, section: MonitorSection, chunks: Sequence[Any], low_precision: LowPrecision, layout: Layout
    ) -> None:
        self.section, self.chunks, self.low_precision, self.layout = section, chunks, low_precision, layout
        self.device = next(chunks[0].parameters()).device
        self.probe = LayerProbe(low_precision.products, layout, self.device)

    def before_backward(
        self, rollout: int | None, work: Work, backward: Backward, optimizer: Any
    ) -> dict[str, Statistic]:
        """The comparison of gradients, if it is due. Leaves gradients to be cleared.

        Args:
            rollout: number from 0, here and below. None: this optimiser step isn't watched.
        """
        if self.low_precision.precision is None or not _is_due(self.section.gradient_every, rollout):
            return {}
        return self._compare(_first_micro_batches(work, self.layout), backward, optimizer)

    def during_backward(self, rollout: int | None) -> AbstractContextManager[None]:
        """Around the backward pass of an optimiser step: a look into the layers, if it is due."""
        return self.probe.watching() if self._looks_into_layers(rollout) else nullcontext()

    def after_backward(self, rollout: int | None, optimizer: Any) -> dict[str, Statistic]:
        """Before the optimizer clips the gradients."""
        if rollout is None:
            return {}
        statistics = self.probe.statistics() if self._looks_into_layers(rollout) else {}
        squares = squared_norms(owned_gradients(self.chunks, optimizer, self.layout), self.device).tolist()
        return statistics | {
            f"optim/grad_norm/{name}": Statistic.ratio(square**0.5, 1.0)
            for name, square in zip(CLASSES, squares, strict=True)
            if square
        }

    def _looks_into_layers(self, rollout: int | None) -> bool:
        """Equal on all ranks, also on one whose layers are all kept."""
        precision = self.low_precision.precision
        return precision is not None and precision.emulated and _is_due(self.section.layers_every, rollout)

    def _compare(self, work: Work, backward: Backward, optimizer: Any) -> dict[str, Statistic]:
        """precision/gradient_cosine/<class or all> and precision/router_flips/<layer or mean>."""
        self._clear()
        with self.low_precision.unrecorded(), self._choices() as low_choices:
            backward(work)
        low = [gradient.clone() for _, gradient in owned_gradients(self.chunks, optimizer, self.layout)]
        self._clear()
        with self.low_precision.off(), self._choices() as high_choices:
            backward(work)
        sums = torch.zeros(3, len(CLASSES), dtype=torch.float64, device=self.device)
        high = owned_gradients(self.chunks, optimizer, self.layout)
        for a, (name, b) in zip(low, high, strict=True):
            products = torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])
            sums[:, CLASSES.index(name)] += products.double()
        dist.all_reduce(sums)
        return _cosines(sums.cpu()) | self._flips(low_choices, high_choices)

    def _clear(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    @contextmanager
    def _choices(self) -> Iterator[dict[int, torch.Tensor]]:
        """Layer -> [tokens, experts] bool: the experts that this rank's routers choose in the first pass of the block."""
        chosen: dict[int, torch.Tensor] = {}

        def keep(router: TopKRouter, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            chosen.setdefault(router.layer_number - 1, output[1].bool())

        routers = [module for chunk in self.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        hooks = [router.register_forward_hook(keep) for router in routers]
        try:
            yield chosen
        finally:
            for hook in hooks:
                hook.remove()

    def _flips(self, some: dict[int, torch.Tensor], others: dict[int, torch.Tensor]) -> dict[str, Statistic]:
        num_layers = self.low_precision.models[0].config.num_layers
        counts = torch.zeros(2, num_layers, dtype=torch.float64, device=self.device)
        for layer, choice in some.items():
            counts[0, layer] += (choice != others[layer]).any(1).sum()
            counts[1, layer] += len(choice)
        dist.all_reduce(counts)
        counts = counts.cpu()
        shares = {layer: Statistic("mean", counts[:, layer]) for layer in counts[1].nonzero().flatten().tolist()}
        statistics = {f"precision/layer_{layer:02d}/router_flips": share for layer, share in shares.items()}
        if shares:
            statistics["precision/router_flips/mean"] = Statistic("mean", counts.sum(1))
        return statistics


def _is_due(every: int, rollout: int | None) -> bool:
    return rollout is not None and every > 0 and rollout % every == 0


def _first_micro_batches(work: Work, layout: Layout) -> Work:
    """One; where virtual stages need a multiple of the pipeline's length, so many."""
    count = layout.parallel.pipeline if layout.parallel.virtual_pipeline else 1
    return replace(work, batches=work.batches[:count], whole_batches=work.whole_batches[:count])


def _cosines(sums: torch.Tensor) -> dict[str, Statistic]:
    """Of [dot, square, square] by class."""
    found = {"all": sums.sum(1)} | dict(zip(CLASSES, sums.T, strict=True))
    return {
        f"precision/gradient_cosine/{name}": Statistic.ratio(dot / (a * b) ** 0.5, 1.0)
        for name, (dot, a, b) in ((name, values.tolist()) for name, values in found.items())
        if a and b
    }

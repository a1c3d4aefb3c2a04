"""Routing replay: the trainer sends every token to the experts that the rollout engine sent it to (R3, arXiv:2510.11370).

Only the choice is replayed. A token's experts are weighted by the trainer's own router, whose logits are gathered at the
replayed experts and go through the same softmax as ever, so gradients flow into the router.

    Sample.routed_experts -> pack, context parallel slice -> this rank's sequence parallel rows
                          -> one LayerRouting a router of this rank's stages

Whether replayed or not, the routers' choices are compared with the engine's. Tokens without a trace (padding, and the
last token of every sequence) are left to the router, and count nowhere.

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from drpo_megatron.config.hf_config import ExpertRouting
from drpo_megatron.metrics import Statistic
from drpo_megatron.trainer.setup import Layout
from drpo_megatron.trainer.transfer import to_device
from drpo_megatron.types import PackedBatch


class LayerRouting(RouterReplay):
    """Megatron's replay of one router, for traces with gaps (-1), and the count of what it would have chosen."""

    def __init__(self, router: TopKRouter, index: int, device: torch.device) -> None:
        super().__init__()
        self.index = index
        """Of the layer among those with experts, in the whole model."""
        self.traced: torch.Tensor | None = None
        """[tokens, k] int64, the engine's choice: during a forward pass that has one."""
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Traced tokens; those that went to other experts; those that would have."""
        router.router_replay = self
        router.register_forward_hook(self._compare)

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, ids), both [tokens, k], of the experts to use, from scores [tokens, experts]."""
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            own = default_compute_topk(scores.detach(), topk, num_groups, group_topk)[1]
            traced = self.target_topk_idx
            differs = (own.sort(1).values != traced.sort(1).values).any(1)
            self.counts[2] += (differs & (traced[:, 0] >= 0)).sum()
            # The backward pass recomputes with the very same, gaps included.
            self.target_topk_idx = self.replay_backward_list[-1] = torch.where(traced < 0, own, traced)
        return super().get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)

    def _compare(self, router: TopKRouter, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """A forward hook: what the router really answered, [tokens, experts] bool, against the trace."""
        if self.traced is None:
            return
        is_traced = self.traced[:, 0] >= 0
        agrees = output[1].gather(1, self.traced.clamp(min=0)).all(1)
        self.counts[:2] += torch.stack([is_traced.sum(), (is_traced & ~agrees).sum()])


class RoutingReplay:
    """The routers of this rank's model chunks, and what they do with the engine's traces.

    Args:
        replays: follow the traces; else only count where the routers choose otherwise.
        recomputes: every layer's forward pass happens again in the backward pass.
    """

    def __init__(
        self, chunks: Sequence[Any], layout: Layout, routing: ExpertRouting, *, replays: bool, recomputes: bool
    ) -> None:
        # Megatron lists all of a process; an earlier model would be kept alive by it.
        RouterReplay.clear_global_router_replay_instances()
        self.layout, self.replays, self.recomputes = layout, replays, recomputes
        self.device = next(chunks[0].parameters()).device
        self._layers = {
            chunk: [
                # Megatron counts layers from 1.
                LayerRouting(module, routing.moe_layers.index(module.layer_number - 1), self.device)
                for module in chunk.modules()
                if isinstance(module, TopKRouter)
            ]
            for chunk in chunks
        }

    @contextmanager
    def during_forward(self, chunk: Any, batch: PackedBatch) -> Iterator[None]:
        """Around the forward pass of one micro-batch through one chunk.

        A recomputation happens outside, in the backward pass. Every schedule of Megatron goes backward through a chunk in
        the order of its forward passes, so the traces wait for it in a queue.
        """
        if batch.routed_experts is None:
            yield
            return
        traces = to_device(self._rows_of_this_rank(batch.routed_experts), self.device)
        layers = self._layers[chunk]
        for layer in layers:
            layer.traced = traces[:, layer.index].long()
            if self.replays:
                layer.set_target_indices(layer.traced)
                layer.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for layer in layers:
            layer.traced = None
            if self.replays:
                layer.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
                if not self.recomputes:
                    layer.replay_backward_list.clear()

    def finish(self) -> dict[str, Statistic]:
        """After all micro-batches: shares of (token, layer) pairs over all ranks, empty if there were no traces.

        mismatch/router_flips/share       went to other experts than in the engine; with replay exactly 0
        mismatch/router_overruled/share   would have gone to other experts (with replay only)
        """
        layers = [layer for layers in self._layers.values() for layer in layers]
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        for layer in layers:
            counts += layer.counts
            layer.counts.zero_()
            layer.clear_indices()
            layer.clear_router_replay_action()
        dist.all_reduce(counts)
        pairs, flips, overruled = map(float, counts.tolist())
        if not pairs:
            return {}
        statistics = {"mismatch/router_flips/share": Statistic.ratio(flips, pairs)}
        if self.replays:
            statistics["mismatch/router_overruled/share"] = Statistic.ratio(overruled, pairs)
        return statistics

    def _rows_of_this_rank(self, traces: torch.Tensor) -> torch.Tensor:
        """Sequence parallelism: routers see the tensor-parallel rank's own part of the tokens."""
        if not self.layout.parallel.sequence:
            return traces
        return traces.chunk(self.layout.tp.size())[self.layout.tp.rank()]

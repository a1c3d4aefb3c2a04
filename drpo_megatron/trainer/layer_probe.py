"""A look into the quantised layers: how much of activations, weights and gradients survives the rounding.

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from drpo_megatron.metrics import Statistic, merge_all, reduce_over
from drpo_megatron.precision.layers import parameter_class
from drpo_megatron.trainer.emulation import ROLES, EmulatedProduct, Role
from drpo_megatron.trainer.setup import Layout


class LayerProbe:
    """Sees every operand of every product once, in the first micro-batch after `watching` was entered.

    precision/<role>/...                   over all quantised layers; roles are activation, weight and gradient
    precision/layer_<i>/<class>/<role>/... of one decoder layer, experts together

        amax               largest magnitude before rounding
        underflow_share    of the numbers that aren't 0: rounded to 0
        saturated_share    cut to the largest number of the format (delayed scaling only: other scales hold all)
        sqnr_db            energy of the numbers over that of the rounding errors
    """

    def __init__(self, products: Sequence[EmulatedProduct], layout: Layout, device: torch.device) -> None:
        self.products, self.layout, self.device = products, layout, device
        self._seen: set[tuple[int, Role]] = set()
        self._parts: list[dict[str, Statistic]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._seen, self._parts = set(), []
        nothing = torch.empty(0, 1, device=self.device)
        for product in self.products:
            product.probe = self._see
            for role in ROLES:  # So that all ranks reduce the same names, whatever their experts get.
                self._add(product, role, nothing, nothing)
        try:
            yield
        finally:
            for product in self.products:
                product.probe = None

    def statistics(self) -> dict[str, Statistic]:
        """Of the last look, over all ranks. Collective."""
        mine = reduce_over(merge_all(self._parts), self.layout.tp, self.layout.groups.dp_cp)
        stages: list[dict[str, Statistic]] = [{} for _ in range(self.layout.groups.pp.size())]
        dist.all_gather_object(stages, mine, group=self.layout.groups.pp)
        return merge_all(stages)

    def _see(self, product: EmulatedProduct, role: Role, x: torch.Tensor, rounded: torch.Tensor) -> None:
        if (id(product), role) in self._seen:
            return
        self._seen.add((id(product), role))
        self._add(product, role, x, rounded)

    def _add(self, product: EmulatedProduct, role: Role, x: torch.Tensor, rounded: torch.Tensor) -> None:
        found = operand_statistics(x, rounded, may_saturate=product.recipe.operands.has_history)
        layer = f"precision/layer_{product.layer:02d}/{parameter_class(product.name)}/{role}/"
        for prefix in (layer, f"precision/{role}/"):
            self._parts.append({prefix + name: statistic for name, statistic in found.items()})


def operand_statistics(x: torch.Tensor, rounded: torch.Tensor, *, may_saturate: bool) -> dict[str, Statistic]:
    """Of an operand and what rounding left of it, both [rows, columns]; valid and empty without rows.

    Args:
        may_saturate: numbers can lie beyond the largest of the format, as one scale has it for the whole tensor.
    """
    x, rounded = x.detach().float(), rounded.detach().float()
    largest, is_something = x.abs(), x != 0
    num_saturated = torch.zeros((), dtype=torch.long, device=x.device)
    if may_saturate and x.numel():
        # At the largest number, and further from it than rounding ever goes: half of a spacing, 1/8 of an E5M2 number.
        cut = rounded.abs()
        num_saturated = ((cut == cut.max()) & (largest > 1.13 * cut)).sum()
    # Sums and one maximum, rather than selections and copies in FP64: a look is at all numbers of a layer.
    num_lost = ((rounded == 0) & is_something).sum()
    return {
        "amax": Statistic.max(largest.max().reshape(1) if x.numel() else x.flatten()),
        "underflow_share": Statistic("mean", torch.stack([num_lost, is_something.sum()]).double()),
        "saturated_share": Statistic("mean", torch.stack([num_saturated, num_lost.new_full((), x.numel())]).double()),
        "sqnr_db": Statistic.decibels(x.square().sum(), (x - rounded).square().sum()),
    }

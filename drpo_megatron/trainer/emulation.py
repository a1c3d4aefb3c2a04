"""Quantised training without FP8 hardware: the products of Megatron's local linear layers, with rounded operands.

    y = Q(x) Q(w)^T        dx = Q(g) Q(w)        dw = Q(g)^T Q(x)

Each Q rounds along the dimension that its product sums over, so an operand with one-dimensional blocks is rounded
twice, from its exact value: by rows for one product and by columns for the other. What is rounded is the matrix that a
GPU kernel would multiply: after sequence parallelism gathered x, and this rank's shard of w. The gradient is that of
the rounded products; it passes Q itself unchanged (straight through). Products are summed in FP32.

Parameters, their names and checkpoints stay as they are: only the function that a layer multiplies with is replaced.
Import only after `platform.activate`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from drpo_megatron.precision.layers import is_kept
from drpo_megatron.precision.quantize import Format, Noise, block_amax, fake_quantize
from drpo_megatron.precision.recipes import HISTORY_LENGTH, Recipe

Role = Literal["activation", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("activation", "weight", "gradient")
Probe = Callable[["EmulatedProduct", Role, torch.Tensor, torch.Tensor], None]
"""Is shown every operand [rows, columns], as it is and rounded, of the products y and dx."""


class EmulatedProduct:
    """What a parallel linear layer multiplies with, in place of its `_forward_impl`."""

    def __init__(self, layer: int, name: str, recipe: Recipe) -> None:
        self.layer = layer
        """From 0, over all pipeline stages."""
        self.name = name
        """Of the linear within its layer, such as `mlp.experts.local_experts.0.linear_fc1`."""
        self.recipe = recipe
        self.is_on = True
        self.has_run = False
        """Whether it ever multiplied rounded operands."""
        self.probe: Probe | None = None
        self.history: dict[Role, deque[float]] = {}
        """Of delayed scaling: the amax of the last uses."""

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **unused: Any,
    ) -> torch.Tensor:
        """As Megatron's linear_with_grad_accumulation_and_async_allreduce.

        Communicates, over `tp_group`: gathers the input in the forward and reduce-scatters its gradient in the backward
        pass (sequence_parallel), or all-reduces that gradient (allreduce_dgrad).
        """
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        # The Function itself can't see whether anybody will go backward: inside it gradients are always off.
        output = _Product.apply(input, weight, self, torch.is_grad_enabled())
        return output if bias is None else output + bias

    def format(self, role: Role) -> Format | Noise:
        return getattr(self.recipe.operands, role)

    def rounded(self, x: torch.Tensor, role: Role, transposed: bool = False, records: bool = True) -> torch.Tensor:
        """FP32 of an operand [rows, columns].

        Args:
            transposed: for a product that sums over its rows.
            records: whether delayed scaling remembers this use.
        """
        if not self.is_on:
            return x.float()
        self.has_run = True
        format = self.format(role)
        if transposed:
            format = format.transposed()
        remembers = self.recipe.operands.has_history and x.numel() > 0
        return fake_quantize(x, format, self._remembered_amax(x, format, role, records) if remembers else None)

    def is_symmetric(self, role: Role) -> bool:
        """Whether both products see the operand rounded in the same way."""
        format = self.format(role)
        return format == format.transposed() or not self.is_on

    def show(self, role: Role, x: torch.Tensor, rounded: torch.Tensor) -> None:
        if self.probe is not None:
            self.probe(self, role, x, rounded)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Delayed scaling forgets what it sees in the block."""
        before = {role: history.copy() for role, history in self.history.items()}
        yield
        self.history = before

    def _remembered_amax(self, x: torch.Tensor, format: Format | Noise, role: Role, records: bool) -> torch.Tensor:
        """Largest amax of earlier uses; the first has only its own."""
        assert isinstance(format, Format)
        own = block_amax(x, format).amax()
        history = self.history.setdefault(role, deque(maxlen=HISTORY_LENGTH))
        amax = own.new_tensor(max(history)) if history else own
        if records:
            history.append(float(own))
        return amax


class _Product(torch.autograd.Function):
    """x [..., K], w [N, K] -> [..., N] in x's dtype. Communicates nothing, forward or backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, product: EmulatedProduct, goes_backward: bool
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # A forward pass that is recomputed in the backward pass goes backward once: both see the same scales.
        q_rows = product.rounded(rows, "activation", records=goes_backward)
        q_weight = product.rounded(weight, "weight", records=goes_backward)
        product.show("activation", rows, q_rows)
        product.show("weight", weight, q_weight)
        output = (q_rows @ q_weight.t()).to(x.dtype)
        ctx.product = product
        ctx.rounded = (product.is_symmetric("activation"), product.is_symmetric("weight"))
        ctx.save_for_backward(q_rows if ctx.rounded[0] else rows, q_weight if ctx.rounded[1] else weight)
        ctx.dtypes = (x.dtype, weight.dtype)
        return output.reshape(*x.shape[:-1], len(weight))  # Not -1: an expert may get no token.

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        product: EmulatedProduct = ctx.product
        rows = gradient.reshape(-1, gradient.shape[-1])
        q_gradient = product.rounded(rows, "gradient")
        product.show("gradient", rows, q_gradient)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            q_weight = weight if ctx.rounded[1] else product.rounded(weight, "weight", transposed=True)
            x_gradient = (q_gradient @ q_weight).to(ctx.dtypes[0]).reshape(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            if not product.is_symmetric("gradient"):
                q_gradient = product.rounded(rows, "gradient", transposed=True)
            q_rows = x if ctx.rounded[0] else product.rounded(x, "activation", transposed=True)
            weight_gradient = (q_gradient.t() @ q_rows).to(ctx.dtypes[1])
        return x_gradient, weight_gradient, None, None


def emulate(models: Sequence[Any], recipe: Recipe, keep_bf16: Sequence[str]) -> list[EmulatedProduct]:
    """Quantise every linear layer in the decoder layers of this rank's PolicyModels, but for the layers to keep.

    Router, embedding, norms and LM head are not among them.
    """
    products = []
    for layer, name, linear in decoder_linears(models):
        if not is_kept(layer, linear.config.num_layers, keep_bf16):
            linear._forward_impl = EmulatedProduct(layer, name, recipe)
            products.append(linear._forward_impl)
    return products


def decoder_linears(models: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
    """(layer from 0 over all stages, name within it, module) of this rank's parallel linear layers."""
    for model in models:
        for layer in model.decoder.layers:
            for name, module in layer.named_modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    yield layer.layer_number - 1, name, module

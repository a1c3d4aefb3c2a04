"""Transformer Engine's recipes against their emulation: the same operands, and agreement within the recipe's own error."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from drpo_megatron.precision.recipes import (
    FP32_SCALES,
    TRAIN_RECIPES,
    find_hardware,
    transformer_engine_recipe,
    what_is_missing,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

TOKENS, INPUTS, OUTPUTS = 256, 512, 384


@pytest.mark.parametrize("name", [name for name, recipe in TRAIN_RECIPES.items() if recipe.engine])
def test_transformer_engine_computes_what_is_emulated(name: str) -> None:
    recipe = TRAIN_RECIPES[name]
    assert recipe.engine is not None
    if missing := what_is_missing(recipe.engine, find_hardware("gpu")):
        pytest.skip("; ".join(missing))
    os.environ[FP32_SCALES] = "1"  # As a trainer rank of the blockwise recipe is started.
    import transformer_engine.pytorch as te

    from drpo_megatron.trainer.platform import activate

    activate("gpu")
    from drpo_megatron.trainer.emulation import EmulatedProduct

    torch.manual_seed(0)
    x, w, g = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    )
    linear = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        linear.weight.copy_(w)
    engine_recipe = transformer_engine_recipe(recipe)
    product = EmulatedProduct(0, "linear", recipe)

    def by_engine(rows: torch.Tensor) -> torch.Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=engine_recipe):
            return linear(rows)

    for _ in range(2):  # Delayed scaling has a history from the second pass on.
        real = step(by_engine, x, linear.weight, g)
        emulated = step(lambda rows: product(rows, linear.weight), x, linear.weight, g)
    exact = step(lambda rows: rows @ linear.weight.t(), x, linear.weight, g)
    # Transformer Engine rounds NVFP4 gradients stochastically, after a random Hadamard transform: two errors, not one.
    share = 1.5 if name == "nvfp4" else 0.5
    for found, expected, unrounded in zip(real, emulated, exact, strict=True):
        assert distance(found, expected) < max(share * distance(expected, unrounded), 0.01)


def step(layer: Any, x: torch.Tensor, weight: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """y, dx and dw in float64."""
    rows = x.clone().requires_grad_()
    weight.grad = None
    y = layer(rows)
    y.backward(g)
    assert rows.grad is not None and weight.grad is not None
    return [tensor.detach().double() for tensor in (y, rows.grad, weight.grad)]


def distance(some: torch.Tensor, other: torch.Tensor) -> float:
    return ((some - other).norm() / other.norm()).item()

"""Each low-precision recipe, in one product and in one training step.

The emulation is as far from the exact product as its formats are wide, on this device as on the CPU; and Transformer
Engine computes what is emulated, where the hardware can.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.doctor.accept.layouts import step_config, training_step
from drpo_megatron.doctor.accept.models import Step, save_model, small_moe
from drpo_megatron.doctor.accept.ranks import TIMEOUT_S, run_ranks
from drpo_megatron.doctor.accept.stage import Results, Settings, Skip
from drpo_megatron.precision.quantize import Format, Noise
from drpo_megatron.precision.recipes import (
    FP32_SCALES,
    TRAIN_RECIPES,
    Recipe,
    find_hardware,
    transformer_engine_linear,
    what_is_missing,
)

TOKENS, INPUTS, OUTPUTS = 256, 512, 384
SAME_ROUNDING = 1e-3
"""Between devices: a number on the border of two of its neighbours may go either way, few do."""
ENGINE_SHARE, STOCHASTIC_SHARE, ENGINE_FLOOR = 0.5, 1.5, 0.01
"""How far Transformer Engine may be from the emulation, as a share of the emulation's distance from the exact product. It
rounds NVFP4 gradients stochastically, after a random Hadamard transform: two errors, not one."""

STEP_FACTOR = 1.5
"""The same for the gradients of a whole model: two independent roundings of one size are 1.41 of it apart."""
_OF_TINY = "fp8-blockwise"

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [tokens, inputs], w [outputs, inputs]) -> y."""


def run(settings: Settings, results: Results) -> None:
    os.environ[FP32_SCALES] = "1"  # As a trainer rank of the blockwise recipe is started.
    for check in run_ranks(settings, 1, _measure)[0]:
        getattr(results, check[0])(*check[1:])
    hf_path = str(save_model(Path(settings.scratch, "model"), small_moe(settings.is_tiny)))
    plain = run_ranks(settings, 1, _train, hf_path, {})[0]
    for name, recipe in TRAIN_RECIPES.items():
        if recipe.engine is None or (settings.is_tiny and name != _OF_TINY):
            continue
        try:
            _compare_steps(settings, results, recipe, hf_path, plain)
        except Exception as error:  # Whatever a rank may raise is this recipe's finding.
            results.failed(f"{name}: training step", str(error).strip()[-1500:])


def _compare_steps(settings: Settings, results: Results, recipe: Recipe, hf_path: str, plain: Step) -> None:
    """Each in a process of its own: Transformer Engine keeps its state for the life of one."""
    title = f"{recipe.name}: training step"
    section = {"train": {"name": recipe.name}}
    emulated = run_ranks(settings, 1, _train, hf_path, section | {"emulate": True})[0]
    rounding = emulated.distances(plain)["gradients"]
    if 0.0 < rounding < 1.0:
        results.passed(f"{title}, emulated", f"gradients are {rounding:.2g} from the unquantised ones")
    else:
        results.failed(f"{title}, emulated", f"gradients are {rounding:.2g} from the unquantised ones")
    assert recipe.engine is not None
    real_title = f"{title}, Transformer Engine's gradients from the emulated ones"
    if missing := what_is_missing(recipe.engine, find_hardware(settings.device)):
        results.skipped(real_title, "; ".join(missing))
        return
    real = run_ranks(settings, 1, _train, hf_path, section | {"emulate": False})[0]
    results.at_most(real_title, real.distances(emulated)["gradients"], STEP_FACTOR * rounding)


def _train(settings: Settings, rank: int, store: Any, hf_path: str, precision: dict[str, Any]) -> Step:
    from drpo_megatron.trainer.setup import initialize_distributed

    dtype = "fp32" if settings.device == "cpu" else "bf16"
    config = step_config(settings, hf_path, {"num_ranks": 1}, dtype, precision=precision)
    initialize_distributed(config, rank, 1, store, TIMEOUT_S)
    return training_step(config)


def _measure(settings: Settings, rank: int, store: Any) -> list[tuple[Any, ...]]:
    """Arguments of calls to `Results`, the method's name first."""
    from drpo_megatron.trainer.platform import activate

    platform = activate(settings.device)
    checks: list[tuple[Any, ...]] = []
    for name, recipe in TRAIN_RECIPES.items():
        exact, emulated = products(platform.device, torch.float32), emulation(recipe, platform.device, torch.float32)
        error = max(map(distance, emulated, exact))
        checks.append(("at_most", f"{name}: emulation, from the exact product", error, rounding_error(recipe)))
        if min(map(distance, emulated, exact)) < rounding_error(recipe) / 100:
            checks.append(("failed", f"{name}: emulation", "it rounds nothing"))
        if settings.device == "gpu":
            on_cpu = emulation(recipe, torch.device("cpu"), torch.float32)
            checks.append(
                ("at_most", f"{name}: emulation, from the CPU's", max(map(distance, emulated, on_cpu)), SAME_ROUNDING)
            )
        checks += _engine(settings, name, recipe)
    return checks


def _engine(settings: Settings, name: str, recipe: Recipe) -> list[tuple[Any, ...]]:
    title = f"{name}: Transformer Engine, from the emulation"
    try:
        shares = engine_distances(recipe, settings.device)
    except Skip as skip:
        return [("skipped", title, str(skip))]
    return [
        ("at_most", f"{title}, {what}", found, limit)
        for what, (found, limit) in zip(("y", "dx", "dw"), shares, strict=True)
    ]


def engine_distances(recipe: Recipe, device: str) -> list[tuple[float, float]]:
    """(distance of Transformer Engine from the emulation, its limit) of y, dx and dw. Raises Skip where it can't run."""
    if recipe.engine is None:
        raise Skip("Transformer Engine has no such recipe")
    if missing := what_is_missing(recipe.engine, find_hardware(device)):
        raise Skip("; ".join(missing))
    device_ = torch.device("cuda", torch.cuda.current_device())
    linear = transformer_engine_linear(recipe, OUTPUTS, INPUTS)
    passes = 2 if recipe.operands.has_history else 1  # Delayed scaling has a history from the second pass on.
    for _ in range(passes):
        real = products(device_, torch.bfloat16, linear)
    emulated = emulation(recipe, device_, torch.bfloat16, passes)
    exact = products(device_, torch.bfloat16)
    share = STOCHASTIC_SHARE if recipe.name == "nvfp4" else ENGINE_SHARE
    return [
        (distance(found, expected), max(share * distance(expected, unrounded), ENGINE_FLOOR))
        for found, expected, unrounded in zip(real, emulated, exact, strict=True)
    ]


def emulation(recipe: Recipe, device: torch.device, dtype: torch.dtype, passes: int = 1) -> list[torch.Tensor]:
    """y, dx and dw by the emulation. Import of Megatron: after `platform.activate`."""
    from drpo_megatron.trainer.emulation import EmulatedProduct

    product = EmulatedProduct(0, "linear", recipe)
    for _ in range(passes):
        found = products(device, dtype, product)
    return found


def products(device: torch.device, dtype: torch.dtype, layer: Layer = lambda x, w: x @ w.t()) -> list[torch.Tensor]:
    """y, dx and dw in float64, of the same random operands on every device."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(shape, generator=generator).to(torch.bfloat16).to(device, dtype)
        for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    )
    x.requires_grad_()
    w.requires_grad_()
    y = layer(x, w)
    y.backward(g)
    assert x.grad is not None and w.grad is not None
    return [tensor.detach().double().cpu() for tensor in (y, x.grad, w.grad)]


def distance(some: torch.Tensor, other: torch.Tensor) -> float:
    return ((some - other).norm() / other.norm()).item()


def rounding_error(recipe: Recipe) -> float:
    """The most that rounding both operands can do to a product of independent random numbers, relative, in the norm.

    A number is off by at most half a unit in its last place, 2^-(mantissa bits + 1) of itself; the errors of two
    operands add up in squares. Numbers below the smallest normal one, and scales that are powers of two, are within
    the same bound for Gaussian operands.
    """
    operands = (recipe.operands.activation, recipe.operands.weight, recipe.operands.gradient)
    widest = sorted(map(_half_unit, operands))[-2:]
    return math.hypot(*widest)


def _half_unit(format: Format | Noise) -> float:
    return format.size if isinstance(format, Noise) else 2.0 ** -(format.element.mantissa_bits + 1)

"""Tolerances that follow from arithmetic instead of from the machine they were tried on.

What FP32 may lose is a property of the function: how far its exact value moves when its input is rounded. So the limit
of a comparison is a multiple of what the reference itself loses, measured here and now: transformers' model in FP32
against the same model in FP64, and the FP64 model against itself with every weight moved by at most one rounding of
FP32. Several such draws, because at an ill-conditioned token a single one may be small by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

Values = Mapping[str, torch.Tensor]

EPS = torch.finfo(torch.float32).eps
_DRAWS = 3
_FACTOR = 8.0
"""2 for each of: an implementation may be off on either side of the exact value; an element is rounded after every
operation, and there are several for each weight that a draw moves; a few draws find less than the largest loss."""


class Exact(NamedTuple):
    values: dict[str, torch.Tensor]
    """FP64."""
    limits: dict[str, float]
    """By name, of the largest difference."""


class _InFloat64(TorchFunctionMode):
    """Models ask for FP32 inside (norms, softmax, rotary angles): they get FP64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def exact(model: torch.nn.Module, run: Callable[[], Values], num_roundings: int) -> Exact:
    """The values of `run` in FP64, and how far an FP32 implementation may be from them.

    Args:
        model: what `run` calls, in FP32. Left in FP64.
        run: logits, gradients, ... by name; called once in FP32 and several times in FP64.
        num_roundings: how many roundings an element has behind it, about: layers x operations x summands. They add up
            like a random walk, which is the least that any implementation loses.
    """
    in_float32 = {name: value.detach().double() for name, value in run().items()}
    model.double()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    with _InFloat64():
        values = {name: value.detach().clone() for name, value in run().items()}
        assert all(value.dtype == torch.float64 for value in values.values())
        others = [in_float32]
        for _ in range(_DRAWS):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.5
                    weight.copy_(weights[name] * (1 + EPS * noise))
            others.append({name: value.detach().clone() for name, value in run().items()})
    limits = {}
    for name, value in values.items():
        loss = max((other[name] - value).abs().max().item() for other in others)
        floor = EPS * num_roundings**0.5 * value.abs().max().item()
        limits[name] = _FACTOR * loss + floor
    return Exact(values, limits)

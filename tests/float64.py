"""Tolerances that follow from arithmetic instead of from the machine they were tried on.

What FP32 loses is a property of the function, not of a processor. It is measured here in FP64, by Monte Carlo
arithmetic (Parker, 1997): every sum of the reference, forward and backward, gets an error that FP32 may make there,
drawn at random. A sum of n summands gets sqrt(n) roundings of the sum of the magnitudes, which holds for any order of
summation (Higham and Mary, 2019), hence for any instruction set, number of threads and split over ranks. Operations
element by element get none: what they round goes into a sum next, where it is less than the error drawn there.

The draws give each value's standard error. An FP32 implementation is one more draw: its distance from FP64 in these
units follows Student's t, of which the limit is a quantile far out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Values = Mapping[str, torch.Tensor]

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2
DRAWS = 12
STUDENT_T = 13.8
"""What the magnitude of Student's t with 12 degrees of freedom exceeds once in 1e8: with the 1e5 to 1e6 values that a
test file compares, one false alarm in some hundred machines if all of them were independent; they are far from it, and
the errors drawn are larger than those that any implementation makes."""

aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
_SUMS = _PRODUCTS | {
    aten.sum,
    aten.cumsum,
    aten.convolution,
    aten.convolution_backward,
    aten.embedding_dense_backward,
    aten.index_add,
    aten.index_add_,
    aten.scatter_add,
    aten.scatter_add_,
}
"""Linear in each of their floating arguments."""


class Exact(NamedTuple):
    values: dict[str, torch.Tensor]
    """FP64."""
    limits: dict[str, torch.Tensor]
    """By name, of the difference; one for each row (token, output unit): [..., 1]."""

    def outside(self, values: Values) -> dict[str, float]:
        """By name, how many times its limit the worst element is off, where it is off by more (NaN is, too)."""
        worst = {name: ((values[name] - self.values[name]).abs() / self.limits[name]).max().item() for name in values}
        return {name: ratio for name, ratio in worst.items() if not ratio <= 1}


class _InFloat64(TorchFunctionMode):
    """Models ask for FP32 inside (norms, softmax, rotary angles): they get FP64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class RoundingErrors(TorchDispatchMode):
    """FP64 sums that err as FP32 ones do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._offsets = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self._noise = 2 * torch.rand(2**19, generator=generator, dtype=torch.float64) - 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _SUMS or not any(_is_float(value) for value in args):
            return func(*args, **kwargs)
        sizes = func(*tree_map(_magnitude, args), **kwargs)
        counts = _num_summands(func, args, kwargs, sizes)
        return tree_map(self._with_error, func(*args, **kwargs), sizes, counts)

    def _with_error(self, value: Any, size: Any, count: Any) -> Any:
        if not _is_float(value):
            return value
        start = self._offsets.randrange(len(self._noise) - value.numel())
        noise = self._noise[start : start + value.numel()].view(value.shape)
        if isinstance(count, torch.Tensor):
            return value.addcmul_(size * count.sqrt(), noise, value=UNIT_ROUNDOFF)
        return value.addcmul_(size, noise, value=UNIT_ROUNDOFF * count**0.5)


def _num_summands(func: Any, args: Any, kwargs: Any, sizes: Any) -> Any:
    """Of each result: a number, or a tensor like it."""
    if func.overloadpacket in _PRODUCTS:
        return args[-2].shape[-1]
    if func.overloadpacket is aten.sum:
        return args[0].numel() / max(sizes.numel(), 1)
    return func(*tree_map(lambda x: torch.ones_like(x) if _is_float(x) else x, args), **kwargs)


def _magnitude(value: Any) -> Any:
    return value.abs() if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def exact(model: torch.nn.Module, run: Callable[[], Values]) -> Exact:
    """The values of `run` in FP64, and how far an FP32 implementation may be from them.

    Args:
        model: what `run` calls. Left in FP64.
        run: logits, gradients, ... by name; called 13 times. Its sums must be plain ones ("eager" attention), since the
            errors inside of a fused operation would not be seen.
    """
    model.double()
    with _InFloat64(), _one_thread():
        values = {name: value.detach().clone() for name, value in run().items()}
        assert all(value.dtype == torch.float64 for value in values.values())
        squares = {name: torch.zeros_like(value) for name, value in values.items()}
        for seed in range(DRAWS):
            with RoundingErrors(seed):
                drawn = run()
            for name, value in drawn.items():
                squares[name] += (value.detach() - values[name]).square()
    limits = {}
    for name, value in values.items():
        error = (squares[name] / DRAWS).sqrt().amax(-1, keepdim=True)
        # A value is stored in FP32. Rows that are zero (the embedding of a token that is not there) must be zero.
        bound = STUDENT_T * error + UNIT_ROUNDOFF * value.abs().amax(-1, keepdim=True)
        limits[name] = bound.clamp(min=torch.finfo(torch.float32).tiny)
    return Exact(values, limits)

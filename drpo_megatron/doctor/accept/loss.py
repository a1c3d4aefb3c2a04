"""The loss kernel: gradients and log-probs against float64, and its speed and memory beside the other ways.

Plain logits, Megatron-Core's cross entropy and Liger are what it is compared with; no speed is a failure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.doctor.accept.ranks import join, run_ranks
from drpo_megatron.doctor.accept.stage import Results, Settings

LIMITS = {"torch.float32": 1e-5, "torch.bfloat16": 2.0**-7}
"""Of the relative error of a gradient, in the norm. FP32: sums in other orders. BF16: the gradient of a logit and that of
a hidden state are each rounded once, by at most 2^-9; the rest is FP32."""
LOGPROB_LIMIT = 1e-4
"""Absolute, of a log-prob: operands are the same, and logits are summed in FP32 whatever their dtype."""
_REPEATS = 7
_CHECKED = ("ours", "ours, low memory")


def run(settings: Settings, results: Results) -> None:
    shape = (64, 64, 259) if settings.is_tiny else (8192, 2048, 151936)
    for tensor_parallel in (1, 2):
        if tensor_parallel > settings.num_devices:
            results.skipped(
                f"tp{tensor_parallel}", f"needs {tensor_parallel} devices, and there are {settings.num_devices}"
            )
            continue
        _case(settings, results, (*shape, tensor_parallel))


def _case(settings: Settings, results: Results, case: tuple[int, int, int, int]) -> None:
    tp = case[3]
    ranks = run_ranks(settings, tp, _measure, case)
    for name, reason in ranks[0]["missing"].items():
        results.skipped(f"tp{tp}, {name}", reason)
    for name in ranks[0]["errors"]:
        for dtype, limit in LIMITS.items():
            results.at_most(
                f"tp{tp}, {name}: gradients in {dtype.removeprefix('torch.')}",
                max(rank["errors"][name][dtype] for rank in ranks),
                limit,
            )
    results.at_most(f"tp{tp}: log-probs", max(rank["logprobs"] for rank in ranks), LOGPROB_LIMIT)
    base = None
    for name in ranks[0]["seconds"]:
        seconds = max(rank["seconds"][name] for rank in ranks)
        base = base or seconds  # The first is plain logits.
        key = f"tp{tp}_{name.replace(', ', '_').replace(' ', '_')}"
        results.figure(f"{key}_ms", seconds * 1e3)
        results.figure(f"{key}_time_of_plain", seconds / base)
        results.figure(f"{key}_extra_mb", max(rank["bytes"][name] for rank in ranks) / 1e6)
    tokens, hidden, vocab, _ = case
    results.figure(f"tp{tp}_shape", f"{tokens} tokens, hidden {hidden}, vocabulary {vocab}, TP {tp}")


def _measure(settings: Settings, rank: int, store: dist.Store, case: tuple[int, int, int, int]) -> dict[str, Any]:
    from drpo_megatron.trainer import loss_methods as methods

    device = join(settings, rank, store, case[3])
    methods.initialize_megatron(case[3])
    problem = methods.make_problem(case, 0.0, device)
    few = problem.rows(methods.ERROR_ROWS, problem.hidden.dtype)
    missing: dict[str, str] = {}
    errors: dict[str, dict[str, float]] = {}
    seconds: dict[str, list[float]] = {}
    num_bytes: dict[str, int] = {}
    for name, method in methods.METHODS.items():
        if name == "liger" and (reason := methods.liger_reason(case[3])):
            missing[name] = reason
            continue
        if name in _CHECKED:
            errors[name] = {dtype: _error(method, problem, getattr(torch, dtype[6:])) for dtype in LIMITS}
        methods.step(method, problem)
        num_bytes[name] = methods.peak_memory(lambda method=method: methods.step(method, problem), device)
        seconds[name] = []
    for _ in range(1 if settings.is_tiny else _REPEATS):  # In turns, so that a noisy machine touches all alike.
        for name in seconds:
            seconds[name].append(_time(lambda name=name: methods.step(methods.METHODS[name], problem), device))
    return {
        "missing": missing,
        "errors": errors,
        "logprobs": methods.logprob_error(few),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "bytes": num_bytes,
    }


def _error(method: Any, problem: Any, dtype: torch.dtype) -> float:
    """Of the gradients, with operands rounded to `dtype` on both sides."""
    from drpo_megatron.trainer.loss_methods import ERROR_ROWS, gradients, plain

    rounded = problem.rows(ERROR_ROWS, dtype)
    exact = gradients(plain, rounded.rows(ERROR_ROWS, torch.float64))
    found = gradients(method, rounded)
    return max(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))


def _time(run: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

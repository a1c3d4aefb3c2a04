"""Ways of computing the policy loss, ours among them, the problem they get, and what is measured of them.

For tools/benchmark_loss.py, tools/benchmark_step.py and `doctor --accept`. Wants a default process group.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.objectives import build
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_logprobs, vocab_parallel_policy_loss

DELTA = 0.15
ERROR_ROWS = 128
"""Of the problem, for which float64 logits fit beside it."""


@dataclass(frozen=True)
class Problem:
    """What every method gets: this rank's operands and the full per-token vectors."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    advantages: torch.Tensor
    group: dist.ProcessGroup
    start: int

    def rows(self, count: int, dtype: torch.dtype) -> Problem:
        vectors = (v[:count] for v in (self.targets, self.behavior_logprobs, self.advantages))
        hidden, weight = leaf(self.hidden[:count], dtype), leaf(self.weight, dtype)
        return Problem(hidden, weight, *vectors, group=self.group, start=self.start)


def leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter with gradient buffers: `main_grad` (FP32 at least) and `.grad`."""
    leaf = tensor.detach().to(dtype, copy=True).requires_grad_()
    leaf.main_grad = torch.zeros_like(leaf, dtype=torch.promote_types(dtype, torch.float32))
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def make_problem(case: tuple[int, int, int, int], zero_advantage: float, device: torch.device) -> Problem:
    tokens, hidden_size, vocab, tp = case
    rank, group = dist.get_rank(), dist.group.WORLD
    shard = -(-vocab // tp)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    advantages[torch.randperm(tokens, generator=generator)[: round(zero_advantage * tokens)]] = 0
    behavior = -9 - torch.rand(tokens, generator=generator)
    rows = min(shard, vocab - rank * shard)
    weight = torch.randn(rows, hidden_size, generator=torch.Generator().manual_seed(1 + rank)) / hidden_size**0.5
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    there = [v.to(device) for v in (targets, behavior, advantages)]
    operands = leaf(hidden.to(device), dtype), leaf(weight.to(device), dtype)
    return Problem(*operands, *there, group=group, start=rank * shard)


class _CopyToRanks(torch.autograd.Function):
    """Forward: nothing. Backward: all-reduce."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumOverRanks(torch.autograd.Function):
    """Forward: all-reduce. Backward: nothing."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def drpo_formula(logprobs: torch.Tensor, behavior: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """DRPO's loss a token, [N]; autograd does the rest."""
    r = (logprobs - behavior).clamp(max=20).exp()
    shift = logprobs.exp() - behavior.exp()
    return -advantages * r + advantages.abs() * shift * (r - 1) / (2 * DELTA)


def _drpo_loss(problem: Problem, logprobs: torch.Tensor) -> torch.Tensor:
    return drpo_formula(logprobs, problem.behavior_logprobs, problem.advantages).mean()


def plain(problem: Problem) -> torch.Tensor:
    """Logits, log-softmax, autograd."""
    hidden = problem.hidden
    if dist.get_world_size(problem.group) > 1:
        hidden = _CopyToRanks.apply(hidden, problem.group)
    logits = (hidden @ problem.weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return _drpo_loss(problem, plain_logprobs(logits, problem.targets, problem.start, problem.group))


def plain_logprobs(logits: torch.Tensor, targets: torch.Tensor, start: int, group: dist.ProcessGroup) -> torch.Tensor:
    """log p of targets [N] from this rank's logits [N, V/TP], which begin at token id `start`."""
    if dist.get_world_size(group) == 1:
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    maximum = logits.detach().amax(1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - maximum[:, None]
    local = targets - start
    owned = (local >= 0) & (local < logits.shape[1])
    target = shifted.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    target = _SumOverRanks.apply(torch.where(owned, target, 0.0), group)
    return target - _SumOverRanks.apply(shifted.exp().sum(1), group).log()


def megatron(problem: Problem) -> torch.Tensor:
    """Logits, then Megatron-Core's vocab_parallel_cross_entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = _CopyToRanks.apply(problem.hidden, problem.group) @ problem.weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return _drpo_loss(problem, -vocab_parallel_cross_entropy(logits.to(wide)[:, None], problem.targets[:, None])[:, 0])


def liger(problem: Problem) -> torch.Tensor:
    """Liger's chunked GRPO loss, which is not DRPO: time and memory compare, error does not."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    length = 128
    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=1)
    shape = (problem.targets.shape[0] // length, length)
    used = shape[0] * length
    out = loss(
        problem.hidden[:used].view(*shape, -1),
        problem.weight,
        problem.targets[:used].view(shape),
        torch.ones(shape, device=problem.targets.device),
        problem.advantages[:used].view(shape)[:, 0],
        old_per_token_logps=problem.behavior_logprobs[:used].view(shape),
    )
    return out[0] if isinstance(out, tuple) else out


def ours(problem: Problem, **options: Any) -> torch.Tensor:
    count = problem.targets.shape[0]
    return vocab_parallel_policy_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.behavior_logprobs,
        problem.advantages,
        torch.full_like(problem.advantages, 1 / count),
        objective=build({"name": "drpo", "delta": DELTA}),
        tp_group=problem.group,
        main_grad_fusion=True,
        **options,
    ).loss


def ours_low_memory(problem: Problem) -> torch.Tensor:
    return ours(problem, low_memory=True)


METHODS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "plain": plain,
    "megatron": megatron,
    "liger": liger,
    "ours": ours,
    "ours, low memory": ours_low_memory,
}


# --- measurements ----------------------------------------------------------------------------------------------


def step(method: Callable[[Problem], torch.Tensor], problem: Problem) -> None:
    method(problem).backward()


def gradients(method: Callable[[Problem], torch.Tensor], problem: Problem) -> list[torch.Tensor]:
    step(method, problem)
    return [problem.hidden.grad.double(), problem.weight.grad.double() + problem.weight.main_grad.double()]


def error_of(method: Callable[[Problem], torch.Tensor], problem: Problem, exact: list[torch.Tensor]) -> float:
    found = gradients(method, problem.rows(ERROR_ROWS, problem.hidden.dtype))
    return max(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))


def logprob_error(problem: Problem) -> float:
    """The largest absolute error of a log-prob of ours, against float64."""
    exact = problem.rows(ERROR_ROWS, torch.float64)
    with torch.no_grad():
        logits = exact.hidden @ exact.weight.T
        expected = plain_logprobs(logits, exact.targets, exact.start, exact.group)
        few = problem.rows(ERROR_ROWS, problem.hidden.dtype)
        found = vocab_parallel_logprobs(few.hidden, few.weight, few.targets, tp_group=problem.group).logprobs
    return (found.double() - expected).abs().max().item()


def initialize_megatron(tensor_parallel: int) -> None:
    """Megatron's parallel state, which its cross entropy asks for its group."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that an earlier method freed would hide this one's
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def liger_reason(tp: int) -> str | None:
    """Why Liger cannot be measured here; None if it can."""
    if tp > 1:
        return "has no vocabulary parallelism"
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        return f"not installed ({error})"
    return None

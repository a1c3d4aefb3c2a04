"""Time, memory, communication and error of the policy loss, forward and backward, against other ways to compute it.

    OMP_NUM_THREADS=1 python tools/benchmark_loss.py
    OMP_NUM_THREADS=1 python tools/benchmark_loss.py --tokens 1024 --hidden 256 --vocab 151936 --tp 2 --json out.json
    python tools/benchmark_loss.py --device cuda --tokens 32768 --hidden 2048 --vocab 62080 --tp 1

Every method computes DRPO's loss and adds its gradients to buffers that exist already, as in training with Megatron.
Methods take turns in each repeat, and times are medians over repeats, so that a noisy machine touches all alike.

time    forward and backward, of the slowest rank: wall clock, then on a CPU the process's own CPU time, which does
        not count what other programs on the machine take away.
memory  peak above what the process held before the call. CPU: the kernel's own high-water mark of resident memory
        (VmHWM, reset through /proc/self/clear_refs); CUDA: torch's allocator. Of the largest rank.
calls, bytes  collectives of one rank, and bytes of the larger side of each.
error   the larger relative error of d hidden and d weight against dense float64, on the first 128 rows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drpo_megatron.objectives import build
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_policy_loss

DELTA = 0.15
ERROR_ROWS = 128
DEFAULT_CASES = ((2048, 256, 32768, 1), (2048, 256, 32768, 2), (1024, 256, 151936, 1), (1024, 256, 151936, 2))


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
        hidden, weight = _leaf(self.hidden[:count], dtype), _leaf(self.weight, dtype)
        return Problem(hidden, weight, *vectors, group=self.group, start=self.start)


@dataclass
class Measured:
    method: str
    time_s: float
    cpu_time_s: float
    memory_bytes: float
    collectives: int
    communicated_bytes: int
    error: float | None


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


def _drpo_loss(problem: Problem, logprobs: torch.Tensor) -> torch.Tensor:
    """DRPO by its formula; autograd does the rest."""
    r = (logprobs - problem.behavior_logprobs).clamp(max=20).exp()
    shift = logprobs.exp() - problem.behavior_logprobs.exp()
    a = problem.advantages
    return (-a * r + a.abs() * shift * (r - 1) / (2 * DELTA)).mean()


def plain(problem: Problem) -> torch.Tensor:
    """Logits, log-softmax, autograd."""
    wide = torch.promote_types(problem.hidden.dtype, torch.float32)
    if dist.get_world_size(problem.group) == 1:
        logits = (problem.hidden @ problem.weight.T).to(wide)
        return _drpo_loss(problem, logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0])
    logits = (_CopyToRanks.apply(problem.hidden, problem.group) @ problem.weight.T).to(wide)
    maximum = logits.detach().amax(1)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=problem.group)
    shifted = logits - maximum[:, None]
    local = problem.targets - problem.start
    owned = (local >= 0) & (local < problem.weight.shape[0])
    target = shifted.gather(1, local.clamp(0, problem.weight.shape[0] - 1)[:, None])[:, 0]
    target = _SumOverRanks.apply(torch.where(owned, target, 0.0), problem.group)
    return _drpo_loss(problem, target - _SumOverRanks.apply(shifted.exp().sum(1), problem.group).log())


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
    operands = _leaf(hidden.to(device), dtype), _leaf(weight.to(device), dtype)
    return Problem(*operands, *there, group=group, start=rank * shard)


def _leaf(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter with gradient buffers: `main_grad` (FP32 at least) and `.grad`."""
    leaf = tensor.detach().to(dtype, copy=True).requires_grad_()
    leaf.main_grad = torch.zeros_like(leaf, dtype=torch.promote_types(dtype, torch.float32))
    leaf.grad = torch.zeros_like(leaf)
    return leaf


def step(method: Callable[[Problem], torch.Tensor], problem: Problem) -> None:
    method(problem).backward()


def gradients(method: Callable[[Problem], torch.Tensor], problem: Problem) -> list[torch.Tensor]:
    step(method, problem)
    return [problem.hidden.grad.double(), problem.weight.grad.double() + problem.weight.main_grad.double()]


def error_of(method: Callable[[Problem], torch.Tensor], problem: Problem, exact: list[torch.Tensor]) -> float:
    found = gradients(method, problem.rows(ERROR_ROWS, problem.hidden.dtype))
    return max(((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True))


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Bytes of the larger side of every collective that torch.distributed is asked for."""
    names, sizes = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"), []
    originals = {name: getattr(dist, name) for name in names}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes.append(max(a.nbytes for a in args if isinstance(a, torch.Tensor)))
            return function(*args, **kwargs)

        return call

    for name, function in originals.items():
        setattr(dist, name, counting(function))
    try:
        yield sizes
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


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


def timed(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def largest_over_ranks(value: float) -> float:
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def rank_main(rank: int, case: tuple[int, int, int, int], args: argparse.Namespace, scratch: str) -> None:
    from megatron.core import parallel_state

    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(args.threads)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=case[3])
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case[3])
    problem = make_problem(case, args.zero_advantage, device)
    exact = gradients(plain, problem.rows(ERROR_ROWS, torch.float64))

    measured: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for name, method in METHODS.items():
        if name == "liger" and (reason := liger_reason(case[3])):
            missing[name] = reason
            continue
        step(method, problem)
        with counted_collectives() as sizes:
            step(method, problem)
        memory = largest_over_ranks(peak_memory(lambda method=method: step(method, problem), device))
        error = None if name == "liger" else largest_over_ranks(error_of(method, problem, exact))
        measured[name] = Measured(name, 0.0, 0.0, memory, len(sizes), sum(sizes), error)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in measured}
    for _ in range(args.repeats):
        for name in measured:
            wall, cpu = timed(lambda name=name: step(METHODS[name], problem), device)
            times[name].append((largest_over_ranks(wall), largest_over_ranks(cpu)))
    for name, values in times.items():
        wall_times, cpu_times = zip(*values, strict=True)
        measured[name].time_s, measured[name].cpu_time_s = statistics.median(wall_times), statistics.median(cpu_times)
    if rank == 0:
        result = {"rows": [asdict(m) for m in measured.values()], "missing": missing}
        Path(scratch, "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def liger_reason(tp: int) -> str | None:
    """Why Liger cannot be measured here; None if it can."""
    if tp > 1:
        return "has no vocabulary parallelism"
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError as error:
        return f"not installed ({error})"
    return None


def run_case(case: tuple[int, int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="benchmark-loss-") as scratch:
        mp.spawn(rank_main, args=(case, args, scratch), nprocs=case[3])
        result = json.loads(Path(scratch, "result.json").read_text())
    base = next(row for row in result["rows"] if row["method"] == "plain")
    for row in result["rows"]:
        row["time_ratio"] = row["time_s"] / base["time_s"]
        row["cpu_time_ratio"] = row["cpu_time_s"] / base["cpu_time_s"]
        row["memory_ratio"] = row["memory_bytes"] / base["memory_bytes"]
    names = ("tokens", "hidden", "vocab", "tp")
    return {**dict(zip(names, case, strict=True)), "zero_advantage": args.zero_advantage, **result}


def print_case(result: dict[str, Any]) -> None:
    title = "N {tokens}, H {hidden}, V {vocab}, TP {tp}, A = 0 on {zero_advantage:.0%} of the rows".format(**result)
    print(f"\n{title}\n")
    print("| method | time ms | ratio | CPU ms | ratio | extra memory MB | ratio | calls | KB | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in result["rows"]:
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        print(
            f"| {r['method']} | {r['time_s'] * 1e3:.0f} | {r['time_ratio']:.2f} "
            f"| {r['cpu_time_s'] * 1e3:.0f} | {r['cpu_time_ratio']:.2f} "
            f"| {r['memory_bytes'] / 1e6:.0f} | {r['memory_ratio']:.3f} "
            f"| {r['collectives']} | {r['communicated_bytes'] / 1e3:.0f} | {error} |"
        )
    for name, reason in result["missing"].items():
        print(f"| {name} | {reason} | | | | | | | | |")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "liger-kernel", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="rows N; give tokens, hidden and vocab, or none of them")
    parser.add_argument("--hidden", type=int, help="hidden size H")
    parser.add_argument("--vocab", type=int, help="vocabulary V over all ranks")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, a process each (default 1)")
    parser.add_argument("--zero-advantage", type=float, default=0.0, help="share of rows with A = 0 (default 0)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of every method (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank (default 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: BF16 operands, a GPU a rank")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    given = (args.tokens, args.hidden, args.vocab)
    if any(given) and not all(given):
        parser.error("give all of --tokens, --hidden and --vocab, or none of them")
    cases = ((*given, args.tp),) if all(given) else DEFAULT_CASES
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    results = []
    for case in cases:
        results.append(run_case(case, args))
        print_case(results[-1])
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

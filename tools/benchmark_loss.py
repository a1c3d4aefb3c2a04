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

from drpo_megatron.trainer.loss_methods import (
    ERROR_ROWS,
    METHODS,
    error_of,
    gradients,
    liger_reason,
    make_problem,
    peak_memory,
    plain,
    step,
)

DEFAULT_CASES = ((2048, 256, 32768, 1), (2048, 256, 32768, 2), (1024, 256, 151936, 1), (1024, 256, 151936, 2))


@dataclass
class Measured:
    method: str
    time_s: float
    cpu_time_s: float
    memory_bytes: float
    collectives: int
    communicated_bytes: int
    error: float | None


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

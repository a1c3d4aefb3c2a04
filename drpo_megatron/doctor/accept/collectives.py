"""NCCL (gloo on a CPU) between all ranks and within every pair: exact results, and the bandwidth of an all-reduce."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from drpo_megatron.doctor.accept.ranks import join, run_ranks
from drpo_megatron.doctor.accept.stage import Results, Settings

_COUNT = 1031
"""Elements a rank, prime: no algorithm's share of it is even."""
_REPEATS = 5


def run(settings: Settings, results: Results) -> None:
    ranks = run_ranks(settings, settings.num_devices, _measure)
    problems = [problem for rank in ranks for problem in rank["problems"]]
    number = len(ranks[0]["seconds"])
    what = "all ranks" if number == 1 else f"all {settings.num_devices} ranks and {number - 1} pairs"
    if problems:
        results.failed("sums", "; ".join(problems[:5]))
    else:
        results.passed("sums", f"{settings.backend}: exact over {what}")
    if settings.num_devices == 1:
        results.skipped("pairs", "there is one device")
        return
    size = _bandwidth_bytes(settings)
    results.figure("allreduce_bytes", size)
    for group in ranks[0]["seconds"]:
        seconds = max(rank["seconds"][group] for rank in ranks)
        # Every rank sends and receives 2 (n - 1) / n of the bytes, whatever the algorithm.
        speed = size / seconds * 2 * (len(group) - 1) / len(group) / 1e9
        if len(group) == settings.num_devices:
            results.figure("allreduce_all_bus_gb_per_s", speed)
        if len(group) == 2:
            results.figure(f"allreduce_pair_{group[0]}_{group[1]}_bus_gb_per_s", speed)


def _bandwidth_bytes(settings: Settings) -> int:
    return 2**20 if settings.is_tiny else 2**29


def _measure(settings: Settings, rank: int, store: dist.FileStore) -> dict[str, object]:
    num_ranks = settings.num_devices
    device = join(settings, rank, store, num_ranks)
    groups = dict.fromkeys([tuple(range(num_ranks)), *itertools.combinations(range(num_ranks), 2)])
    problems: list[str] = []
    seconds: dict[tuple[int, ...], float] = {}
    for members in groups:
        group = dist.new_group(list(members))  # Every rank makes every group, its own or not.
        seconds[members] = 0.0
        if rank in members:
            problems += [
                f"{name} of ranks {', '.join(map(str, members))}: wrong on rank {rank}"
                for name, is_right in _exact(members, group, rank, device)
                if not is_right
            ]
            seconds[members] = _time(group, _bandwidth_bytes(settings), device)
        dist.barrier()
    return {"problems": problems, "seconds": seconds}


def _exact(
    members: tuple[int, ...], group: dist.ProcessGroup, rank: int, device: torch.device
) -> Iterator[tuple[str, bool]]:
    """The collectives that training uses, on small integers, which every dtype adds exactly."""
    n, mine = len(members), members.index(rank)

    def of(member: int, dtype: torch.dtype, count: int = _COUNT) -> torch.Tensor:
        return ((torch.arange(count, device=device) + 3 * members.index(member)) % 16).to(dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        total = of(rank, dtype)
        dist.all_reduce(total, group=group)
        yield f"all-reduce in {dtype}", torch.equal(total, sum(of(member, dtype) for member in members))
    gathered = torch.empty(n * _COUNT, device=device)
    dist.all_gather_into_tensor(gathered, of(rank, torch.float32), group=group)
    yield "all-gather", torch.equal(gathered, torch.cat([of(member, torch.float32) for member in members]))
    share = torch.empty(_COUNT, device=device)
    dist.reduce_scatter_tensor(share, of(rank, torch.float32, n * _COUNT), group=group)
    whole = sum(of(member, torch.float32, n * _COUNT) for member in members)
    yield "reduce-scatter", torch.equal(share, whole[mine * _COUNT :][:_COUNT])
    swapped = torch.empty(n * _COUNT, device=device)
    dist.all_to_all_single(swapped, of(rank, torch.float32, n * _COUNT), group=group)
    pieces = [of(member, torch.float32, n * _COUNT)[mine * _COUNT :][:_COUNT] for member in members]
    yield "all-to-all", torch.equal(swapped, torch.cat(pieces))
    sent = of(rank, torch.float32)
    dist.broadcast(sent, src=members[-1], group=group)
    yield "broadcast", torch.equal(sent, of(members[-1], torch.float32))


def _time(group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> float:
    """Seconds of an all-reduce: the best of some, after one that warms up."""
    data = torch.zeros(num_bytes // 4, device=device)
    best = float("inf")
    for repeat in range(_REPEATS + 1):
        dist.barrier(group)
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(data, group=group)
        _wait(device)
        if repeat:
            best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

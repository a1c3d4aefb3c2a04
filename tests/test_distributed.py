"""The helper that starts gloo ranks: results come back in order, and nothing outlives a failure."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def _all_reduced(rank: int, world_size: int, scale: float) -> tuple[int, torch.Tensor, int]:
    total = torch.tensor(scale * (rank + 1))
    dist.all_reduce(total)
    return rank, total, torch.get_num_threads()


def _rank_one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one has a bad day")
    dist.barrier()


def _never_returns(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_ranks_share_one_process_group_and_their_values_come_back_in_order() -> None:
    values = run_ranks(2, _all_reduced, 10.0)
    assert [(rank, total.item(), threads) for rank, total, threads in values] == [(0, 30.0, 1), (1, 30.0, 1)]


def _loops(rank: int, world_size: int) -> list[int]:
    """Threads that wait on sockets, and the sum over every one of the groups."""
    groups = [dist.new_group(range(world_size)) for _ in range(5)]
    sums = [torch.ones(1) for _ in groups]
    for group, total in zip(groups, sums, strict=True):
        dist.all_reduce(total, group=group)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [threads.count("gloo_tcp_loop"), *(int(total) for total in sums)]


def test_all_groups_of_a_rank_share_one_loop() -> None:
    assert run_ranks(2, _loops) == [[1, 2, 2, 2, 2, 2]] * 2


def test_failure_names_the_rank_that_failed_first() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*ValueError: rank one has a bad day"):
        run_ranks(2, _rank_one_raises)


def test_ranks_that_hang_are_killed_at_the_time_limit() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(TimeoutError, match="rank0 of 1 ranks still ran after timeout_s=5"):
        run_ranks(1, _never_returns, timeout_s=5)
    assert set(multiprocessing.active_children()) <= before


def _process_and_variable(rank: int, world_size: int, value: str | None) -> tuple[int, str | None]:
    before = os.environ.get("OF_A_TEST")
    if value is not None:
        os.environ["OF_A_TEST"] = value
    return os.getpid(), before


def test_processes_are_used_again_unless_something_was_left_in_them() -> None:
    first, again = (run_ranks(2, _process_and_variable, None) for _ in range(2))
    assert {pid for pid, _ in first} == {pid for pid, _ in again}
    assert run_ranks(2, _process_and_variable, None, fresh=True)[0][0] not in {pid for pid, _ in first}
    changed = run_ranks(2, _process_and_variable, "left here")
    after = run_ranks(2, _process_and_variable, None)
    assert {pid for pid, _ in changed} == {pid for pid, _ in first}
    assert {pid for pid, _ in after}.isdisjoint({pid for pid, _ in changed})
    assert [before for _, before in after] == [None, None]

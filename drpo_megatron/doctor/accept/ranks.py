"""Ranks inside a stage: processes that call one function each, and meet at a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drpo_megatron.doctor.accept.processes import die_with
from drpo_megatron.doctor.accept.stage import Settings

TIMEOUT_S = 300.0
"""Of a collective. A stage that hangs is ended from outside."""


def run_ranks(settings: Settings, num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(settings, rank, store, *args)` returns on every rank, in rank order.

    `store` is where they meet; joining the process group is the function's part. The first rank that fails raises here,
    with its traceback; the others are ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if settings.device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # A container's host name often resolves to nothing.
    with TemporaryDirectory(prefix="ranks-") as directory:
        mp.spawn(_rank_main, (num_ranks, os.getpid(), settings, directory, function, args), nprocs=num_ranks)
        return [torch.load(Path(directory, f"{rank}.pt"), weights_only=False) for rank in range(num_ranks)]


def _rank_main(
    rank: int,
    num_ranks: int,
    parent: int,
    settings: Settings,
    directory: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    die_with(parent)
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(directory, "store"), num_ranks)
    result = function(settings, rank, store, *args)
    torch.save(result, Path(directory, f"{rank}.pt"))
    if dist.is_initialized():
        dist.barrier()  # One that leaves early closes connections that its peers may still read from.
        dist.destroy_process_group()


def join(settings: Settings, rank: int, store: dist.FileStore, num_ranks: int) -> torch.device:
    """Join the default process group; returns this rank's device. For ranks without a Trainer."""
    device = torch.device("cpu")
    if settings.device == "gpu":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        settings.backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    return device

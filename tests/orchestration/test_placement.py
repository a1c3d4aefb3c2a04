"""Where Ray puts the processes of a run, with GPUs that it only believes in: nothing is started on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import ray

from drpo_megatron.config import Config
from drpo_megatron.orchestration.actors import Place
from drpo_megatron.orchestration.cluster import launch
from drpo_megatron.orchestration.placement import Numbers, _reserve, ranks_have_gpus
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process for Ray, which leaves threads and sockets behind in the one that it is started from."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        yield pool


def config(num_ranks: int, placement: str, backend: str = "gpu", **engine: Any) -> Config:
    sglang = {"name": "sglang", "python": sys.executable} | engine
    return tiny_config(
        "model",
        parallel={"num_ranks": num_ranks},
        rollout={"engine": sglang},
        trainer={"backend": backend},
        cluster={"placement": placement},
    )


def places(chosen: Config, logs: Path) -> dict[str, list[Place]]:
    ray.init(num_cpus=16, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    workers = launch(chosen, Numbers.of(chosen, trains=True), logs)
    assert workers.take_turns == (chosen.cluster.placement == "colocated")
    groups = {"ranks": workers.ranks, "engines": workers.engines, "servers": workers.servers}
    ray.shutdown()
    return {name: [p.place for p in group.processes if p.place] for name, group in groups.items()}


def test_colocated_servers_stand_on_the_gpus_of_neighbouring_ranks(
    elsewhere: ProcessPoolExecutor, tmp_path: Path
) -> None:
    chosen = config(4, "colocated", num_engines=2, tensor_parallel=2)
    found = elsewhere.submit(places, chosen, tmp_path).result()
    assert [place.gpus for place in found["ranks"]] == [(0,), (1,), (2,), (3,)]
    assert [place.gpus for place in found["servers"]] == [(0, 1), (2, 3)]
    assert [place.gpus for place in found["engines"]] == [()]
    assert len({place.pid for group in found.values() for place in group}) == 7
    assert len({place.node_id for group in found.values() for place in group}) == 1


@pytest.mark.slow
def test_disaggregated_servers_get_gpus_of_their_own_and_a_sender_by_nccl_that_of_rank_0(
    elsewhere: ProcessPoolExecutor, tmp_path: Path
) -> None:
    chosen = config(2, "disaggregated", num_engines=1, tensor_parallel=2, broadcast="nccl")
    found = elsewhere.submit(places, chosen, tmp_path).result()
    of_ranks = [gpu for place in found["ranks"] for gpu in place.gpus]
    [of_server] = [place.gpus for place in found["servers"]]
    assert len(of_ranks) == len(of_server) == 2 and of_ranks == sorted(of_ranks)
    assert sorted([*of_ranks, *of_server]) == [0, 1, 2, 3]
    assert [place.gpus for place in found["engines"]] == [(of_ranks[0],)]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (
            config(4, "disaggregated", num_engines=2, tensor_parallel=2),
            "num_ranks=4 and rollout.engine.num_engines=2 servers of 2 GPUs need 8, but Ray sees 4",
        ),
        (config(2, "disaggregated", num_engines=3), "num_ranks=2 and .*num_engines=3 servers of 1 GPUs need 5, but"),
        (config(5, "colocated", num_engines=5), "num_ranks=5 needs as many GPUs, but Ray sees 4"),
        (
            config(1, "disaggregated", backend="cpu", broadcast="nccl"),
            "broadcast=nccl needs GPUs: trainer.backend=cpu uses none of the 4 .* set rollout.engine.broadcast=gloo",
        ),
    ],
)
def test_what_four_gpus_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, chosen: Config, expected: str) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    with pytest.raises(ValueError, match=expected):
        ranks_have_gpus(chosen, Numbers.of(chosen, trains=True))


def test_without_ranks_a_sender_by_nccl_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 4.0})
    gloo, nccl = (config(1, "disaggregated", num_engines=4, broadcast=name) for name in ("gloo", "nccl"))
    assert ranks_have_gpus(gloo, Numbers.of(gloo, trains=False))
    with pytest.raises(
        ValueError, match="4 servers of 1 GPUs, and rollout.engine.broadcast=nccl, need 5, but Ray sees 4"
    ):
        ranks_have_gpus(nccl, Numbers.of(nccl, trains=False))


def test_a_server_is_not_torn_between_machines() -> None:
    machines = [{"NodeName": name, "NodeManagerAddress": name, "Resources": {"GPU": 3.0}} for name in ("a", "b")]
    with pytest.raises(ValueError, match="data_parallel=2 GPUs stands whole .* have 3, 3 GPUs: room for 4 of .*=6"):
        _reserve(machines, num_ranks=6, gpus_together=2)

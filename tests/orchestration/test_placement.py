"""Where Ray puts the processes of a run, with GPUs that it only believes in: nothing is started on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from drpo_megatron.config import Config
from drpo_megatron.orchestration.cluster import launch
from drpo_megatron.orchestration.placement import Numbers, _reserve, ranks_have_gpus
from drpo_megatron.orchestration.workers import Process, Workers
from tests.tiny import tiny_config


@pytest.fixture(scope="module", autouse=True)
def four_gpus() -> Iterator[None]:
    ray.init(num_cpus=16, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config(num_ranks: int, placement: str, **engine: Any) -> Config:
    sglang = {"name": "sglang", "python": sys.executable} | engine
    return tiny_config(
        "model",
        parallel={"num_ranks": num_ranks},
        rollout={"engine": sglang},
        trainer={"backend": "gpu"},
        cluster={"placement": placement},
    )


def placed(chosen: Config, logs: Path) -> Workers:
    workers = launch(chosen, Numbers.of(chosen, trains=True), logs)
    for process in workers.ranks.supervisor.processes:
        ray.kill(process.actor)
    for group, described in placement_group_table().items():  # Ray would keep the GPUs for the rest of this module.
        if described["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
    return workers


def gpus(processes: list[Process]) -> list[tuple[int, ...]]:
    return [process.gpus for process in processes]


def test_colocated_servers_stand_on_the_gpus_of_neighbouring_ranks(tmp_path: Path) -> None:
    workers = placed(config(4, "colocated", num_engines=2, tensor_parallel=2), tmp_path)
    assert gpus(workers.ranks.processes) == [(0,), (1,), (2,), (3,)]
    assert gpus(workers.servers.processes) == [(0, 1), (2, 3)]
    assert gpus(workers.engines.processes) == [()]
    assert workers.take_turns
    assert len({process.place.node_id for process in workers.ranks.supervisor.processes if process.place}) == 1


def test_disaggregated_servers_get_gpus_of_their_own_and_a_sender_by_nccl_that_of_rank_0(tmp_path: Path) -> None:
    workers = placed(config(2, "disaggregated", num_engines=1, tensor_parallel=2, broadcast="nccl"), tmp_path)
    assert not workers.take_turns
    [of_server] = gpus(workers.servers.processes)
    of_ranks = [gpu for [gpu] in gpus(workers.ranks.processes)]
    assert len(of_server) == 2 and of_ranks == sorted(of_ranks)
    assert sorted([*of_ranks, *of_server]) == [0, 1, 2, 3]
    assert gpus(workers.engines.processes) == [(of_ranks[0],)]


def test_too_few_gpus_are_named() -> None:
    chosen = config(4, "disaggregated", num_engines=2, tensor_parallel=2)
    with pytest.raises(ValueError, match="num_ranks=4 and .*num_engines=2 servers of 2 GPUs need 8, but Ray sees 4"):
        ranks_have_gpus(chosen, Numbers.of(chosen, trains=True))
    assert ranks_have_gpus(config(4, "colocated", num_engines=4), Numbers(4, 1, 1, 4))


def test_a_broadcast_by_nccl_is_refused_where_ranks_have_no_gpus() -> None:
    chosen = config(1, "disaggregated", broadcast="nccl")
    on_cpu = chosen.model_copy(update={"trainer": chosen.trainer.model_copy(update={"backend": "cpu"})})
    with pytest.raises(ValueError, match="broadcast=nccl needs GPUs.*; set rollout.engine.broadcast=gloo"):
        ranks_have_gpus(on_cpu, Numbers.of(on_cpu, trains=True))


def test_a_server_is_not_torn_between_machines() -> None:
    machines = [{"NodeName": name, "NodeManagerAddress": name, "Resources": {"GPU": 3.0}} for name in ("a", "b")]
    with pytest.raises(ValueError, match="data_parallel=2 GPUs stands whole .* have 3, 3 GPUs: room for 4 of .*=6"):
        _reserve(machines, num_ranks=6, gpus_together=2)

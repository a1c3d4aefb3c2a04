"""Which machine, and which GPU of it, each process of a run gets.

    disaggregated                              colocated, servers of two GPUs
    GPU 0    1    | 2         3                GPU 0      1      | 2      3
    rank 0   1    | server 0  server 1         rank 0     1      | 2      3
                                               server 0 --------   server 1 -----

Ranks fill one machine after the other, so that whole machines are left for engines of several GPUs. Each stands in a
bundle of a placement group, a GPU a bundle, and leaves a share of the GPU to guests: a colocated server, or the engine
process when it broadcasts by NCCL. On CPUs every machine gets the same share of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from drpo_megatron.config import Config
from drpo_megatron.config.sections import SGLangEngineSection

_RANK_SHARE, _GUEST_SHARE = 0.8, 0.1
"""Of a GPU, for Ray's books: a rank, a server and the engine process may be on one. Memory is not what is shared."""


class Numbers(NamedTuple):
    """How many processes of each kind a run has."""

    ranks: int
    engines: int
    rewards: int
    servers: int

    @classmethod
    def of(cls, config: Config, trains: bool) -> Numbers:
        ranks, engine = config.parallel.num_ranks if trains else 0, config.rollout.engine
        if config.rollout.from_dump is not None:
            return cls(ranks, 0, 0, 0)
        if isinstance(engine, SGLangEngineSection):  # One process speaks to all servers.
            return cls(ranks, 1, 1, 0 if engine.servers else engine.num_engines)
        return cls(ranks, engine.num_engines, 1, 0)


@dataclass(frozen=True, slots=True)
class Spot:
    """What Ray is asked for one process."""

    strategy: Any = "SPREAD"
    num_gpus: float = 0
    num_cpus: int = 1

    def beside(self) -> Spot:
        """For a guest: the same machine and, if it is on one, the same GPU."""
        on_gpu = self.num_gpus > 0
        return replace(self, num_gpus=_GUEST_SHARE if on_gpu else 0, num_cpus=int(not on_gpu))


def is_colocated(config: Config, numbers: Numbers) -> bool:
    """`drpo-megatron rollout` has no ranks to stand beside."""
    return config.cluster.placement == "colocated" and numbers.ranks > 0 and numbers.servers > 0


def ranks_have_gpus(config: Config, numbers: Numbers) -> bool:
    """Whether ranks get a GPU each. Raises ValueError when the cluster can't hold the run."""
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    num_ranks, backend, engine = numbers.ranks, config.trainer.backend, config.rollout.engine
    uses_nccl = isinstance(engine, SGLangEngineSection) and engine.uses_nccl
    if num_cpus < (needed := sum(numbers)):
        raise ValueError(f"the Ray cluster has {num_cpus} CPUs, but the run needs {needed}, one a process")
    if backend == "cpu" or (backend == "auto" and num_gpus == 0):
        if uses_nccl:
            raise ValueError(
                f"rollout.engine.broadcast=nccl needs GPUs: trainer.backend={backend} uses none of the {num_gpus} that Ray "
                "sees; set rollout.engine.broadcast=gloo"
            )
        return False
    each = 0 if is_colocated(config, numbers) else gpus_a_server(config)
    of_sender = int(uses_nccl and not num_ranks)  # Without a rank whose GPU it could share.
    if (needed := num_ranks + of_sender + numbers.servers * each) > num_gpus >= num_ranks:
        raise ValueError(
            f"parallel.num_ranks={num_ranks} and rollout.engine.num_engines={numbers.servers} servers of "
            f"{each} GPUs{', and rollout.engine.broadcast=nccl,' if of_sender else ''} need {needed}, but Ray sees "
            f"{num_gpus}; use fewer, or more nodes"
        )
    if num_gpus < num_ranks:
        raise ValueError(
            f"parallel.num_ranks={num_ranks} needs as many GPUs, but Ray sees {num_gpus}; "
            f"use fewer ranks, more nodes, or trainer.backend=cpu"
        )
    return True


def gpus_a_server(config: Config) -> int:
    engine = config.rollout.engine
    return engine.gpus_a_server if isinstance(engine, SGLangEngineSection) else 0


def rank_spots(config: Config, numbers: Numbers, on_gpu: bool) -> list[Spot]:
    """One a rank. On GPUs Ray has reserved them when this returns; ValueError when it can't within startup_timeout_s."""
    machines = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeName"])
    num_ranks = numbers.ranks
    if not on_gpu:
        chosen = [machines[r * len(machines) // num_ranks]["NodeID"] for r in range(num_ranks)]
        return [Spot(NodeAffinitySchedulingStrategy(machine, soft=False)) for machine in chosen]
    group = _reserve(machines, num_ranks, gpus_a_server(config) if is_colocated(config, numbers) else 1)
    if group is None:
        return []
    if not group.wait(timeout_s := config.cluster.startup_timeout_s):
        raise ValueError(
            f"parallel.num_ranks={num_ranks}: Ray could not reserve as many GPUs within cluster.startup_timeout_s="
            f"{timeout_s:g}; others use this Ray cluster, too: wait for them, or use fewer ranks"
        )
    return [Spot(PlacementGroupSchedulingStrategy(group, r), _RANK_SHARE) for r in range(num_ranks)]


def engine_spot(config: Config, numbers: Numbers, on_gpu: bool, ranks: Sequence[Spot]) -> Spot:
    """The embedded engine takes a whole GPU if the ranks leave enough; the one before servers a share, if it uses NCCL."""
    engine = config.rollout.engine
    if isinstance(engine, SGLangEngineSection):
        if not engine.uses_nccl:
            return Spot()
        return ranks[0].beside() if ranks else Spot(num_gpus=_GUEST_SHARE)
    num_left = int(ray.cluster_resources().get("GPU", 0)) - numbers.ranks
    return Spot(num_gpus=int(on_gpu and num_left >= numbers.engines))


def _reserve(machines: Sequence[dict[str, Any]], num_ranks: int, gpus_together: int) -> PlacementGroup | None:
    """A bundle a rank, on whole multiples of `gpus_together` GPUs of each machine, so that no server is torn apart."""
    num_gpus = {m["NodeName"]: int(m["Resources"].get("GPU", 0)) for m in machines}
    slots = [m for m in machines for _ in range(num_gpus[m["NodeName"]] // gpus_together * gpus_together)]
    if len(slots) < num_ranks:
        raise ValueError(
            f"cluster.placement=colocated: a server of rollout.engine.tensor_parallel x data_parallel={gpus_together} GPUs "
            f"stands whole on one machine, and the machines have {', '.join(map(str, num_gpus.values()))} GPUs: room for "
            f"{len(slots)} of parallel.num_ranks={num_ranks}; use a smaller tensor_parallel, or more nodes"
        )
    # Ray lets a bundle name its machine by a resource that each machine has, of which it takes next to nothing.
    bundles = [{"GPU": 1, "CPU": 1, f"node:{m['NodeManagerAddress']}": 0.001} for m in slots[:num_ranks]]
    return placement_group(bundles) if bundles else None

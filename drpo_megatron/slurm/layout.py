"""Nodes and GPUs of a job, shared out to trainer ranks and engines."""

from __future__ import annotations

from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.plan import on_gpus
from drpo_megatron.planner.rollout import engine_of


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a job asks for."""

    count: int
    gpus_each: int
    """0: the ranks run on CPUs."""

    def __str__(self) -> str:
        return f"--nodes {self.count} --gpus-per-node {self.gpus_each}"


def on_nodes(config: Config, nodes: Nodes) -> Config:
    """The recipe on these nodes. Engines keep their share of the GPUs and data parallelism takes the rest.

    Raises: ValueError when nodes or GPUs don't divide into the layout, with what does.
    """
    cluster = config.cluster.model_copy(update={"ray_address": "auto", "num_machines": nodes.count})
    config = config.model_copy(update={"cluster": cluster})
    if nodes.gpus_each == 0:
        _check_cpu_ranks(config, nodes)
        return config
    try:
        scaled = on_gpus(config, nodes.count * nodes.gpus_each)
    except ValueError as error:
        raise ValueError(f"{nodes}: {error}") from error
    engine_gpus = engine_of(scaled).gpus
    if nodes.gpus_each % engine_gpus:
        raise ValueError(
            f"{nodes}: rollout.engine.tensor_parallel={engine_gpus} doesn't divide the {nodes.gpus_each} GPUs of a node, "
            f"and an engine stays within one; use a divisor of {nodes.gpus_each}"
        )
    return scaled


def _check_cpu_ranks(config: Config, nodes: Nodes) -> None:
    num_ranks = config.parallel.num_ranks
    if config.trainer.backend == "gpu":
        raise ValueError(f"{nodes}, but trainer.backend=gpu; ask for GPUs, or set trainer.backend=cpu")
    if num_ranks % nodes.count:
        fitting = ", ".join(str(n) for n in range(1, num_ranks + 1) if num_ranks % n == 0)
        raise ValueError(
            f"parallel.num_ranks={num_ranks} can't be shared evenly by --nodes {nodes.count}; use {fitting} nodes"
        )


def neighbours_note(config: Config, nodes: Nodes) -> str | None:
    """What is allowed, but slow: tensor parallelism between machines."""
    tensor = config.parallel.tensor
    if not nodes.gpus_each or nodes.gpus_each % tensor == 0:
        return None
    return f"parallel.tensor={tensor} doesn't divide the {nodes.gpus_each} GPUs of a node: its traffic crosses machines"

"""What can be wrong with `cluster.placement: colocated` and `rollout.engine.broadcast: nccl`, before Ray has started."""

from __future__ import annotations

from collections.abc import Iterator

from drpo_megatron.config.sections import Config, SGLangEngineSection


def placement_problems(config: Config) -> Iterator[str]:
    engine = config.rollout.engine
    if config.cluster.placement == "colocated":
        if isinstance(engine, SGLangEngineSection):
            yield from _colocation_problems(config, engine)
        else:
            yield (
                f"cluster.placement=colocated is for SGLang servers, and rollout.engine.name={engine.name} has none; set "
                "rollout.engine.name=sglang, or cluster.placement=disaggregated"
            )
        if (k := config.rollout.max_staleness) > 0:
            yield (
                f"cluster.placement=colocated with rollout.max_staleness={k}: servers can't draw ahead on GPUs that train; "
                "set rollout.max_staleness=0, or cluster.placement=disaggregated"
            )
    if isinstance(engine, SGLangEngineSection) and engine.uses_nccl and config.trainer.backend == "cpu":
        yield (
            "rollout.engine.broadcast=nccl needs GPUs, and trainer.backend=cpu; set rollout.engine.broadcast=gloo, or "
            "another backend"
        )


def _colocation_problems(config: Config, engine: SGLangEngineSection) -> Iterator[str]:
    if engine.servers:
        yield (
            f"cluster.placement=colocated launches servers on the ranks' GPUs, and rollout.engine.servers="
            f"{', '.join(engine.servers)} run elsewhere; leave rollout.engine.servers out, or set "
            "cluster.placement=disaggregated"
        )
        return
    num_ranks, each = config.parallel.num_ranks, engine.gpus_a_server
    if engine.num_engines * each != num_ranks:
        fix = f"rollout.engine.num_engines={num_ranks // each}" if num_ranks % each == 0 else "another tensor_parallel"
        yield (
            f"cluster.placement=colocated: rollout.engine.num_engines={engine.num_engines} servers of tensor_parallel="
            f"{engine.tensor_parallel} x data_parallel={engine.data_parallel} GPUs are {engine.num_engines * each}, and "
            f"parallel.num_ranks={num_ranks}; every GPU trains and draws: set {fix}"
        )
    if engine.uses_nccl:
        yield (
            "rollout.engine.broadcast=nccl with cluster.placement=colocated: sender and server would be two ranks on one "
            "GPU, which NCCL refuses; set rollout.engine.broadcast=gloo, or rollout.engine.sync=tensor on one machine"
        )

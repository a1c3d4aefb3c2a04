"""Everything the planner says of one recipe on so many GPUs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.config.sections import ParallelSection
from drpo_megatron.planner.activations import chunks_in_flight, stage_activation_bytes
from drpo_megatron.planner.communication import Traffic, stage_traffic
from drpo_megatron.planner.hardware import ENGINE_MEMORY_SHARE, RESERVED_BYTES
from drpo_megatron.planner.loss import loss_workspace_bytes
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.parameters import StageParameters, StateBytes, stage_parameters, state_bytes
from drpo_megatron.planner.rollout import Rollout, engine_of, plan_rollout
from drpo_megatron.planner.step_time import StepTime, step_time
from drpo_megatron.planner.work import Work, work_of


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One rank of a pipeline stage. Bytes."""

    counts: StageParameters
    states: StateBytes
    activations: int
    """As the recipe recomputes."""
    activations_by_recompute: dict[str, int]
    chunks_in_flight: int
    loss: int
    """Workspace of the loss kernel; 0 but on the last stage."""
    plain_loss: int
    """What plain logits would take in its place."""
    traffic: dict[str, Traffic]

    @property
    def total(self) -> int:
        """Whatever is larger comes on top: the loss kernel runs when all activations are there."""
        return self.states.total + self.activations + self.loss


@dataclass(frozen=True, slots=True)
class Plan:
    parallel: ParallelSection
    recompute: str
    gpu_bytes: int
    work: Work
    stages: tuple[StagePlan, ...]
    rollout: Rollout
    time: StepTime
    is_colocated: bool
    """Engines on the ranks' GPUs: the ranks' states are always there, and beside them what is larger: a step's
    activations and loss, or the engine's weights and cache, which it releases while the ranks train."""
    asked_share: float
    """What the recipe lets an engine fill of a GPU that it shares; 0 where it shares none."""

    @property
    def num_gpus(self) -> int:
        of_engines = 0 if self.is_colocated else self.rollout.num_replicas * self.rollout.gpus_per_replica
        return self.parallel.num_ranks + of_engines

    @property
    def usable_bytes(self) -> int:
        """Of a trainer's GPU. An engine on it keeps a context and graphs of its own there."""
        return self.gpu_bytes - RESERVED_BYTES * (2 if self.is_colocated else 1)

    @property
    def engine_share(self) -> float:
        """Of a GPU that an engine may fill with weights and cache: SGLang's --mem-fraction-static, in hundredths."""
        share = (self.rollout.weight_bytes + self.rollout.cache_bytes) / self.gpu_bytes
        return max(0.0, math.floor(100 * share) / 100)

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def ranks_fit(self) -> bool:
        return self.fullest.total <= self.usable_bytes

    @property
    def engines_fit(self) -> bool:
        """At least one sequence of full length."""
        return self.rollout.concurrency >= 1

    @property
    def share_fits(self) -> bool:
        return self.asked_share <= self.engine_share

    @property
    def fits(self) -> bool:
        return self.ranks_fit and self.engines_fit and self.share_fits

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Trained tokens over the time of a whole step."""
        return self.work.num_tokens / self.time.total_s / self.num_gpus

    def as_dict(self) -> dict[str, Any]:
        """For --json: what is counted, then what is estimated."""
        return {
            "parallel": self.parallel.model_dump() | {"data": self.parallel.data},
            "num_gpus": self.num_gpus,
            "is_colocated": self.is_colocated,
            "gpu_bytes": self.gpu_bytes,
            "usable_bytes": self.usable_bytes,
            "fits": self.fits,
            "work": asdict(self.work),
            "stages": [asdict(stage) | {"total": stage.total} for stage in self.stages],
            "rollout": asdict(self.rollout),
            "estimates": asdict(self.time)
            | {"total_s": self.time.total_s, "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu},
        }


def make_plan(config: Config, model: Model, gpu_bytes: int) -> Plan:
    """Plan the recipe as it stands. The layout must be one that `layout_problems` has nothing against."""
    work = work_of(config)
    stages = tuple(_stage(config, model, work, stage) for stage in range(config.parallel.pipeline))
    is_colocated = config.cluster.placement == "colocated"
    held = max(stage.states.total for stage in stages) + RESERVED_BYTES if is_colocated else 0
    rollout = plan_rollout(model, config, work, gpu_bytes, held)
    time = step_time(model, config, work, [stage.traffic for stage in stages], rollout.seconds)
    asked = _asked_share(config) if is_colocated else 0.0
    return Plan(config.parallel, config.model.recompute, gpu_bytes, work, stages, rollout, time, is_colocated, asked)


def _asked_share(config: Config) -> float:
    flags = getattr(config.rollout.engine, "flags", {})
    return float(flags.get("mem-fraction-static", ENGINE_MEMORY_SHARE))


def on_gpus(config: Config, num_gpus: int) -> Config:
    """The recipe on another number of GPUs: engines keep their share, data parallelism takes the rest. Both take all of
    them when colocated.

    Raises: ValueError when the ranks that remain don't divide into the layout, with the numbers of GPUs that do.
    """
    if num_gpus < 1:
        raise ValueError(f"--gpus {num_gpus}: give at least 1")
    if fitted := _scaled(config, num_gpus):
        return fitted
    parallel, unit = config.parallel, _unit(config.parallel)
    near = [n for n in range(max(1, num_gpus - 8 * unit), num_gpus + 8 * unit) if _scaled(config, n)]
    near = sorted(sorted(near, key=lambda n: abs(n - num_gpus))[:4])
    sizes = ", ".join(f"{key} {getattr(parallel, key)}" for key in ("tensor", "pipeline", "context", "expert"))
    instead = f"use {', '.join(map(str, near))} GPUs, or another layout" if near else "use another layout"
    raise ValueError(
        f"--gpus {num_gpus} can't be shared between the engines' {_engine_gpus(config)} of {_total(config)} GPUs in the "
        f"recipe and ranks in multiples of {unit} ({sizes}); {instead} (--search proposes some)"
    )


def _scaled(config: Config, num_gpus: int) -> Config | None:
    each = engine_of(config).gpus * getattr(config.rollout.engine, "data_parallel", 1)
    if config.cluster.placement == "colocated":
        num_engines, num_ranks = num_gpus // each, num_gpus if num_gpus % each == 0 else 0
    else:
        num_engines = max(1, round(num_gpus * _engine_gpus(config) / _total(config) / each))
        num_ranks = num_gpus - num_engines * each
    if num_ranks < 1 or num_ranks % _unit(config.parallel):
        return None
    engine = config.rollout.engine.model_copy(update={"num_engines": num_engines})
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={"num_ranks": num_ranks}),
            "rollout": config.rollout.model_copy(update={"engine": engine}),
        }
    )


def _unit(parallel: ParallelSection) -> int:
    """Ranks come in multiples of it."""
    dense = parallel.tensor * parallel.context * parallel.pipeline
    return math.lcm(dense, parallel.expert * parallel.expert_tensor * parallel.pipeline)


def _engine_gpus(config: Config) -> int:
    engine = engine_of(config)
    return engine.num_replicas * engine.gpus


def _total(config: Config) -> int:
    is_colocated = config.cluster.placement == "colocated"
    return config.parallel.num_ranks + (0 if is_colocated else _engine_gpus(config))


def _stage(config: Config, model: Model, work: Work, stage: int) -> StagePlan:
    counts = stage_parameters(model, config, stage)
    is_last = stage == config.parallel.pipeline - 1
    loss, plain = loss_workspace_bytes(model, config) if is_last else (0, 0)
    by_recompute = {
        name: stage_activation_bytes(model, _recomputing(config, name), stage, work.num_micro_batches)
        for name in ("none", "selective", "full")
    }
    return StagePlan(
        counts=counts,
        states=state_bytes(counts, config.trainer.dtype == "bf16"),
        activations=by_recompute[config.model.recompute],
        activations_by_recompute=by_recompute,
        chunks_in_flight=chunks_in_flight(config, stage, work.num_micro_batches),
        loss=loss,
        plain_loss=plain,
        traffic=stage_traffic(model, config, work, stage, counts),
    )


def _recomputing(config: Config, recompute: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"recompute": recompute})})

"""An estimate of the time of a step: compute at a share of the peak, communication at a share of the links' speed.

    step    = rollout + optimiser steps x update + weights to the engines
    update  = (micro-batches + (PP - 1) / VPP) x slowest stage + gradient reduction

Nothing overlaps but, where it is switched on, the gradient reduction with the backward pass. Good for comparing
layouts; the constants are in hardware.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.communication import Traffic
from drpo_megatron.planner.hardware import COMPUTE_EFFICIENCY, NETWORK_BYTES_PER_S, PEAK_FLOPS
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.parameters import layers_of_stage
from drpo_megatron.planner.work import Work

_BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimates, in seconds unless named otherwise."""

    rollout_s: float
    compute_s: float
    """Matmuls of all optimiser steps, of the slowest stage."""
    bubble_share: float
    """Of the time of an update's forward and backward passes, what a stage waits."""
    communication_s: float
    """Of all optimiser steps, what is not hidden."""
    train_s: float
    sync_s: float
    mfu: float
    """Of training: model FLOPs (no recomputation) over peak, over all trainer GPUs."""

    @property
    def total_s(self) -> float:
        return self.rollout_s + self.train_s + self.sync_s


def step_time(
    model: Model, config: Config, work: Work, traffic: list[dict[str, Traffic]], rollout_s: float
) -> StepTime:
    """`traffic`: of every stage."""
    parallel, passes = config.parallel, work.num_micro_batches * work.num_updates
    compute = [_micro_batch_flops(model, config, work, stage) for stage in range(parallel.pipeline)]
    compute_s = max(compute) / (PEAK_FLOPS * COMPUTE_EFFICIENCY) * passes
    inside_s = max(_seconds(stage, ("tensor", "expert", "context", "pipeline")) for stage in traffic)
    waiting = (parallel.pipeline - 1) / (parallel.virtual_pipeline or 1)
    bubble_share = waiting / (work.num_micro_batches + waiting)
    reduce_s = max(_seconds(stage, ("data", "expert_data")) for stage in traffic)
    if config.trainer.optimizer.overlap_grad_reduce:
        reduce_s = max(0.0, reduce_s - _BACKWARD_SHARE * compute_s / work.num_micro_batches)
    train_s = (compute_s + inside_s) / (1 - bubble_share) + reduce_s
    useful = model_flops(model, work.mean_tokens) * work.num_tokens
    return StepTime(
        rollout_s=rollout_s,
        compute_s=compute_s,
        bubble_share=bubble_share,
        communication_s=inside_s + reduce_s,
        train_s=train_s,
        sync_s=2 * model.num_parameters / NETWORK_BYTES_PER_S,
        mfu=useful / (train_s * PEAK_FLOPS * parallel.num_ranks),
    )


def model_flops(model: Model, mean_tokens: float) -> float:
    """Of a token, forward and backward: 6 a parameter that it meets (the embedding is a look-up), and attention.

    `mean_tokens` is the length of its sequence.
    """
    met = model.num_active_parameters - (0 if model.tied_head else model.vocab_size * model.hidden)
    return 6 * met + 3 * sum(model.caches_keys) * _attention_flops(model, mean_tokens)


def _attention_flops(model: Model, mean_tokens: float) -> float:
    """Forward, of a token in one layer: two matmuls with the half of its sequence that lies before it."""
    return 2 * mean_tokens * model.query


def _micro_batch_flops(model: Model, config: Config, work: Work, stage: int) -> float:
    """Of a rank of the stage, recomputation included."""
    parallel = config.parallel
    share = model.experts_per_token / model.num_experts if model.num_experts else 0.0
    forward = 0.0
    for index in layers_of_stage(parallel, len(model.layers), stage):
        layer = model.layers[index]
        forward += 2 * (layer.total - layer.expert * (1 - share))
        forward += _attention_flops(model, work.mean_tokens) * model.caches_keys[index]
    a_token = forward * (4 if config.model.recompute == "full" else 3)
    if stage == parallel.pipeline - 1:
        a_token += 6 * model.vocab_size * model.hidden
    return a_token * work.tokens_per_micro_batch / parallel.tensor


def _seconds(traffic: dict[str, Traffic], kinds: tuple[str, ...]) -> float:
    return sum(item.seconds for kind, item in traffic.items() if kind in kinds)

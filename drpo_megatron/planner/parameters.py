"""Parameters, gradients and optimizer states of the ranks of a pipeline stage.

Counted from the same weight rules that convert checkpoints; `built.py` compares with what Megatron builds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.config.sections import ParallelSection
from drpo_megatron.planner.model import Model
from drpo_megatron.trainer.setup import padded_vocab_size


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Numbers of one rank of a stage; equal on all its ranks."""

    dense: int
    """Whatever is not inside an expert, frozen routers included."""
    expert: int
    frozen: int
    dense_optimizer: int
    """Of the dense parameters, those whose FP32 master and moments this rank holds."""
    expert_optimizer: int

    @property
    def total(self) -> int:
        return self.dense + self.expert

    @property
    def trained(self) -> int:
        return self.total - self.frozen

    @property
    def optimizer(self) -> int:
        return self.dense_optimizer + self.expert_optimizer


@dataclass(frozen=True, slots=True)
class StateBytes:
    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def expert_data_parallel(parallel: ParallelSection) -> int:
    """Ranks that hold the same experts: they share optimizer states of them."""
    return parallel.num_ranks // (parallel.expert * parallel.expert_tensor * parallel.pipeline)


def layers_of_stage(parallel: ParallelSection, num_layers: int, stage: int) -> list[int]:
    """Megatron deals chunks of layers round robin: chunk c of stage p is the (c x PP + p)-th."""
    chunks = parallel.virtual_pipeline or 1
    size = num_layers // (parallel.pipeline * chunks)
    starts = [(chunk * parallel.pipeline + stage) * size for chunk in range(chunks)]
    return [layer for start in starts for layer in range(start, start + size)]


def stage_parameters(model: Model, config: Config, stage: int) -> StageParameters:
    parallel, optimizer = config.parallel, config.trainer.optimizer
    layers = [model.layers[index] for index in layers_of_stage(parallel, len(model.layers), stage)]
    routers = sum(layer.router for layer in layers)
    dense = sum(layer.replicated + layer.split // parallel.tensor for layer in layers) + routers
    vocabulary = padded_vocab_size(model.vocab_size, parallel.tensor) // parallel.tensor * model.hidden
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1
    # A tied head is the embedding itself where one stage has both; else the last stage keeps a copy.
    dense += vocabulary * (is_first + (is_last and not (is_first and model.tied_head)))
    dense += model.final_norm * is_last
    expert = sum(layer.expert for layer in layers) // (parallel.expert * parallel.expert_tensor)
    frozen = routers if config.model.freeze_router else 0
    if optimizer.distributed:
        held_dense = _shard(dense - frozen, parallel.data * parallel.context)
        held_expert = _shard(expert, expert_data_parallel(parallel))
    else:
        held_dense, held_expert = dense - frozen, expert
    return StageParameters(dense, expert, frozen, held_dense, held_expert)


def state_bytes(parameters: StageParameters, is_bf16: bool) -> StateBytes:
    """BF16: 2 bytes a parameter, FP32 gradients, FP32 master and two moments. FP32: the parameter is its own master."""
    width, held = (2, 12) if is_bf16 else (4, 8)
    return StateBytes(
        parameters=width * parameters.total,
        gradients=4 * parameters.trained,
        optimizer=held * parameters.optimizer,
    )


def _shard(count: int, num_ranks: int) -> int:
    """The distributed optimizer pads the buffer to a multiple of lcm(ranks, 128) and cuts it evenly."""
    unit = math.lcm(num_ranks, 128)
    return math.ceil(count / unit) * unit // num_ranks

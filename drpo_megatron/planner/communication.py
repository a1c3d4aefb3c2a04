"""Bytes that one rank sends in a step, by kind, counted from what Megatron's layers and schedules communicate.

A gather or reduce-scatter over n ranks moves (n - 1) / n of the whole tensor, an all-reduce twice that. With full
recomputation the forward pass's share comes twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.hardware import GPUS_PER_NODE, NETWORK_BYTES_PER_S, NVLINK_BYTES_PER_S
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.parameters import StageParameters, expert_data_parallel, layers_of_stage
from drpo_megatron.planner.work import Work


@dataclass(frozen=True, slots=True)
class Traffic:
    bytes: float
    """A rank, a step with all its optimiser steps."""
    group: int
    """Ranks of the group."""
    extent: int
    """From its first to its last rank: within a node or not."""

    @property
    def is_within_node(self) -> bool:
        return self.extent <= GPUS_PER_NODE

    @property
    def seconds(self) -> float:
        return self.bytes / (NVLINK_BYTES_PER_S if self.is_within_node else NETWORK_BYTES_PER_S)


def stage_traffic(
    model: Model, config: Config, work: Work, stage: int, parameters: StageParameters
) -> dict[str, Traffic]:
    """Of a rank of the stage: tensor, expert, context, pipeline and data parallelism."""
    parallel = config.parallel
    tensor, expert, inner = parallel.tensor, parallel.expert, parallel.expert_tensor
    expert_data = expert_data_parallel(parallel)
    layers = layers_of_stage(parallel, len(model.layers), stage)
    passes = work.num_micro_batches * work.num_updates
    dense, experts = _data_parallel_bytes(parameters, config)
    per_pass = {
        "tensor": _tensor_bytes(model, config, work, layers, stage),
        "expert": _expert_bytes(model, config, work, layers),
        "context": _context_bytes(model, config, work, layers),
        "pipeline": _pipeline_bytes(model, config, work, stage),
    }
    sizes = {"tensor": tensor, "expert": expert * inner, "context": parallel.context, "pipeline": parallel.pipeline}
    extents = {
        "tensor": tensor,
        "expert": expert * inner,
        "context": tensor * parallel.context,
        "pipeline": parallel.num_ranks,
    }
    traffic = {kind: Traffic(bytes_ * passes, sizes[kind], extents[kind]) for kind, bytes_ in per_pass.items()}
    replicas, stage_ranks = parallel.data * parallel.context, parallel.num_ranks // parallel.pipeline
    traffic["data"] = Traffic(dense * work.num_updates, replicas, stage_ranks)
    traffic["expert_data"] = Traffic(experts * work.num_updates, expert_data, stage_ranks)
    return {kind: item for kind, item in traffic.items() if item.group > 1 and item.bytes > 0}


def _activation_bytes(model: Model, config: Config, work: Work) -> float:
    """Hidden states of one micro-batch, over all tensor-parallel ranks."""
    return work.tokens_per_micro_batch * model.hidden * (2 if config.trainer.dtype == "bf16" else 4)


def _others(size: int) -> float:
    return (size - 1) / size


def _tensor_bytes(model: Model, config: Config, work: Work, layers: list[int], stage: int) -> float:
    """Sequence parallel: two collectives in a block's forward and three in its backward pass (its input is gathered
    again for the weights' gradient). Else an all-reduce each way."""
    parallel = config.parallel
    forward, backward = (2, 3) if parallel.sequence else (2, 2)
    block = forward * (2 if config.model.recompute == "full" else 1) + backward
    num_blocks = sum(1 if model.has_experts[layer] and not model.shared_inner else 2 for layer in layers)
    at_ends = 2 * (stage == 0) + 2 * (stage == parallel.pipeline - 1)  # Embedding; hidden states of the loss.
    return (num_blocks * block + at_ends) * _activation_bytes(model, config, work) * _others(parallel.tensor)


def _expert_bytes(model: Model, config: Config, work: Work, layers: list[int]) -> float:
    """Dispatch and combine, forward and backward: every token's row travels to each of its experts."""
    parallel = config.parallel
    times = 4 + 2 * (config.model.recompute == "full")
    size = parallel.expert * parallel.expert_tensor
    rows = _activation_bytes(model, config, work) / parallel.tensor * model.experts_per_token * parallel.expert_tensor
    return sum(model.has_experts[layer] for layer in layers) * times * rows * _others(size)


def _context_bytes(model: Model, config: Config, work: Work, layers: list[int]) -> float:
    """Keys and values of the other ranks' tokens, and in the backward pass these again with their gradients."""
    parallel = config.parallel
    times = 3 + (config.model.recompute == "full")
    key = model.key / min(parallel.tensor, model.num_groups)
    keys_and_values = _activation_bytes(model, config, work) / model.hidden * 2 * key
    return sum(model.caches_keys[layer] for layer in layers) * times * keys_and_values * (parallel.context - 1)


def _pipeline_bytes(model: Model, config: Config, work: Work, stage: int) -> float:
    """Hidden states to the next stage, gradients to the one before, for every chunk."""
    parallel = config.parallel
    chunks = parallel.virtual_pipeline or 1
    sends = 2 * chunks - (stage == 0) - (stage == parallel.pipeline - 1)
    shard = parallel.tensor if parallel.sequence else 1
    return (sends if parallel.pipeline > 1 else 0) * _activation_bytes(model, config, work) / shard


def _data_parallel_bytes(parameters: StageParameters, config: Config) -> tuple[float, float]:
    """(dense, expert) of an optimiser step: FP32 gradients are reduced, parameters gathered where they are sharded."""
    width = 2 if config.trainer.dtype == "bf16" else 4
    per_parameter = 4 + width if config.trainer.optimizer.distributed else 8
    parallel = config.parallel
    dense = (parameters.dense - parameters.frozen) * per_parameter * _others(parallel.data * parallel.context)
    return dense, parameters.expert * per_parameter * _others(expert_data_parallel(parallel))

"""The engines: what they hold, how many sequences they decode at once, and about how long a rollout takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.hardware import (
    COMPUTE_EFFICIENCY,
    ENGINE_MEMORY_SHARE,
    HBM_BYTES_PER_S,
    PEAK_FLOPS,
)
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.work import Work

_STATE_BYTES = 4
"""SGLang keeps recurrent states in FP32, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How the engines of a recipe are made: replicas of the model, each on GPUs of its own."""

    num_replicas: int
    gpus: int
    """Of a replica."""
    weight_bytes: int
    """A parameter."""
    layer_weight_bytes: int
    """A parameter of a layer: less where the engine quantises (embeddings and head stay as they are)."""
    cache_bytes: int
    """An element of the KV cache."""


@dataclass(frozen=True, slots=True)
class Rollout:
    num_replicas: int
    gpus_per_replica: int
    weight_bytes: float
    """A GPU."""
    cache_bytes: float
    """A GPU: what is left for keys and values, and recurrent states. Not above 0: the weights alone are too large."""
    cache_bytes_per_token: float
    """A GPU."""
    concurrency: int
    """Longest sequences that a replica's cache holds at once."""
    seconds: float
    """Estimate of the time of a rollout."""


def engine_of(config: Config) -> Engine:
    """A replica: the embedded engine is an FP32 model on one GPU, an SGLang server may hold several of many GPUs."""
    section = config.rollout.engine
    if section.name == "transformers":
        return Engine(section.num_engines, gpus=1, weight_bytes=4, layer_weight_bytes=4, cache_bytes=4)
    width = 4 if section.dtype == "float32" else 2
    is_fp8_cache = str(section.flags.get("kv-cache-dtype", "auto")).startswith("fp8")
    return Engine(
        num_replicas=section.num_engines * section.data_parallel,
        gpus=section.tensor_parallel,
        weight_bytes=width,
        layer_weight_bytes=1 if config.precision.rolls_out_quantized else width,
        cache_bytes=1 if is_fp8_cache else width,
    )


def plan_rollout(model: Model, config: Config, work: Work, gpu_bytes: float, held_bytes: float = 0) -> Rollout:
    """held_bytes: of each GPU, by the ranks that the engines share it with. They keep their states while engines draw."""
    engine = engine_of(config)
    in_layers = sum(layer.total for layer in model.layers)
    outside = (model.num_parameters - in_layers) * engine.weight_bytes
    weights = (outside + in_layers * engine.layer_weight_bytes) / engine.gpus
    groups = model.num_groups / min(engine.gpus, model.num_groups)  # More ranks than groups hold copies.
    head = model.key / model.num_groups
    a_token = 2 * sum(model.caches_keys) * groups * head * engine.cache_bytes
    state = model.caches_keys.count(False) * model.recurrent_state * _STATE_BYTES / engine.gpus
    cache = gpu_bytes * ENGINE_MEMORY_SHARE - held_bytes - weights
    concurrency = max(0, int(cache / (a_token * work.longest_tokens + state)))
    seconds = _seconds(model, config, work, engine, weights * engine.gpus, concurrency)
    return Rollout(engine.num_replicas, engine.gpus, weights, cache, a_token, concurrency, seconds)


def _seconds(model: Model, config: Config, work: Work, engine: Engine, weight_bytes: float, concurrency: int) -> float:
    """Decoding is bound by memory or by compute; the longest response is waited for. `weight_bytes` of a replica."""
    if concurrency < 1:
        return math.inf
    sequences = math.ceil(work.num_sequences / engine.num_replicas)
    at_once = min(sequences, concurrency)
    experts_read = 1 - (1 - model.experts_per_token / model.num_experts) ** at_once if model.num_experts else 0.0
    routed = sum(layer.expert for layer in model.layers)
    weights = weight_bytes - routed * (1 - experts_read) * engine.layer_weight_bytes
    context = work.prompt_tokens + work.mean_response_tokens / 2
    cache = at_once * context * 2 * sum(model.caches_keys) * model.key * engine.cache_bytes
    read_s = (weights + cache) / (HBM_BYTES_PER_S * engine.gpus)
    multiply_s = 2 * model.num_active_parameters * at_once / (PEAK_FLOPS * COMPUTE_EFFICIENCY * engine.gpus)
    num_rounds = max(config.rollout.max_response_tokens, sequences * work.mean_response_tokens / at_once)
    return num_rounds * max(read_s, multiply_s)

"""What the backward pass needs kept of a micro-batch, tensor by tensor.

Two sets of layers are told apart, as in the trainer. torch's run on CPUs; their lists are compared with what autograd
really saves (`tools/measure_activations.py`, `tests/planner/test_activations.py`). Transformer Engine's run on GPUs;
their lists are the same less what fused norms, SwiGLU, rotary embedding and flash attention do not save, and were not
measured. Experts are taken as balanced.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.parameters import layers_of_stage

_FP32 = 4


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Elements a token of one rank, and bytes an element."""

    hidden: float
    """Between the tensor-parallel regions: a share of a token under sequence parallelism."""
    query: float
    key: float
    heads: float
    dense_inner: float
    shared_inner: float
    expert_inner: float
    expert_rows: float
    """Rows that this rank's experts see a token, each of the whole hidden size."""
    width: int
    is_fused: bool
    is_selective: bool


def tokens_of_rank(config: Config) -> int:
    """Of a full micro-batch, after context parallelism."""
    return math.ceil(config.trainer.max_tokens_per_micro_batch / config.parallel.context)


def stage_activation_bytes(model: Model, config: Config, stage: int, num_micro_batches: int) -> int:
    """Of all micro-batches that a rank of the stage holds between their forward and their backward pass."""
    chunk = micro_batch_bytes(model, config, stage) / (config.parallel.virtual_pipeline or 1)
    in_flight = chunks_in_flight(config, stage, num_micro_batches)
    layers = layers_of_stage(config.parallel, len(model.layers), stage)
    recomputed = max(layer_bytes(model, config, layer) for layer in layers) if _is_full(config) else 0
    return round(in_flight * chunk + recomputed * tokens_of_rank(config))


def chunks_in_flight(config: Config, stage: int, num_micro_batches: int) -> int:
    """Model chunks of micro-batches that wait for their backward pass: 1F1B, or interleaved 1F1B."""
    parallel = config.parallel
    after, chunks = parallel.pipeline - 1 - stage, parallel.virtual_pipeline
    if chunks is None:
        return min(num_micro_batches, after + 1)
    return min(num_micro_batches * chunks, 2 * after + (chunks - 1) * parallel.pipeline + 1)


def micro_batch_bytes(model: Model, config: Config, stage: int) -> int:
    """What one micro-batch keeps on a rank of the stage, from its forward to its backward pass."""
    parallel, sizes = config.parallel, _sizes(model, config)
    layers = layers_of_stage(parallel, len(model.layers), stage)
    if _is_full(config):
        a_token = len(layers) * sizes.hidden * sizes.width
    else:
        a_token = sum(layer_bytes(model, config, layer) for layer in layers)
    if stage == parallel.pipeline - 1:
        a_token += _norm(sizes.hidden, sizes)
    return round(a_token * tokens_of_rank(config))


def layer_bytes(model: Model, config: Config, layer: int) -> float:
    """What one layer keeps a token, without full recomputation."""
    sizes = _sizes(model, config)
    mixer = _attention(sizes) if model.caches_keys[layer] else _linear_attention(model, config, sizes)
    return mixer + (_experts(model, sizes) if model.has_experts[layer] else _dense_mlp(sizes))


def _is_full(config: Config) -> bool:
    return config.model.recompute == "full"


def _sizes(model: Model, config: Config) -> _Sizes:
    parallel = config.parallel
    shard = parallel.tensor if parallel.sequence else 1
    return _Sizes(
        hidden=model.hidden / shard,
        query=model.query / parallel.tensor,
        key=model.key / min(parallel.tensor, model.num_groups),
        heads=model.num_heads / parallel.tensor,
        dense_inner=model.dense_inner / parallel.tensor,
        shared_inner=model.shared_inner / parallel.tensor,
        expert_inner=model.expert_inner / parallel.expert_tensor,
        expert_rows=model.experts_per_token * parallel.expert_tensor / shard,
        width=2 if config.trainer.dtype == "bf16" else 4,
        is_fused=config.trainer.backend != "cpu",
        is_selective=config.model.recompute == "selective",
    )


def _norm(elements: float, sizes: _Sizes) -> float:
    """A fused norm keeps its input. torch's keeps it and the normalised one, both in FP32."""
    return elements * (sizes.width if sizes.is_fused else 2 * _FP32)


def _swiglu(inner: float, sizes: _Sizes) -> float:
    """fc1's output (gate and up) and fc2's input; unfused also silu(gate) and up."""
    return inner * sizes.width * (3 if sizes.is_fused else 5)


def _attention(sizes: _Sizes) -> float:
    query, key, width = sizes.query, sizes.key, sizes.width
    head = query / sizes.heads
    kept = _norm(sizes.hidden, sizes) + sizes.hidden * width  # the norm before it; QKV's input
    kept += _norm(query + key, sizes)  # q and k norms
    qkv, output, log_sum_exp = (query + 2 * key) * width, query * width, sizes.heads * _FP32
    if sizes.is_fused:
        return kept + qkv + output + log_sum_exp * (not sizes.is_selective)
    kept += 4 * head * width + output  # sine and cosine, for q and for k; the output projection's input
    if width == _FP32:  # The k norm's input is a view of all of QKV, which stays; in BF16 it is a copy in FP32.
        kept += qkv - key * _FP32
    if sizes.is_selective:  # q and k are kept, and v as a view of QKV.
        return kept + (query + key) * width + qkv * (width != _FP32)
    return kept + qkv + output + log_sum_exp  # of the padded rectangle of sequences


def _linear_attention(model: Model, config: Config, sizes: _Sizes) -> float:
    """The norm, the projections' input and output, the same after the convolution and after the norms of q and k, the
    gated output."""
    projected = model.linear_attention / config.parallel.tensor
    return _norm(sizes.hidden, sizes) + (sizes.hidden + 3.5 * projected) * sizes.width


def _dense_mlp(sizes: _Sizes) -> float:
    return _norm(sizes.hidden, sizes) + sizes.hidden * sizes.width + _swiglu(sizes.dense_inner, sizes)


def _experts(model: Model, sizes: _Sizes) -> float:
    share = sizes.hidden / model.hidden
    # Of the router: FP32 probabilities and a mask over all experts; indices, probabilities and places of the chosen.
    router = ((_FP32 + 1) * model.num_experts + 40 * model.experts_per_token) * share
    # Scaling by the router's probability keeps the unscaled product where it is not fused into the activation.
    unscaled = sizes.expert_inner * sizes.width * (not sizes.is_fused)
    rows = model.hidden * sizes.width + _swiglu(sizes.expert_inner, sizes) + unscaled
    before = _norm(sizes.hidden, sizes) + sizes.hidden * sizes.width
    return before + router + rows * sizes.expert_rows + _swiglu(sizes.shared_inner, sizes)

"""The few numbers of a checkpoint's config.json that the layout depends on, read without torch or transformers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.reading import read_json_object, short

KNOWN_MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text", "mixtral")
"""The families in `drpo_megatron.models`, which this module is too low to import. A test keeps the two equal."""

_NAMES_OF_NUM_EXPERTS = ("num_experts", "num_local_experts")
"""As Qwen publishes it, and as Mixtral does and transformers 5 writes it."""
_EXPERT_SIZE = {
    "qwen3_moe": "moe_intermediate_size",
    "qwen3_5_moe": "moe_intermediate_size",
    "qwen3_5_moe_text": "moe_intermediate_size",
    "mixtral": "intermediate_size",
}
"""What a family with experts calls the inner size of one; without an entry a family is dense."""


_POSITIVE = (
    "hidden_size",
    "vocab_size",
    "head_dim",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)


@dataclass(frozen=True, slots=True)
class HFModelConfig:
    model_type: str
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    num_experts: int | None
    """None: a dense model."""
    moe_intermediate_size: int | None
    """Inner size of an expert. None: a dense model."""
    intermediate_size: int | None
    """Inner size of a dense MLP. None: every layer has experts."""
    shared_expert_intermediate_size: int | None = None
    """None: there is no shared expert."""
    linear_num_key_heads: int | None = None
    """Of a gated delta net. None: every layer is attention."""
    linear_key_head_dim: int | None = None
    quantization: str | None = None
    """Method that the weights are quantised with, such as fp8. None: they aren't."""


@dataclass(frozen=True, slots=True)
class ExpertRouting:
    """How a model routes: what a trace of its routers has to look like."""

    num_layers: int
    """Of the model, those without experts included."""
    moe_layers: tuple[int, ...]
    """The layers with experts, counted from 0."""
    num_experts: int
    experts_per_token: int


def read_expert_routing(directory: str | os.PathLike[str]) -> ExpertRouting | None:
    """The same file's word on routing. None for a dense model. Raises ValueError as `read_hf_config` does."""
    model = read_hf_config(directory)
    if model.num_experts is None:
        return None
    file = Path(directory) / "config.json"
    fields = _read_object(file)
    fields = fields.get("text_config", fields)
    experts_per_token = fields.get("num_experts_per_tok")
    if type(experts_per_token) is not int or not 1 <= experts_per_token <= model.num_experts:
        raise ValueError(f"{file}: num_experts_per_tok={experts_per_token!r} is not within 1 ... {model.num_experts}")
    dense, step = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step", 1)
    layers = tuple(layer for layer in range(model.num_layers) if layer not in dense and (layer + 1) % step == 0)
    return ExpertRouting(model.num_layers, layers, model.num_experts, experts_per_token)


def read_hf_config(directory: str | os.PathLike[str]) -> HFModelConfig:
    """What `config.json` of a Hugging Face checkpoint says about the model.

    Raises: ValueError when directory or file is missing, the file is no JSON object, its `model_type` is not one of
        KNOWN_MODEL_TYPES, or a number is missing or not a positive integer.
    """
    file = Path(directory) / "config.json"
    fields = _read_object(file)
    model_type = fields.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type={short(repr(model_type))} is not supported; the supported ones are "
            f"{', '.join(KNOWN_MODEL_TYPES)}"
        )

    quantization = fields.get("quantization_config") or {}
    fields = fields.get("text_config", fields)  # Of a model that also sees, the part that reads and writes.
    for name, value in (("quantization_config", quantization), ("text_config", fields)):
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {name} is {short(repr(value))}, not an object; copy the file again")
    if problems := list(_odd_values(fields)):
        raise ValueError(f"{file}: {'; '.join(problems)}; copy the file again")

    def number(*names: str) -> int:
        name = next((name for name in names if name in fields), names[0])
        value = fields.get(name)
        if type(value) is not int or value < 1:
            found = f"is {short(repr(value))}" if name in fields else "is missing"
            raise ValueError(f"{file}: {name} {found}; it must be a positive integer")
        return value

    is_hybrid = model_type.startswith("qwen3_5_moe")
    expert_size = _EXPERT_SIZE.get(model_type)
    has_dense_layers = expert_size is None or (model_type == "qwen3_moe" and _has_dense_layers(fields))
    return HFModelConfig(
        model_type=model_type,
        num_layers=number("num_hidden_layers"),
        num_attention_heads=number("num_attention_heads"),
        num_key_value_heads=number("num_key_value_heads"),
        max_position_embeddings=number("max_position_embeddings"),
        num_experts=number(*_NAMES_OF_NUM_EXPERTS) if expert_size else None,
        moe_intermediate_size=number(expert_size) if expert_size else None,
        intermediate_size=number("intermediate_size") if has_dense_layers else None,
        shared_expert_intermediate_size=number("shared_expert_intermediate_size") if is_hybrid else None,
        linear_num_key_heads=number("linear_num_key_heads") if is_hybrid else None,
        linear_key_head_dim=number("linear_key_head_dim") if is_hybrid else None,
        quantization=str(quantization.get("quant_method")) if quantization else None,
    )


def _odd_values(fields: dict[str, Any]) -> Iterator[str]:
    """What no model can have, among the values that nothing here needs: transformers would find out one by one."""
    for name in _POSITIVE:
        value = fields.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            yield f"{name} is {short(repr(value))}, not a positive integer"
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        yield f"rope_parameters is {short(repr(rope))}, not an object"
        rope = {}
    for name, value in (
        ("rope_theta", fields.get("rope_theta")),
        ("rms_norm_eps", fields.get("rms_norm_eps")),
        ("rope_parameters.rope_theta", rope.get("rope_theta")),
    ):
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            yield f"{name} is {short(repr(value))}, not a positive number"
    heads, kv_heads = fields.get("num_attention_heads"), fields.get("num_key_value_heads")
    if type(heads) is int and type(kv_heads) is int and kv_heads > 0 and heads % kv_heads:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
    experts = next((fields[name] for name in _NAMES_OF_NUM_EXPERTS if name in fields), None)
    chosen = fields.get("num_experts_per_tok")
    if type(experts) is int and chosen is not None and (type(chosen) is not int or not 1 <= chosen <= max(experts, 1)):
        yield f"num_experts_per_tok={short(repr(chosen))} is not within 1 ... {experts} experts"
    size, eos = fields.get("vocab_size"), fields.get("eos_token_id")
    for token in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if type(token) is not int or token < 0 or (type(size) is int and token >= size):
            yield f"eos_token_id={short(repr(token))} is no token of vocab_size={size}"
    step, dense = fields.get("decoder_sparse_step"), fields.get("mlp_only_layers")
    if step is not None and (type(step) is not int or step < 1):
        yield f"decoder_sparse_step is {short(repr(step))}, not a positive integer"
    if dense is not None and not (isinstance(dense, list) and all(type(layer) is int for layer in dense)):
        yield f"mlp_only_layers is {short(repr(dense))}, not a list of layers"


def _has_dense_layers(fields: dict[str, Any]) -> bool:
    """Of a Qwen3-MoE: transformers gives them to every `decoder_sparse_step`-th layer, less the named ones."""
    return bool(fields.get("mlp_only_layers")) or fields.get("decoder_sparse_step", 1) != 1


def _read_object(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise ValueError(f"model.hf_path: the checkpoint directory {file.parent} does not exist")
    if not file.is_file():
        raise ValueError(f"model.hf_path: {file.parent} has no config.json; it is not a Hugging Face checkpoint")
    return read_json_object(file)

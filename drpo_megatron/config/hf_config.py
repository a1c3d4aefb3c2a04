"""The few numbers of a checkpoint's config.json that the layout depends on, read without torch or transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.reading import read_json_object

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
            f"{file}: model_type={model_type!r} is not supported; the supported ones are {', '.join(KNOWN_MODEL_TYPES)}"
        )

    quantization = fields.get("quantization_config") or {}
    fields = fields.get("text_config", fields)  # Of a model that also sees, the part that reads and writes.

    def number(*names: str) -> int:
        name = next((name for name in names if name in fields), names[0])
        value = fields.get(name)
        if type(value) is not int or value < 1:
            found = f"is {value!r}" if name in fields else "is missing"
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


def _has_dense_layers(fields: dict[str, Any]) -> bool:
    """Of a Qwen3-MoE: transformers gives them to every `decoder_sparse_step`-th layer, less the named ones."""
    return bool(fields.get("mlp_only_layers")) or fields.get("decoder_sparse_step", 1) != 1


def _read_object(file: Path) -> dict[str, Any]:
    if not file.parent.is_dir():
        raise ValueError(f"model.hf_path: the checkpoint directory {file.parent} does not exist")
    if not file.is_file():
        raise ValueError(f"model.hf_path: {file.parent} has no config.json; it is not a Hugging Face checkpoint")
    return read_json_object(file)

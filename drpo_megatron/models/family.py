"""What a model family declares, and the Hugging Face config it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from drpo_megatron.models.rules import Rule
from drpo_megatron.reading import one_line

HFConfig = Any
"""A transformers PreTrainedConfig, or the dict in config.json."""


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`: its parameters' rules, and how Megatron builds the same model."""

    model_type: str
    unsupported: Callable[[HFConfig], list[str]]
    """What the config asks for that the family can't do: `key=value: why`, one entry each."""
    megatron_config: Callable[[HFConfig], dict[str, Any]]
    parameter_rules: Callable[[HFConfig], list[Rule]]
    """In the names of the published checkpoints."""
    rules_of_names: Callable[[HFConfig, Collection[str]], list[Rule]] | None = None
    """Of a family whose checkpoints differ in what they call their tensors: the rules for one that holds these."""
    stacked_rules: Callable[[HFConfig, Collection[str]], list[Rule]] | None = None
    """Of a family with experts: the rules for a checkpoint that looks like these names, but holds a layer's experts in
    two tensors, as transformers 5 does."""
    ignored: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are no parameters of ours: not loaded, copied by an export."""

    def transformer_config_kwargs(self, hf_config: HFConfig) -> dict[str, Any]:
        """Arguments of megatron.core TransformerConfig that the model decides (not those of layout or precision)."""
        return self.megatron_config(typed_config(hf_config))

    def gpt_model_kwargs(self, hf_config: HFConfig) -> dict[str, Any]:
        """Arguments of GPTModel beside config, spec and stage. `vocab_size` is not padded yet."""
        config = typed_config(hf_config)
        return {
            "vocab_size": config.vocab_size,
            "max_sequence_length": config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": config.rope_parameters["rope_theta"],
            "rotary_percent": config.rope_parameters.get("partial_rotary_factor", 1.0),
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
        }

    def rules(self, hf_config: HFConfig, names: Collection[str] | None = None) -> list[Rule]:
        """The rule of every parameter of the whole model, in the order of the checkpoint: the export's order.

        Args:
            names: every tensor's name in the checkpoint that is read, or that the export shall look like.
        """
        config = typed_config(hf_config)
        if names and self.rules_of_names is not None:
            return self.rules_of_names(config, names)
        return self.parameter_rules(config)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is no parameter of ours."""
        return name.startswith(self.ignored)


def typed_config(hf_config: HFConfig, place: str = "config.json") -> HFConfig:
    """A transformers config of the text model with all defaults filled in, of a transformers config or a dict.

    Args:
        place: the file that it was read from, for errors.

    Raises: ValueError, in one line, for a dict that transformers can't make one of.
    """
    if isinstance(hf_config, Mapping):
        from transformers import CONFIG_MAPPING  # Slow to import, and most callers hold a typed config already.

        kind = CONFIG_MAPPING[hf_config["model_type"]]
        try:
            hf_config = kind.from_dict(deepcopy(dict(hf_config)))  # It writes into its argument.
        except Exception as error:  # Whatever a foreign file makes of foreign code: it is the file that is wrong.
            raise ValueError(
                f"{place} is none of a {kind.model_type}, says transformers: {type(error).__name__}: {one_line(error)}"
            ) from error
    return hf_config.get_text_config()


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "decoder_sparse_step",
    "max_position_embeddings",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
_MULTIPLES = (
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)


def bad_sizes(config: HFConfig) -> list[str]:
    """What no model can be of: sizes that aren't positive integers, or don't fit together."""
    found = {key: getattr(config, key, None) for key in _SIZES}
    sizes: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    problems = [
        f"{key}={value!r} is no positive integer" for key, value in sizes.items() if type(value) is not int or value < 1
    ]
    rope = config.rope_parameters.get("rope_theta") if isinstance(config.rope_parameters, Mapping) else None
    for key, number in {"rms_norm_eps": config.rms_norm_eps, "rope_theta": rope}.items():
        if type(number) not in (int, float) or not 0 < number < math.inf:
            problems.append(f"{key}={number!r} is no positive number")
    if problems:
        return problems
    for whole, part in _MULTIPLES:
        if whole in sizes and part in sizes and sizes[whole] % sizes[part]:
            problems.append(f"{whole}={sizes[whole]} is no multiple of {part}={sizes[part]}")
    experts = sizes.get("num_experts", sizes.get("num_local_experts"))
    if (chosen := sizes.get("num_experts_per_tok", 0)) > (experts or 0):
        problems.append(f"num_experts_per_tok={chosen} of {experts} experts")
    return problems


def contradictions(config: Mapping[str, Any]) -> list[str]:
    """What config.json says twice, and not the same: which of the two counts depends on who reads it."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, Mapping) else [config]
    problems = []
    for part in parts:
        ropes = {key: part[key] for key in ("rope_parameters", "rope_scaling") if isinstance(part.get(key), Mapping)}
        for key in ("rope_theta", "partial_rotary_factor"):
            said = {key: part[key]} if part.get(key) is not None else {}
            said |= {f"{name}.{key}": rope[key] for name, rope in ropes.items() if rope.get(key) is not None}
            problems += _unequal(said)
        problems += _unequal(
            {key: part[key] for key in ("num_experts", "num_local_experts") if part.get(key) is not None}
        )
        problems += _unequal({key: rope.get("rope_type", rope.get("type")) for key, rope in ropes.items()})
    if isinstance(text, Mapping):  # One ties the model with vision, the other the text model that is trained.
        ties = {"tie_word_embeddings": config, "text_config.tie_word_embeddings": text}
        problems += _unequal({name: bool(part.get("tie_word_embeddings", False)) for name, part in ties.items()})
    return problems


def _unequal(said: Mapping[str, Any]) -> list[str]:
    if len({repr(float(v)) if isinstance(v, (int, float)) else repr(v) for v in said.values()}) < 2:
        return []
    return [f"{' but '.join(f'{key}={value}' for key, value in said.items())}: they must be equal"]

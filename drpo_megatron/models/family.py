"""What a model family declares, and the Hugging Face config it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drpo_megatron.models.rules import Rule

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
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
        }

    def rules(self, hf_config: HFConfig) -> list[Rule]:
        """The rule of every parameter of the whole model, in the order of the checkpoint: the export's order."""
        return self.parameter_rules(typed_config(hf_config))


def typed_config(hf_config: HFConfig) -> HFConfig:
    """A transformers config with all defaults filled in; one that is typed already is returned as it is."""
    if not isinstance(hf_config, Mapping):
        return hf_config
    from transformers import CONFIG_MAPPING  # Slow to import, and most callers hold a typed config already.

    return CONFIG_MAPPING[hf_config["model_type"]].from_dict(dict(hf_config))

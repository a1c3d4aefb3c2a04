"""What a model family declares, and the Hugging Face config it reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
    """In the names of the published checkpoints."""
    rules_of_names: Callable[[HFConfig, Collection[str]], list[Rule]] | None = None
    """Of a family whose checkpoints differ in what they call their tensors: the rules for one that holds these."""
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


def typed_config(hf_config: HFConfig) -> HFConfig:
    """A transformers config of the text model with all defaults filled in, of a transformers config or a dict."""
    if isinstance(hf_config, Mapping):
        from transformers import CONFIG_MAPPING  # Slow to import, and most callers hold a typed config already.

        hf_config = CONFIG_MAPPING[hf_config["model_type"]].from_dict(dict(hf_config))
    return hf_config.get_text_config()

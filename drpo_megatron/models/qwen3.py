"""Qwen3 dense (Qwen3-4B-Base, ...): grouped-query attention with q/k norms and SwiGLU; tied or untied head."""

from __future__ import annotations

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import Rule


def rules(config: HFConfig) -> list[Rule]:
    layers = [
        rule
        for layer in range(config.num_hidden_layers)
        for rule in [*decoder.attention(config, layer), *decoder.dense_mlp(config, layer)]
    ]
    return [decoder.embedding(config), *layers, *decoder.final_norm_and_head(config)]


FAMILY = Family("qwen3", decoder.unsupported, decoder.megatron_config, rules)

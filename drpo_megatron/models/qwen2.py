"""Qwen2 and Qwen2.5 dense (DeepSeek-R1-Distill-Qwen-1.5B, ...): q/k/v biases and no q/k norms; tied or untied head."""

from __future__ import annotations

from typing import Any

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import Rule


def megatron_config(config: HFConfig) -> dict[str, Any]:
    return decoder.megatron_config(config) | {"qk_layernorm": False, "add_qkv_bias": True}


def rules(config: HFConfig) -> list[Rule]:
    layers: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        layers += decoder.attention(config, layer, qk_norms=False, qkv_biases=True)
        layers += decoder.dense_mlp(config, layer)
    return [decoder.embedding(config), *layers, *decoder.final_norm_and_head(config)]


FAMILY = Family("qwen2", decoder.unsupported, megatron_config, rules)

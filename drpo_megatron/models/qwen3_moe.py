"""Qwen3-MoE (Qwen3-30B-A3B, ...): Qwen3's attention; most or all layers route to experts, the rest are dense.

A checkpoint holds each expert on its own (published), or a layer's in two tensors (transformers 5 with
save_original_format=False).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import Rule


def is_moe_layer(config: HFConfig, layer: int) -> bool:
    """transformers' rule: every `decoder_sparse_step`-th layer, unless `mlp_only_layers` names it."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def megatron_config(config: HFConfig) -> dict[str, Any]:
    layers = [is_moe_layer(config, layer) for layer in range(config.num_hidden_layers)]
    return decoder.megatron_config(config) | decoder.routed_experts(
        config, config.moe_intermediate_size, layers, config.norm_topk_prob
    )


def unsupported(config: HFConfig) -> list[str]:
    problems = decoder.unsupported(config)
    if not any(is_moe_layer(config, layer) for layer in range(config.num_hidden_layers)):
        problems.append(
            f"mlp_only_layers={config.mlp_only_layers} with decoder_sparse_step={config.decoder_sparse_step}: no layer "
            "has experts; a model without experts is model_type=qwen3"
        )
    if config.norm_topk_prob:
        problems += decoder.frozen_router(config, "norm_topk_prob=true")
    return problems


def rules(config: HFConfig) -> list[Rule]:
    return _rules(config, frozenset())


def rules_of_names(config: HFConfig, names: Collection[str]) -> list[Rule]:
    """The rules in the names that a checkpoint uses."""
    return _rules(config, decoder.stacked_names(names))


def stacked_rules(config: HFConfig, names: Collection[str]) -> list[Rule]:
    return _rules(config, decoder.STACKED)


def _rules(config: HFConfig, stacked: frozenset[str]) -> list[Rule]:
    layers: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        layers += decoder.attention(config, layer)
        if is_moe_layer(config, layer):
            block = f"model.layers.{layer}.mlp"
            layers += decoder.moe(config, layer, block, config.moe_intermediate_size, stacked=stacked)
        else:
            layers += decoder.dense_mlp(config, layer)
    return [decoder.embedding(config), *layers, *decoder.final_norm_and_head(config)]


FAMILY = Family("qwen3_moe", unsupported, megatron_config, rules, rules_of_names, stacked_rules)

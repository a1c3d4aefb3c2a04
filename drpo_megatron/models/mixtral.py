"""Mixtral (Mixtral-8x7B, 8x22B): attention without q/k norms, experts in every layer, renormalised top-k.

Published checkpoints call a layer's experts `block_sparse_moe.experts.E.w1`; transformers 5 with
save_original_format=False calls them `mlp.experts.gate_up_proj`, all in one tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import Rule

MATRICES = ("w1", "w3", "w2")
"""What a checkpoint calls an expert's gate, up and down."""


def megatron_config(config: HFConfig) -> dict[str, Any]:
    everywhere = [True] * config.num_hidden_layers
    experts = decoder.routed_experts(config, config.intermediate_size, everywhere)
    return decoder.megatron_config(config) | experts | {"qk_layernorm": False}


def unsupported(config: HFConfig) -> list[str]:
    problems = [*decoder.unsupported(config), *decoder.frozen_router(config, "renormalised top-k")]
    if config.router_jitter_noise:
        problems.append(f"router_jitter_noise={config.router_jitter_noise}: only 0, training without noise")
    return problems


def rules(config: HFConfig) -> list[Rule]:
    return _rules(config, frozenset())


def rules_of_names(config: HFConfig, names: Collection[str]) -> list[Rule]:
    """The rules in the names that a checkpoint uses."""
    return _rules(config, decoder.stacked_names(names))


def stacked_rules(config: HFConfig, names: Collection[str]) -> list[Rule]:
    return _rules(config, decoder.STACKED)


def _rules(config: HFConfig, stacked: frozenset[str]) -> list[Rule]:
    block = "mlp" if stacked else "block_sparse_moe"
    matrices = decoder.GATED_MLP if stacked else MATRICES
    layers: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.{block}"
        layers += decoder.attention(config, layer, qk_norms=False)
        layers += decoder.moe(config, layer, name, config.intermediate_size, matrices, stacked)
    return [decoder.embedding(config), *layers, *decoder.final_norm_and_head(config)]


FAMILY = Family("mixtral", unsupported, megatron_config, rules, rules_of_names, stacked_rules)

"""Qwen3-MoE (Qwen3-30B-A3B, ...): Qwen3's attention; most or all layers route to experts, the rest are dense."""

from __future__ import annotations

from typing import Any

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import Rule


def is_moe_layer(config: HFConfig, layer: int) -> bool:
    """transformers' rule: every `decoder_sparse_step`-th layer, unless `mlp_only_layers` names it."""
    return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0


def megatron_config(config: HFConfig) -> dict[str, Any]:
    """Qwen3-MoE softmaxes over all experts, takes the top k, and renormalises them if `norm_topk_prob`.

    A renormalised softmax over all is the softmax over the top k, which is what Megatron does after its top-k;
    without the renormalisation it is Megatron's softmax before the top-k.
    """
    return decoder.megatron_config(config) | {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [int(is_moe_layer(config, layer)) for layer in range(config.num_hidden_layers)],
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not config.norm_topk_prob,
    }


def unsupported(config: HFConfig) -> list[str]:
    problems = decoder.unsupported(config)
    if not any(is_moe_layer(config, layer) for layer in range(config.num_hidden_layers)):
        problems.append(
            f"mlp_only_layers={config.mlp_only_layers} with decoder_sparse_step={config.decoder_sparse_step}: no layer "
            "has experts; a model without experts is model_type=qwen3"
        )
    if config.norm_topk_prob and config.num_experts_per_tok == 1:
        problems.append("norm_topk_prob=true with num_experts_per_tok=1: the router's output is 1 and never learns")
    return problems


def rules(config: HFConfig) -> list[Rule]:
    layers: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        mlp = decoder.moe if is_moe_layer(config, layer) else decoder.dense_mlp
        layers += [*decoder.attention(config, layer), *mlp(config, layer)]
    return [decoder.embedding(config), *layers, *decoder.final_norm_and_head(config)]


FAMILY = Family("qwen3_moe", unsupported, megatron_config, rules)

"""Qwen3.5-MoE (Qwen3.5-35B-A3B, ...), the text model: gated delta nets, every few layers gated attention, and experts
beside a shared one in every layer. `qwen3_5_moe` is the published model with vision, `qwen3_5_moe_text` the text alone.

Checkpoints name the text model's tensors in several ways: `model.language_model.` or `model.` in front, and a layer's
experts stacked in one tensor (published in BF16) or each on its own (published in FP8, saved by transformers). What
transformers loads stacked it saves half and half: gate and up on their own, down stacked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from drpo_megatron.models import decoder
from drpo_megatron.models.family import Family, HFConfig
from drpo_megatron.models.rules import GatedQKV, HFTensor, Key, Replicated, Rule, Sections, Split

NESTED, ALONE = "model.language_model", "model"
IGNORED = ("model.visual.", "mtp.")


def is_linear_layer(config: HFConfig, layer: int) -> bool:
    return config.layer_types[layer] == "linear_attention"


def megatron_config(config: HFConfig) -> dict[str, Any]:
    everywhere = [True] * config.num_hidden_layers
    linear = [int(is_linear_layer(config, layer)) for layer in range(config.num_hidden_layers)]
    return (
        decoder.megatron_config(config)
        | decoder.routed_experts(config, config.moe_intermediate_size, everywhere)
        | {
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            "layernorm_zero_centered_gamma": True,
            "attention_output_gate": True,
            "experimental_attention_variant": "gated_delta_net" if any(linear) else None,
            "linear_attention_freq": linear,
            "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
            "linear_key_head_dim": config.linear_key_head_dim,
            "linear_value_head_dim": config.linear_value_head_dim,
            "linear_num_key_heads": config.linear_num_key_heads,
            "linear_num_value_heads": config.linear_num_value_heads,
        }
    )


def unsupported(config: HFConfig) -> list[str]:
    interval = getattr(config, "full_attention_interval", None)
    problems = decoder.unsupported(config, rotates_partly=True, layer_types=("linear_attention", "full_attention"))
    problems += decoder.frozen_router(config, "renormalised top-k")
    problems += decoder.read_by_some(
        config, {"attn_output_gate": True, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    )
    if (gate := getattr(config, "output_gate_type", None)) not in (None, "swish", "silu"):
        problems.append(f"output_gate_type={gate!r}: only swish, which is all that transformers knows")
    if interval is not None and not _agrees(interval, config):
        problems.append(
            f"full_attention_interval={interval!r} contradicts layer_types: SGLang reads the first, transformers the second"
        )
    return problems


def _agrees(interval: Any, config: HFConfig) -> bool:
    """Whether every `interval`-th layer, and no other, is attention."""
    if type(interval) is not int or interval < 1:
        return False
    return all(is_linear_layer(config, i) == ((i + 1) % interval != 0) for i in range(config.num_hidden_layers))


def rules_of_names(config: HFConfig, names: Collection[str]) -> list[Rule]:
    """The rules in the names that a checkpoint uses."""
    # Multi-token prediction has experts of its own, in a layout of its own.
    ours = [name for name in names if not name.startswith(IGNORED)]
    return _rules(config, _model(names), decoder.stacked_names(ours))


def stacked_rules(config: HFConfig, names: Collection[str]) -> list[Rule]:
    return _rules(config, _model(names), decoder.STACKED)


def _model(names: Collection[str]) -> str:
    return NESTED if any(name.startswith(f"{NESTED}.") for name in names) else ALONE


def published_rules(config: HFConfig) -> list[Rule]:
    return _rules(config, NESTED, decoder.STACKED)


def transformers_rules(config: HFConfig) -> list[Rule]:
    """What transformers saves of a text model alone."""
    return _rules(config, ALONE, frozenset())


def _rules(config: HFConfig, model: str, stacked: frozenset[str]) -> list[Rule]:
    layers: list[Rule] = []
    for layer in range(config.num_hidden_layers):
        megatron, hf = f"decoder.layers.{layer}", f"{model}.layers.{layer}"
        hidden = config.hidden_size
        mixer = _delta_net if is_linear_layer(config, layer) else _gated_attention
        layers += [
            decoder.norm(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden),
            *mixer(config, f"{megatron}.self_attention", hf),
            decoder.norm(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden),
            *decoder.moe(config, layer, f"{hf}.mlp", config.moe_intermediate_size, stacked=stacked),
            *_shared_expert(config, f"{megatron}.mlp.shared_experts", f"{hf}.mlp"),
        ]
    return [decoder.embedding(config, model), *layers, *decoder.final_norm_and_head(config, model)]


def _gated_attention(config: HFConfig, megatron: str, hf: str) -> list[Rule]:
    hidden, dim, groups = config.hidden_size, config.head_dim, config.num_key_value_heads
    q_rows, kv_rows = config.num_attention_heads * dim, groups * dim
    qkv = (
        HFTensor(f"{hf}.self_attn.q_proj.weight", (2 * q_rows, hidden)),
        HFTensor(f"{hf}.self_attn.k_proj.weight", (kv_rows, hidden)),
        HFTensor(f"{hf}.self_attn.v_proj.weight", (kv_rows, hidden)),
    )
    return [
        Rule(Key(f"{megatron}.linear_qkv.weight"), qkv, GatedQKV(groups, dim)),
        *(decoder.norm(f"{megatron}.{x}_layernorm.weight", f"{hf}.self_attn.{x}_norm.weight", dim) for x in "qk"),
        Rule(
            Key(f"{megatron}.linear_proj.weight"),
            (HFTensor(f"{hf}.self_attn.o_proj.weight", (hidden, q_rows)),),
            Split(1),
        ),
    ]


def _delta_net(config: HFConfig, megatron: str, hf: str) -> list[Rule]:
    """Megatron keeps all projections in one matrix, `[q; k; v; gate; beta; alpha]` on every rank."""
    hidden, heads = config.hidden_size, config.linear_num_value_heads
    qk_rows, v_rows = config.linear_num_key_heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    qkv = (qk_rows, qk_rows, v_rows)

    def tensor(name: str, *shape: int) -> HFTensor:
        return HFTensor(f"{hf}.linear_attn.{name}", shape)

    projections = (
        tensor("in_proj_qkv.weight", sum(qkv), hidden),
        tensor("in_proj_z.weight", v_rows, hidden),
        tensor("in_proj_b.weight", heads, hidden),
        tensor("in_proj_a.weight", heads, hidden),
    )
    convolution = tensor("conv1d.weight", sum(qkv), 1, config.linear_conv_kernel_dim)
    return [
        Rule(Key(f"{megatron}.in_proj.weight"), projections, Sections((qkv, (v_rows,), (heads,), (heads,)))),
        Rule(Key(f"{megatron}.conv1d.weight"), (convolution,), Sections((qkv,))),
        Rule(Key(f"{megatron}.dt_bias"), (tensor("dt_bias", heads),), Split(0)),
        Rule(Key(f"{megatron}.A_log"), (tensor("A_log", heads),), Split(0)),
        Rule(Key(f"{megatron}.out_norm.weight"), (tensor("norm.weight", config.linear_value_head_dim),), Replicated()),
        Rule(Key(f"{megatron}.out_proj.weight"), (tensor("out_proj.weight", hidden, v_rows),), Split(1)),
    ]


def _shared_expert(config: HFConfig, megatron: str, hf: str) -> list[Rule]:
    gate = HFTensor(f"{hf}.shared_expert_gate.weight", (1, config.hidden_size))
    inner = config.shared_expert_intermediate_size
    return [
        *decoder.gated_mlp(megatron, f"{hf}.shared_expert", config.hidden_size, inner),
        Rule(Key(f"{megatron}.gate_weight"), (gate,), Replicated()),
    ]


FAMILY = Family(
    "qwen3_5_moe",
    unsupported,
    megatron_config,
    published_rules,
    rules_of_names,
    stacked_rules,
    ignored=IGNORED,
)
TEXT_FAMILY = replace(FAMILY, model_type="qwen3_5_moe_text", parameter_rules=transformers_rules)

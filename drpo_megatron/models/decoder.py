"""The parts that decoder-only families share: each function returns the rules of one block of one layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from drpo_megatron.models.family import HFConfig
from drpo_megatron.models.rules import GateUp, GroupedQKV, HFTensor, Key, Replicated, Rule, Split, Vocabulary


def head_dim(config: HFConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def megatron_config(config: HFConfig) -> dict[str, Any]:
    """TransformerConfig arguments of a pre-norm decoder: RMSNorm, rotary GQA with q/k norms, SwiGLU, no biases."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_dim(config),
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "init_method_std": config.initializer_range,
    }


def unsupported(config: HFConfig) -> list[str]:
    """Settings that would change the forward pass and that the rules above don't carry."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    checks = {
        f"hidden_act={config.hidden_act}: only silu": config.hidden_act != "silu",
        "attention_bias=true: only attention without biases": config.attention_bias,
        "use_sliding_window=true: only full attention": config.use_sliding_window,
        f"rope_type={rope_type}: only default": rope_type != "default",
    }
    return [problem for problem, present in checks.items() if present]


def embedding(config: HFConfig) -> Rule:
    key, layout = Key("embedding.word_embeddings.weight"), Vocabulary(config.vocab_size)
    hf = (HFTensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)),)
    if config.tie_word_embeddings:
        return Rule(key, hf, layout, copies=(Key("output_layer.weight"),), hf_copies=("lm_head.weight",))
    return Rule(key, hf, layout)


def final_norm_and_head(config: HFConfig) -> list[Rule]:
    rules = [_norm("decoder.final_layernorm.weight", "model.norm.weight", config.hidden_size)]
    if not config.tie_word_embeddings:
        hf = HFTensor("lm_head.weight", (config.vocab_size, config.hidden_size))
        rules.append(Rule(Key("output_layer.weight"), (hf,), Vocabulary(config.vocab_size)))
    return rules


def attention(config: HFConfig, layer: int) -> list[Rule]:
    """Grouped-query attention with q/k norms, and the norm before it."""
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, dim, groups = config.hidden_size, head_dim(config), config.num_key_value_heads
    q_rows, kv_rows = config.num_attention_heads * dim, groups * dim
    qkv = (
        HFTensor(f"{hf}.self_attn.q_proj.weight", (q_rows, hidden)),
        HFTensor(f"{hf}.self_attn.k_proj.weight", (kv_rows, hidden)),
        HFTensor(f"{hf}.self_attn.v_proj.weight", (kv_rows, hidden)),
    )
    out = HFTensor(f"{hf}.self_attn.o_proj.weight", (hidden, q_rows))
    return [
        _norm(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden),
        Rule(Key(f"{megatron}.self_attention.linear_qkv.weight"), qkv, GroupedQKV(groups, dim)),
        _norm(f"{megatron}.self_attention.q_layernorm.weight", f"{hf}.self_attn.q_norm.weight", dim),
        _norm(f"{megatron}.self_attention.k_layernorm.weight", f"{hf}.self_attn.k_norm.weight", dim),
        Rule(Key(f"{megatron}.self_attention.linear_proj.weight"), (out,), Split(1)),
        _norm(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden),
    ]


def dense_mlp(config: HFConfig, layer: int) -> list[Rule]:
    return _gated_mlp(
        f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
    )


def moe(config: HFConfig, layer: int) -> list[Rule]:
    """A router and its experts."""
    megatron, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    router = HFTensor(f"{hf}.gate.weight", (config.num_experts, config.hidden_size))
    rules = [Rule(Key(f"{megatron}.router.weight"), (router,), Replicated())]
    for expert in range(config.num_experts):
        rules += _gated_mlp(
            f"{megatron}.experts", f"{hf}.experts.{expert}", config.hidden_size, config.moe_intermediate_size, expert
        )
    return rules


def _gated_mlp(megatron: str, hf: str, hidden: int, inner: int, expert: int | None = None) -> list[Rule]:
    gate_up = HFTensor(f"{hf}.gate_proj.weight", (inner, hidden)), HFTensor(f"{hf}.up_proj.weight", (inner, hidden))
    down = HFTensor(f"{hf}.down_proj.weight", (hidden, inner))
    return [
        Rule(Key(f"{megatron}.linear_fc1.weight", expert), gate_up, GateUp()),
        Rule(Key(f"{megatron}.linear_fc2.weight", expert), (down,), Split(1)),
    ]


def _norm(megatron: str, hf: str, size: int) -> Rule:
    return Rule(Key(megatron), (HFTensor(hf, (size,)),), Replicated())

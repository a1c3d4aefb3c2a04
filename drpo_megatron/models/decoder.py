"""The parts that decoder-only families share: each function returns the rules of one block of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from drpo_megatron.models.family import HFConfig
from drpo_megatron.models.rules import GateUp, GroupedQKV, HFTensor, Key, Replicated, Rule, Split, Vocabulary


def head_dim(config: HFConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


GATED_MLP = ("gate_proj", "up_proj", "down_proj")
"""What most checkpoints call the three matrices of a SwiGLU."""


def megatron_config(config: HFConfig) -> dict[str, Any]:
    """TransformerConfig arguments of a pre-norm decoder: RMSNorm, rotary GQA with q/k norms, SwiGLU, no biases."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": head_dim(config),
        "ffn_hidden_size": getattr(config, "intermediate_size", None),  # None: no layer is dense.
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "init_method_std": config.initializer_range,
    }


def routed_experts(
    config: HFConfig, inner_size: int, layers: Sequence[bool], renormalised: bool = True
) -> dict[str, Any]:
    """TransformerConfig arguments of experts that a softmax over all of them and a top-k choose.

    A softmax over all, renormalised over the top k, is the softmax over the top k, which is what Megatron does after
    its top-k; without the renormalisation it is Megatron's softmax before the top-k.

    Args:
        layers: of every layer, whether it has experts.
        renormalised: whether the k chosen probabilities are scaled to sum to 1.
    """
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": inner_size,
        "moe_layer_freq": [int(has_experts) for has_experts in layers],
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": not renormalised,
    }


def unsupported(config: HFConfig) -> list[str]:
    """Settings that would change the forward pass and that the rules below don't carry."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    checks = {
        f"hidden_act={config.hidden_act}: only silu": config.hidden_act != "silu",
        "attention_bias=true: no biases that this setting adds": getattr(config, "attention_bias", False),
        f"sliding_window={window}: only full attention": window is not None,
        f"rope_type={rope_type}: only default": rope_type != "default",
    }
    return [problem for problem, present in checks.items() if present]


def frozen_router(config: HFConfig, setting: str) -> list[str]:
    """The problem of one renormalised expert a token. `setting`: what renormalises."""
    if config.num_experts_per_tok > 1:
        return []
    return [f"{setting} with num_experts_per_tok=1: the router's output is 1 and never learns"]


def embedding(config: HFConfig, model: str = "model") -> Rule:
    """`model`: what the names of the decoder's tensors begin with."""
    key, layout = Key("embedding.word_embeddings.weight"), Vocabulary(config.vocab_size)
    hf = (HFTensor(f"{model}.embed_tokens.weight", (config.vocab_size, config.hidden_size)),)
    if config.tie_word_embeddings:
        return Rule(key, hf, layout, copies=(Key("output_layer.weight"),), hf_copies=("lm_head.weight",))
    return Rule(key, hf, layout)


def final_norm_and_head(config: HFConfig, model: str = "model") -> list[Rule]:
    rules = [norm("decoder.final_layernorm.weight", f"{model}.norm.weight", config.hidden_size)]
    if not config.tie_word_embeddings:
        hf = HFTensor("lm_head.weight", (config.vocab_size, config.hidden_size))
        rules.append(Rule(Key("output_layer.weight"), (hf,), Vocabulary(config.vocab_size)))
    return rules


def attention(config: HFConfig, layer: int, *, qk_norms: bool = True, qkv_biases: bool = False) -> list[Rule]:
    """Grouped-query attention, the norm before it and the norm after it."""
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    hidden, dim, groups = config.hidden_size, head_dim(config), config.num_key_value_heads
    q_rows, kv_rows = config.num_attention_heads * dim, groups * dim
    rows = {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows}
    weights = tuple(HFTensor(f"{hf}.self_attn.{name}.weight", (size, hidden)) for name, size in rows.items())
    biases = tuple(HFTensor(f"{hf}.self_attn.{name}.bias", (size,)) for name, size in rows.items())
    out = HFTensor(f"{hf}.self_attn.o_proj.weight", (hidden, q_rows))
    rules = [
        norm(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden),
        Rule(Key(f"{megatron}.self_attention.linear_qkv.weight"), weights, GroupedQKV(groups, dim)),
    ]
    if qkv_biases:
        rules.append(Rule(Key(f"{megatron}.self_attention.linear_qkv.bias"), biases, GroupedQKV(groups, dim)))
    if qk_norms:
        rules += [
            norm(f"{megatron}.self_attention.{x}_layernorm.weight", f"{hf}.self_attn.{x}_norm.weight", dim)
            for x in "qk"
        ]
    return [
        *rules,
        Rule(Key(f"{megatron}.self_attention.linear_proj.weight"), (out,), Split(1)),
        norm(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden),
    ]


def dense_mlp(config: HFConfig, layer: int) -> list[Rule]:
    return gated_mlp(
        f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp", config.hidden_size, config.intermediate_size
    )


def moe(
    config: HFConfig, layer: int, block: str, inner_size: int, matrices: tuple[str, str, str] = GATED_MLP
) -> list[Rule]:
    """A router and its experts.

    Args:
        block: what the checkpoint calls them: its router is `block.gate`, its experts are `block.experts.E`.
        matrices: what it calls an expert's gate, up and down.
    """
    megatron = f"decoder.layers.{layer}.mlp"
    router = HFTensor(f"{block}.gate.weight", (config.num_experts, config.hidden_size))
    rules = [Rule(Key(f"{megatron}.router.weight"), (router,), Replicated())]
    for expert in range(config.num_experts):
        name = f"{block}.experts.{expert}"
        rules += gated_mlp(f"{megatron}.experts", name, config.hidden_size, inner_size, expert, matrices)
    return rules


def gated_mlp(
    megatron: str,
    hf: str,
    hidden: int,
    inner: int,
    expert: int | None = None,
    matrices: tuple[str, str, str] = GATED_MLP,
) -> list[Rule]:
    """A SwiGLU: gate and up are one Megatron parameter, down is another."""
    gate, up, down = (f"{hf}.{name}.weight" for name in matrices)
    gate_up = HFTensor(gate, (inner, hidden)), HFTensor(up, (inner, hidden))
    return [
        Rule(Key(f"{megatron}.linear_fc1.weight", expert), gate_up, GateUp()),
        Rule(Key(f"{megatron}.linear_fc2.weight", expert), (HFTensor(down, (hidden, inner)),), Split(1)),
    ]


def norm(megatron: str, hf: str, size: int) -> Rule:
    return Rule(Key(megatron), (HFTensor(hf, (size,)),), Replicated())

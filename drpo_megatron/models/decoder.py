"""The parts that decoder-only families share: each function returns the rules of one block of one layer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from drpo_megatron.models.family import HFConfig
from drpo_megatron.models.rules import (
    GateUp,
    GroupedQKV,
    HFTensor,
    Key,
    Replicated,
    Rule,
    Sections,
    Slice,
    Split,
    Vocabulary,
)


def head_dim(config: HFConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


GATED_MLP = ("gate_proj", "up_proj", "down_proj")
"""What most checkpoints call the three matrices of a SwiGLU."""
STACKED = frozenset({"gate_up_proj", "down_proj"})
"""What the tensors of stacked experts are called: [E, 2 I, H], gate above up, and [E, H, I]."""


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


def unsupported(
    config: HFConfig, *, rotates_partly: bool = False, layer_types: Collection[str] = ("full_attention",)
) -> list[str]:
    """Settings that would change the forward pass and that the rules below don't carry.

    Also those that only some of trainer, transformers and SGLang read: pi and mu would be of different models.

    Args:
        rotates_partly: whether the family's attention rotates a part of each head.
        layer_types: what a layer may be.
    """
    rope_type = config.rope_parameters.get("rope_type", "default")
    rotated = config.rope_parameters.get("partial_rotary_factor")
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or []
    foreign = sorted(set(types) - set(layer_types))
    checks = {
        f"hidden_act={config.hidden_act}: only silu": config.hidden_act != "silu",
        "attention_bias=true: no biases that this setting adds": getattr(config, "attention_bias", False),
        f"sliding_window={window}: only full attention": window is not None,
        f"rope_type={rope_type}: only default": rope_type != "default",
        f"partial_rotary_factor={rotated}: only 1, which transformers takes it for": (
            not rotates_partly and rotated not in (None, 1)
        ),
        f"layer_types={foreign}: only {' and '.join(layer_types)}": bool(foreign),
        f"layer_types of {len(types)} layers, num_hidden_layers={config.num_hidden_layers}: one for each": (
            bool(types) and len(types) != config.num_hidden_layers
        ),
    }
    problems = [problem for problem, present in checks.items() if present]
    return problems + read_by_some(config, {"is_causal": True, "use_mrope": False, "dual_chunk_attention_config": None})


def read_by_some(config: HFConfig, harmless: Mapping[str, Any]) -> list[str]:
    """Keys that only some of trainer, transformers and SGLang read, where they aren't what the others take for granted."""
    found = {key: getattr(config, key, None) for key in harmless}
    return [
        f"{key}={value!r}: only {harmless[key]!r}, because not everything that reads config.json heeds it"
        for key, value in found.items()
        if value is not None and value != harmless[key]
    ]


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


def stacked_names(names: Collection[str]) -> frozenset[str]:
    """Which of STACKED a checkpoint uses: none, both, or down alone (transformers saves gate and up on their own)."""
    return frozenset(x for x in STACKED if any(name.endswith(f".experts.{x}") for name in names))


def moe(
    config: HFConfig,
    layer: int,
    block: str,
    inner_size: int,
    matrices: tuple[str, str, str] = GATED_MLP,
    stacked: frozenset[str] = frozenset(),
) -> list[Rule]:
    """A router and its experts.

    Args:
        block: what the checkpoint calls them: its router is `block.gate`, its experts are `block.experts.E`.
        matrices: what it calls an expert's gate, up and down.
        stacked: those of STACKED that hold all experts of the layer.
    """
    router, *each = _apart(config, layer, block, inner_size, matrices)
    if not stacked:
        return [router, *each]
    rules = {"gate_up_proj": each[0::2], "down_proj": each[1::2]}
    for matrix in stacked:
        name = f"{block}.experts.{matrix}"
        rules[matrix] = [_slice_of_stack(rule, name, config.num_experts) for rule in rules[matrix]]
    return [router, *rules["gate_up_proj"], *rules["down_proj"]]


def _slice_of_stack(rule: Rule, name: str, count: int) -> Rule:
    """The rule of one expert's matrix where the checkpoint stacks them, gate above up."""
    expert = rule.key.expert
    assert expert is not None
    rows = [hf.shape[0] for hf in rule.hf]
    tensor = HFTensor(name, (sum(rows), *rule.hf[0].shape[1:]), Slice(expert, count))
    return replace(rule, hf=(tensor,), layout=Sections((tuple(rows),)) if len(rows) > 1 else rule.layout)


def _apart(config: HFConfig, layer: int, block: str, inner_size: int, matrices: tuple[str, str, str]) -> list[Rule]:
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

"""Gated delta nets (arXiv:2412.06464) over packed sequences, for the layers of a block that are not attention.

Megatron's own layer refuses packed sequences (gated_delta_net.py:297). Its parameters, their names and its distributed
checkpoints stay as they are; with BF16 weights that includes A_log and the norm, which some checkpoints publish in FP32
(optimizer.py:812 can't save a model of two dtypes). They are used in FP32. Context parallelism it refuses, too
(transformer_config.py:984), and so do we. Import only after `platform.activate`.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm import gated_delta_net
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from drpo_megatron.trainer.layers import PackedSequences, RMSNorm, rectangle

# gated_delta_net.py:103 refuses to be built without flash-linear-attention. Without it, ours runs the torch rule. In
# 0.19 gated_delta_net is a package, and who refuses is one of its modules.
for _base in gated_delta_net.GatedDeltaNet.__mro__:
    if hasattr(sys.modules[_base.__module__], "HAVE_FLA"):
        sys.modules[_base.__module__].HAVE_FLA = True  # type: ignore[attr-defined]
_chunked_rule = gated_delta_net.chunk_gated_delta_rule or gated_delta_net.torch_chunk_gated_delta_rule


class HeadNorm(RMSNorm):
    """The norm of a head's output: in FP32, scaled by the weight itself although the model's other norms add 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class PackedDeltaNet(gated_delta_net.GatedDeltaNet):
    """Every sequence of a packed micro-batch starts from an empty state: it is a row of its own in a padded rectangle.

    With S_t [key dim, value dim] the state of one head, q and k of length 1 and q scaled by 1 / sqrt(key dim):

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = S_t^T q_t

    g = -exp(A_log) softplus(alpha + dt_bias) and beta = sigmoid(.); q, k and v went through a short causal convolution.
    """

    def _setup_variant_attrs(self) -> None:
        """Of Megatron-Core 0.19, which refuses to be built without a rule, although `forward` here has its own."""
        super()._setup_variant_attrs()
        self.gated_delta_rule = _chunked_rule

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *unused: Any,
        packed_seq_params: PackedSequences | None = None,
        **also_unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T/TP, 1, H] with sequence parallelism, else [T, 1, H], to the same shape, and no bias."""
        assert packed_seq_params is not None, "PackedDeltaNet takes packed sequences (THD) only"
        packed = packed_seq_params
        inside, shape = packed.rectangle, (len(packed.lengths), int(packed.max_seqlen_q))
        projected, _ = self.in_proj(hidden_states)
        qk_dim, v_dim = self.qk_dim // self.tp_size, self.v_dim // self.tp_size
        heads = self.num_v_heads_local_tp
        qkv, gate, beta, alpha = projected.squeeze(1).split([2 * qk_dim + v_dim, v_dim, heads, heads], dim=-1)

        mixed = self.conv1d(rectangle(qkv, inside, shape).transpose(1, 2))[..., : shape[1]]
        query, key, value = self.act_fn(mixed).transpose(1, 2).split([qk_dim, qk_dim, v_dim], dim=-1)
        repeats = self.num_value_heads // self.num_key_heads
        query, key = (
            _unit_length(x.unflatten(-1, (-1, self.key_head_dim))).repeat_interleave(repeats, dim=2)
            for x in (query, key)
        )
        decay = -self.A_log.float().exp() * F.softplus(alpha.float() + self.dt_bias)
        out, _ = _chunked_rule(
            query,
            key,
            value.unflatten(-1, (-1, self.value_head_dim)).contiguous(),
            g=rectangle(decay, inside, shape),
            beta=rectangle(beta.sigmoid(), inside, shape),
        )
        gated = self.out_norm(out[inside]).flatten(1) * self.act_fn(gate.float())
        return self.out_proj(gated.type_as(hidden_states).unsqueeze(1))


def _unit_length(x: torch.Tensor) -> torch.Tensor:
    """x / |x| along the last axis, in FP32 inside; rows of zeros, which are padding, stay zeros."""
    x32 = x.float()
    return (x32 * (x32.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).type_as(x)


def use_delta_nets(
    block: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The block spec with a gated delta net in the layers that `linear_attention_freq` marks; linears stay the block's."""
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    for index, layer in enumerate(block.layer_specs):
        if config.linear_attention_freq[offset + index]:
            block.layer_specs[index] = _with_delta_net(layer)
    return block


def _with_delta_net(layer: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention.submodules
    delta_net = ModuleSpec(
        module=PackedDeltaNet,
        submodules=gated_delta_net.GatedDeltaNetSubmodules(
            in_proj=attention.linear_qkv, out_norm=HeadNorm, out_proj=attention.linear_proj
        ),
    )
    # In a distributed checkpoint the local layers' norms go by the names of Transformer Engine's, which are fused.
    keys = {
        local: fused.replace(".linear_qkv.", ".in_proj.")
        for local, fused in layer.submodules.sharded_state_dict_keys_map.items()
    }
    layer = copy.copy(layer)
    layer.submodules = replace(layer.submodules, self_attention=delta_net, sharded_state_dict_keys_map=keys)
    return layer

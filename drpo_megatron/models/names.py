"""Megatron parameter names of one rank -> keys that mean the same on every rank and in both layer specs.

The two layer specs agree but for these, and their checkpoints but for the norm before experts, which the first calls as
that before a dense MLP, and the second as here:

    local (torch) layers                               Transformer Engine layers
    input_layernorm.weight                             self_attention.linear_qkv.layer_norm_weight (attention)
                                                       self_attention.in_proj.layer_norm_weight (gated delta net)
    pre_mlp_layernorm.weight                           mlp.linear_fc1.layer_norm_weight (dense layers)
    mlp.experts.local_experts.E.linear_fc1.weight      mlp.experts.linear_fc1.weightE
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from drpo_megatron.models.rules import Key

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_SEQUENTIAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def spellings(key: str) -> Iterator[str]:
    """The key of a checkpoint's tensor, itself first, in every way in which one of the layer specs may write it."""
    yield key
    for fused, own in _FUSED_NORMS.items():
        for one, other in ((fused, own), (own, fused)):
            if key.endswith(f".{one}"):
                yield key.removesuffix(one) + other


def canonical_key(name: str, layers: Sequence[int], first_expert: int) -> Key:
    """The key of a parameter of an unwrapped GPTModel chunk.

    Args:
        name: as `named_parameters` gives it.
        layers: global index (from 0) of every layer of this chunk.
        first_expert: global index of this rank's first expert.
    """
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Key(name)
    prefix, inside = f"decoder.layers.{layers[int(layer[1])]}", layer[2]
    if match := _SEQUENTIAL_EXPERT.fullmatch(inside):
        return Key(f"{prefix}.mlp.experts.{match[2]}.{match[3]}", first_expert + int(match[1]))
    if match := _GROUPED_EXPERT.fullmatch(inside):
        return Key(f"{prefix}.mlp.experts.{match[1]}.{match[2]}", first_expert + int(match[3]))
    return Key(f"{prefix}.{_FUSED_NORMS.get(inside, inside)}")

"""Which parameters of a decoder layer are what, by their names, and which of them are quantised at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from drpo_megatron.models.rules import Rule

_MODULES = {
    "linear_qkv": "qkv",
    "in_proj": "qkv",
    "linear_proj": "proj",
    "out_proj": "proj",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
}
_OUTSIDE = {"embedding": "embedding", "output_layer": "head"}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_NUM_QUANTISED = {"linear_qkv": 3, "linear_proj": 1, "linear_fc1": 2, "linear_fc2": 1, "in_proj": 2, "out_proj": 1}
"""How many of the HF tensors in one of Megatron's modules are quantised in an engine, from the first: the gates b and a
of a gated delta net come last, are a few rows, and stay."""


def parameter_class(name: str) -> str:
    """qkv, proj, fc1, fc2, expert_fc1, expert_fc2, router, norm, embedding, head or other, of a Megatron name.

    The name is a parameter's or a module's, of the whole model or within a layer. A gated delta net's projections count
    as qkv and proj, shared experts as fc1 and fc2.
    """
    parts = name.split(".")
    if "norm" in parts[-1] or any(part.endswith("norm") for part in parts):
        return "norm"
    if "router" in parts:
        return "router"
    for part in reversed(parts):
        if part in _MODULES:
            return f"expert_{_MODULES[part]}" if "experts" in parts else _MODULES[part]
    return _OUTSIDE.get(parts[0], "other")


def is_kept(layer: int, num_layers: int, keep_bf16: Sequence[str]) -> bool:
    """Whether `precision.keep_bf16` names this decoder layer, counted from 0."""
    return (layer == 0 and "first" in keep_bf16) or (layer == num_layers - 1 and "last" in keep_bf16)


def quantised_names(rules: Iterable[Rule], num_layers: int = 0, keep_bf16: Sequence[str] = ()) -> set[str]:
    """HF tensors that quantised checkpoints and engines hold in low precision: attention, experts, dense MLPs.

    Embeddings, head, norms, routers and gates stay, and the layers that `keep_bf16` names of `num_layers`.
    """
    names = set()
    for rule in rules:
        module, _, kind = rule.key.name.rpartition(".")
        layer = _LAYER.match(rule.key.name)
        if kind != "weight" or (layer and is_kept(int(layer[1]), num_layers, keep_bf16)):
            continue
        count = _NUM_QUANTISED.get(module.rpartition(".")[2], 0)
        names |= {hf.name for hf in rule.hf[:count] if len(hf.shape) == 2}
    return names

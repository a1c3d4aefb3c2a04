"""Block-FP8 checkpoints as SGLang and DeepSeek have them: which tensors are quantised, and what config.json says.

    X.weight            e4m3 [N, K]
    X.weight_scale_inv  FP32 [ceil(N/128), ceil(K/128)], what a block is multiplied by to get the weights back

Edges that don't fill a block have one of their own, as if padded with zeros: no tensor changes its shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from drpo_megatron.checkpoint.safetensors_file import TensorInfo
from drpo_megatron.models.rules import Rule

BLOCK = 128
SCALE_SUFFIX = ".weight_scale_inv"

_QUANTISED = {"linear_qkv": 3, "linear_proj": 1, "linear_fc1": 2, "linear_fc2": 1, "in_proj": 2, "out_proj": 1}
"""Megatron's modules whose products run in FP8: attention, experts and dense MLPs, and gated delta nets. The number is
how many of the HF tensors are quantised, from the first: a delta net's gates b and a come last and are a few rows."""


def quantised_names(rules: Iterable[Rule]) -> set[str]:
    """HF tensors that a block-FP8 checkpoint holds in FP8. Embeddings, head, norms, routers and gates stay."""
    names = set()
    for rule in rules:
        module, _, kind = rule.key.name.rpartition(".")
        count = _QUANTISED.get(module.rpartition(".")[2], 0) if kind == "weight" else 0
        names |= {hf.name for hf in rule.hf[:count] if len(hf.shape) == 2}
    return names


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + SCALE_SUFFIX


def quantised_infos(name: str, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The two tensors that take the place of one."""
    scale = tuple(-(-size // BLOCK) for size in shape)
    return {name: TensorInfo(torch.float8_e4m3fn, shape), scale_name(name): TensorInfo(torch.float32, scale)}


def quantization_config(names: Iterable[str], quantised: Collection[str]) -> dict[str, Any]:
    """What config.json says of it. `names`: all tensors before quantisation."""
    kept = sorted({name.rpartition(".")[0] or name for name in names if name not in quantised})
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }

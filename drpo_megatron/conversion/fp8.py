"""Block-FP8 checkpoints as SGLang and DeepSeek have them: how tensors are stored, and what config.json says.

    X.weight            e4m3 [N, K]
    X.weight_scale_inv  FP32 [ceil(N/128), ceil(K/128)], what a block is multiplied by to get the weights back

Edges that don't fill a block have one of their own, as if padded with zeros: no tensor changes its shape.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch

from drpo_megatron.checkpoint.safetensors_file import TensorInfo

BLOCK = 128
SCALE_SUFFIX = ".weight_scale_inv"


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

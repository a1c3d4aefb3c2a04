"""Block-FP8 checkpoints as SGLang and DeepSeek have them: how tensors are stored, and what config.json says.

    X.weight            e4m3 [N, K]
    X.weight_scale_inv  FP32 [ceil(N/128), ceil(K/128)], what a block is multiplied by to get the weights back

Edges that don't fill a block have one of their own, as if padded with zeros: no tensor changes its shape.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.safetensors_file import TensorInfo
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.precision.rollout import RolloutPrecision

BLOCK = 128
SCALE_SUFFIX = ".weight_scale_inv"
_NESTED = "model.language_model."


def server_flags(hf_path: str | Path, section: PrecisionSection) -> list[str]:
    """SGLang's, of a server that computes in block FP8 although the checkpoint is not: it starts without weights.

    They are sent to it before it is used (`RolloutPrecision.quantized`).
    """
    checkpoint = HFCheckpoint(hf_path)
    precision = RolloutPrecision.of_checkpoint(section, checkpoint.config, checkpoint.names())
    assert precision is not None
    changed = {"quantization_config": quantization_config(checkpoint.names(), precision.names)}
    return ["--load-format", "dummy", "--json-model-override-args", json.dumps(changed)]


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + SCALE_SUFFIX


def quantised_infos(name: str, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The two tensors that take the place of one."""
    scale = tuple(-(-size // BLOCK) for size in shape)
    return {name: TensorInfo(torch.float8_e4m3fn, shape), scale_name(name): TensorInfo(torch.float32, scale)}


def quantization_config(names: Iterable[str], quantised: Collection[str]) -> dict[str, Any]:
    """What config.json says of it. `names`: all tensors before quantisation."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": unquantised_modules(names, quantised),
    }


def unquantised_modules(names: Iterable[str], quantised: Collection[str]) -> list[str]:
    """The modules that readers shall build without FP8: the largest that hold weights and not one in FP8.

    Readers take a name for the module and all that it holds, so a module with an FP8 matrix anywhere in it is never
    named: neither for a bias beside that matrix, nor for a parameter of its own such as a delta net's A_log.
    """
    holds_fp8 = {module for name in quantised for module in _modules(name)}
    found = set()
    for name in names:
        free = [module for module in _modules(name) if module not in holds_fp8]
        if name not in quantised and free:
            found.add(free[-1])
    # transformers builds the text model of one with vision without the middle of its names.
    return sorted(found | {name.replace(_NESTED, "model.", 1) for name in found if name.startswith(_NESTED)})


def _modules(name: str) -> list[str]:
    """Those that a tensor lies in, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]

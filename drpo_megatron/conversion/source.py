"""The Hugging Face side of a conversion: validated against its own config, FP8 weights as BF16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.safetensors_file import TensorInfo
from drpo_megatron.conversion.fp8 import BLOCK, SCALE_SUFFIX
from drpo_megatron.conversion.model import ModelPlan, differences
from drpo_megatron.models.rules import HFTensor, Rule
from drpo_megatron.precision.quantize import dequantize_block128


class HFSource:
    """A checkpoint directory, its family, and its tensors as the rules want them.

    Raises ValueError on construction, listing everything that is wrong: damaged files, an unknown family or setting,
    missing, extra and misshapen tensors, integers, a tied head that differs.
    """

    def __init__(self, directory: str | Path) -> None:
        self.checkpoint = HFCheckpoint(directory)
        self.is_fp8 = _is_block_fp8(self.checkpoint.config)
        self.scales = {name for name in self.checkpoint.names() if self.is_fp8 and name.endswith(SCALE_SUFFIX)}
        self.config = {k: v for k, v in self.checkpoint.config.items() if k != "quantization_config"}
        self.names = [name for name in self.checkpoint.names() if name not in self.scales]
        self.model = ModelPlan.of(self.config, self.names)
        self.untrained = [name for name in self.model.extra(self.names) if self.model.family.ignores(name)]
        if problems := sorted(set(self._problems())):
            raise ValueError(differences(f"{directory} and its config.json", problems))

    def info(self, name: str) -> TensorInfo:
        """Shape, and dtype after dequantisation."""
        info = self.checkpoint.info(name)
        return TensorInfo(torch.bfloat16, info.shape) if self._scale_of(name) in self.scales else info

    def get(self, hf: HFTensor) -> torch.Tensor:
        """The tensor, or the slice of it, that a rule speaks of."""
        index = None if hf.slice is None else hf.slice.index
        tensor = self.checkpoint.get(hf.name, index)
        if (scale := self._scale_of(hf.name)) in self.scales:
            return dequantize_block128(tensor, self.checkpoint.get(scale, index)).to(torch.bfloat16)
        return tensor

    def notes(self) -> list[str]:
        """What a user may not expect of the tensors' types."""
        notes = []
        if self.scales:
            notes.append(f"{len(self.scales)} FP8 tensors are dequantised to bfloat16")
        dtypes = Counter(self.info(name).dtype for name in self.names if name not in self.untrained)
        if len(dtypes) > 1:
            found = ", ".join(f"{count} of {_text(dtype)}" for dtype, count in dtypes.most_common())
            notes.append(f"mixed dtypes: {found}; a Megatron tensor that is made of several takes the widest")
        declared, usual = self.config.get("dtype", self.config.get("torch_dtype")), _text(dtypes.most_common(1)[0][0])
        if declared not in (None, usual):
            notes.append(f"config.json says {declared}, but the tensors are {usual} and stay so; --dtype changes both")
        return notes

    def _scale_of(self, name: str) -> str:
        return name.removesuffix(".weight") + SCALE_SUFFIX

    def _problems(self) -> Iterator[str]:
        names = set(self.names)
        for name in self.model.extra(self.names):
            if name not in self.untrained:
                yield f"extra: {name} belongs to no parameter of the model"
        for rule in self.model.rules:
            for hf in rule.hf:
                if hf.name not in names:
                    yield f"missing: {hf.name} {list(hf.stored_shape)}"
                    continue
                dtype, shape = self.checkpoint.info(hf.name)
                if shape != hf.stored_shape:
                    yield f"misshapen: {hf.name} is {list(shape)}, the config says {list(hf.stored_shape)}"
                yield from self._dtype_problems(hf.name, dtype)
            if rule.hf[0].name in names:
                yield from self._tie_problems(rule, names)

    def _dtype_problems(self, name: str, dtype: torch.dtype) -> Iterator[str]:
        is_fp8 = dtype.itemsize == 1 and dtype.is_floating_point
        if not dtype.is_floating_point:
            yield f"dtype: {name} is {_text(dtype)}, weights must be floating point; quantised models can't be trained"
        elif is_fp8 and self._scale_of(name) not in self.scales:
            yield f"dtype: {name} is {_text(dtype)} without a {self._scale_of(name)} and a quantization_config for it"
        elif is_fp8:
            shape, scale = self.checkpoint.info(name).shape, self.checkpoint.info(self._scale_of(name)).shape
            expected = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
            if scale != expected:
                yield f"misshapen: {self._scale_of(name)} is {list(scale)}, blocks of {BLOCK} need {list(expected)}"

    def _tie_problems(self, rule: Rule, names: set[str]) -> Iterator[str]:
        for copy in (name for name in rule.hf_copies if name in names):
            if self.checkpoint.info(copy) != self.checkpoint.info(rule.hf[0].name) or not torch.equal(
                self.checkpoint.get(copy), self.checkpoint.get(rule.hf[0].name)
            ):
                yield (
                    f"untied: {copy} differs from {rule.hf[0].name}, but config.json says tie_word_embeddings=true; "
                    "set it to false"
                )


def _is_block_fp8(config: dict[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    if quantization is None:
        return False
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or block != [BLOCK, BLOCK]:
        raise ValueError(
            f"quantization_config has quant_method={method!r}, weight_block_size={block}; only fp8 in blocks of "
            f"[{BLOCK}, {BLOCK}] can be dequantised: convert the unquantised checkpoint"
        )
    return True


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

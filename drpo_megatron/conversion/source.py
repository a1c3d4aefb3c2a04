"""The Hugging Face side of a conversion: validated against its own config, FP8 weights as what they stand for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.model_check import require_fit, tie_problems
from drpo_megatron.checkpoint.safetensors_file import TensorInfo
from drpo_megatron.checkpoint.stored import StoredTensors, dtype_name
from drpo_megatron.conversion.model import ModelPlan
from drpo_megatron.models.rules import HFTensor


class HFSource:
    """A checkpoint directory, its family, and its tensors as the rules want them.

    Raises ValueError on construction, with everything that is wrong: damaged files, an unknown family or setting,
    missing, extra and misshapen tensors, weights that are packed or lack their scales, a tied head that differs.
    """

    def __init__(self, directory: str | Path) -> None:
        self.stored = StoredTensors(HFCheckpoint(directory))
        self.checkpoint = self.stored.checkpoint
        self.config, self.names = self.stored.config, self.stored.names
        family, rules = require_fit(self.stored)
        require_fit(self.stored, tie_problems(self.stored, rules))
        self.model = ModelPlan.of(self.config, self.names, self.checkpoint.directory)
        self.untrained = [name for name in self.model.extra(self.names) if family.ignores(name)]

    def info(self, name: str) -> TensorInfo:
        """Shape, and dtype after dequantisation."""
        return self.stored.info(name)

    def get(self, hf: HFTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, or the slice of it, that a rule speaks of, as `dtype` (None: as `info` says)."""
        return self.stored.get(hf.name, None if hf.slice is None else hf.slice.index, dtype)

    def notes(self) -> list[str]:
        """What a user may not expect of the tensors' types, and what is not carried."""
        notes = self.checkpoint.other_files().notes()
        if count := self.stored.num_quantised:
            notes.append(f"{count} FP8 tensors are dequantised to bfloat16")
        dtypes = Counter(self.info(name).dtype for name in self.names if name not in self.untrained)
        if len(dtypes) > 1:
            found = ", ".join(f"{count} of {dtype_name(dtype)}" for dtype, count in dtypes.most_common())
            notes.append(f"mixed dtypes: {found}; a Megatron tensor that is made of several takes the widest")
        declared, usual = _declared(self.config), dtype_name(dtypes.most_common(1)[0][0])
        if declared not in (None, usual):
            notes.append(f"config.json says {declared}, but the tensors are {usual} and stay so; --dtype changes both")
        return notes


def _declared(config: dict[str, Any]) -> str | None:
    return config.get("dtype", config.get("torch_dtype"))

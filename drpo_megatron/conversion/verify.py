"""Whether two checkpoints hold the same weights: every tensor is read from both sides and compared bit by bit."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from drpo_megatron.checkpoint.hf_files import FOLDER, CarriedFiles
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from drpo_megatron.conversion.report import progress_bar
from drpo_megatron.conversion.source import HFSource
from drpo_megatron.conversion.workers import run_tasks
from drpo_megatron.models.rules import Rule


@dataclass(frozen=True, slots=True)
class Verification:
    num_tensors: int
    num_cast: int
    """Tensors that are equal after a cast: the two sides have different dtypes."""
    differences: list[str]
    """One line for every tensor that differs."""


def verify(hf: Path, megatron: Path) -> Verification:
    """Compare all tensors of `hf` with those of `megatron`. Where dtypes differ, `hf` is cast to that of `megatron`.

    Raises: ValueError for checkpoints that are damaged, or of models that are not the same.
    """
    source, checkpoint = HFSource(hf), TorchDistCheckpoint(megatron)
    source.model.check(checkpoint)
    lock, differences, num_cast = threading.Lock(), [], 0

    def compare(rule: Rule) -> None:
        nonlocal num_cast
        for tensor, theirs in zip(rule.hf, source.model.read(checkpoint, rule), strict=True):
            ours = source.get(tensor)
            found = _difference(ours.to(theirs.dtype), theirs)
            name = tensor.name if tensor.slice is None else f"{tensor.name}[{tensor.slice.index}]"
            with lock:
                num_cast += found is None and ours.dtype != theirs.dtype
                differences.extend([] if found is None else [f"{name}: {found}"])
            advance(ours.nbytes)

    def num_bytes(rule: Rule) -> int:
        return sum(math.prod(tensor.shape) for tensor in rule.hf) * 4 * 4

    total = sum(source.info(name).num_bytes for name in source.names if name not in source.untrained)
    with progress_bar("verify", total) as advance:
        run_tasks(source.model.rules, compare, num_bytes)
    if source.untrained:
        carried = CarriedFiles(megatron / FOLDER)
        for name in source.untrained:
            found = _difference(source.checkpoint.get(name), carried.untrained(name))
            differences.extend([] if found is None else [f"{name}: {found}"])
    num_tensors = sum(len(rule.hf) for rule in source.model.rules) + len(source.untrained)
    return Verification(num_tensors, num_cast, sorted(differences))


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """None for equal bits; NaNs are equal to themselves, and 0 is not -0."""
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} here, {list(theirs.shape)} there"
    ours, theirs = ours.contiguous(), theirs.contiguous()
    if torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8)):
        return None
    count = int((ours != theirs).sum())
    largest = (ours.double() - theirs.double()).abs().max().item()
    return f"{count:,} of {ours.numel():,} values differ, by up to {largest:.3g}"

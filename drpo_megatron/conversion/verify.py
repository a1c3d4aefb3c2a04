"""Whether two checkpoints hold the same model: every tensor is read from both sides as what its numbers mean (FP8 times
its scales) and compared bit by bit, and config.json is compared key by key."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.hf_files import FOLDER, CarriedFiles
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from drpo_megatron.conversion.report import check_files, progress_bar
from drpo_megatron.conversion.source import HFSource
from drpo_megatron.conversion.workers import run_tasks
from drpo_megatron.models import get_family
from drpo_megatron.models.rules import Rule

_NOT_COMPARED = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config")


@dataclass(frozen=True, slots=True)
class Verification:
    num_tensors: int
    num_cast: int
    """Tensors that are equal after a cast: the two sides have different dtypes."""
    differences: list[str]
    """One line for every tensor that differs."""
    config_differences: list[str]
    """One line for every key of config.json that differs."""
    has_config: bool = True
    """Whether the Megatron checkpoint has a config.json to compare."""


def verify(hf: Path, megatron: Path, *, skip_checksums: bool = False) -> Verification:
    """Compare all tensors of `hf` with those of `megatron`. Where dtypes differ, `hf` is cast to that of `megatron`.

    Raises: ValueError for checkpoints that are damaged, or of models that are not the same.
    """
    check_files(megatron, skip=skip_checksums)
    source, checkpoint = HFSource(hf), TorchDistCheckpoint(megatron)
    model = source.model.fitted(checkpoint)
    model.check(checkpoint)
    lock, differences, num_cast = threading.Lock(), [], 0

    def compare(rule: Rule) -> None:
        nonlocal num_cast
        for tensor, theirs in zip(rule.hf, model.read(checkpoint, rule), strict=True):
            ours = source.get(tensor, theirs.dtype)
            found = _difference(ours, theirs)
            name = tensor.name if tensor.slice is None else f"{tensor.name}[{tensor.slice.index}]"
            with lock:
                num_cast += found is None and source.info(tensor.name).dtype != theirs.dtype
                differences.extend([] if found is None else [f"{name}: {found}"])
            advance(ours.nbytes)

    def num_bytes(rule: Rule) -> int:
        return sum(math.prod(tensor.shape) for tensor in rule.hf) * 4 * 4

    total = sum(source.info(name).num_bytes for name in source.names if name not in source.untrained)
    with progress_bar("verify", total) as advance:
        run_tasks(model.rules, compare, num_bytes)
    has_config = (megatron / FOLDER).is_dir()
    carried = CarriedFiles(megatron / FOLDER) if has_config else None
    untrained = source.untrained if carried is not None else []
    for name in untrained:
        assert carried is not None
        theirs = carried.untrained(name)
        found = _difference(source.stored.get(name, dtype=theirs.dtype), theirs)
        num_cast += found is None and source.info(name).dtype != theirs.dtype
        differences.extend([] if found is None else [f"{name}: {found}"])
    num_tensors = sum(len(rule.hf) for rule in model.rules) + len(untrained)
    keys = [] if carried is None else config_differences(source.config, carried.config, carried.directory)
    return Verification(num_tensors, num_cast, sorted(differences), keys, has_config)


def config_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], directory: Path) -> list[str]:
    """`key: value here, value there`, with all defaults filled in, so that it doesn't matter how a value is written.

    Not compared: the type of the weights, which the tensors themselves tell, how they are quantised, and who wrote it.

    Args:
        directory: of `theirs`, for errors; `ours` is known to be fine.
    """
    get_family(theirs, f"{directory}/config.json")
    here, there = (dict(_flat(_with_defaults(config), "")) for config in (ours, theirs))
    return [
        f"config.json: {key} is {here.get(key, 'not there')!r} here, {there.get(key, 'not there')!r} there"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]


def _with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config))).to_dict()


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in _NOT_COMPARED:
            yield f"{prefix}{key}", value


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

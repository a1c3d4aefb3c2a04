"""Megatron -> Hugging Face: parameters are read from the chunks of whatever layout wrote them, merged, and written
where they belong in files whose headers are known beforehand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch

from drpo_megatron.checkpoint.atomic import new_directory
from drpo_megatron.checkpoint.hf import says_dtype, usual_dtype, with_dtype, write_config
from drpo_megatron.checkpoint.hf_files import FOLDER, CarriedFiles, FileLayout, GivenFiles, HFFiles
from drpo_megatron.checkpoint.model_check import differences
from drpo_megatron.checkpoint.safetensors_file import TensorInfo, copy_tensor, create_file, write_tensor
from drpo_megatron.checkpoint.stored import require_plain
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from drpo_megatron.checkpoint.torch_save import ByteRange
from drpo_megatron.conversion import fp8 as block_fp8
from drpo_megatron.conversion.model import ModelPlan
from drpo_megatron.conversion.report import check_files, progress_bar
from drpo_megatron.conversion.workers import flushing, run_tasks
from drpo_megatron.models.rules import HFTensor, Rule
from drpo_megatron.paths import inside
from drpo_megatron.precision.layers import quantised_names
from drpo_megatron.precision.quantize import quantize_block128

Experts = Literal["apart", "fused"]


def megatron_to_hf(
    megatron: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    fp8: bool = False,
    experts: Experts | None = None,
    hf: Path | None = None,
    force: bool = False,
    skip_checksums: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face checkpoint `out` of the distributed checkpoint `megatron`, whatever layout saved it.

    Optimizer state is not read. Memory: a few times the largest tensor, or a few hundred MB.

    Args:
        megatron: what `hf_to_megatron` wrote, or a checkpoint of a training run.
        dtype: of all weights. None: what they are in a training run's checkpoint; what they were before a conversion.
        max_shard_bytes: cut new files. None: the files of the checkpoint that it all began with.
        fp8: quantise as `conversion.fp8` says.
        experts: `apart`, a tensor for each, or `fused`, a layer's in two. None: as they came; apart with `fp8`.
        hf: a Hugging Face checkpoint of the same model, whose config, tokenizer and files are taken. None: those that
            lie in `megatron`.
        force: replace an existing `out`.
        skip_checksums: read no more than the weights; else all files of a checkpoint with checksums are compared first.

    Raises: ValueError for a checkpoint that is damaged or not of its own config, or an existing `out`, or a disk that
        is too small.
    """
    if fp8 and experts == "fused":
        raise ValueError("FP8 needs a scale for each block of each expert, so experts can't be fused; leave one out")
    check_files(megatron, skip=skip_checksums)
    export = _Export.of(megatron, dtype, fp8, "apart" if fp8 else experts, hf)
    layout = export.layout if max_shard_bytes is None else export.layout.resharded(max_shard_bytes)
    infos = layout.tensors
    if ragged := sorted(name for name in export.quantised if any(n % block_fp8.BLOCK for n in infos[name].shape)):
        say(
            f"note: {len(ragged)} FP8 tensors have blocks that aren't full, such as {ragged[0]} "
            f"{list(infos[ragged[0]].shape)}; SGLang wants multiples of {block_fp8.BLOCK}"
        )
    num_bytes = layout.num_bytes + export.carried.others.num_bytes
    with new_directory(out, num_bytes=num_bytes, force=force, source=megatron) as scratch:
        for note in export.carried.copy_others(scratch, layout):
            say(f"note: {note}")
        if export.config != export.carried.config:
            write_config(scratch, export.config)
        total = sum(info.num_bytes for info in infos.values())
        with progress_bar("to Hugging Face", total) as advance, flushing() as flush:
            output = _Output(scratch, layout, advance, flush)

            def convert(rule: Rule) -> None:
                if output.copy(export.places(rule, infos)):
                    return
                for hf, tensor in zip(rule.hf, export.model.read(export.source, rule), strict=True):
                    if hf.name in export.quantised:
                        values, scale_inv = quantize_block128(tensor)
                        output.write(hf.name, values)
                        output.write(block_fp8.scale_name(hf.name), scale_inv)
                    else:
                        output.write(hf.name, tensor, None if hf.slice is None else hf.slice.index)
                    for copy in (name for name in rule.hf_copies if name in infos):
                        output.write(copy, tensor)

            # From two places of the model at once: workers wait for one another where they write to the same file.
            half = len(export.model.rules) // 2
            pairs = zip_longest(export.model.rules[half:], export.model.rules[:half])
            run_tasks([rule for pair in pairs for rule in pair if rule], convert, export.num_bytes_needed)
            for name in export.untrained:
                output.write(name, export.carried.untrained(name))
        layout.write_index(scratch)
    say(f"{out}: {len(layout.headers)} files, {total:,} bytes of tensors")


class _Output:
    """The files, made at once and filled in any order, by several threads. A full one goes to the disk."""

    def __init__(
        self, directory: Path, layout: FileLayout, advance: Callable[[int], None], flush: Callable[[Path], None]
    ) -> None:
        self._directory, self._layout, self._advance, self._flush = directory, layout, advance, flush
        self._infos, self._file_of = layout.tensors, layout.file_of
        self._lock, self._bytes_left = threading.Lock(), dict[str, int]()
        for file, header in layout.headers.items():
            path = inside(directory, file, "the layout of the checkpoint", for_writing=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            create_file(path, header)
            self._bytes_left[file] = sum(info.num_bytes for info in header.tensors.values())

    def write(self, name: str, tensor: torch.Tensor, index: int | None = None) -> None:
        """A tensor, in the dtype of the file, or `tensor[index]` of it."""
        file, info = self._file_of[name], self._infos[name]
        write_tensor(self._directory / file, self._layout.headers[file], name, tensor.to(info.dtype), index)
        self._written(file, info.num_bytes if index is None else info.num_bytes // info.shape[0])

    def copy(self, places: dict[str, ByteRange]) -> bool:
        """Tensors from where they lie in other files. False, and nothing is done, if that isn't possible."""
        for name, place in places.items():
            file = self._file_of[name]
            if not copy_tensor(self._directory / file, self._layout.headers[file], name, place):
                return False
            self._written(file, place.num_bytes)
        return bool(places)

    def _written(self, file: str, num_bytes: int) -> None:
        self._advance(num_bytes)
        with self._lock:
            self._bytes_left[file] -= num_bytes
            is_full = not self._bytes_left[file]
        if is_full:
            self._flush(self._directory / file)


@dataclass(frozen=True, slots=True)
class _Export:
    """What is written, and from where."""

    source: TorchDistCheckpoint
    carried: HFFiles
    model: ModelPlan
    """With the rules of the tensors that are written."""
    config: dict[str, Any]
    layout: FileLayout
    untrained: list[str]
    quantised: set[str]

    @classmethod
    def of(
        cls, megatron: Path, dtype: torch.dtype | None, fp8: bool, experts: Experts | None, hf: Path | None
    ) -> _Export:
        source = TorchDistCheckpoint(megatron)
        carried = CarriedFiles(megatron / FOLDER) if hf is None else GivenFiles(hf)
        before = carried.layout.tensors
        model = ModelPlan.of(carried.config, before, carried.directory).fitted(source)
        model.check(source)
        untrained = [name for name in model.extra(before) if model.family.ignores(name)]
        if unknown := set(model.extra(before)) - set(untrained):
            raise ValueError(differences(str(carried.directory), [f"extra: {name}" for name in unknown]))
        require_plain({name: before[name] for name in untrained}, carried.directory)
        written = _written(model, experts)
        quantised = quantised_names(written.rules) if fp8 else set[str]()
        after = {name: {name: before[name]} for name in untrained}
        for old, new in zip(model.rules, _in_order(written, model), strict=True):
            own = source.dtype(model.parameter(old).pieces[0].box.key)
            for name, infos in _replacement(old, new).items():
                kind = dtype or (own if carried.is_trained else before[name].dtype)
                for tensor in infos:
                    after.setdefault(name, {}).update(_infos(tensor, kind, tensor.name in quantised))
            for copy in (name for name in old.hf_copies if name in before):
                after[copy] = {copy: after[old.hf[0].name][old.hf[0].name]}
        layout = carried.layout.rebuilt(_each_once(carried.layout, after).__getitem__)
        config = _config(carried, layout, dtype)
        if fp8:
            names = [name for rule in written.rules for name in (*(hf.name for hf in rule.hf), *rule.hf_copies)]
            config = config | {"quantization_config": block_fp8.quantization_config([*names, *untrained], quantised)}
        return cls(source, carried, written, config, layout, untrained, quantised)

    def places(self, rule: Rule, infos: dict[str, TensorInfo]) -> dict[str, ByteRange]:
        """Where the bytes of all its tensors lie; empty unless all of them stay as they are. `infos`: what is written."""
        pieces, found = self.model.moved(rule), {}
        for hf in rule.hf:
            piece = pieces.get(hf)
            if piece is None or hf.slice or hf.name in self.quantised or any(name in infos for name in rule.hf_copies):
                return {}
            place = self.source.place(piece.box)
            if place is None or self.source.dtype(piece.box.key) != infos[hf.name].dtype:
                return {}
            found[hf.name] = place
        return found

    def num_bytes_needed(self, rule: Rule) -> int:
        """In memory: chunk, parameter and HF tensors; to quantise, a few FP32 copies."""
        parameter = self.model.parameter(rule)
        num_bytes = math.prod(parameter.shape) * self.source.dtype(parameter.pieces[0].box.key).itemsize
        return num_bytes * (12 if self.quantised else 3)


def _written(model: ModelPlan, experts: Experts | None) -> ModelPlan:
    """The model in the names that are written."""
    if experts is None or not any(rule.key.expert is not None for rule in model.rules):
        return model
    return model.unstacked() if experts == "apart" else model.stacked()


def _in_order(plan: ModelPlan, other: ModelPlan) -> list[Rule]:
    """The rules of the same parameters in the order of the other plan."""
    rules = {rule.key: rule for rule in plan.rules}
    return [rules[rule.key] for rule in other.rules]


def _replacement(old: Rule, new: Rule) -> dict[str, tuple[HFTensor, ...]]:
    """What takes the place of each tensor of a rule: itself, or all that the parameter is written as."""
    return {hf.name: (hf,) if old.hf == new.hf else new.hf for hf in old.hf}


def _each_once(layout: FileLayout, after: dict[str, dict[str, TensorInfo]]) -> dict[str, dict[str, TensorInfo]]:
    """A tensor that takes the place of many is written where the first of them was, in the widest of their types."""
    widest: dict[str, torch.dtype] = {}
    for infos in after.values():
        for name, info in infos.items():
            known = widest.setdefault(name, info.dtype)
            widest[name] = known if known == info.dtype else torch.promote_types(known, info.dtype)
    seen, once = set[str](), dict[str, dict[str, TensorInfo]]()
    for old in layout.tensors:
        fresh = {name: info for name, info in after.get(old, {}).items() if name not in seen}
        once[old] = {name: TensorInfo(widest[name], info.shape) for name, info in fresh.items()}
        seen |= fresh.keys()
    return once


def _config(carried: HFFiles, layout: FileLayout, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of what is written. After a training it says the type of the weights, whatever it said before."""
    usual = usual_dtype(layout.tensors.values()) if carried.is_trained else None
    return with_dtype(carried.config, dtype or (None if says_dtype(carried.config, usual) else usual))


def _infos(hf: HFTensor, dtype: torch.dtype, is_quantised: bool) -> dict[str, TensorInfo]:
    if is_quantised:
        return block_fp8.quantised_infos(hf.name, hf.shape)
    return {hf.name: TensorInfo(dtype, hf.stored_shape)}

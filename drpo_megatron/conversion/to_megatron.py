"""Hugging Face -> Megatron: tensors are read when their part of the checkpoint is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drpo_megatron.checkpoint.atomic import new_directory
from drpo_megatron.checkpoint.checksums import FileSum, sum_of_new, write_checksums_of_all
from drpo_megatron.checkpoint.hf import says_dtype, usual_dtype, with_dtype
from drpo_megatron.checkpoint.hf_files import FOLDER, keep_hf_files, plain_layout
from drpo_megatron.checkpoint.safetensors_file import flush_file
from drpo_megatron.checkpoint.torch_dist import Box, Chunk, TorchDistWriter, without_crc32
from drpo_megatron.conversion.report import progress_bar
from drpo_megatron.conversion.source import HFSource
from drpo_megatron.conversion.workers import flushing, run_tasks
from drpo_megatron.models.rules import HFTensor, Rule
from drpo_megatron.trainer.pieces import Piece

FILE_BYTES = 128 * 2**20
"""Of a file of the checkpoint, or one parameter that is larger."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a chunk of the checkpoint is made of."""

    rule: Rule
    piece: Piece
    dtype: torch.dtype
    same: HFTensor | None
    """The one that it is, byte for byte but for the dtype."""

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.piece.box, self.dtype, self.piece.global_shape)


def hf_to_megatron(
    hf: Path, out: Path, *, dtype: torch.dtype | None = None, force: bool = False, say: Callable[[str], None] = print
) -> None:
    """Write the distributed checkpoint `out` of the Hugging Face checkpoint `hf`.

    Memory: a few times the largest tensor, or a few hundred MB.

    Args:
        dtype: of all weights. None: each keeps its own.
        force: replace an existing `out`.

    Raises: ValueError for everything that is wrong with `hf`, an existing `out`, or a disk that is too small.
    """
    source = HFSource(hf)
    for note in source.notes():
        say(f"note: {note}")
    parts = _parts(source, dtype)
    groups = _groups(parts)
    sizes = [sum(part.chunk.num_bytes for part in group) for group in groups]
    kept_bytes = source.checkpoint.other_files().num_bytes
    kept_bytes += sum(source.info(name).num_bytes for name in source.untrained)
    with new_directory(out, num_bytes=sum(sizes) + kept_bytes, force=force, source=hf) as scratch:
        keep_hf_files(
            source.stored,
            scratch / FOLDER,
            plain_layout(source.stored, dtype, source.untrained),
            with_dtype(source.config, dtype or _new_dtype(source)),
            source.untrained,
        )
        sums: dict[str, FileSum] = {}

        def finish(file: Path) -> None:
            sums[file.name] = sum_of_new(file)  # While all of it is in memory.
            flush_file(file)

        writer = TorchDistWriter(scratch, [[part.chunk for part in group] for group in groups])
        with progress_bar("to Megatron", sum(sizes)) as advance, flushing(finish) as flush, without_crc32():

            def write(index: int) -> None:
                flush(writer.write(index, _Values(source, groups[index])))
                advance(sizes[index])

            run_tasks(range(len(groups)), write, lambda index: _num_bytes_needed(source, groups[index]))
            for file in writer.finish(source.model.checkpoint.objects):
                flush(file)
        write_checksums_of_all(scratch, sums)
    say(f"{out}: {len(groups) + 1} files, {sum(sizes):,} bytes of weights, loadable in any layout")


class _Values:
    """The tensors of a group's chunks, asked for in their order. At most one parameter is kept."""

    def __init__(self, source: HFSource, group: Sequence[_Part]) -> None:
        self._source = source
        self._parts = {part.piece.box: part for part in group}
        self._rule: Rule | None = None
        self._parameter = torch.empty(0)

    def __call__(self, box: Box) -> torch.Tensor:
        part = self._parts[box]
        if part.same is not None:
            return self._source.get(part.same, part.dtype).view(box.size)
        if part.rule is not self._rule:
            self._rule, self._parameter = part.rule, torch.empty(0)  # The last one goes before the next one comes.
            self._parameter = self._build(part)
        return part.piece.of(self._parameter)

    def _build(self, part: _Part) -> torch.Tensor:
        tensors = [self._source.get(hf, part.dtype) for hf in part.rule.hf]
        shape = self._source.model.parameter(part.rule).shape
        return part.rule.layout.shard(tensors, 0, 1, shape).contiguous()


def _parts(source: HFSource, dtype: torch.dtype | None) -> list[_Part]:
    """Every chunk, parameter by parameter."""
    dtypes: dict[str, torch.dtype] = {}
    pieces = []
    for rule in source.model.rules:
        same = {piece: hf for hf, piece in source.model.moved(rule).items()}
        pieces += [(rule, piece, same.get(piece)) for piece in source.model.parameter(rule).pieces]
    for rule, piece, _ in pieces:
        key = piece.box.key
        for hf in rule.hf:
            own = dtype or source.info(hf.name).dtype
            dtypes[key] = torch.promote_types(dtypes.get(key, own), own)
    return [_Part(rule, piece, dtypes[piece.box.key], same) for rule, piece, same in pieces]


def _groups(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Neighbours share a file; the pieces of a parameter always do."""
    groups: list[list[_Part]] = []
    num_bytes = 0
    for index, part in enumerate(parts):
        is_new = index == 0 or parts[index - 1].rule is not part.rule
        if is_new and (not groups or num_bytes + part.chunk.num_bytes > FILE_BYTES):
            groups.append([])
            num_bytes = 0
        groups[-1].append(part)
        num_bytes += part.chunk.num_bytes
    return groups


def _num_bytes_needed(source: HFSource, group: Sequence[_Part]) -> int:
    """In memory: of one parameter the HF tensors, what is made of them, and a piece of it."""
    shapes = [(source.model.parameter(part.rule).shape, part.dtype) for part in group]
    return max(3 * math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def _new_dtype(source: HFSource) -> torch.dtype | None:
    """What config.json has to say of weights that were FP8. None: nothing was, and it stays as it is."""
    if not source.stored.num_quantised:
        return None
    usual = usual_dtype(source.info(name) for name in source.names)
    return None if says_dtype(source.config, usual) else usual

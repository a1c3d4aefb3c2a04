"""Megatron's `torch_dist` checkpoint files, written and read piece by piece in one process without a model.

A checkpoint holds global tensors by key. Each is stored in chunks, boxes at an offset, which every layout cuts in its
own way; a reader takes any box. Files, offsets and resharding are torch's distributed checkpoint (DCP):

    .metadata       every key with its shape, dtype and chunks, and where each chunk lies
    __<i>_0.distcp  chunks, each a torch.save of one tensor
    common.pt, metadata.json    Megatron's: what is not sharded, and the format's version

`megatron.py` saves and loads the same files from the ranks of a training run.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemWriter,
    LoadPlan,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from drpo_megatron.checkpoint.torch_dist_reader import METADATA_FILE, FixedReader, read_metadata
from drpo_megatron.checkpoint.torch_save import ByteRange, tensor_bytes
from drpo_megatron.reading import read_json_object

Shape = tuple[int, ...]
SETTINGS_FILE = "common.pt"
FORMAT_FILES = ("metadata.json", METADATA_FILE, SETTINGS_FILE)
_SETTINGS_KEY = "common_state/"
"""Begins the key under which Megatron-Core 0.19 keeps what isn't sharded, in place of the file."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Box(NamedTuple):
    """A part of a global tensor."""

    key: str
    offset: Shape
    size: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box to write."""

    box: Box
    dtype: torch.dtype
    global_shape: Shape

    @property
    def num_bytes(self) -> int:
        return self.box.numel * self.dtype.itemsize


class TorchDistWriter:
    """Writes a checkpoint into a new directory: `write` for every group of chunks, from any thread, then `finish`.

    Files are not flushed to the disk. What a group resolves is written at once and not kept.

    Args:
        groups: all chunks, by the file they go to.
    """

    def __init__(self, directory: Path, groups: Sequence[Sequence[Chunk]]) -> None:
        self._directory = directory
        # No copies ahead: they would reorder the tensors by size, and belong to a GPU.
        self._writer = _Writer(directory, per_thread_copy_ahead=0, sync_files=False)
        plans = [SavePlan([_write_item(chunk) for chunk in group]) for group in groups]
        plans, self._metadata = create_default_global_save_plan(plans)
        self._plans = self._writer.prepare_global_plan(plans)
        self._results: list[list[WriteResult]] = [[] for _ in groups]

    def write(self, group: int, resolve: Callable[[Box], torch.Tensor]) -> Path:
        """Write a group's file. `resolve` gives each chunk's tensor, in the order of the group."""
        planner = _LazyValues(lambda item: resolve(_box_of(item)))
        self._results[group] = self._writer.write_data(self._plans[group], planner).wait()
        return self._file_of(self._results[group])

    def finish(self, objects: Sequence[str]) -> list[Path]:
        """Write what makes the files a checkpoint: the new ones. `objects` are keys of Megatron's per-module states, which
        are empty.
        """
        nothing = io.BytesIO()
        torch.save([None], nothing)
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
        (plan,), metadata = create_default_global_save_plan([SavePlan(items)])
        (*_, plan) = self._writer.prepare_global_plan([*self._plans, SavePlan(plan.items)])
        written = self._writer.write_data(plan, _LazyValues(lambda item: nothing)).wait()
        self._metadata.state_dict_metadata |= metadata.state_dict_metadata
        torch.save({}, self._directory / "common.pt")
        (self._directory / "metadata.json").write_text(json.dumps(_FORMAT))
        self._writer.finish(self._metadata, [*self._results, written])
        return [*(self._directory / name for name in FORMAT_FILES), self._file_of(written)]

    def _file_of(self, written: list[WriteResult]) -> Path:
        return self._directory / written[0].storage_data.relative_path


@contextmanager
def without_crc32() -> Iterator[None]:
    """In the block torch.save computes no checksums, which torch.load never looks at: 0.4 s a GB."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class TorchDistCheckpoint:
    """A checkpoint on disk, whatever layout wrote it. Nothing but the boxes asked for is read.

    Raises ValueError on construction, listing every file that is missing or too short.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        missing = [name for name in FORMAT_FILES if not (self.directory / name).is_file()]
        if missing and missing != [SETTINGS_FILE]:
            self._is_unfinished(missing)
        _check_format(self.directory / "metadata.json")
        metadata = read_metadata(self.directory / METADATA_FILE)
        if missing and not any(key.startswith(_SETTINGS_KEY) for key in metadata.state_dict_metadata):
            self._is_unfinished(missing)
        self._reader = FixedReader(self.directory, metadata)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._stored_whole = {
            Box(key, tuple(chunk.offsets), tuple(chunk.sizes))
            for key, tensor in self.tensors.items()
            for chunk in tensor.chunks
        }
        self._check_files(metadata)

    def _is_unfinished(self, missing: list[str]) -> NoReturn:
        raise ValueError(
            f"{self.directory} is not a finished Megatron checkpoint (torch_dist): {', '.join(missing)} is missing"
        )

    def shape(self, key: str) -> Shape:
        return tuple(self.tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def read(self, box: Box, into: torch.Tensor) -> None:
        """Fill a tensor of the box's shape. Thread-safe. ValueError when chunks of the box are missing."""
        chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))
        stored = self.tensors[box.key]
        if box in self._stored_whole:  # As a rule. It spares the search through the chunks of thousands of experts.
            stored = replace(stored, chunks=[chunk])
        items = create_read_items_for_chunk_list(box.key, stored, [chunk])
        if sum(math.prod(item.lengths) for item in items) != box.numel:
            raise ValueError(f"{self.directory}: {box.key} at {list(box.offset)} is stored in part only")
        self._reader.read_data(LoadPlan(items), _Destination(into)).wait()

    def place(self, box: Box) -> ByteRange | None:
        """Where the elements of a box lie one after the other; None where they don't, or can't be told."""
        if box not in self._stored_whole:
            return None
        stored = self._reader.storage_data[MetadataIndex(box.key, box.offset)]
        path = self.directory / stored.relative_path
        return tensor_bytes(path, stored.offset, stored.length, self.dtype(box.key), box.size)

    def _check_files(self, metadata: Metadata) -> None:
        needed: dict[str, int] = {}
        for place in metadata.storage_data.values():
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
        problems = []
        for name, num_bytes in sorted(needed.items()):
            path = self.directory / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size < num_bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes, but {num_bytes} are described")
        if problems:
            raise ValueError(f"checkpoint {self.directory} is damaged: " + "; ".join(problems))


def _check_format(file: Path) -> None:
    backend = read_json_object(file).get("sharded_backend")
    if backend != "torch_dist":
        raise ValueError(f"{file.parent} is in Megatron's format {backend!r}; only torch_dist is read")


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # As text: a path is pickled as pathlib._local's by Python 3.13, which no other Python has.
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)


class _LazyValues(DefaultSavePlanner):
    """Gives each value when it is written, and keeps none."""

    def __init__(self, resolve: Callable[[WriteItem], Any]) -> None:
        super().__init__()
        self._resolve = resolve

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._resolve(write_item)


class _Destination(DefaultLoadPlanner):
    """All that is read goes into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        view = self._tensor
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def _write_item(chunk: Chunk) -> WriteItem:
    offset = torch.Size(chunk.box.offset)
    data = TensorWriteData(
        ChunkStorageMetadata(offset, torch.Size(chunk.box.size)),
        TensorProperties(chunk.dtype),
        torch.Size(chunk.global_shape),
    )
    return WriteItem(MetadataIndex(chunk.box.key, offset), WriteItemType.SHARD, tensor_data=data)


def _box_of(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Box(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes))

"""Files of torch's distributed checkpoint (DCP), read without running what a pickle in them says.

DCP's own reader unpickles `.metadata` and objects as they come, and takes names of files as they stand. This one reads
both from fixed lists, checks the names, and reads tensors straight from where their bytes lie. Megatron is given it, too
(`megatron.py`).
"""

from __future__ import annotations

import copyreg
import os
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, Metadata, filesystem, metadata, planner
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from torch.futures import Future
from torch.serialization import _get_layout

from drpo_megatron.checkpoint.extra_state import rewritten
from drpo_megatron.checkpoint.fixed_pickle import DTYPES, ENUM_MEMBERS, Table, load_fixed
from drpo_megatron.checkpoint.torch_save import find_tensor, load_saved
from drpo_megatron.paths import inside

METADATA_FILE = ".metadata"
_RECORDS = {
    metadata: (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    planner: ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    filesystem: ("_StorageInfo", "_StoragePrefix"),
}
_TABLE: Table = {
    **{(module.__name__, name): getattr(module, name) for module, names in _RECORDS.items() for name in names},
    # Python 3.13 alone calls their module pathlib._local.
    **{
        (module, kind.__name__): kind for module in ("pathlib", "pathlib._local") for kind in (PosixPath, PurePosixPath)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    **DTYPES,
    **ENUM_MEMBERS,
}
"""All that stands in the metadata of DCP and Megatron."""


def _pickled_by_value(member: Enum) -> tuple[type[Enum], tuple[Any]]:
    return type(member), (member.value,)


for _enum in (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType):
    # Python 3.11.0 to 3.11.3 would pickle them by `getattr`, which readers with a list of their own refuse.
    copyreg.pickle(_enum, _pickled_by_value)  # type: ignore[arg-type]


def read_metadata(path: Path) -> Metadata:
    """The metadata of a checkpoint. ValueError, which names the file, when it is damaged or names files elsewhere."""
    found = load_fixed(path.read_bytes(), _TABLE, str(path))
    try:
        _check(found, path)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found


def _check(found: Any, path: Path) -> None:
    """A damaged pickle may still make records, of anything."""
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} holds a {type(found).__name__}, not the metadata of a checkpoint")
    if not isinstance(found.state_dict_metadata, dict) or not isinstance(found.storage_data, dict):
        raise ValueError(f"{path} is damaged: it has no tables of tensors and of where they lie")
    for key, value in found.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(value, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"{path} is damaged: it says {type(value).__name__} of {key!r:.80}")
        if isinstance(value, TensorStorageMetadata):
            _check_tensor(key, value, path)
    names = set()
    for index, place in found.storage_data.items():
        if type(place) is not filesystem._StorageInfo or not isinstance(index, MetadataIndex):
            raise ValueError(f"{path} is damaged: a place in it is a {type(place).__name__}")
        if type(place.offset) is not int or type(place.length) is not int or min(place.offset, place.length) < 0:
            raise ValueError(f"{path} is damaged: {index.fqn} lies at {place.offset!r:.40}, {place.length!r:.40} bytes")
        if place.transform_descriptors:
            raise ValueError(
                f"{path}: {index.fqn} is compressed ({place.transform_descriptors!r:.80}), which is not read"
            )
        names.add(place.relative_path)
    for name in names:
        inside(path.parent, name, str(path))


def _check_tensor(key: str, tensor: TensorStorageMetadata, path: Path) -> None:
    shapes = [tensor.size, *(shape for chunk in tensor.chunks for shape in (chunk.offsets, chunk.sizes))]
    dtype = tensor.properties.dtype
    if not isinstance(dtype, torch.dtype) or not all(isinstance(shape, torch.Size) for shape in shapes):
        raise ValueError(f"{path} is damaged: it says no dtype and shape of {key}")
    if any(len(shape) != len(tensor.size) for shape in shapes):
        raise ValueError(f"{path} is damaged: chunks of {key} have another number of axes than {list(tensor.size)}")


class FixedReader(FileSystemReader):
    """DCP's reader of files, from fixed lists. Reads of several threads don't disturb each other.

    Raises: ValueError, which names the file, for whatever is damaged or beyond the lists.
    """

    def __init__(self, path: str | os.PathLike[str], found: Metadata | None = None) -> None:
        super().__init__(path)
        self.directory = Path(path)
        self._found = found
        """The metadata, once it has been read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._found is None:
            self._found = read_metadata(self.directory / METADATA_FILE)
            if getattr(self._found, "storage_meta", None) is None:
                self._found.storage_meta = StorageMeta()
        return self._found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: defaultdict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.storage_index not in self.storage_data:
                raise ValueError(
                    f"{self.directory / METADATA_FILE} is damaged: it doesn't say where {item.storage_index.fqn} lies"
                )
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            path = inside(self.directory, name, METADATA_FILE)
            with path.open("rb") as file:
                for item in items:
                    self._read_item(path, file, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, path: Path, file: IO[bytes], item: ReadItem, planner: LoadPlanner) -> None:
        place = self.storage_data[item.storage_index]
        source = f"{path}: {item.storage_index.fqn}"
        if item.type == LoadItemType.BYTE_IO:
            value = load_saved(_bytes(file, place.offset, place.length), source)
            if "_extra_state" in item.storage_index.fqn:
                value = (
                    [rewritten(state, source) for state in value]
                    if isinstance(value, list)
                    else rewritten(value, source)
                )
            _give(planner, item.dest_index.fqn, value)
            return
        target = planner.resolve_tensor(item).detach()
        if not self._read_whole(file, item, place, target):
            tensor = load_saved(_bytes(file, place.offset, place.length), source)
            begins, lengths = item.storage_offsets, item.lengths
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != len(lengths):
                raise ValueError(f"{source} is not the tensor that {METADATA_FILE} describes")
            for axis, (begin, length) in enumerate(zip(begins, lengths, strict=True)):
                if begin + length > tensor.shape[axis]:
                    raise ValueError(f"{source} is of shape {list(tensor.shape)}, not what {METADATA_FILE} describes")
                tensor = tensor.narrow(axis, begin, length)
            target.copy_(tensor)
        planner.commit_tensor(item, target)

    def _read_whole(self, file: IO[bytes], item: ReadItem, place: Any, target: torch.Tensor) -> bool:
        """Read a chunk straight into the tensor that takes all of it. False where it is another case."""
        if any(item.storage_offsets) or not target.is_contiguous() or target.device.type != "cpu":
            return False
        found = find_tensor(file, place.offset, place.length, target.dtype, tuple(target.shape))
        if found is None:
            return False
        file.seek(found[0])
        view = target.view(-1).view(torch.uint8).numpy().data
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                return False
            view = view[count:]
        return True


def _bytes(file: IO[bytes], begin: int, num_bytes: int) -> bytes:
    file.seek(begin)
    return file.read(num_bytes)


def _give(planner: Any, key: str, value: Any) -> None:
    """What DefaultLoadPlanner.load_bytes does with an object that it has unpickled (default_planner.py:383)."""
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[key], value)
    else:
        planner.state_dict[key] = value

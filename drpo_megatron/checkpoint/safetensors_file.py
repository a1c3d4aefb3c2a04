"""The safetensors format, read and written tensor by tensor at known offsets.

The safetensors library maps whole files and writes whole files. A converter of files that are larger than the memory
needs neither: it reads one tensor (or one slice of one) with plain reads, which leave no pages behind in the process,
and writes tensors in any order, by several threads, into files whose header is known beforehand.

    8 bytes   length of the header, little endian
    header    JSON: {"__metadata__": {...}, name: {"dtype": ..., "shape": ..., "data_offsets": [begin, end]}, ...}
    data      tensors without gaps
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from drpo_megatron.checkpoint.torch_save import ByteRange
from drpo_megatron.reading import parse_json_object

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NO_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds. `text` is the JSON as it stands in the file, padding included."""

    text: str
    tensors: dict[str, TensorInfo]
    begins: dict[str, int]
    """Where each tensor begins, in bytes from the start of the file."""
    num_bytes: int
    """Of the whole file."""

    @classmethod
    def parse(cls, text: str) -> Header:
        """Raises ValueError for what is no header: not JSON, an unknown dtype, offsets that don't fit the shapes, or
        tensors that overlap or leave gaps."""
        try:
            entries = parse_json_object(text, "its header")
            metadata = entries.pop("__metadata__", None)
            if metadata is not None and not isinstance(metadata, dict):
                raise TypeError("__metadata__ is no object")
            parsed = {name: _parse_entry(name, entry) for name, entry in entries.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
        data_start, end = 8 + len(text.encode()), 0
        for name, (info, begin) in sorted(parsed.items(), key=lambda item: (item[1][1], item[1][0].num_bytes)):
            if begin != end:
                raise ValueError(f"tensor {name} begins at byte {begin} of the data, but the one before ends at {end}")
            end = begin + info.num_bytes
        tensors = {name: info for name, (info, _) in parsed.items()}
        begins = {name: data_start + begin for name, (_, begin) in parsed.items()}
        return cls(text, tensors, begins, data_start + end)

    @classmethod
    def build(cls, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> Header:
        """A header for these tensors, the widest dtypes first, so that all are aligned."""
        entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
        offset = 0
        for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
            end = offset + info.num_bytes
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        return cls.parse(text + " " * (-len(text.encode()) % 8))

    @property
    def metadata(self) -> dict[str, str] | None:
        return parse_json_object(self.text, "the header").get("__metadata__")


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, int]:
    """What it is, and where it begins in the data. ValueError, KeyError or TypeError for anything else."""
    dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} is of dtype {dtype}; known are {', '.join(DTYPES)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(
            f"tensor {name} has shape {shape} and offsets {[first, last]}, which must be whole numbers from 0"
        )
    info = TensorInfo(DTYPES[dtype], tuple(shape))
    if last - first != info.num_bytes:
        raise ValueError(f"tensor {name} {dtype} {shape} takes {info.num_bytes} bytes, but has {last - first}")
    return info, first


def read_header(path: Path) -> Header:
    """ValueError, naming the file, when it is shorter or longer than its header says, or the header is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if prefix == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer, not the file that it stands for; run `git lfs pull` there")
        if 8 + length > size:
            raise ValueError(f"{path} is truncated: {size} bytes can't hold its header")
        try:
            header = Header.parse(file.read(length).decode())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if header.num_bytes != size:
        raise ValueError(f"{path} has {size} bytes, but its header describes {header.num_bytes}; copy it again")
    return header


def read_tensor(path: Path, header: Header, name: str, index: int | None = None) -> torch.Tensor:
    """A tensor of the file, or `tensor[index]`, in memory of its own. Reads no other bytes. Thread-safe."""
    info, begin = header.tensors[name], header.begins[name]
    if index is not None:
        info = TensorInfo(info.dtype, info.shape[1:])
        begin += index * info.num_bytes
    buffer = torch.empty(info.num_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while view:
            count = file.readinto(view)
            if not count:
                raise ValueError(f"{path} ended inside of {name}; another process has changed it")
            view = view[count:]
    return buffer.view(info.dtype).view(info.shape)


def create_file(path: Path, header: Header) -> None:
    """The file with its header and the room for its tensors, which `write_tensor` fills; with the folder it lies in."""
    encoded = header.text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(header.num_bytes)


def write_tensor(path: Path, header: Header, name: str, tensor: torch.Tensor, index: int | None = None) -> None:
    """Fill a tensor of the file, or `tensor[index]` of it. Thread-safe."""
    info, offset = header.tensors[name], header.begins[name]
    if index is not None:
        info = TensorInfo(info.dtype, info.shape[1:])
        offset += index * info.num_bytes
    assert (tensor.dtype, tuple(tensor.shape)) == info, f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {info}"
    view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)


def copy_tensor(path: Path, header: Header, name: str, source: ByteRange) -> bool:
    """Fill a tensor of the file with bytes of another one, inside of the kernel. Thread-safe.

    Returns: False, and nothing is done, where the system or the two file systems have no such thing.
    """
    info, target = header.tensors[name], header.begins[name]
    assert source.num_bytes == info.num_bytes, f"{name}: {source.num_bytes} bytes, not {info.num_bytes}"
    if not hasattr(os, "copy_file_range"):  # Linux
        return False
    done = 0
    with source.path.open("rb") as given, path.open("r+b") as written:
        while done < info.num_bytes:
            left = info.num_bytes - done
            try:
                count = os.copy_file_range(given.fileno(), written.fileno(), left, source.begin + done, target + done)
            except OSError as error:
                if error.errno in _NO_COPY and not done:
                    return False
                raise
            if not count:
                raise ValueError(f"{source.path} ended inside of {name}; another process has changed it")
            done += count
    return True


def flush_file(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

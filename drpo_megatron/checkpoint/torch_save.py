"""What `torch.save` wrote, read without `torch.load`: from a fixed list of types, and tensors from where their bytes lie.

`torch.save` writes a zip archive without compression: `*/data.pkl` describes the object, `*/data/<key>` are the storages
of its tensors. The checksums of the archive are not looked at: writers may leave them out.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from drpo_megatron.checkpoint.fixed_pickle import DTYPES, FixedUnpickler, Table, damaged

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a file in a zip archive; the lengths of the two fields that follow it."""


class ByteRange(NamedTuple):
    path: Path
    begin: int
    num_bytes: int


def tensor_bytes(
    path: Path, begin: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> ByteRange | None:
    """The elements, row by row, of the one tensor that was saved to a part of a file.

    Args:
        begin, num_bytes: the part.
        dtype, shape: what the tensor has to be.

    Returns: None for anything else than exactly that: another tensor, other strides, more storage, a damaged archive.
        `load_saved` reads what can be read of those, or says what is wrong.
    """
    try:
        with path.open("rb") as file:
            place = find_tensor(file, begin, num_bytes, dtype, shape)
    except OSError:
        return None
    return None if place is None else ByteRange(path, *place)


def find_tensor(
    file: IO[bytes], begin: int, num_bytes: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int] | None:
    """`tensor_bytes` of an open file: (where they begin, their number)."""
    try:
        archive = _Archive(file, begin, num_bytes)
        found = _Description(archive.read("data.pkl"), _PLAIN_TENSOR).load()
        place = archive.place("data/0")
    except Exception:  # A damaged pickle ends in errors of any type.
        return None
    wanted = torch.empty(shape, dtype=dtype, device="meta")
    is_it = found == (dtype, "0", 0, tuple(shape), wanted.stride()) and place[1] == wanted.nbytes
    return place if is_it else None


def load_saved(data: bytes, source: str) -> Any:
    """`torch.load` on the CPU, of numbers, texts, containers and tensors. Gradients and hooks are left out.

    Args:
        source: what names the file in the ValueError for a damaged archive, or one that holds something else.
    """
    try:
        archive = _Archive(io.BytesIO(data), 0, len(data))
        if "byteorder" in archive.names and archive.read("byteorder") != b"little":
            raise ValueError("it was written on a big-endian machine")
        return _Objects(archive).load()
    except Exception as error:  # See above.
        raise damaged(source, error) from error


class _Archive:
    """A zip archive of stored files, in a part of a file."""

    def __init__(self, file: IO[bytes], begin: int, num_bytes: int) -> None:
        self._file, self._begin, self._num_bytes = file, begin, num_bytes
        with zipfile.ZipFile(_Part(file, begin, num_bytes)) as archive:  # type: ignore[arg-type]
            self.names = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def place(self, name: str) -> tuple[int, int]:
        """(begin in the outer file, length). KeyError when there is none of the name."""
        info = self.names[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        if info.file_size > self._num_bytes:
            raise ValueError(f"{name} is cut off")
        header = self._begin + info.header_offset
        self._file.seek(header)
        lengths = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        return header + _LOCAL_HEADER.size + sum(lengths), info.file_size

    def read(self, name: str) -> bytes:
        begin, length = self.place(name)
        self._file.seek(begin)
        data = self._file.read(length)
        if len(data) != length:
            raise ValueError(f"{name} is cut off")
        return data


def storage_dtype(module: str, name: str) -> torch.dtype | None:
    """What a class of storages holds; None for whatever is no such class."""
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return torch.uint8
    return _STORAGES.get(name) if module == "torch" else None


class _Unpickler(FixedUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        return storage_dtype(module, name) or super().find_class(module, name)


_PLAIN_TENSOR: Table = {
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *rest: (
        *storage,
        offset,
        tuple(size),
        tuple(stride),
    ),
    ("collections", "OrderedDict"): OrderedDict,
}


class _Description(_Unpickler):
    """(dtype, key of the storage, offset in it, size, stride) of a plain tensor."""

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return dtype, key


class _Objects(_Unpickler):
    def __init__(self, archive: _Archive) -> None:
        super().__init__(archive.read("data.pkl"), OBJECTS)
        self._archive = archive
        self._storages: dict[str, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, torch.Tensor]:
        """dtype and bytes of a storage."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage of a tensor")
        if key not in self._storages:
            data = self._archive.read(f"data/{key}")
            self._storages[key] = torch.empty(len(data), dtype=torch.uint8)
            self._storages[key].numpy().data[:] = data
        return dtype, self._storages[key]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    dtype, data = storage
    return _view(data, dtype, offset, tuple(size), tuple(stride))


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any) -> Any:
    return _view(storage[1], dtype, offset, tuple(size), tuple(stride))


def _view(data: torch.Tensor, dtype: Any, offset: Any, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """torch would enlarge a storage that is too small for a tensor, so that is looked at first."""
    elements = data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= elements.numel()):
        raise ValueError(f"a tensor of shape {list(size)} doesn't fit its {data.numel()} bytes")
    return elements.as_strided(size, stride, offset) if 0 not in size else torch.empty(size, dtype=dtype)


def _encoded(text: Any, encoding: Any) -> bytes:
    """What protocol 2 makes bytes of."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it encodes what is no text in latin1")
    return text.encode("latin1")


def _bytes_io(data: Any = b"", *rest: Any) -> io.BytesIO:
    if not isinstance(data, bytes):
        raise ValueError("it has no bytes in a BytesIO")
    return io.BytesIO(data)


OBJECTS: Table = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_io", "BytesIO"): _bytes_io,
    **DTYPES,
}


class _Part(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: IO[bytes], begin: int, num_bytes: int) -> None:
        self._file, self._begin, self._num_bytes, self._position = file, begin, num_bytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        self._file.seek(self._begin + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data

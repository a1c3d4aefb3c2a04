"""Where the bytes of a tensor lie in what `torch.save` wrote, so that they can be copied without being read.

`torch.save` writes a zip archive without compression: `*/data.pkl` describes the tensor, `*/data/0` is its storage.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
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
        `torch.load` reads what can be read of those, or says what is wrong.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Part(file, begin, num_bytes)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            found = _Description(io.BytesIO(archive.read(names["data.pkl"]))).load()
            info = archive.getinfo(names["data/0"])
            file.seek(begin + info.header_offset)
            lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        pickle.UnpicklingError,
        struct.error,
        zipfile.BadZipFile,
    ):
        return None
    wanted = torch.empty(shape, dtype=dtype, device="meta")
    is_it = found == (dtype, "0", 0, tuple(shape), wanted.stride())
    if not is_it or info.compress_type != zipfile.ZIP_STORED or info.file_size != wanted.nbytes:
        return None
    return ByteRange(path, begin + info.header_offset + _LOCAL_HEADER.size + sum(lengths), wanted.nbytes)


class _Description(pickle.Unpickler):
    """(dtype, key of the storage, offset in it, size, stride) of a plain tensor. Builds nothing else and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (*storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ValueError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return dtype, key


class _Part(io.RawIOBase):
    """A part of a file as if it were a file."""

    def __init__(self, file: io.BufferedReader, begin: int, num_bytes: int) -> None:
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

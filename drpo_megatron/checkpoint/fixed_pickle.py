"""Pickles of checkpoints, read from a fixed list of what may stand in them. Nothing that a pickle says is run or imported.

A pickle names functions and classes, and calls them. This reader looks each name up in a table of a few records and
numbers, and knows no other. torch's own `weights_only=True` has a longer list, which every library may lengthen: Megatron
adds 16 classes to it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

Table = Mapping[tuple[str, str], Any]
"""What (module, name) stands for."""


def enum_member(kind: Any, name: Any) -> Any:
    """What `getattr` is called for in a pickle of Python 3.11.0 to 3.11.3: a member of an enum, by its name."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)) or name not in kind.__members__:
        raise ValueError(f"it asks for {str(name)[:80]!r} of {str(kind)[:80]}, which is no member of an enum")
    return kind.__members__[name]


ENUM_MEMBERS: Table = {
    ("builtins", "getattr"): enum_member,
    ("__builtin__", "getattr"): enum_member,  # As protocol 2 calls it, which torch.save writes.
}
DTYPES: Table = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class FixedUnpickler(pickle.Unpickler):
    """Knows the names of a table. ValueError at once for what is no pickle."""

    def __init__(self, data: bytes, table: Table) -> None:
        _check_memo(data)
        self._file = io.BytesIO(data)
        super().__init__(self._file)
        self._table = table

    def num_read(self) -> int:
        """Bytes up to the end of the pickle, after `load`."""
        return self._file.tell()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise ValueError(f"it refers to {module}.{name}, which checkpoints have no use for") from None

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("it refers to something beside it")


def load_fixed(data: bytes, table: Table, source: str) -> Any:
    """Unpickle. `source` names the file in the ValueError for a damaged pickle, or one with a name beyond the table."""
    try:
        return FixedUnpickler(data, table).load()
    except Exception as error:  # A pickle is a program: a damaged one ends in errors of any type.
        raise damaged(source, error) from error


def damaged(source: str, error: Exception) -> ValueError:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(f"{source} is damaged: {text}")


def _argument_lengths() -> list[int]:
    """By opcode: bytes of its argument, or how its length is written: -n in n bytes before it, -100 - n as n lines."""
    lengths = [-1000] * 256
    by_reader = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "uint8": 8, "float8": 8}
    for opcode in pickletools.opcodes:
        argument = opcode.arg
        if argument is None:
            length = 0
        elif argument.n >= 0 or argument.name in by_reader:
            length = by_reader.get(argument.name, argument.n)
        elif argument.n == pickletools.UP_TO_NEWLINE:
            length = -101 - (opcode.name in ("GLOBAL", "INST"))
        else:
            length = {pickletools.TAKEN_FROM_ARGUMENT1: -1, pickletools.TAKEN_FROM_ARGUMENT8U: -8}.get(argument.n, -4)
        lengths[ord(opcode.code)] = length
    return lengths


_ARGUMENT_LENGTHS = _argument_lengths()
_PUT, _LONG_BINPUT, _STOP = b"pr."


def _check_memo(data: bytes) -> None:
    """ValueError when a pickle numbers an object higher than it can have any.

    pickle makes room for all numbers up to it, which after a flipped bit are billions. 0.2 s a MB of pickle.
    """
    place, end, lengths = 0, len(data), _ARGUMENT_LENGTHS
    while place < end:
        code = data[place]
        length = lengths[code]
        place += 1
        if length >= 0:
            if code == _LONG_BINPUT and int.from_bytes(data[place : place + 4], "little") > end:
                raise ValueError("it numbers more objects than it has bytes")
            place += length
            if code == _STOP:
                return
        elif length >= -8:
            place += -length + int.from_bytes(data[place : place - length], "little")
        elif length >= -102:
            for _ in range(-100 - length):
                begin, place = place, data.find(b"\n", place) + 1
                if not place or (code == _PUT and int(data[begin:place]) > end):
                    raise ValueError("it numbers more objects than it has bytes, or is cut off")
        else:
            raise ValueError(f"{code:#x} at byte {place - 1} is nothing that a pickle can say")
    raise ValueError("it is cut off")

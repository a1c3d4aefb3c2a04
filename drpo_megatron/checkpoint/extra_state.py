"""The state that Transformer Engine keeps of a layer's FP8, made safe: it unpickles what it is given (module/base.py,
`set_extra_state`; Megatron's transformer_engine.py:1690 as well).

What a checkpoint holds is read here from a fixed list, and pickled anew: they only ever unpickle what we wrote.
Has not run with Transformer Engine: tests have states in its format.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from typing import Any

import torch

from drpo_megatron.checkpoint.fixed_pickle import FixedUnpickler, Table, damaged, load_fixed
from drpo_megatron.checkpoint.torch_save import OBJECTS, load_saved, storage_dtype

_RECIPES = "transformer_engine.common.recipe"
_RECIPE_NAMES = (
    *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"),
    *("Format", "_FormatHelper", "MMParams", "QParams"),
)
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def rewritten(state: Any, source: str) -> Any:
    """The same state in the same form, of our own pickling. ValueError, with `source`, for a pickle beyond the list."""
    if isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.numel():
        found = load_fixed(state.numpy().tobytes(), _table(), source)
        return torch.frombuffer(bytearray(pickle.dumps(found)), dtype=torch.uint8)
    if isinstance(state, io.BytesIO):
        buffer = io.BytesIO()
        torch.save(load_saved(state.getvalue(), source), buffer)
        return io.BytesIO(buffer.getvalue())
    if state is None or (isinstance(state, torch.Tensor) and not state.numel()):
        return state
    raise damaged(source, ValueError(f"a {type(state).__name__} is no state of a layer"))


def _table() -> Table:
    recipes = sys.modules.get(_RECIPES)
    known = {(_RECIPES, name): getattr(recipes, name) for name in _RECIPE_NAMES if hasattr(recipes, name)}
    return {**OBJECTS, ("torch.storage", "_load_from_bytes"): _storage, **known}


class _Legacy(FixedUnpickler):
    """One of the pickles that follow each other in what `torch.save` wrote before it wrote archives."""

    def find_class(self, module: str, name: str) -> Any:
        return storage_dtype(module, name) or super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, numel, *_ = pid
        return dtype, key, numel


def _storage(data: Any) -> tuple[torch.dtype, torch.Tensor]:
    """dtype and bytes of a storage, which is pickled as the bytes of a file of `torch.save` within the pickle."""
    parts, place = [], 0
    for _ in range(5):
        unpickler = _Legacy(data[place:], {})
        parts.append(unpickler.load())
        place += unpickler.num_read()
    magic, protocol, _, (dtype, key, numel), keys = parts
    num_bytes = numel * dtype.itemsize
    if (magic, protocol, keys) != (_MAGIC, _PROTOCOL, [key]) or len(data) != place + 8 + num_bytes:
        raise ValueError("it holds a storage that torch didn't write")
    if struct.unpack_from("<q", data, place) != (numel,):
        raise ValueError("it holds a storage of another length than it says")
    stored = torch.empty(num_bytes, dtype=torch.uint8)
    stored.numpy().data[:] = data[place + 8 :]
    return dtype, stored

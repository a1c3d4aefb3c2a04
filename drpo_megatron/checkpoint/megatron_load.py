"""Megatron's `dist_checkpointing.load`, made to read from fixed lists, on both of its lines.

Megatron unpickles whatever a checkpoint holds: `.metadata` by DCP's readers, and what isn't sharded (settings of the
optimizer and the schedule) by torch.load. Until 0.16 those lie in `common.pt`, which a strategy of the caller's may read;
0.19 writes them as one object among the shards, `common_state`, and reads both by functions of its own module. Import only
after `platform.activate`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common as common_strategies
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy

from drpo_megatron.checkpoint.torch_dist_reader import FixedReader
from drpo_megatron.checkpoint.torch_save import load_saved

_SETTINGS_FILE = "common.pt"
_TAKES_STRATEGY = hasattr(common_strategies, "TorchCommonLoadStrategy")
"""Whether `load` is given how settings are read, as until 0.16."""


def _fixed_reader(directory: str | Path, *args: Any, **kwargs: Any) -> FixedReader:
    return FixedReader(directory)


# torch.py:752 (0.16.1) and torch.py:902 (0.19.2, which serialization.py imports by name) make one of DCP's own readers.
assert callable(torch_strategy._get_filesystem_reader)
for _module in (torch_strategy, serialization):
    if hasattr(_module, "_get_filesystem_reader"):
        _module._get_filesystem_reader = _fixed_reader


def load_by_fixed_lists(state: dict[str, Any], directory: str | Path, *, with_settings: bool) -> dict[str, Any]:
    """Collective. `state` with what the checkpoint holds of it. Without settings the rest of a checkpoint stays unread.

    Raises: ValueError, which names the file, for what is damaged or beyond the lists; Megatron's own errors.
    """
    # Named, so that no `metadata.json` chooses another one of Megatron's formats.
    shards = torch_strategy.TorchDistLoadShardedStrategy()
    if _TAKES_STRATEGY:
        return dist_checkpointing.load(state, str(directory), shards, _settings_strategy(with_settings))
    before = serialization.load_common_state_dict
    serialization.load_common_state_dict = lambda path: _settings(Path(path)) if with_settings else {}
    try:
        return dist_checkpointing.load(state, str(directory), shards)
    finally:
        serialization.load_common_state_dict = before


def _settings(directory: Path) -> Any:
    file = directory / _SETTINGS_FILE
    if file.exists() or _TAKES_STRATEGY:
        return load_saved(file.read_bytes(), str(file))
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    state: dict[str, Any] = {key: io.BytesIO()}
    torch.distributed.checkpoint.load(state, storage_reader=FixedReader(directory), no_dist=True)
    return state[key][0]


def _settings_strategy(with_settings: bool) -> Any:
    class Settings(common_strategies.TorchCommonLoadStrategy):  # type: ignore[misc]
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            return _settings(Path(checkpoint_dir)) if with_settings else {}

        def load_sharded_objects(self, *args: Any) -> Any:
            raise ValueError("objects of a checkpoint are in its shards")

    # Not by its own __init__, which registers nothing that is used here.
    return object.__new__(Settings)

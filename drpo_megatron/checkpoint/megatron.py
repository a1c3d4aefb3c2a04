"""Megatron distributed checkpoints: model, optimizer and schedule, loadable in another layout.

A checkpoint directory holds Megatron's `torch_dist` files, `hf/` (see `hf_files.py`) and `trainer.json` (counters,
layout, versions). Every rank writes its own shards; `trainer.json` is written last, by rank 0, after all ranks finished:
a directory without it is not a checkpoint of a run. Import only after `platform.activate`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from safetensors.torch import load_file, save_file

from drpo_megatron.checkpoint.hf_files import FOLDER, keep_hf_files_of_training
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint

COUNTERS_FILE = "trainer.json"
AMAX_FILE = "amax_history-rank{}.safetensors"
"""What emulated delayed scaling remembers; no file where it remembers nothing."""


def save_checkpoint(
    directory: Path,
    chunks: Sequence[Any],
    optimizer: Any,
    schedule: Any,
    counters: dict[str, Any],
    hf_path: str,
    amax_history: dict[str, torch.Tensor],
) -> None:
    """Collective. `directory` is new or empty, on a file system that all ranks share.

    Args:
        counters: small JSON-able numbers of the trainer, given back by `read_counters`.
        hf_path: the Hugging Face checkpoint of the run, whose config, tokenizer and file names are kept.
        amax_history: this rank's, of delayed scaling.
    """
    directory = Path(directory)
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["schedule"] = schedule.state_dict()
    dist_checkpointing.save(state, str(directory))
    if amax_history:
        save_file(amax_history, directory / AMAX_FILE.format(dist.get_rank()))
    dist.barrier()
    if dist.get_rank() == 0:
        keep_hf_files_of_training(hf_path, directory / FOLDER)
        record = {"counters": counters, "layout": _layout(chunks), "versions": _versions()}
        (directory / COUNTERS_FILE).write_text(json.dumps(record, indent=2) + "\n")
    dist.barrier()


def read_counters(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as counters. ValueError when the directory holds no finished checkpoint."""
    return _record(directory)["counters"]


def read_amax_history(directory: Path, chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """This rank's of `save_checkpoint`; empty when there is none, or when another layout saved it."""
    file = Path(directory) / AMAX_FILE.format(dist.get_rank())
    return load_file(file) if file.is_file() and _record(directory)["layout"] == _layout(chunks) else {}


def load_weights(directory: str | Path, chunks: Sequence[Any]) -> None:
    """Collective. Fills the model with the weights of a checkpoint that a conversion or a run wrote in any layout.

    Raises: ValueError for a directory that holds no finished checkpoint, or a damaged one.
    """
    TorchDistCheckpoint(directory)  # For its errors, which name what is missing.
    state = _sharded_model(chunks, _sharding_metadata())
    loaded = dist_checkpointing.load(state, str(directory))
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_model_key(chunks, index)], strict=True)


def load_checkpoint(directory: Path, chunks: Sequence[Any], optimizer: Any, schedule: Any) -> None:
    """Collective. Fills model, optimizer and schedule in place; the layout may differ from the one that saved."""
    state = _sharded_state(chunks, optimizer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(directory))
    for index, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_model_key(chunks, index)], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])


def _model_key(chunks: Sequence[Any], index: int) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def _sharded_state(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = _sharding_metadata()
    state = _sharded_model(chunks, metadata)
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _sharded_model(chunks: Sequence[Any], metadata: dict[str, Any]) -> dict[str, Any]:
    return {_model_key(chunks, i): chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _sharding_metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _record(directory: Path) -> dict[str, Any]:
    path = Path(directory) / COUNTERS_FILE
    if not path.is_file():
        raise ValueError(f"{directory} holds no finished checkpoint: {COUNTERS_FILE} is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); use an older checkpoint") from error


def _layout(chunks: Sequence[Any]) -> dict[str, int]:
    config = chunks[0].config
    return {
        "world_size": dist.get_world_size(),
        "tensor": config.tensor_model_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
        "context": config.context_parallel_size,
        "expert": config.expert_model_parallel_size,
    }


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}

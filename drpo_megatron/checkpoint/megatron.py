"""Megatron distributed checkpoints: model, optimizer and schedule, loadable in another layout.

A checkpoint directory holds Megatron's `torch_dist` files, `hf/` (see `hf_files.py`), `trainer.json` (counters, layout,
versions) and `checksums.json`. Every rank writes its own shards and hashes them; the last two are written by rank 0 after
all ranks finished: a directory without them is not a checkpoint of a run. Import only after `platform.activate`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from drpo_megatron.checkpoint.checksums import damaged, read_checksums, sums_of, write_checksums_of_all
from drpo_megatron.checkpoint.hf_files import FOLDER, keep_hf_files_of_training
from drpo_megatron.checkpoint.megatron_load import load_by_fixed_lists
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from drpo_megatron.files import CannotWrite, explained, flush_tree, require_free_space, write_text
from drpo_megatron.models.names import spellings
from drpo_megatron.reading import read_json_object

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
) -> str | None:
    """Collective. `directory` is new or empty, on a file system that all ranks share.

    Returns: None; or, on all ranks alike, why it could not be written. They can go on.

    Args:
        counters: small JSON-able numbers of the trainer, given back by `read_counters`.
        hf_path: the Hugging Face checkpoint of the run, whose config, tokenizer and file names are kept.
        amax_history: this rank's, of delayed scaling.
    """
    directory, rank = Path(directory), dist.get_rank()
    state = _sharded_state(chunks, optimizer, is_loading=False)
    state["schedule"] = schedule.state_dict()

    def prepare() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        require_free_space(directory, num_bytes)

    def save_shards() -> None:
        try:
            dist_checkpointing.save(state, str(directory))
        except CheckpointException as error:  # Raised on all ranks, with its reason on rank 0.
            raise CannotWrite.because(directory, _system_error(error)) from error

    def finish_own_files() -> None:
        if amax_history:
            save_file(amax_history, directory / AMAX_FILE.format(rank))
        names = [path.name for path in directory.iterdir() if _is_of_rank(path.name, rank)]
        own.update(sums_of(directory, names))

    def finish() -> None:
        keep_hf_files_of_training(hf_path, directory / FOLDER)
        record = {"counters": counters, "layout": _layout(chunks), "versions": _versions()}
        write_text(directory / COUNTERS_FILE, json.dumps(record, indent=2) + "\n")
        flush_tree(directory)
        write_checksums_of_all(directory, {name: found for part in everyone for name, found in part.items()})

    own: dict[str, Any] = {}
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    num_bytes = _total_bytes(state)
    problem = _agree(directory, prepare if rank == 0 else None) or _agree(directory, save_shards)
    problem = problem or _agree(directory, finish_own_files)
    if problem is None:
        dist.all_gather_object(everyone, own)
        problem = _agree(directory, finish if rank == 0 else None)
    return problem


def find_damage(directory: Path) -> list[str]:
    """Collective. A sentence for each file that is not what `save_checkpoint` wrote, equal on all ranks.

    Each reads its share of the files. Nothing is known of a checkpoint without checksums, which older versions wrote.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        sums = read_checksums(directory) or {}
        names = sorted(sums, key=lambda name: sums[name].num_bytes)
        found = damaged(directory, {name: sums[name] for name in names[rank::world_size]})
    except ValueError as error:
        found = [str(error)]
    everyone: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(everyone, found)
    return list(dict.fromkeys(problem for part in everyone for problem in part))


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
    stored = TorchDistCheckpoint(directory).tensors.keys()
    if problems := find_damage(Path(directory)):
        raise ValueError(f"checkpoint {directory} can't be used: {'; '.join(problems[:3])}")
    with _named(directory):
        state = _sharded_model(chunks, _sharding_metadata())
        # The rest (Transformer Engine's FP8 state) stays as it is. A stranger's is pickled, and means nothing here.
        state = _in_keys(dict_list_map_outplace(_kept_unless_tensor, state), stored)
        loaded = load_by_fixed_lists(state, directory, with_settings=False)
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded[_model_key(chunks, index)], strict=True)


def load_checkpoint(directory: Path, chunks: Sequence[Any], optimizer: Any, schedule: Any) -> None:
    """Collective. Fills model, optimizer and schedule in place; the layout may differ from the one that saved.

    Raises: ValueError, as `load_weights`.
    """
    stored = TorchDistCheckpoint(directory).tensors.keys()
    with _named(directory):
        state = _in_keys(_sharded_state(chunks, optimizer, is_loading=True), stored)
        loaded = load_by_fixed_lists(state, directory, with_settings=True)
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(loaded[_model_key(chunks, index)], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
        schedule.load_state_dict(loaded["schedule"])


def _in_keys(state: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """The state in the keys of a checkpoint that the other layer spec may have written."""

    def renamed(value: Any) -> Any:
        if isinstance(value, ShardedTensor) and value.key not in stored:
            value.key = next((key for key in spellings(value.key) if key in stored), value.key)
        return value

    return dict_list_map_outplace(renamed, state)


def _kept_unless_tensor(value: Any) -> Any:
    return LocalNonpersistentObject(value.data) if isinstance(value, ShardedObject) else value


@contextmanager
def _named(directory: str | Path) -> Iterator[None]:
    """What goes wrong in the block is a fault of the checkpoint: a ValueError that names it. Lost peers stay what they are."""
    try:
        yield
    except CheckpointException as failed:  # Of any rank, told to all of them.
        error, _ = next(iter(failed.failures.values()))
        raise _fault(directory, error) from failed
    except (ArithmeticError, AssertionError, AttributeError, CheckpointingException, LookupError, TypeError) as error:
        raise _fault(directory, error) from error
    except (ValueError, RuntimeError) as error:
        is_about_it = isinstance(error, ValueError) or str(error).startswith("Error(s) in loading state_dict")
        raise (_fault(directory, error) if is_about_it else error) from error


def _fault(directory: str | Path, error: BaseException) -> BaseException:
    if isinstance(error, OSError) or (isinstance(error, ValueError) and str(directory) in str(error)):
        return error
    return ValueError(
        f"checkpoint {directory} is damaged, or of another model: {type(error).__name__}: {str(error):.400}"
    )


def _agree(directory: Path, part: Callable[[], None] | None) -> str | None:
    """Collective. Do this rank's part, if it has one. What failed on any rank is returned on all of them.

    An error that is not the file system's is a bug, and raised.
    """
    problem = None
    try:
        if part is not None:
            with explained(directory):
                part()
    except (OSError, ValueError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)


def _system_error(error: CheckpointException) -> OSError:
    """The reason in Megatron's report: `Worker failure: [Errno 28] No space left on device`, on rank 0 only."""
    text = "; ".join(str(failure[0]) for failure in error.failures.values())
    number = re.search(r"\[Errno (\d+)\]", text)
    if number is None:
        return OSError(0, text or "another rank failed")
    return OSError(int(number[1]), os.strerror(int(number[1])))


def _is_of_rank(name: str, rank: int) -> bool:
    """Files that a rank writes: `__<rank>_<n>.distcp`, and its amax history."""
    return name.startswith(f"__{rank}_") or name == AMAX_FILE.format(rank)


def _total_bytes(state: dict[str, Any]) -> int:
    """Collective. About the bytes that all ranks write together."""
    local = sum(tensor.nbytes for tensor in _own_tensors(state))
    total = torch.tensor([local], dtype=torch.int64, device=_device())
    dist.all_reduce(total)
    return int(total.item())


def _own_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Local shards of which this rank writes the one copy."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _own_tensors(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _own_tensors(inner)
    elif isinstance(getattr(value, "data", None), torch.Tensor) and is_main_replica(value.replica_id):
        yield value.data


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


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
    return read_json_object(path)


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

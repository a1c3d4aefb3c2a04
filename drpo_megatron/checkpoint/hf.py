"""Hugging Face checkpoints: read lazily, validated whole before anything is loaded; written streamed and atomically.

safetensors only, never pickle, never code from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.atomic import new_directory
from drpo_megatron.checkpoint.other_files import OtherFiles
from drpo_megatron.checkpoint.safetensors_file import (
    Header,
    TensorInfo,
    create_file,
    read_header,
    read_tensor,
    write_tensor,
)
from drpo_megatron.paths import inside
from drpo_megatron.reading import read_json_object, read_text, short

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of config.json: what transformers 5 and older versions call the weights' type."""

_NUM_NAMED = 8
"""Problems of a checkpoint that an error lists: one lost file takes hundreds of tensors with it."""


def tensor_checksum(tensor: torch.Tensor) -> str:
    """A short hash of dtype, shape and bytes: equal exactly when the tensors are."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class HFCheckpoint:
    """A checkpoint directory: config.json and safetensors, one file or shards with an index.

    Raises ValueError on construction, listing everything that is missing, truncated or contradictory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self.index: str | None = None
        """The text of the index file; None where there is one file without an index."""
        self.headers: dict[str, Header] = {}
        """By file name."""
        self._file_of = self._locate()

    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._file_of)

    def info(self, name: str) -> TensorInfo:
        """dtype and shape. KeyError if there is none of that name."""
        return self.headers[self._file_of[name]].tensors[name]

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        """The whole tensor, or `tensor[index]`. KeyError if there is none of that name."""
        file = self._file_of[name]
        return read_tensor(self.directory / file, self.headers[file], name, index)

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one in memory at a time."""
        for name in self._file_of:
            yield name, self.get(name)

    def other_files(self) -> OtherFiles:
        """All that the directory holds beside these weights."""
        return OtherFiles.of(self.directory, {*self.headers, INDEX_FILE})

    def _locate(self) -> dict[str, str]:
        """The file of every tensor."""
        index_file = self.directory / INDEX_FILE
        problems: list[str] = []
        weight_map: dict[str, str] = {}
        if index_file.is_file():
            self.index = read_text(index_file)
            found = _read_json(index_file).get("weight_map")
            if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
                raise ValueError(f"{index_file} names no tensors (weight_map: name -> file); copy it again")
            weight_map = found
            if (self.directory / SINGLE_FILE).is_file() and set(weight_map.values()) != {SINGLE_FILE}:
                raise ValueError(
                    f"{self.directory} has both {SINGLE_FILE} and {INDEX_FILE}, which names other files: transformers "
                    f"would load the first, SGLang and the trainer the second; remove the one that is out of date"
                )
        elif not (self.directory / SINGLE_FILE).is_file():
            raise ValueError(
                f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights are read from safetensors only"
            )
        for file in sorted(set(weight_map.values()) or {SINGLE_FILE}, key=str):
            path = inside(self.directory, file, str(index_file))
            if not path.is_file():
                problems.append(f"{file} is named by {INDEX_FILE} but missing")
                continue
            try:
                self.headers[file] = read_header(path)
            except ValueError as error:
                problems.append(str(error))
        for name, file in weight_map.items():
            if file in self.headers and name not in self.headers[file].tensors:
                problems.append(f"tensor {short(name)} is not in {file}, where {INDEX_FILE} says it is")
        if weight_map:
            for file, header in self.headers.items():
                unlisted = [name for name in header.tensors if weight_map.get(name) != file]
                problems += [f"tensor {short(name)} is in {file}, but {INDEX_FILE} doesn't say so" for name in unlisted]
        if problems:
            more = f"; and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
            raise ValueError(f"checkpoint {self.directory} is damaged: {'; '.join(problems[:_NUM_NAMED])}{more}")
        return {name: file for file, header in self.headers.items() for name in header.tensors}


def has_weights(directory: Path) -> bool:
    """Whether a directory holds tensors that `HFCheckpoint` would read."""
    return (directory / INDEX_FILE).is_file() or (directory / SINGLE_FILE).is_file()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint. ValueError when the directory or the file is missing, or is not JSON."""
    if not directory.is_dir():
        raise ValueError(f"checkpoint directory {directory} does not exist")
    if not (directory / "config.json").is_file():
        snapshots = sorted(path.name for path in directory.glob("snapshots/*") if path.is_dir())
        hint = f"; it is a cache, give {directory}/snapshots/{snapshots[-1]}" if snapshots else ""
        raise ValueError(f"{directory} has no config.json; it is not a Hugging Face checkpoint{hint}")
    return _read_json(directory / "config.json")


def with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json that says so, in the keys that it has for it. None: as it is."""
    if dtype is None:
        return config
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    changed = config | dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = with_dtype(config["text_config"], dtype)
    return changed


def usual_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype | None:
    """That of most of the numbers, FP8 and integers aside: what config.json should say."""
    counts: Counter[torch.dtype] = Counter()
    for info in tensors:
        if info.dtype.is_floating_point and info.dtype.itemsize > 1:
            counts[info.dtype] += info.num_bytes // info.dtype.itemsize
    return counts.most_common(1)[0][0] if counts else None


def says_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> bool:
    """Whether config.json says that the weights are of this type, or nothing."""
    text = config.get("text_config")
    said = [part[key] for part in (config, text) if isinstance(part, dict) for key in _DTYPE_KEYS if part.get(key)]
    return dtype is None or all(name == str(dtype).removeprefix("torch.") for name in said)


def write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shard_name(index: int, count: int) -> str:
    """The customary name of shard `index` (from 0) of `count`."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def index_text(weight_map: dict[str, str], metadata: dict[str, Any]) -> str:
    """An index file. `metadata` has total_size: the bytes of all tensors."""
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write_hf_checkpoint(
    directory: str | Path,
    named_tensors: Iterable[tuple[str, torch.Tensor | None]],
    source: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Stream tensors into a new checkpoint at `directory`; all else is copied from the checkpoint `source`.

    Left there, and said so: what holds its weights in another format. config.json says the type of the tensors.
    Written under a temporary name beside it and renamed at the end: an interrupted write leaves no checkpoint. One
    shard is in memory at a time. Raises ValueError if `directory` exists (unless `force`).
    """
    target, original = Path(directory), HFCheckpoint(source)
    others = original.other_files().without_copies(original.names())
    for note in others.notes():
        say(f"note: {note}")
    with new_directory(target, num_bytes=others.num_bytes, force=force, source=original.directory) as scratch:
        others.copy(scratch)
        dtype = usual_dtype(_write_shards(scratch, named_tensors, max_shard_bytes))
        if not says_dtype(original.config, dtype):
            write_config(scratch, with_dtype(original.config, dtype))
    return target


def _write_shards(
    scratch: Path, named_tensors: Iterable[tuple[str, torch.Tensor | None]], max_bytes: int
) -> list[TensorInfo]:
    """What was written."""
    infos: list[TensorInfo] = []
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    num_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, num_bytes
        path = scratch / f"shard-{len(shards)}"
        tensors = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()}
        header = Header.build(tensors, {"format": "pt"})
        create_file(path, header)
        for name, tensor in shard.items():
            write_tensor(path, header, name, tensor)
        infos.extend(tensors.values())
        shards.append(list(shard))
        shard, num_bytes = {}, 0

    for name, tensor in named_tensors:
        assert tensor is not None, f"{name}: only the rank that holds the tensors writes them"
        size = tensor.numel() * tensor.element_size()
        if shard and num_bytes + size > max_bytes:
            flush()
        shard[name] = tensor.detach().cpu()
        num_bytes += size
        total_bytes += size
    flush()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = shard_name(index, len(shards))
        os.replace(scratch / f"shard-{index}", scratch / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (scratch / INDEX_FILE).write_text(index_text(weight_map, {"total_size": total_bytes}), encoding="utf-8")
    return infos


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path)

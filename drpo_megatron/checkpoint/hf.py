"""Hugging Face checkpoints: read lazily, validated whole before anything is loaded; written streamed and atomically.

safetensors only, never pickle, never code from the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9


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
        if not self.directory.is_dir():
            raise ValueError(f"checkpoint directory {self.directory} does not exist")
        config_file = self.directory / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{self.directory} has no config.json; it is not a Hugging Face checkpoint")
        self.config: dict[str, Any] = _read_json(config_file)
        self._file_of = self._locate()

    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._headers[self._file_of[name]][name]["shape"])

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor. KeyError if there is none of that name."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def iter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one in memory at a time."""
        for name in self._file_of:
            yield name, self.get(name)

    @cached_property
    def _headers(self) -> dict[Path, dict[str, Any]]:
        return {}

    def _locate(self) -> dict[str, Path]:
        index_file, single = self.directory / INDEX_FILE, self.directory / SINGLE_FILE
        problems: list[str] = []
        if index_file.is_file():
            weight_map: dict[str, str] = _read_json(index_file).get("weight_map", {})
            files = {self.directory / file for file in weight_map.values()}
        elif single.is_file():
            weight_map, files = {}, {single}
        else:
            raise ValueError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        for file in sorted(files):
            if not file.is_file():
                problems.append(f"{file.name} is named by {INDEX_FILE} but missing")
                continue
            try:
                self._headers[file] = read_safetensors_header(file)
            except ValueError as error:
                problems.append(str(error))
        for name, file_name in weight_map.items():
            header = self._headers.get(self.directory / file_name)
            if header is not None and name not in header:
                problems.append(f"tensor {name} is not in {file_name}, where {INDEX_FILE} says it is")
        if problems:
            raise ValueError(f"checkpoint {self.directory} is damaged: " + "; ".join(problems))
        if weight_map:
            return {name: self.directory / file for name, file in weight_map.items()}
        return {name: single for name in self._headers[single]}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Name -> {dtype, shape, data_offsets}. ValueError when the file is shorter or longer than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is truncated: {size} bytes can't hold its header")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != size:
        raise ValueError(f"{path} has {size} bytes, but its header describes {expected}; copy it again")
    return header


def write_hf_checkpoint(
    directory: str | Path,
    named_tensors: Iterable[tuple[str, torch.Tensor | None]],
    source: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
) -> Path:
    """Stream tensors into a new checkpoint at `directory`; config, tokenizer and the like are copied from `source`.

    Written under a temporary name beside it and renamed at the end: an interrupted write leaves no checkpoint. One
    shard is in memory at a time. Raises ValueError if `directory` exists (unless `force`).
    """
    target, source = Path(directory), Path(source)
    if target.exists() and not force:
        raise ValueError(f"{target} already exists; choose another directory or force overwriting it")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_shards(scratch, named_tensors, max_shard_bytes)
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX_FILE:
                shutil.copy2(file, scratch / file.name)
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def _write_shards(scratch: Path, named_tensors: Iterable[tuple[str, torch.Tensor | None]], max_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    num_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal shard, num_bytes
        save_file(shard, scratch / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, num_bytes = {}, 0

    for name, tensor in named_tensors:
        assert tensor is not None, f"{name}: only the rank that holds the tensors writes them"
        size = tensor.numel() * tensor.element_size()
        if shard and num_bytes + size > max_bytes:
            flush()
        shard[name] = tensor.detach().cpu().contiguous()
        num_bytes += size
        total_bytes += size
    flush()
    if len(shards) == 1:
        os.replace(scratch / "shard-0", scratch / SINGLE_FILE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(scratch / f"shard-{index}", scratch / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (scratch / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error

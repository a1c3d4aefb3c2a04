"""What a Megatron checkpoint keeps of the Hugging Face checkpoint that it comes from, so that it can become one again.

CHECKPOINT/hf/config.json, tokenizer.json, ...   as they were
              additional_chat_templates/ ...     and subdirectories, too
              tensors.json                       which tensor of which type lies in which file, and the index
              untrained.safetensors              tensors that no parameter takes (a vision tower), if there are any
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.hf import (
    DEFAULT_SHARD_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    HFCheckpoint,
    has_weights,
    index_text,
    read_config,
    shard_name,
    write_config,
)
from drpo_megatron.checkpoint.other_files import OtherFiles, copy_contents
from drpo_megatron.checkpoint.safetensors_file import (
    Header,
    TensorInfo,
    create_file,
    read_header,
    read_tensor,
    write_tensor,
)
from drpo_megatron.checkpoint.stored import StoredTensors, require_plain
from drpo_megatron.models import get_family
from drpo_megatron.paths import inside
from drpo_megatron.reading import parse_json_object, read_json_as

FOLDER = "hf"
TENSORS_FILE = "tensors.json"
UNTRAINED_FILE = "untrained.safetensors"
_OWN_FILES = (TENSORS_FILE, UNTRAINED_FILE)
_RENAMED = ".as-it-was"
"""What follows the name of a carried file that is called as one of ours."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The tensors of a checkpoint by file, without their values."""

    headers: dict[str, Header]
    """By file name, in the order of the files."""
    index: str | None
    """The text of the index file, if there is one."""

    @classmethod
    def of(cls, checkpoint: HFCheckpoint) -> FileLayout:
        return cls(checkpoint.headers, checkpoint.index)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @property
    def file_of(self) -> dict[str, str]:
        return {name: file for file, header in self.headers.items() for name in header.tensors}

    @property
    def num_bytes(self) -> int:
        return sum(header.num_bytes for header in self.headers.values())

    def rebuilt(self, expand: Callable[[str], dict[str, TensorInfo]]) -> FileLayout:
        """The same files with `expand(name)` in the place of every tensor. What doesn't change keeps its bytes."""
        headers = {}
        for file, header in self.headers.items():
            tensors = {new: info for name in header.tensors for new, info in expand(name).items()}
            headers[file] = header if tensors == header.tensors else Header.build(tensors, header.metadata)
        if headers == self.headers:
            return self
        return FileLayout(headers, None if self.index is None else _index_of(headers, self.index))

    def resharded(self, max_bytes: int) -> FileLayout:
        """The same tensors in new files of at most `max_bytes` of tensors (or of one tensor that is larger)."""
        shards: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name, info in self.tensors.items():
            if shards[-1] and size + info.num_bytes > max_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.num_bytes
        metadata = next(iter(self.headers.values())).metadata
        headers = {shard_name(i, len(shards)): Header.build(shard, metadata) for i, shard in enumerate(shards)}
        return FileLayout(headers, _index_of(headers, self.index) if len(headers) > 1 else None)

    def write_index(self, directory: Path) -> None:
        if self.index is not None:
            (directory / INDEX_FILE).write_text(self.index, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Record:
    """tensors.json."""

    is_trained: bool
    untrained: str | None
    """Directory of the tensors that no parameter takes. None: this one."""
    index: str | None
    headers: dict[str, str]
    """By file name, as they stand there."""


class HFFiles:
    """The Hugging Face side of a Megatron checkpoint: what is written beside the weights, and where those go."""

    directory: Path
    config: dict[str, Any]
    layout: FileLayout
    is_trained: bool
    """Whether the weights have changed since: then they are of the trainer's dtype, not of the layout's."""
    others: OtherFiles

    def untrained(self, name: str) -> torch.Tensor:
        """A tensor that no parameter takes. ValueError when the place that has it is gone."""
        raise NotImplementedError

    def copy_others(self, target: Path, layout: FileLayout) -> list[str]:
        """All but the weights, into a directory for files of `layout`. Returns notes on what is left."""
        taken = {name for name in self.others.files if name in layout.headers or name == INDEX_FILE}
        for name in self.others.files.keys() - taken:
            copy_contents(self.directory / name, target / name.removesuffix(_RENAMED))
        notes = self.others.notes()
        if taken:
            notes.append(f"left in {self.directory}: {', '.join(sorted(taken))} (new files have the same name)")
        return notes


class CarriedFiles(HFFiles):
    """The folder `hf/` of a Megatron checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError when the folder is not there or is damaged."""
        self.directory = directory
        record_file = directory / TENSORS_FILE
        if not record_file.is_file():
            raise ValueError(
                f"{record_file} is missing: {directory.parent} doesn't say what it was converted from; name a Hugging "
                "Face checkpoint of the same model with --hf"
            )
        self.config = read_config(directory)
        try:
            record = read_json_as(record_file, _Record)
            headers = {file: Header.parse(text) for file, text in record.headers.items()}
            for file in headers:
                inside(directory, file, str(record_file))
                if not file.endswith(".safetensors"):
                    raise ValueError(f"it names {file!r}, which is no file of safetensors")
            self.layout = FileLayout(headers, record.index)
            self.is_trained = record.is_trained
            self._untrained = Path(record.untrained or directory)
            """Where the tensors are that no parameter takes."""
        except ValueError as error:
            raise ValueError(f"{record_file} is damaged ({error}); convert again") from error
        self.others = OtherFiles.of(directory, _OWN_FILES)

    def untrained(self, name: str) -> torch.Tensor:
        """See the base class."""
        file = self._untrained / UNTRAINED_FILE
        try:
            if file.is_file():
                header = read_header(file)
                require_plain({name: header.tensors[name]}, file)
                return read_tensor(file, header, name)
            return StoredTensors(HFCheckpoint(self._untrained)).get(name)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{name} is not trained, so it has stayed in {self._untrained}, which can't be read: {error}"
            ) from error


class GivenFiles(HFFiles):
    """Another Hugging Face checkpoint of the same model, for a Megatron checkpoint that has no folder of its own."""

    def __init__(self, directory: Path) -> None:
        """`directory` may also hold no weights at all: config and tokenizer are enough. Raises ValueError for what is
        no whole checkpoint, or is quantised in a way that nothing here can undo."""
        self.directory, self.is_trained = directory, True
        if not has_weights(directory):
            self.config = read_config(directory)
            self.layout = _published_layout(self.config, directory)
            self.others = OtherFiles.of(directory, ()).without_copies(self.layout.tensors)
            return
        self._stored = StoredTensors(HFCheckpoint(directory))
        checkpoint = self._stored.checkpoint
        self.config, self.layout = self._stored.config, plain_layout(self._stored, None, ())
        self.others = checkpoint.other_files().without_copies(checkpoint.names())

    def untrained(self, name: str) -> torch.Tensor:
        """See the base class."""
        return self._stored.get(name)


def _published_layout(config: dict[str, Any], directory: Path) -> FileLayout:
    """The files of a new checkpoint in the names of the family's published ones; types are those of the weights."""
    tensors = {
        hf.name: TensorInfo(torch.bfloat16, hf.stored_shape)
        for rule in get_family(config, f"{directory}/config.json").rules(config)
        for hf in rule.hf
    }
    return FileLayout({SINGLE_FILE: Header.build(tensors, {"format": "pt"})}, None).resharded(DEFAULT_SHARD_BYTES)


def plain_layout(stored: StoredTensors, dtype: torch.dtype | None, untrained: Collection[str]) -> FileLayout:
    """The files of a checkpoint with what its tensors stand for: without scales, and all but `untrained` as `dtype`."""
    names = set(stored.names)

    def expand(name: str) -> dict[str, TensorInfo]:
        if name not in names:
            return {}
        info = stored.info(name)
        return {name: info if dtype is None or name in untrained else TensorInfo(dtype, info.shape)}

    return FileLayout.of(stored.checkpoint).rebuilt(expand)


def keep_hf_files(
    source: StoredTensors, directory: Path, layout: FileLayout, config: dict[str, Any], untrained: list[str]
) -> None:
    """Write the folder for a conversion: everything of `source` but the weights that the Megatron files hold.

    Args:
        layout: of the tensors as they are after the conversion.
        config: config.json after the conversion.
        untrained: names of tensors that no parameter takes.
    """
    directory.mkdir()
    checkpoint = source.checkpoint
    _carry(checkpoint.other_files(), directory)
    if config != checkpoint.config:
        write_config(directory, config)
    _write_record(directory, layout, is_trained=False, untrained=None)
    if untrained:
        header = Header.build({name: source.info(name) for name in untrained}, None)
        create_file(directory / UNTRAINED_FILE, header)
        for name in untrained:
            write_tensor(directory / UNTRAINED_FILE, header, name, source.get(name))


def keep_hf_files_of_training(source: str | Path, directory: Path) -> None:
    """Write the folder for a checkpoint of a training run that began with `source`.

    Args:
        source: a Hugging Face checkpoint. Tensors that no parameter takes stay there, and so do copies of its weights.
    """
    checkpoint = HFCheckpoint(source)
    directory.mkdir()
    _carry(checkpoint.other_files().without_copies(checkpoint.names()), directory)
    untrained = str(checkpoint.directory.resolve())
    _write_record(directory, FileLayout.of(checkpoint), is_trained=True, untrained=untrained)


def _carry(others: OtherFiles, directory: Path) -> None:
    for name in others.files:
        copy_contents(others.directory / name, directory / (name + _RENAMED if name in _OWN_FILES else name))


def _write_record(directory: Path, layout: FileLayout, *, is_trained: bool, untrained: str | None) -> None:
    headers = {file: header.text for file, header in layout.headers.items()}
    record = _Record(is_trained, untrained, layout.index, headers)
    (directory / TENSORS_FILE).write_text(json.dumps(asdict(record), ensure_ascii=False) + "\n", encoding="utf-8")


def _index_of(headers: dict[str, Header], old: str | None) -> str:
    """An index of these files that keeps what an old one says beside the sizes."""
    found = parse_json_object(old, "the index").get("metadata") if old is not None else None
    metadata = found if isinstance(found, dict) else {}
    infos = [info for header in headers.values() for info in header.tensors.values()]
    weight_map = {name: file for file, header in headers.items() for name in header.tensors}
    return index_text(weight_map, metadata | {"total_size": sum(info.num_bytes for info in infos)})

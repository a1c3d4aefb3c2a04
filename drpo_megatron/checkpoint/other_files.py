"""What a checkpoint directory holds beside its weights: every file is carried, or named with the reason why it isn't.

Subdirectories (chat templates, figures, another library's settings), .jinja, .pt, .bin and .gguf are carried like the
tokenizer. Links are followed, so an output holds the contents; modes are those of new files, so a read-only checkpoint
gives an output that can be changed.
"""

from __future__ import annotations

import re
import shutil
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from drpo_megatron.checkpoint.safetensors_file import read_header
from drpo_megatron.files import explained
from drpo_megatron.paths import fault_of_name

_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model|tf_model|flax_model|rust_model|model|consolidated)([-._].*)?"
    r"\.(bin|safetensors|pt|pth|ckpt|h5|msgpack|ot|onnx)(\.index\.json)?|.*\.gguf"
)
"""What other libraries and older versions call files with the weights of the whole model."""


@dataclass(frozen=True, slots=True)
class OtherFiles:
    directory: Path
    files: dict[str, int]
    """Relative names, `/` between folders, and bytes; in order."""
    left: dict[str, str] = field(default_factory=dict)
    """Names that aren't carried, and why."""

    @classmethod
    def of(cls, directory: Path, weights: Collection[str]) -> OtherFiles:
        """All that lies in `directory`, except for the files of `weights`. Nothing is read."""
        files, left = dict[str, int](), dict[str, str]()
        weights = {str(PurePosixPath(name)) for name in weights}  # An index may say ./a.safetensors.
        for name, path in _walk(directory, "", (directory.resolve(),), left):
            if name not in weights:
                files[name] = path.stat().st_size
        return cls(directory, dict(sorted(files.items())), left)

    def without_copies(self, tensors: Collection[str]) -> OtherFiles:
        """For weights that were trained: files with the weights from before are left, whatever format they are in.

        Args:
            tensors: names of the model's tensors, to tell another copy from an adapter.
        """
        copies = {name for name in self.files if _is_copy(self.directory / name, tensors)}
        reason = "the model's weights in another file, from before the training"
        kept = {name: size for name, size in self.files.items() if name not in copies}
        return OtherFiles(self.directory, kept, self.left | dict.fromkeys(sorted(copies), reason))

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())

    def copy(self, target: Path) -> None:
        """Into an existing directory. CannotWrite when the disk is full."""
        for name in self.files:
            copy_contents(self.directory / name, target / name)

    def notes(self) -> list[str]:
        """What is left, for the user: one line a reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        return [f"left in {self.directory}: {', '.join(names)} ({reason})" for reason, names in reasons.items()]


def copy_contents(source: Path, target: Path) -> None:
    """A file's bytes in a new file, with the folders that it needs."""
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _walk(directory: Path, prefix: str, above: tuple[Path, ...], left: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file. `above`: real paths of the folders that this one lies in, for links."""
    for path in sorted(directory.iterdir()):
        name = prefix + path.name
        if (fault := fault_of_name(path.name)) is not None:
            left[ascii(name)] = f"its name {fault}"
        elif not path.exists():
            left[name] = "a link to nothing"
        elif path.is_file():
            yield name, path
        elif not path.is_dir():
            left[name] = f"no file but {_kind(path)}"
        elif (reason := _no_folder(path, above)) is not None:
            left[name + "/"] = reason
        else:
            yield from _walk(path, name + "/", (*above, path.resolve()), left)


def _no_folder(path: Path, above: tuple[Path, ...]) -> str | None:
    if path.name == ".git":
        return "version control, with copies of the weights"
    if ".writing-" in path.name and path.name.startswith("."):
        return "an output that is not finished"
    if path.resolve() in above:
        return "a link to the folder that it lies in"
    if (path / ".metadata").exists() or next(path.glob("*.distcp"), None) is not None:
        return "a Megatron checkpoint"
    return None


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _is_copy(path: Path, tensors: Collection[str]) -> bool:
    if _OTHER_WEIGHTS.fullmatch(path.name):
        return True
    if path.suffix != ".safetensors":
        return False
    try:
        return not read_header(path).tensors.keys().isdisjoint(tensors)
    except ValueError:
        return False

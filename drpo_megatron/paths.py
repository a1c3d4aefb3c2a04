"""Names that come from a file or from the user, before they are joined to a directory: here and nowhere else.

    path = inside(directory, name, "model.safetensors.index.json")              # to read
    path = inside(directory, name, "hf/tensors.json", for_writing=True)         # to write
    name = file_name(name, "run.name")                                          # one component, no folder

What is refused is the way out of the directory (`..`, an absolute path, and for writes a symbolic link that leads out)
and what no tool shows as it is (NUL, newline, control characters, text that is no UTF-8). A symbolic link may be read
through: Hugging Face's cache is made of them.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

_MAX_BYTES = 255
"""Of one component, on every file system in use."""
_UNSHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories: control, format (which reorder or hide text), surrogates, line and paragraph separators."""


def inside(directory: str | Path, name: object, source: str, *, for_writing: bool = False) -> Path:
    """`directory / name`, which is below `directory`.

    Args:
        name: what the file or the user says: a file name, or a path with `/` between folders.
        source: where the name stands, for the error.
        for_writing: the path, as far as it is there, must not lead out of the directory by symbolic links either.

    Raises: ValueError for anything else.
    """
    directory = Path(directory)
    if not isinstance(name, str):
        raise ValueError(f"{source} has {name!r} for a file name; it has to be text")
    for part in name.split("/"):
        if reason := fault_of_name(part):
            raise ValueError(f"{source} names the file {_shown(name)}, which {reason}; it has to lie in {directory}")
    path = directory / name
    if for_writing and not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{source} names the file {_shown(name)}, a symbolic link that leads out of {directory}")
    return path


def file_name(name: str, source: str) -> str:
    """The name itself, when it can be that of one file or directory. ValueError otherwise."""
    reason = "holds a /, which would be a folder" if "/" in name else fault_of_name(name)
    if reason:
        raise ValueError(f"{source} is {_shown(name)}, which {reason}; use letters, digits, '-', '_' and '.'")
    return name


def unshown_characters(text: str) -> list[str]:
    """The control characters, line breaks and the like of a text, as escapes; none in text that stays on its line."""
    return [_shown(character)[1:-1] for character in text if unicodedata.category(character) in _UNSHOWN]


def fault_of_name(part: str) -> str | None:
    """Why a name can be that of no file or folder that we list or write, in words; None for one that can."""
    if part == "":
        return "is empty or absolute, or has an empty folder in it"
    if part in (".", ".."):
        return f"has {part!r} in it"
    if found := unshown_characters(part):
        return f"has the character {found[0]} in it"
    if len(part.encode()) > _MAX_BYTES:
        return f"is longer than {_MAX_BYTES} bytes"
    return None


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else f"{name[:80]}...")

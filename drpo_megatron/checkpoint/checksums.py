"""Checksums of a directory's files: one flipped bit, a lost or a cut-off file is found before anything is read from it.

`checksums.json` lists size and XXH3 (128 bits) of every file, and its own hash. XXH3 is as fast as memory and finds
what happens by accident; it is no signature. `tools/benchmark_checkpoint.py` measures what it costs.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from drpo_megatron.files import write_text
from drpo_megatron.paths import inside
from drpo_megatron.reading import read_json_object

CHECKSUMS_FILE = "checksums.json"
_CHUNK_BYTES = 2**20
_NUM_NAMED = 3
"""Damaged files that an error lists."""
_NUM_THREADS = 4
"""Reading and hashing release the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class FileSum:
    num_bytes: int
    xxh3: str


def sum_of(path: Path) -> FileSum:
    """By reading: an error of the disk is an OSError."""
    digest, buffer, total = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            total += count
    return FileSum(total, digest.hexdigest())


def sum_of_new(path: Path) -> FileSum:
    """Of a file that was just written, whose pages are in memory: hashed where they are, at twice the speed."""
    size = path.stat().st_size
    if size == 0:
        return sum_of(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return FileSum(size, xxhash.xxh3_128_hexdigest(content))


def sums_of(
    directory: Path, names: Iterable[str], sum_one: Callable[[Path], FileSum] = sum_of_new
) -> dict[str, FileSum]:
    wanted = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(wanted, pool.map(lambda name: sum_one(directory / name), wanted), strict=True))


def write_checksums(directory: Path, sums: Mapping[str, FileSum]) -> None:
    """Written last: the directory is whole when it is there."""
    write_text(directory / CHECKSUMS_FILE, sealed({"files": {name: asdict(sums[name]) for name in sorted(sums)}}))


def write_checksums_of_all(directory: Path, known: Mapping[str, FileSum]) -> None:
    """`write_checksums` of every file in a directory that nobody else writes to. `known`: those that need no reading."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    write_checksums(directory, {**known, **sums_of(directory, names - known.keys())})


def read_checksums(directory: Path) -> dict[str, FileSum] | None:
    """None when the directory has none: another tool, or an older version of this one, wrote it.

    Raises: ValueError that names the file when it is damaged.
    """
    path = directory / CHECKSUMS_FILE
    if not path.exists():
        return None
    files = unsealed(path).get("files")
    for name in files if isinstance(files, dict) else ():
        inside(directory, name, str(path))
    try:
        return {name: FileSum(int(entry["num_bytes"]), str(entry["xxh3"])) for name, entry in files.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it is no list of files with their sums") from error


def missing_or_cut(directory: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """A sentence for each file that is not there or has another size. Reads no file."""
    problems = []
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif (size := path.stat().st_size) != expected.num_bytes:
            problems.append(f"{path} has {size:,} bytes, and had {expected.num_bytes:,} when it was saved")
    return problems


def damaged(directory: Path, sums: Mapping[str, FileSum], sum_one: Callable[[Path], FileSum] = sum_of) -> list[str]:
    """`missing_or_cut`, and a sentence for each file that holds something else than what was written."""
    if problems := missing_or_cut(directory, sums):
        return problems
    try:
        found = sums_of(directory, sums, sum_one)
    except OSError as error:
        return [f"{error.filename or directory} can't be read: {error.strerror or error}"]
    return [
        f"{directory / name} is damaged: its checksum is {found[name].xxh3[:12]}..., and was {expected.xxh3[:12]}... when "
        "it was saved"
        for name, expected in sums.items()
        if found[name] != expected
    ]


def require_undamaged(
    directory: Path, what_else: str, watched: Callable[[int], AbstractContextManager[Callable[[int], None]]]
) -> bool:
    """Reads all that a directory has checksums of. Returns whether it has any.

    Args:
        what_else: what a user can do who has changed a file on purpose.
        watched: given the bytes, shows how many have been read.

    Raises: ValueError that names every file that is missing or holds something else than what was written.
    """
    sums = read_checksums(directory)
    if sums is None:
        return False
    problems = missing_or_cut(directory, sums)
    if not problems:
        with watched(sum(found.num_bytes for found in sums.values())) as advance:

            def read(path: Path) -> FileSum:
                found = sum_of(path)
                advance(found.num_bytes)
                return found

            problems = damaged(directory, sums, read)
    if problems:
        more = f"; and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
        raise ValueError(f"{'; '.join(problems[:_NUM_NAMED])}{more}; {what_else}")
    return True


def sealed(record: dict[str, Any]) -> str:
    """JSON that carries its own hash."""
    return json.dumps(record | {"checksum": _seal(record)}, indent=2) + "\n"


def unsealed(path: Path) -> dict[str, Any]:
    """What `sealed` made. A file without a hash, which an older version wrote, is taken as it is.

    Raises: ValueError that names the file and says what is wrong with it.
    """
    try:
        record = read_json_object(path)
    except ValueError as error:
        if not path.exists():
            raise ValueError(f"{path} is missing") from None
        reason = str(error).removeprefix(str(path)).removeprefix(",").strip()
        raise ValueError(f"{path} is damaged: it {reason} ({path.stat().st_size} bytes)") from None
    checksum = record.pop("checksum", None)
    if checksum is not None and checksum != _seal(record):
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return record


def _seal(record: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())

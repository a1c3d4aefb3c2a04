"""A file or a directory is the old one or the new one, whole, wherever its writer is broken off."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drpo_megatron.checkpoint.atomic import new_directory
from drpo_megatron.files import CannotWrite, write_text, writing
from tests.disks import mounted

OLD, NEW = "old" * 5000, "new" * 7000


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 2**20) as disk:
        yield disk


def write_file(directory: Path) -> None:
    write_text(directory / "state.json", NEW)


def write_piecewise(directory: Path) -> None:
    with writing(directory / "state.json", "wb") as file:
        for start in range(0, len(NEW), 3000):
            file.write(NEW[start : start + 3000].encode())


def write_directory(directory: Path) -> None:
    with new_directory(directory / "model", force=True) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "weights").write_text(NEW)
        (scratch / "inner" / "config").write_text(NEW)


def read(directory: Path) -> set[str]:
    """What stands under the names that readers know: of a directory, whether it is one whole."""
    file, model = directory / "state.json", directory / "model"
    found = {file.read_text()} if file.exists() else set()
    if model.exists():
        names = sorted(str(path.relative_to(model)) for path in model.rglob("*"))
        assert names in (["config"], ["inner", "inner/config", "weights"]), names
        found |= {path.read_text() for path in model.rglob("*") if path.is_file()}
    return found


def dies_at_call(write: Callable[[Path], None], directory: Path, number: int) -> bool:
    """Whether a process that writes, and is killed before its n-th call into C, was still at it."""
    child = os.fork()
    if child == 0:
        count = 0

        def before_call(frame: object, event: str, function: object) -> None:
            nonlocal count
            if event == "c_call":
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(before_call)
        write(directory)
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("write", [write_file, write_piecewise, write_directory])
@pytest.mark.parametrize("there_is_an_old_one", [True, False])
def test_a_writer_that_dies_between_any_two_calls_leaves_the_old_or_the_new_whole(
    tmp_path: Path, write: Callable[[Path], None], there_is_an_old_one: bool
) -> None:
    number, seen = 0, set()
    before = {OLD} if there_is_an_old_one else set()
    is_over = False
    while not is_over:
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir()
        if there_is_an_old_one and write is write_directory:
            (directory / "model").mkdir()
            (directory / "model" / "config").write_text(OLD)
        elif there_is_an_old_one:
            (directory / "state.json").write_text(OLD)
        is_over = not dies_at_call(write, directory, number)
        left = read(directory)
        assert left in (before, {NEW}), f"killed before call {number}"
        seen.add(frozenset(left))
        write(directory)  # The next writer is not in the way of what the dead one left, and removes it.
        assert read(directory) == {NEW}
        assert [path.name for path in directory.iterdir()] == ["model" if write is write_directory else "state.json"]
        shutil.rmtree(directory)
    assert number > 20
    assert seen == {frozenset(before), frozenset({NEW})}, "both outcomes were met"


_TRACED = """
import sys
from pathlib import Path
from tests import test_files
getattr(test_files, sys.argv[1])(Path(sys.argv[2]))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed; apt-get install strace")
@pytest.mark.parametrize("write", ["write_file", "write_piecewise", "write_directory"])
def test_all_is_flushed_to_the_disk_before_it_gets_its_name_and_the_name_after(tmp_path: Path, write: str) -> None:
    """What the kernel was asked for, in order: a power cut keeps a rename, and loses what no fsync came for."""
    calls = "openat,write,fsync,close,rename,renameat2"
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-o", str(trace), "-e", f"trace={calls}", sys.executable, "-c", _TRACED]
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run([*command, write, str(out)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if "Operation not permitted" in done.stderr:
        pytest.skip("this machine doesn't let a process be traced (ptrace)")
    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text().splitlines() if str(out) in line and "= -1" not in line]
    renamed = next(i for i, line in enumerate(lines) if " rename" in line)
    flushed: list[str] = []
    written: set[str] = set()
    for line in lines[:renamed]:
        path = line.partition("<")[2].partition(">")[0]
        if " write(" in line:
            written.add(path)
            assert path not in flushed, f"{path} is written after it was flushed"
        elif " fsync(" in line:
            flushed.append(path)
    assert written and written <= set(flushed)
    assert any(" fsync(" in line and f"<{out}>" in line for line in lines[renamed:]), "the directory with the new name"
    if write == "write_directory":
        assert any("/inner" in path and not path.endswith("config") for path in flushed), "a directory inside"


_WRITES = re.compile(
    r"""\.write_text\(|\.write_bytes\(|open\([^)]*["'][wx]b?["']|os\.(replace|rename)\(|\bsave_file\(|torch\.save\(|"""
    r"""\.rename\(|savefig\((?!file|buffer)"""
)
_OTHERS = {
    "checkpoint/": "into the directory that new_directory, or the run directory's checkpoint, flushes and renames",
    "commands/unforeseen.py": "a traceback, beside whatever went wrong",
    "conversion/": "likewise",
    "data/quickstart.py": "into the directory that is flushed and renamed at its end",
    "doctor/": "tries what a disk can do; reports of an acceptance check",
    "imported.py": "the answers of a process that imports what a user names, in a scratch directory",
    "orchestration/cluster.py": "a token, in the temporary directory",
    "orchestration/run_directory.py": "renames a damaged checkpoint",
    "orchestration/run_lock.py": "a lock, which must not be renamed onto another's",
    "rollout/sglang_transport.py": "buckets of weights on their way, read once",
    "trainer/loss_methods.py": "asks the kernel to forget a peak",
}


def test_nothing_else_in_the_package_writes_files() -> None:
    package = Path(__file__).parents[1] / "drpo_megatron"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name == "files.py" or name.startswith(tuple(_OTHERS)):
            continue
        found = [line.strip() for line in path.read_text().splitlines() if _WRITES.search(line)]
        assert not found, f"{name} writes by itself; use drpo_megatron.files: {found}"


def test_what_a_living_writer_writes_is_not_removed_by_another(tmp_path: Path) -> None:
    with writing(tmp_path / "state.json") as first:
        first.write("first")
        write_text(tmp_path / "state.json", "second")
    assert (tmp_path / "state.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "state.json", OLD)
    with pytest.raises(RuntimeError), writing(tmp_path / "state.json") as file:
        file.write("half")
        raise RuntimeError
    assert (tmp_path / "state.json").read_text() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_disk_that_is_full_is_said_with_the_file_and_the_free_bytes(tiny_disk: Path) -> None:
    write_text(tiny_disk / "state.json", OLD)
    with pytest.raises(CannotWrite, match=r"can't write .*/state\.json: No space left .*\([\d,]+ bytes are free\)"):
        write_text(tiny_disk / "state.json", "x" * 2**21)
    assert (tiny_disk / "state.json").read_text() == OLD
    with (
        pytest.raises(CannotWrite, match=r"can't write .*/model: No space left") as caught,
        new_directory(tiny_disk / "model") as scratch,
    ):
        (scratch / "weights").write_bytes(bytes(2**21))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tiny_disk.iterdir()] == ["state.json"]


def test_a_limit_of_file_sizes_is_said(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(CannotWrite, match=r"File too large: a limit of this process \(ulimit -f\)"):
            write_text(tmp_path / "state.json", NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []


def test_an_error_crosses_processes_as_it_is() -> None:
    error = CannotWrite.because("/run/state.json", OSError(errno.EROFS, os.strerror(errno.EROFS)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CannotWrite and str(again) == str(error) and again.errno == errno.EROFS
    assert (
        str(error)
        == "can't write /run/state.json: Read-only file system; make it writable, or choose another directory"
    )

"""The machine under a run: its file system, shared memory, ports, clock and limits."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from drpo_megatron.doctor.finding import Finding, fail, ok, warn

_SHARED_MEMORY = Path("/dev/shm")
_MIN_SHARED_MEMORY = 2 * 2**30
_MIN_FREE = 50 * 2**30
_MIN_OPEN_FILES = 4096
_MAX_CLOCK_S = 2.0
_IDENTITY = ".drpo-megatron-directory"
_LOCAL_TYPES = ("tmpfs", "overlay", "ext4", "xfs", "btrfs", "ext3")


def check_run_directory(directory: Path) -> Iterator[Finding]:
    """Writable, renames whole directories, has room; and which one it is: nodes that share it read the same identity."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        identity = _identity(directory)
        scratch = directory / f".doctor-{uuid.uuid4().hex}"
        scratch.mkdir()
        (scratch / "file").write_bytes(b"x")
        moved = scratch.with_name(f"{scratch.name}.moved")
        scratch.rename(moved)
        written_at = (moved / "file").stat().st_mtime
        now = time.time()
        shutil.rmtree(moved)
    except OSError as error:
        yield fail("run directory", str(error), "give one that can be written: run.output_dir, and --run-dir here")
        return
    kind = _file_system(directory)
    local = "; on several nodes use one that all share" if kind in _LOCAL_TYPES else ""
    yield ok("run directory", identity, f"{directory}, {kind}{local}")
    free = shutil.disk_usage(directory).free
    amount = f"{free / 2**30:.0f} GiB free"
    if free < _MIN_FREE:
        yield warn("disk", "little room", "a checkpoint takes 14 bytes a parameter, and 2 are kept: make room", amount)
    else:
        yield ok("disk", "room", amount)
    skew = abs(now - written_at)
    if skew > _MAX_CLOCK_S:
        yield fail(
            "clock", f"{skew:.1f} s from the file system's", "start chronyd or ntpd: logs and time-outs are wrong"
        )
    else:
        yield ok("clock", f"within {_MAX_CLOCK_S:g} s of the file system's")


def check_shared_memory() -> Iterator[Finding]:
    """Ray's object store, NCCL and gloo live in it. Containers often get 64 MiB."""
    size = shutil.disk_usage(_SHARED_MEMORY).total
    found = f"{size / 2**30:.1f} GiB"
    if size < _MIN_SHARED_MEMORY:
        yield fail("shared memory", found, "start the container with --shm-size=32g or --ipc=host")
    else:
        yield ok("shared memory", found)


def check_ports() -> Iterator[Finding]:
    """A socket that others could reach under this host's name: ranks and engines meet over such."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield fail("ports", f"this host's name {name} has no address ({error})", "add it to DNS or /etc/hosts")
        return
    try:
        with (
            socket.create_server((address, 0)) as server,
            socket.create_connection(server.getsockname()[:2], timeout=10),
        ):
            pass
    except OSError as error:
        yield fail("ports", f"no connection to {address}: {error}", "open the ports between nodes in the firewall")
        return
    if address.startswith("127."):
        yield warn(
            "ports",
            "the host's name is a loopback address",
            "on several nodes name an interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; or mend /etc/hosts",
            f"{name} = {address}",
        )
    else:
        yield ok("ports", "a port of the host's address can be opened and reached", f"{name} = {address}")


def check_limits() -> Iterator[Finding]:
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if open_files < _MIN_OPEN_FILES:
        yield warn("open files", str(open_files), "ulimit -n 65536: every rank and engine holds sockets to the others")
    else:
        yield ok("open files", str(open_files))
    yield ok("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    yield ok("cpus", str(len(os.sched_getaffinity(0))))


def _identity(directory: Path) -> str:
    """Of the directory, made by whoever comes first: a link either appears whole or is already there."""
    file, scratch = directory / _IDENTITY, directory / f"{_IDENTITY}-{uuid.uuid4().hex}"
    scratch.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    with suppress(FileExistsError):
        os.link(scratch, file)
    scratch.unlink()
    return file.read_text(encoding="utf-8")


def _file_system(directory: Path) -> str:
    """Its type, of the longest mount point above the directory."""
    real = directory.resolve()
    best, kind = Path("/"), "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, found, *_ = line.split()
        point = Path(mount.replace("\\040", " "))
        if (real == point or point in real.parents) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    return kind

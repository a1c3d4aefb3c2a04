"""Which file system a path is on, and whether other machines can see it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNTS_FILE = Path("/proc/self/mountinfo")
_LOCAL_KINDS = {"btrfs", "devtmpfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs"}
_LOCAL_KINDS |= {"reiserfs", "rootfs", "squashfs", "tmpfs", "ufs", "vfat", "xfs", "zfs"}


@dataclass(frozen=True, slots=True)
class Mount:
    point: Path
    kind: str
    """ext4, nfs4, lustre, ..."""
    source: str
    """A device, or server:/path."""

    @property
    def is_local(self) -> bool:
        """Of a kind that only this machine sees. Unknown kinds are taken to be shared: clusters have many."""
        return self.kind in _LOCAL_KINDS


def read_mounts(text: str) -> list[Mount]:
    """The mounts in a /proc/<pid>/mountinfo, whose lines are described in proc(5)."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, source = after.split()[:2]
        mounts.append(Mount(Path(_unescaped(before.split()[4])), kind, _unescaped(source)))
    return mounts


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount:
    """The mount that holds `path`, which need not exist: the innermost one, and of two on one point the later."""
    resolved = path.resolve()
    holders = [mount for mount in mounts if resolved.is_relative_to(mount.point)]
    return max(reversed(holders), key=lambda mount: len(mount.point.parts))


def check_shared(path: Path, mounts: Sequence[Mount]) -> None:
    """ValueError, which says what was looked at, when `path` is on a file system of this machine alone."""
    mount = mount_of(path, mounts)
    if not mount.is_local:
        return
    shared = sorted({f"{other.point} ({other.kind})" for other in mounts if _may_hold_runs(other)})
    instead = f"such as one below {', '.join(shared[:4])}" if shared else "but this machine has none mounted"
    raise ValueError(
        f"run directory {path} is on {mount.kind} ({mount.source} mounted on {mount.point}, by {MOUNTS_FILE}), which "
        f"other nodes don't see; set run.output_dir to a directory on a shared file system, {instead}. If all nodes "
        f"see this one, say --assume-shared: the job looks again before its ranks start"
    )


def _may_hold_runs(mount: Mount) -> bool:
    """Shared, and no part of the kernel's own (proc, cgroup2, ...), which have a source without a slash or a colon."""
    return not mount.is_local and any(mark in mount.source for mark in "/:")


def _unescaped(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)

"""What the pretended GPU needs beside the CPU environment: `python -m tests.pretended_gpu.fetch [--oldest]`.

Transformer Engine's Python modules (its compiled part, of 265 MB, is not among them), what those import, and the newest
Megatron-Core that setup.py admits, which pip wouldn't install for Python 3.11: 50 MB in all, once, into
`${XDG_CACHE_HOME:-~/.cache}/drpo-megatron/pretended-gpu/`. Every part is unpacked beside its place and renamed, so a part
is whole or not there, and a fetch that was broken off goes on with the next.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Part:
    """One folder for PYTHONPATH."""

    name: str
    packages: tuple[str, ...]
    """Pinned requirements, without what they require themselves."""
    python: str = ""
    """Whose wheels, if not this Python's: of these only the .py files are of use."""
    is_compiled: bool = False
    """Then each Python has a folder of its own."""

    @property
    def folder(self) -> Path:
        versions = [package.partition("==")[2] for package in self.packages]
        versions += [sys.implementation.cache_tag] if self.is_compiled else []
        return cache() / f"{self.name}-{'-'.join(versions)}"


NEWEST_ENGINE = Part("transformer-engine", ("transformer-engine==2.20.2",))
OLDEST_ENGINE = Part("transformer-engine", ("transformer-engine==2.8.0",))
ENGINE_IMPORTS = Part(
    "engine-imports",
    ("onnxscript==0.7.2", "onnx==1.23.2", "onnx-ir==1.1.0", "ml-dtypes==0.6.0", "nvdlfw-inspect==0.2.2"),
    is_compiled=True,
)
NEWEST_MEGATRON = Part("megatron-core", ("megatron-core==0.19.2",), python="3.12")


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "drpo-megatron" / "pretended-gpu"


def fetch(*parts: Part) -> str:
    """Make the parts' folders. "" if they are there, else why not: a test then skips, with the reason."""
    for part in parts:
        if part.folder.exists():
            continue
        cache().mkdir(parents=True, exist_ok=True)
        with open(cache() / f"{part.folder.name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Another test process may be at it.
            if not part.folder.exists() and (problem := _fetch(part)):
                return problem
    return ""


def _fetch(part: Part) -> str:
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"{part.folder.name}.part-") as scratch:
        wheels, unpacked = Path(scratch, "wheels"), Path(scratch, "unpacked")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(wheels)]
        command += ["--python-version", part.python] if part.python else []
        result = subprocess.run([*command, *part.packages], capture_output=True, text=True, timeout=1200, check=False)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            return f"{' '.join(part.packages)} is not in {cache()} and pip can't download it: {last}"
        for wheel in wheels.iterdir():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
        shutil.move(unpacked, part.folder)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oldest", action="store_true", help="the oldest Transformer Engine of setup.py, too")
    parts = [NEWEST_ENGINE, ENGINE_IMPORTS, NEWEST_MEGATRON]
    parts += [OLDEST_ENGINE] if parser.parse_args().oldest else []
    if problem := fetch(*parts):
        sys.exit(problem)
    print("\n".join(str(part.folder) for part in parts))


if __name__ == "__main__":
    main()

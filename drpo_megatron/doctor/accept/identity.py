"""Which machine, and which versions of what: python -m drpo_megatron.doctor.accept.identity SGLANG_PYTHON

Asked in a process of its own: one that has looked at a GPU holds memory on it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from typing import Any

import torch

import drpo_megatron
from drpo_megatron.doctor.software import nccl_version

_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "triton",
    "transformers",
    "ray",
    "liger-kernel",
)
_ASK_SGLANG = (
    "import json, importlib.metadata as m\n"
    "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
    "print(json.dumps({n: found[n] for n in ('sglang', 'torch') if n in found}))"
)


def identity(sglang_python: str) -> dict[str, Any]:
    """What a report is valid for. `devices` is [] without a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = {"drpo_megatron": drpo_megatron.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not there"
    versions["CUDA"] = torch.version.cuda or "not there"
    versions["NCCL"] = nccl_version() or "not there"
    versions["driver"] = _driver() if count else "not there"
    for package, version in _ask_sglang(sglang_python).items():
        versions[f"SGLang's {package}" if package != "sglang" else "sglang"] = version
    return {
        "host": socket.gethostname(),
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "cpus": len(os.sched_getaffinity(0)),
        "versions": versions,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of one identity is not so in the other, in words."""
    flat = [{k: v for k, v in one.items() if k != "versions"} | one.get("versions", {}) for one in (old, new)]
    return [
        f"{name} was {flat[0].get(name, 'not there')} and is {flat[1].get(name, 'not there')}"
        for name in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(name) != flat[1].get(name)
    ]


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (asked.stdout.split() or ["unknown"])[0]


def _ask_sglang(python: str) -> dict[str, str]:
    try:
        asked = subprocess.run([python, "-c", _ASK_SGLANG], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return {"sglang": "not there"}
    return {"sglang": "not there", **json.loads(asked.stdout)} if asked.returncode == 0 else {"sglang": "broken"}


if __name__ == "__main__":
    print(json.dumps(identity(sys.argv[1])))

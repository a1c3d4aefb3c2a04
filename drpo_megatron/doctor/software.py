"""Packages: are they there, are they the ones that were meant, and do they go together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from drpo_megatron.doctor.finding import Finding, fail, ok, warn

CHECKED_SGLANG = "0.5.23"
"""The version whose server the weight sync was tested against."""
_SHOWN = ("megatron-core", "ray", "transformers", "safetensors")
_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
"""Of NVIDIA's apex: CUDA extensions that lie beside the package. The unrelated one has none."""
_ASK_SGLANG = (
    "import json, importlib.metadata as m; "
    "print(json.dumps({name: m.version(name) for name in ('sglang', 'torch', 'transformers')}))"
)


def check_requirements() -> Iterator[Finding]:
    """The package's own list of what it needs, against what is installed."""
    yield ok("python", platform.python_version())
    wrong = []
    for text in importlib.metadata.requires("drpo_megatron") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'missing'} (needs {requirement.specifier})")
    for package in _SHOWN:
        if (version := _installed(package)) is not None:
            yield ok(package, version)
    if wrong:
        yield fail("requirements", ", ".join(wrong), "pip install -e . again, or the versions that stand there")
    else:
        yield ok("requirements", "all within the ranges of setup.py")


def check_torch() -> Iterator[Finding]:
    """torch, its CUDA and NCCL, and on a CPU whether Megatron-Core's CPU lines were checked with these versions."""
    if torch.version.cuda is None:
        from drpo_megatron.trainer.platform import check_cpu_versions

        yield ok("torch", torch.__version__, "built without CUDA: trains on gloo ranks")
        try:
            check_cpu_versions()
        except ValueError as error:
            yield fail("cpu platform", str(error).partition(";")[0], str(error).partition("; ")[2])
        else:
            yield ok("cpu platform", "these versions of torch and megatron-core were checked")
        return
    yield ok("torch", torch.__version__, f"CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        yield fail(
            "cuda",
            f"torch has CUDA {torch.version.cuda}, but finds no device",
            "look at nvidia-smi: no driver, one too old for this CUDA, or no GPU given to this job (srun --gpus)",
        )
        return
    yield ok("cuda", torch.version.cuda)
    yield ok("nccl", ".".join(map(str, torch.cuda.nccl.version())))


def check_transformer_engine() -> Iterator[Finding]:
    version = _installed("transformer-engine")
    if version is None:
        if torch.cuda.is_available():
            yield warn(
                "transformer engine",
                "missing",
                "pip install 'drpo_megatron[gpu]'; without it layers are slower and FP8 is emulated",
            )
        else:
            yield ok("transformer engine", "missing", "not needed on a CPU")
    elif importlib.util.find_spec("transformer_engine_torch") is None:
        yield fail(
            "transformer engine",
            f"{version}, without its torch extension",
            "pip install --no-build-isolation 'transformer-engine[pytorch]' with the torch that is installed",
        )
    else:
        yield ok("transformer engine", version)


def check_apex() -> Iterator[Finding]:
    """NVIDIA's has never been in the public index; the package of that name there is a toolkit for web sites."""
    if importlib.util.find_spec("apex") is None:
        yield ok("apex", "missing", "not needed; Transformer Engine has the same kernels")
    elif any(importlib.util.find_spec(name) for name in _APEX_EXTENSIONS):
        yield ok("apex", "NVIDIA's")
    else:
        yield fail(
            "apex",
            f"{_installed('apex') or 'unknown version'}, without CUDA extensions: not NVIDIA's, or built without them",
            "pip uninstall apex; it isn't needed, and Megatron-Core takes any module of that name for NVIDIA's",
        )


def check_sglang(python: Path) -> Iterator[Finding]:
    """In its own environment: it needs other versions than the trainer."""
    if not python.exists():
        yield warn(
            "sglang",
            f"{python} does not exist",
            "make sglang-cpu, or give the interpreter with --sglang-python and rollout.engine.python; "
            "rollout.engine=transformers needs none",
        )
        return
    asked = subprocess.run([str(python), "-c", _ASK_SGLANG], capture_output=True, text=True, timeout=120)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        yield fail("sglang", f"{python}: {reason}", f"install sglang=={CHECKED_SGLANG} into that environment")
        return
    versions = json.loads(asked.stdout)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if versions["sglang"] != CHECKED_SGLANG:
        yield warn("sglang", found, f"weight sync was tested with {CHECKED_SGLANG}; use it, or test yours first")
    else:
        yield ok("sglang", found)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Packages: are they there, do they import, are they the ones that were meant, and do they go together."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from drpo_megatron.doctor.finding import Finding, fail, ok, warn
from drpo_megatron.doctor.gpus import has_gpus
from drpo_megatron.versions import PYTHONS, SGLANG, STACKS

_SHOWN = ("megatron-core", "ray", "transformers", "safetensors")
_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
"""Of NVIDIA's apex: CUDA extensions that lie beside the package. The unrelated one has none."""
_ASK_SGLANG = """
import importlib.metadata, json, sglang, torch
cuda = torch.version.cuda
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
versions = {name: importlib.metadata.version(name) for name in ("sglang", "torch", "transformers")}
print(json.dumps({"versions": versions, "cuda": cuda, "nccl": nccl}))
"""
_IMPORT_TRANSFORMER_ENGINE = "import transformer_engine.pytorch"


def check_requirements() -> Iterator[Finding]:
    """The package's own list of what it needs, against what is installed."""
    python = platform.python_version()
    if python.rpartition(".")[0] in PYTHONS:
        yield ok("python", python)
    else:
        yield warn("python", python, f"nothing was run with it; the locks are for {', '.join(PYTHONS)}")
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
        yield ok("torch", torch.__version__, "built without CUDA: trains on gloo ranks")
        yield from _check_cpu_platform()
        return
    yield ok("torch", torch.__version__, f"CUDA {torch.version.cuda}")
    if torch.cuda.is_available():
        yield ok("cuda", torch.version.cuda)
        yield ok("nccl", nccl_version() or "missing")
        yield from _check_stack()
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield ok("cuda", "no device", "CUDA_VISIBLE_DEVICES is empty: trains on gloo ranks")
        yield from _check_cpu_platform()
    elif has_gpus():
        yield fail(
            "cuda",
            f"nvidia-smi lists GPUs, but torch, which has CUDA {torch.version.cuda}, can use none",
            "a driver too old for this CUDA (nvidia-smi prints the newest it takes), or no GPU given to this job "
            "(srun --gpus); to train on the CPU all the same: trainer.backend=cpu",
        )
    else:
        yield ok("cuda", "no device", "this machine has no GPU: trains on gloo ranks")
        yield from _check_cpu_platform()


def _check_cpu_platform() -> Iterator[Finding]:
    from drpo_megatron.trainer.platform import check_cpu_versions

    try:
        check_cpu_versions()
    except ValueError as error:
        yield fail("cpu platform", str(error).partition(";")[0], str(error).partition("; ")[2])
    else:
        yield ok("cpu platform", "these versions of torch and megatron-core were checked")


def _check_stack() -> Iterator[Finding]:
    """Are these versions a row of the table of what fits together?"""
    found = (torch.__version__.partition("+")[0], _installed("megatron-core"), _installed("transformer-engine"))
    rows = [(row.torch, row.megatron_core, row.transformer_engine) for row in STACKS if row.transformer_engine]
    named = "torch {}, megatron-core {}, transformer-engine {}"
    if found in rows:
        yield ok("versions", named.format(*found))
    else:
        yield warn(
            "versions",
            named.format(*(version or "missing" for version in found)),
            f"resolved together, and run on the pretended device: {named.format(*rows[0])} (make gpu)",
        )


def nccl_version() -> str | None:
    """Of the library that torch is linked to; None without CUDA."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None


def check_transformer_engine() -> Iterator[Finding]:
    """Whether it imports, by a process of its own: without its torch extension, or built for another torch, it is not
    there, whatever its metadata say."""
    version = _installed("transformer-engine")
    if version is None:
        if torch.cuda.is_available():
            yield warn(
                "transformer engine",
                "missing",
                "make gpu, or pip install 'drpo_megatron[gpu]'; without it layers are slower and FP8 is emulated",
            )
        else:
            yield ok("transformer engine", "missing", "not needed on a CPU")
        return
    command = [sys.executable, "-c", _IMPORT_TRANSFORMER_ENGINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        yield ok("transformer engine", version)
        return
    reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
    judge = fail if torch.cuda.is_available() else warn  # Without a GPU nothing asks for it.
    yield judge(
        "transformer engine",
        f"{version}, which does not import: {reason}",
        "pip install --no-build-isolation 'transformer-engine[pytorch]' with the torch that is installed",
    )


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
    asked = subprocess.run([str(python), "-c", _ASK_SGLANG], capture_output=True, text=True, timeout=300)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no output"])[-1]
        yield fail("sglang", f"{python}: {reason}", f"install sglang=={SGLANG} into that environment")
        return
    answer = json.loads(asked.stdout.splitlines()[-1])
    found = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
    if answer["versions"]["sglang"] != SGLANG:
        yield warn("sglang", found, f"weight sync was tested with {SGLANG}; use it, or test yours first")
    else:
        yield ok("sglang", found)
    yield from check_communicators(nccl_version(), answer["nccl"])


def check_communicators(trainer: str | None, sglang: str | None) -> Iterator[Finding]:
    """Whether the NCCL of the trainer's torch and that of SGLang's can meet in one communicator, as a broadcast of
    weights over NCCL needs: both ends have to be of one version."""
    if trainer is None or sglang is None:
        return  # A bare CPU build on one side: weights go over gloo.
    if trainer == sglang:
        yield ok("nccl of both", trainer)
    elif torch.cuda.is_available():
        yield warn(
            "nccl of both",
            f"trainer {trainer}, SGLang {sglang}",
            "they can't share a communicator: rollout.engine.sync=broadcast needs one version on both sides (make gpu "
            "sets up two environments that have it); tensor and disk don't",
        )
    else:
        yield ok("nccl of both", f"trainer {trainer}, SGLang {sglang}", "of no account without a GPU: gloo is used")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

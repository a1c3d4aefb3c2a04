"""requirements/*.lock: what pip itself says of them, for every Python and machine, from the index's metadata."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from drpo_megatron import versions

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def pins(lock: Path) -> dict[str, str]:
    lines = [line.split(";")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    return dict(line.split("==") for line in lines if line)


@functools.cache
def index_answers() -> bool:
    asked = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "pip"], capture_output=True)
    return asked.returncode == 0


def test_there_is_a_lock_for_each_row_of_the_table_and_no_other() -> None:
    assert [lock.name for lock in LOCKS] == sorted(row.lock for row in versions.STACKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [lock.stem for lock in LOCKS])
def test_pip_finds_no_conflict_in_a_lock_beside_the_public_torch(name: str) -> None:
    """A dry run for every Python and machine that it names; only metadata is read."""
    if not index_answers():
        pytest.skip("no package index can be reached")
    command = [sys.executable, str(ROOT / "tools" / "locks.py"), "--check", name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_lock_that_disagrees_with_torch_is_found() -> None:
    """The fault that made this test: Triton pinned to another version than torch's public build pins."""
    if not index_answers():
        pytest.skip("no package index can be reached")
    locks = runpy.run_path(str(ROOT / "tools" / "locks.py"))
    with pytest.raises(ValueError, match="conflict"):
        locks["resolve"]((f"torch=={versions.TORCH}", "triton==3.9.0"), "3.12")


@pytest.mark.parametrize("row", versions.STACKS, ids=lambda row: row.lock)
def test_a_lock_says_what_the_table_says(row: versions.Stack) -> None:
    found = pins(ROOT / "requirements" / row.lock)
    assert found["triton"] == row.triton
    for name, version in (("megatron-core", row.megatron_core), ("transformer-engine", row.transformer_engine)):
        assert found.get(name, "") == version
    if "gpu" in row.lock:
        assert (found["torch"], found["nvidia-nccl-cu13"]) == (row.torch, row.nccl)
        assert found.get("sglang", "") == row.sglang
    else:  # Torch comes first, by its pin, and a bare build of it would fight the CUDA packages of the public one.
        assert [name for name in found if re.match(r"torch$|nvidia|cuda|sglang|torchvision", name)] == []
        assert row.torch == versions.TORCH


def test_a_lock_pins_all_that_is_asked_for() -> None:
    """So what `make locks` would resolve are names that exist, in versions that a lock has."""
    for lock in runpy.run_path(str(ROOT / "tools" / "locks.py"))["locks"]():
        found = {canonicalize_name(name): version for name, version in pins(lock.path).items()}
        for wanted in map(Requirement, lock.wanted):
            if lock.left_out is None or not lock.left_out.match(wanted.name):
                assert wanted.specifier.contains(found[canonicalize_name(wanted.name)]), f"{lock.name}: {wanted}"


def test_environments_on_gpus_share_a_communicator() -> None:
    trainer, sglang = (pins(ROOT / "requirements" / f"{name}.lock") for name in ("gpu-py312", "sglang-gpu-py312"))
    for package in ("torch", "triton", "nvidia-nccl-cu13"):
        assert trainer[package] == sglang[package]


def test_all_that_is_imported_is_declared() -> None:
    """Imports of the package by their distributions; what only comes along with another isn't there for ever."""
    names = {"drpo_megatron", *sys.stdlib_module_names}
    imported = set()
    for file in (ROOT / "drpo_megatron").rglob("*.py"):
        for match in re.finditer(r"^ *(?:from|import) ([a-zA-Z_]\w*)", file.read_text(encoding="utf-8"), re.M):
            imported.add(match.group(1))
    declared = {
        re.split(r"[\[<>=;~! ]", needed.specifier)[0].lower().replace("_", "-")
        for group in (versions.REQUIRED, *versions.EXTRAS.values())
        for needed in group
    }
    of_sglang = {"sglang", "torchvision", "sgl_kernel"}
    optional = {
        "amp_C",
        "fused_layer_norm_cuda",
        "fused_weight_gradient_mlp_cuda",
        "liger_kernel",
        "transformer_engine",
    }
    apart = of_sglang | optional | {"annotated_types", "pydantic_core"}  # The last two are pydantic's interface.
    owners = importlib.metadata.packages_distributions()
    missing = {}
    for module in sorted(imported - names - apart):
        distributions = {owner.lower().replace("_", "-") for owner in owners.get(module, [module])}
        if not distributions & declared:
            missing[module] = sorted(distributions)
    assert missing == {}


def test_docs_show_the_table() -> None:
    assert versions.table() in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")

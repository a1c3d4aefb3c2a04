"""Rules for the whole test suite."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
STARTERS = {"subprocess", "multiprocessing", "ray"}
OF_OURS = ("drpo_megatron.orchestration", "drpo_megatron.rollout.sglang_", "drpo_megatron.rewards.worker")
"""Who imports one of these, or a module of the tests that does, is marked `processes`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, on a machine without CUDA; tests of modules that start processes
    are marked `processes`."""
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if starts_processes(item.path) or "sglang" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.processes)


@functools.cache
def starts_processes(module: Path) -> bool:
    """By its imports, and those of the test modules among them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if any(name.partition(".")[0] in STARTERS or name.startswith(OF_OURS) for name in names):
        return True
    files = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("tests."))
    return any(starts_processes(file) for file in files if file.exists() and file != module)

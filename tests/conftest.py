"""Rules for the whole test suite."""

from __future__ import annotations

import ast
import functools
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from drpo_megatron.trainer import platform

ROOT = Path(__file__).parents[1]
STARTERS = ("subprocess", "multiprocessing", "ray", "drpo_megatron.orchestration", "drpo_megatron.rollout.sglang_")
"""Modules whose names start processes. A test that uses one is marked `processes`, by way of its fixtures and helpers, too."""

# The same examples on every machine, each time; --hypothesis-profile=default draws others.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """What a shell in the background and `nohup` make us ignore, children would ignore, too: unlike this function."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *arguments: None)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A module that imports Megatron before its platform is there would break every other test of its worker."""
    if _early_megatron():
        raise pytest.UsageError(f"{report.nodeid} imports megatron.core where it is collected; import it in the test")


@pytest.fixture(autouse=True)
def megatron_after_its_platform() -> Iterator[None]:
    """The same for a test: it passes alone, and fails whatever comes after it, in another order of the files."""
    yield
    assert not _early_megatron(), "this test imports megatron.core without platform.activate('cpu')"


def _early_megatron() -> bool:
    return "megatron.core" in sys.modules and platform._active is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, on a machine without CUDA; tests that start processes are marked
    `processes`. Files come in the order of what they cost, so that none is left over at the end."""
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        assert isinstance(item, pytest.Function)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)
        if item.originalname in starters(item.path) or "sglang" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.processes)
    costs: Counter[Path] = Counter()
    for item in items:  # Seconds, by and large.
        costs[item.path] += 60 if item.get_closest_marker("slow") else 6 if item.get_closest_marker("processes") else 1
    items.sort(key=lambda item: -costs[item.path])


@functools.cache
def starters(module: Path) -> frozenset[str]:
    """The names in a module by which processes are started: imported ones, and whatever is defined by means of them."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name for alias in node.names if alias.name.startswith(STARTERS)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            file = ROOT.joinpath(*node.module.split(".")).with_suffix(".py")
            inside = starters(file) if node.module.startswith("tests.") and file.exists() and file != module else ()
            for alias in node.names:
                if f"{node.module}.{alias.name}".startswith(STARTERS) or alias.name in inside:
                    found.add(alias.asname or alias.name)
    uses = {name: _names(node) for node in tree.body for name in _defined(node)}
    while more := {name for name, used in uses.items() if used & found} - found:
        found |= more
    return frozenset(found)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _names(node: ast.AST) -> set[str]:
    inside = list(ast.walk(node))
    return {each.id for each in inside if isinstance(each, ast.Name)} | {
        each.arg for each in inside if isinstance(each, ast.arg)
    }

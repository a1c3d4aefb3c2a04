"""docs/faults.md: every row names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
FAULTS = [row for row in ROWS if not row.startswith("| fault |")]


@pytest.mark.parametrize("row", FAULTS, ids=lambda row: re.split(r" (?<!\\)\| ", row[2:])[0][:60])
def test_a_fault_has_a_test(row: str) -> None:
    fault, _, tests = re.split(r" (?<!\\)\| ", row.strip("| "))
    if tests in ("the same", "the first of these"):
        return
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
    assert named, fault
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, (
            f"{file} lacks {name}"
        )

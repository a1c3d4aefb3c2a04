"""The package's layers, asserted from its syntax trees: no import goes up, and heavy libraries stay in their places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "drpo_megatron"

LEVELS = [
    {
        "__init__",
        "versions",
        "files",
        "console",
        "types",
        "metrics",
        "sinks",
        "config",
        "paths",
        "imported",
        "intervals",
        "rounding",
        "reading",
    },
    {"data", "rewards", "objectives", "models", "precision", "plots"},
    {"checkpoint", "rollout"},
    {"trainer"},
    {"weight_sync", "conversion"},
    {"orchestration", "study", "planner", "slurm", "doctor"},
    {"cli", "commands"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

PLACES = {
    "megatron": (f"{PACKAGE}/trainer/", f"{PACKAGE}/checkpoint/megatron.py", f"{PACKAGE}/checkpoint/megatron_load.py"),
    "ray": (f"{PACKAGE}/orchestration/",),
    "transformer_engine": (f"{PACKAGE}/precision/",),
    "sglang": (f"{PACKAGE}/rollout/sglang_launch.py",),  # Runs in SGLang's environment; nothing imports it.
}
"""The only files, or folders, that may import each of these."""


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every module imported anywhere in the tree, but not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), module, is_package)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) + is_package - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node, module, is_package)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def part_of(module: str) -> str:
    """`drpo_megatron.trainer.setup` -> `trainer`; a name of the package itself, such as `__version__` -> `__init__`."""
    part = module.split(".")[1] if "." in module else "__init__"
    return part if part in LEVEL_OF else "__init__"


def violations(file: str, source: str) -> list[str]:
    """What the module at `file`, a path from the root, may not import."""
    names = list(Path(file).with_suffix("").parts)
    is_package = names[-1] == "__init__"
    module = ".".join(names[:-1] if is_package else names)
    part = part_of(module)
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        top = name.split(".")[0]
        imported = part_of(name)
        if top == PACKAGE and imported != part and LEVEL_OF[imported] > LEVEL_OF[part]:
            found.append(f"{file}:{line}: {part} is below {imported}")
        if top in PLACES and not file.startswith(PLACES[top]):
            found.append(f"{file}:{line}: {top} belongs to {' and '.join(PLACES[top]) or 'no file'}")
    return found


FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.py"))


def test_every_part_of_the_package_has_a_level() -> None:
    parts = {Path(file).relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert {"cli", "trainer", "config"} <= parts
    assert parts <= LEVEL_OF.keys()


def test_no_import_goes_up_and_heavy_libraries_stay_in_their_places() -> None:
    assert [found for file in FILES for found in violations(file, (ROOT / file).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("drpo_megatron/data/x.py", "from drpo_megatron.trainer import setup"),
        ("drpo_megatron/data/x.py", "from drpo_megatron import trainer"),
        ("drpo_megatron/data/x.py", "import drpo_megatron.trainer.setup as s"),
        ("drpo_megatron/data/x.py", "def f():\n    from drpo_megatron.cli import main"),
        ("drpo_megatron/data/x.py", "from ..trainer import setup"),
        ("drpo_megatron/data/__init__.py", "from .. import trainer"),
        ("drpo_megatron/data/x.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from drpo_megatron.trainer import setup"),
        ("drpo_megatron/types.py", "import drpo_megatron.data"),
        ("drpo_megatron/checkpoint/hf.py", "import megatron.core"),
        ("drpo_megatron/trainer/x.py", "try:\n    import ray\nexcept ImportError:\n    pass"),
        ("drpo_megatron/trainer/x.py", "from transformer_engine.pytorch import Linear"),
        ("drpo_megatron/rollout/x.py", "import sglang"),
    ],
)
def test_a_violation_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("drpo_megatron/data/x.py", "if TYPE_CHECKING:\n    from drpo_megatron.trainer import setup"),
        (
            "drpo_megatron/trainer/x.py",
            "from drpo_megatron.trainer import setup\nfrom drpo_megatron.data import packing",
        ),
        ("drpo_megatron/trainer/x.py", "from . import setup"),
        ("drpo_megatron/checkpoint/megatron.py", "from megatron.core import parallel_state"),
        ("drpo_megatron/orchestration/x.py", "import ray"),
        ("drpo_megatron/cli.py", "from drpo_megatron import __version__"),
    ],
)
def test_what_is_allowed_is_not_called_a_violation(file: str, source: str) -> None:
    assert violations(file, source) == []

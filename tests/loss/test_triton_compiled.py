"""The Triton kernels as GPUs would run them: everything that the recipes launch, compiled for sm_90 and sm_100 on a CPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drpo_megatron.config import load_config
from drpo_megatron.planner.loss import chunk_line
from drpo_megatron.trainer.vocab_parallel_chunks import TILE_MULTIPLE, Head

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "drpo_megatron"
THREADS = 128
SCALARS = {"row_statistics": 0, "logit_gradient": 6}
"""Numbers of a row that a program reads besides logits: maximum, log_sum, entropy, two scales, the target's column."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed; torch does its work")
    from tools import loss_kernels

    return loss_kernels


@pytest.fixture(scope="module")
def launches(tool: ModuleType) -> dict[object, set[int]]:
    return tool.launches()


def test_every_kernel_of_the_package_is_among_them(tool: ModuleType, launches: dict[object, set[int]]) -> None:
    decorated = {
        name
        for file in PACKAGE.rglob("*.py")
        for name in re.findall(r"@triton\.jit\s+def (\w+)", file.read_text(encoding="utf-8"))
    }
    assert decorated == {launch.kernel for launch in launches} and len(decorated) > 1
    gradients = {launch.name for launch in launches if "gradient" in launch.name}
    assert gradients == {f"logit_gradient {d}{e}" for d in ("bf16", "fp32") for e in ("", " with entropy")}


def test_every_tile_is_a_multiple_of_128_columns(launches: dict[object, set[int]]) -> None:
    widths = set().union(*launches.values())
    assert {width % TILE_MULTIPLE for width in widths} == {0}
    assert min(widths) > 4096 and len(widths) > 10


def test_what_the_recipes_launch_moves_128_bits_and_spills_nothing(
    tool: ModuleType, launches: dict[object, set[int]]
) -> None:
    for launch in launches:
        block = dict(launch.constants)["BLOCK"]
        for architecture in tool.ARCHITECTURES:
            built = tool.compiled(launch, architecture)
            assert built.spilled_bytes == 0, (launch, built)
            assert built.registers <= 128, (launch, built)  # Four programs of 128 threads a multiprocessor.
            logits = built.loads[128]
            assert logits >= block / THREADS / 4, (launch, built)
            assert built.loads.total() - logits <= SCALARS[launch.kernel.removeprefix("_")], (launch, built)
            if "gradient" in launch.kernel:
                assert set(built.stores) == {128}, (launch, built)
            else:
                assert built.stores.total() == 3, (launch, built)  # One number a row each.


def test_a_ragged_tile_would_move_single_numbers(tool: ModuleType) -> None:
    """What a width of any number costs: 19,011 is what Qwen3's vocabulary at TP2 was cut into."""
    head = Head(tool.OnGpu.empty(19_011, 64, dtype=torch.bfloat16), 0, 19_011, 19_011, 1.0, None, None)
    gradient = next(launch for launch, _ in tool.recorded(head, 16) if launch.kernel == "_logit_gradient")
    built = tool.compiled(gradient, 90)
    assert built.loads[128] == 0 and set(built.stores) == {16}


def test_a_chunk_has_4096_rows_or_the_plan_says_why_not(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, config in tool.recipes().items():
        for head in tool.heads(config, torch.bfloat16):
            assert head.chunk_rows() >= 4096, name
            given = replace(head, chunk_bytes=2**30)
            assert given.chunk_rows() * given.max_shard * 4 <= 2**30
    config = load_config("examples/qwen3_4b_base.yaml")
    rows = 4096 * config.parallel.tensor
    assert chunk_line(151936, config).startswith(f"{min(rows, 16384)} of 16384 rows of logits at once")
    asked = load_config("examples/qwen3_4b_base.yaml", ["trainer.loss_chunk_mb=1024"])
    line = chunk_line(151936, asked)
    needed = int(re.search(r"trainer.loss_chunk_mb=1024: give (\d+) or leave it out", line)[1])
    better = load_config("examples/qwen3_4b_base.yaml", [f"trainer.loss_chunk_mb={needed}"])
    assert "fewer than 4096" in line and "fewer" not in chunk_line(151936, better)


def test_the_tables_in_the_docs_are_what_the_script_makes(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = tool.DOCS.read_text(encoding="utf-8")
    assert tool.time_table() in page
    if f"Triton {tool.triton.__version__}." not in page:
        pytest.skip(f"the registers in docs/loss.md are not of Triton {tool.triton.__version__}")
    assert tool.with_tables(page, tool.tables()) == page

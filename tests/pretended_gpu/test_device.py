"""The pretended GPU refuses what a GPU refuses, and counts what a GPU waits for; and nobody's CPU repair hides a GPU's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.models import FAMILIES
from drpo_megatron.precision.recipes import TRAIN_RECIPES, Engine
from tests.pretended_gpu import test_local, test_transformer_engine
from tests.pretended_gpu.cases import LAYOUTS, makers
from tests.pretended_gpu.conftest import LOCAL
from tests.pretended_gpu.worker import Environment, Ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(LOCAL) as ranks:
        yield ranks


def refusals(rank: int, num_ranks: int, environment: Environment) -> dict[str, str]:
    import torch
    import torch.distributed as dist

    there, here = torch.ones(4, 4, device="cuda"), torch.ones(4, 4)
    half = torch.ones(4, 4, device="cuda", dtype=torch.bfloat16)
    attempts = {
        "two devices": lambda: there + here,
        "device of an index": lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
        "step of a fused optimizer": lambda: torch._fused_adamw_(
            [there], [there], [there.clone()], [there.clone()], [], [torch.tensor(1.0)],
            lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        ),
        "nccl": lambda: dist.all_reduce(here),
        "gemm": lambda: torch.mm(there, there, out_dtype=torch.bfloat16),
        "numpy": lambda: there.numpy(),
        "allowed": lambda: (there * torch.tensor(2.0), torch.mm(half, half, out_dtype=torch.float32), there.cpu() + here),
    }  # fmt: skip
    answers = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            answers[name] = ""
        except (RuntimeError, TypeError) as error:
            answers[name] = str(error)
    return answers


def test_what_a_gpu_refuses_is_refused(ranks: Ranks) -> None:
    answers = ranks.run(1, refusals)[0]
    assert answers.pop("allowed") == ""
    assert "one device" in answers["two devices"]
    assert "NCCL group was given a host tensor" in answers["nccl"]
    assert all(answers.values()), answers


def waits(rank: int, num_ranks: int, environment: Environment) -> dict[str, int]:
    import torch

    from tests.pretended_gpu.device import CUDA, WAITS

    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    attempts = {
        "item": lambda: there.sum().item(),
        "float": lambda: float(there[0]),
        "if": lambda: bool(there[0] > 0),
        "tolist": lambda: there.tolist(),
        "cpu": lambda: there.cpu(),
        "mask": lambda: there[there > 0],
        "nonzero": lambda: there.nonzero(),
        "bincount": lambda: torch.bincount(there.long()),
        "repeat": lambda: torch.repeat_interleave(there, there.long()),
        "pageable": lambda: here.to(CUDA),
        "pinned but blocking": lambda: here.pin_memory().to(CUDA),
        "factory": lambda: torch.tensor([1.0], device="cuda"),
        "no wait: pinned": lambda: here.pin_memory().to(CUDA, non_blocking=True),
        "no wait: where": lambda: torch.where(there > 0, there, 0.0).sum(),
        "no wait: sized": lambda: torch.repeat_interleave(there, there.long(), output_size=4),
    }
    counts = {}
    for name, attempt in attempts.items():
        with WAITS.counted() as counted:
            attempt()
        counts[name] = sum(counted.values())
    return counts


def test_what_a_gpu_waits_for_is_counted(ranks: Ranks) -> None:
    counts = ranks.run(1, waits)[0]
    assert {name for name, count in counts.items() if not count} == {n for n in counts if n.startswith("no wait")}


def statistics_without_waiting(rank: int, num_ranks: int, environment: Environment) -> list[Any]:
    import torch

    from drpo_megatron.metrics import PackedStatistics, Statistic
    from tests.pretended_gpu.device import WAITS

    values = torch.linspace(0.0, 1.0, 8, device="cuda")
    with WAITS.counted() as counted:
        made = {
            "mean": Statistic.mean(values, values > 0.5),
            "sum": Statistic.sum(values),
            "min": Statistic.min(values, values > 0.5),
            "max": Statistic.max(values),
            "quantile": Statistic.of_quantile(values, 0.5),
            "share": Statistic.effective_share(values),
            "decibels": Statistic.decibels(values.sum(), values.square().sum()),
        }
        packed = PackedStatistics.of(made).merge(PackedStatistics.of(made))
        before = sum(counted.values())
        unpacked = packed.unpack()
        return [before, sum(counted.values()), {name: statistic.value() for name, statistic in unpacked.items()}]


def test_statistics_wait_once(ranks: Ranks) -> None:
    before, after, values = ranks.run(1, statistics_without_waiting)[0]
    assert (before, after) == (0, 1)
    assert values["mean"] == pytest.approx(sum(i / 7 for i in range(4, 8)) / 4)
    assert values["min"] == pytest.approx(4 / 7)
    assert values["max"] == 1.0


def test_every_field_of_a_recipes_engine_is_read() -> None:
    """Outside its own table: a field that nobody reads changes nothing on a GPU."""
    read = set()
    for path in (ROOT / "drpo_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read |= {node.attr} if owner == "engine" else set()
    assert {field.name for field in fields(Engine)} - read == set()
    assert any(recipe.engine for recipe in TRAIN_RECIPES.values())


def test_every_family_and_layout_has_a_case_with_an_engine_and_every_layout_one_without() -> None:
    """Qwen3.5 with pictures holds the text model that has one."""
    trained = {makers()[case.family]().model_type for case in test_transformer_engine.CASES.values()}
    assert FAMILIES.keys() - trained == {"qwen3_5_moe"}
    for module in (test_transformer_engine, test_local):
        assert LAYOUTS.keys() <= {case.layout for case in module.CASES.values()}


def test_a_repair_for_the_cpu_is_of_what_only_the_cpu_lacks() -> None:
    """What Megatron misses without Transformer Engine it misses on a GPU, too: no repair of that is for the CPU alone."""
    from drpo_megatron.trainer import platform

    assert not {fix for fixes in platform._CPU_ONLY.values() for fix in fixes} & {
        fix for fixes in platform._WITHOUT_ENGINE.values() for fix in fixes
    }
    for fixes in platform._CPU_ONLY.values():
        for fix in fixes:
            used = ast.parse((ROOT / "drpo_megatron/trainer/platform.py").read_text(encoding="utf-8"))
            function = next(n for n in ast.walk(used) if isinstance(n, ast.FunctionDef) and n.name == fix.__name__)
            text = ast.unparse(function).lower()
            assert "apex" not in text and "transformer engine" not in text, fix.__name__


def broken_engine(rank: int, num_ranks: int, environment: Environment) -> dict[str, str]:
    import importlib.metadata
    import sys

    from drpo_megatron.doctor.software import check_transformer_engine
    from drpo_megatron.precision.recipes import find_hardware
    from drpo_megatron.precision.transformer_engine import find_transformer_engine
    from drpo_megatron.trainer import platform

    answers = {}
    askers = {
        "platform": lambda: platform.find_transformer_engine(),
        "recipes": lambda: find_hardware("gpu"),
        "doctor": lambda: next(check_transformer_engine()),
    }
    find_transformer_engine.cache_clear()
    forgotten = {"transformer_engine": sys.modules.pop("transformer_engine")}  # None there: asked not to be found.
    real, importlib.metadata.version = importlib.metadata.version, lambda name: "2.20.2"
    try:
        for name, ask in askers.items():
            try:
                answers[name] = str(ask())
            except ValueError as error:
                answers[name] = f"refused: {error}"
    finally:
        importlib.metadata.version = real
        sys.modules.update(forgotten)
        find_transformer_engine.cache_clear()
    return answers


def test_an_engine_that_does_not_import_is_an_error(ranks: Ranks) -> None:
    """Its package without its compiled part has metadata, and no layers: nobody takes it for one, and all say so."""
    answers = ranks.run(1, broken_engine)[0]
    refusal = "refused: Transformer Engine 2.20.2 is installed, but transformer_engine.pytorch doesn't import"
    assert answers["platform"].startswith(refusal) and answers["recipes"] == answers["platform"]
    assert "status='fail'" in answers["doctor"] and "2.20.2, which does not import" in answers["doctor"]

"""Ranks of every environment, started when a test first needs them, and the CPU platform's answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pretended_gpu import fetch
from tests.pretended_gpu.cases import Case, makers, run_case
from tests.pretended_gpu.limits import EPS, NUM_DRAWS, Reference, perturbed, reference_of
from tests.pretended_gpu.worker import Environment, Ranks
from tests.tiny import save_checkpoint

CPU = Environment("cpu", gpu=False)
LOCAL = Environment("local")
Train = Callable[..., list[dict[str, Any]]]


def engine_environment(engine: fetch.Part, *more: fetch.Part) -> Environment:
    """Transformer Engine with what it imports; skips where it can't be had."""
    parts = (engine, fetch.ENGINE_IMPORTS, *more)
    if problem := fetch.fetch(*parts):
        pytest.skip(problem)
    return Environment(
        "-".join(part.folder.name for part in (engine, *more)), tuple(p.folder for p in parts), engine=True
    )


def megatron_environment(*more: fetch.Part) -> Environment:
    if problem := fetch.fetch(*more):
        pytest.skip(problem)
    return Environment("-".join(part.folder.name for part in more), tuple(part.folder for part in more))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The tiny Hugging Face checkpoint of a family."""
    made: dict[str, str] = {}

    def of(family: str) -> str:
        if family not in made:
            made[family] = str(save_checkpoint(tmp_path_factory.mktemp("hf"), makers()[family]()))
        return made[family]

    return of


@pytest.fixture(scope="session")
def reference(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], Reference]]:
    """What one rank of the CPU platform says of a case, in FP32, and how far from it one may be."""
    known: dict[str, Any] = {}
    with Ranks(CPU) as ranks:

        def run(case: Case, draw: int = 0) -> dict[str, Any]:
            """`draw`: of the weights, 0 for those that are trained elsewhere."""
            if (key := f"{case} {draw}") not in known:
                hf_path = checkpoint(case.family)
                if draw:
                    folder = tmp_path_factory.mktemp("hf") / "perturbed"
                    hf_path = perturbed(hf_path, folder, EPS[case.dtype], draw)
                known[key] = ranks.run(case.num_ranks, run_case, hf_path, case, str(tmp_path_factory.mktemp("cpu")))[0]
            return known[key]

        def of(case: Case) -> Reference:
            one = case.reference()
            exact = run(one.with_sections(trainer={"dtype": "fp32"}))
            others = [run(one, draw) for draw in range(case.dtype == "fp32", NUM_DRAWS + 1)]
            return reference_of(exact, others, case.dtype)

        yield of


def trainer_of(environment: Environment, checkpoint: Any, scratch: Path) -> Iterator[Train]:
    """The body of a module's fixture: (case) -> what every rank says of it."""
    with Ranks(environment) as ranks:
        calls = iter(range(10**6))
        yield lambda case: ranks.run(
            case.num_ranks, run_case, checkpoint(case.family), case, str(scratch / f"case{next(calls)}")
        )

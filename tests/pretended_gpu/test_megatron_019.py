"""The newest Megatron-Core that is admitted, with and without Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pretended_gpu import fetch
from tests.pretended_gpu.budget import MEGATRONS, problems
from tests.pretended_gpu.cases import Case
from tests.pretended_gpu.conftest import Train, engine_environment, megatron_environment, trainer_of
from tests.pretended_gpu.limits import assert_same

CASES = {
    "tp2ep2": Case(layout="tp2ep2", goes_on=True),
    "etp2": Case(layout="etp2"),
    "pp2": Case(layout="pp2"),
    "vpp2pp2": Case(layout="vpp2pp2"),
    "cp2": Case(layout="cp2"),
    "qwen3.5": Case("qwen3.5", "tp2ep2"),
    "tied": Case("dense-tied", "pp2"),
}


@pytest.fixture(scope="module")
def with_engine(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = engine_environment(fetch.NEWEST_ENGINE, fetch.NEWEST_MEGATRON)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def without_engine(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = megatron_environment(fetch.NEWEST_MEGATRON)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("local"))


@pytest.mark.parametrize("name", CASES)
def test_trains_like_the_cpu_with_transformer_engine(name: str, with_engine: Train, reference: Any) -> None:
    case = CASES[name]
    ranks = with_engine(case)
    assert all(rank["engine"] for rank in ranks)
    assert_same(ranks, reference(case))
    assert [problem for rank in ranks for problem in problems(rank, MEGATRONS)] == []
    assert not case.goes_on or all(rank["resumed"] == [] for rank in ranks)


@pytest.mark.parametrize("name", ["tp2ep2", "qwen3.5", "pp2"])
def test_trains_like_the_cpu_without_it(name: str, without_engine: Train, reference: Any) -> None:
    case = CASES[name]
    ranks = without_engine(case)
    assert_same(ranks, reference(case))
    assert not case.goes_on or all(rank["resumed"] == [] for rank in ranks)

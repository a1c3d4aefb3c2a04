"""The oldest Transformer Engine that is admitted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.pretended_gpu import fetch
from tests.pretended_gpu.cases import Case
from tests.pretended_gpu.conftest import Train, engine_environment, trainer_of
from tests.pretended_gpu.limits import assert_same


@pytest.fixture(scope="module")
def train(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = engine_environment(fetch.OLDEST_ENGINE)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("oldest"))


@pytest.mark.parametrize("layout", ["one", "tp2ep2", "etp2", "pp2", "cp2"])
def test_trains_like_the_cpu(layout: str, train: Train, reference: Any) -> None:
    case = Case(layout=layout)
    ranks = train(case)
    assert all(rank["engine"] for rank in ranks)
    assert_same(ranks, reference(case))

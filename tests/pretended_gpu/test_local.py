"""A GPU without Transformer Engine: Megatron-Core's own layers, pretended NCCL ranks, against one rank of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.pretended_gpu.budget import MEGATRONS, WITHOUT_ENGINE, problems
from tests.pretended_gpu.cases import LAYOUTS, Case
from tests.pretended_gpu.conftest import LOCAL, Train, trainer_of
from tests.pretended_gpu.limits import assert_same

KL = {"objective": {"anchor": "recompute", "kl_ref": {"coef": 0.1}}}
MANY = {"trainer": {"max_tokens_per_micro_batch": 48}}
EMULATED = Case(sections={"precision": {"train": {"name": "fp8-blockwise"}, "emulate": True}}, gradients=False)
"""A rounding that flips moves single gradients by more than it moves their norms."""
CASES = {
    **{layout: Case(layout=layout) for layout in LAYOUTS},
    "pp2 resumed": Case(layout="pp2", goes_on=True),
    "dense": Case("dense", "tp2"),
    "tied": Case("dense-tied", "pp2"),
    "qwen3.5": Case("qwen3.5", "tp2ep2"),
    "anchor and kl": Case(layout="cp2", sections=KL),
    "replay": Case(layout="tp2ep2", sections={"trainer": {"routing_replay": "rollout"}}),
    "emulated": EMULATED,
    "monitors": replace(
        EMULATED.with_sections(precision={"keep_bf16": ["first"], "monitor": {"layers_every": 1, "gradient_every": 1}}),
        layout="tp2ep2",
    ),
    "many micro-batches": Case(sections=MANY),
}


@pytest.fixture(scope="module")
def train(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    yield from trainer_of(LOCAL, checkpoint, tmp_path_factory.mktemp("local"))


@pytest.mark.parametrize("name", CASES)
def test_trains_like_the_cpu(name: str, train: Train, reference: Any) -> None:
    case = CASES[name]
    ranks = train(case)
    assert_same(ranks, reference(case))
    assert [problem for rank in ranks for problem in problems(rank, MEGATRONS | WITHOUT_ENGINE)] == []
    assert not case.goes_on or all(rank["resumed"] == [] for rank in ranks)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("emulated", "monitors")])
def test_limits_are_narrower_than_what_a_fault_does(name: str, reference: Any) -> None:
    """A lost token, expert or shard moves a gradient by percents."""
    limits = reference(CASES[name]).limits
    assert max(limits.values()) < 2e-3, limits

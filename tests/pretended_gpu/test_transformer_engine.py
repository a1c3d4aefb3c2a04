"""A GPU with the newest Transformer Engine and Megatron-Core 0.16.1: real Python modules over a stand-in for kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from drpo_megatron.precision.recipes import TRAIN_RECIPES
from tests.pretended_gpu import fetch
from tests.pretended_gpu.budget import MEGATRONS, WITHOUT_ENGINE, problems
from tests.pretended_gpu.cases import LAYOUTS, Case
from tests.pretended_gpu.conftest import Train, engine_environment, trainer_of
from tests.pretended_gpu.cuda import B200, H100
from tests.pretended_gpu.limits import assert_same
from tests.pretended_gpu.test_local import EMULATED, KL, MANY

CASES = {
    **{layout: Case(layout=layout) for layout in LAYOUTS},
    "tp2ep2 resumed": Case(layout="tp2ep2", goes_on=True),
    "dp2cp2 sharded, resumed": Case(layout="dp2cp2", goes_on=True, gradients=False),
    "dense": Case("dense", "tp2"),
    "tied": Case("dense-tied", "pp2"),
    "qwen2": Case("qwen2", "tp2"),
    "mixtral": Case("mixtral", "tp2ep2"),
    "qwen3.5": Case("qwen3.5", "tp2ep2"),
    "recompute": Case(layout="tp2ep2", sections={"model": {"recompute": "full"}}),
    "low memory": Case(layout="tp2", sections={"trainer": {"loss_low_memory": True}}),
    "anchor and kl": Case(sections=KL),
    "replay, recompute": Case(
        layout="tp2ep2", sections={"trainer": {"routing_replay": "rollout"}, "model": {"recompute": "full"}}
    ),
    "many micro-batches": Case(sections=MANY),
    "emulated": EMULATED,
}
RECIPES = {name: recipe.engine for name, recipe in TRAIN_RECIPES.items() if recipe.engine}
OF_HOPPER = [name for name, engine in RECIPES.items() if engine.capability[0] <= H100]
OF_BLACKWELL_ALONE = [name for name in RECIPES if name not in OF_HOPPER]


@pytest.fixture(scope="module")
def train(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = engine_environment(fetch.NEWEST_ENGINE)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("engine"))


@pytest.mark.parametrize("name", CASES)
def test_trains_like_the_cpu(name: str, train: Train, reference: Any) -> None:
    case = CASES[name]
    ranks = train(case)
    has_engine = name != "emulated"  # Emulation is of Megatron's own layers, whatever is installed.
    assert all(rank["engine"] is has_engine for rank in ranks)
    assert_same(ranks, reference(case))
    allowed = MEGATRONS if has_engine else MEGATRONS | WITHOUT_ENGINE
    assert [problem for rank in ranks for problem in problems(rank, allowed)] == []
    assert not case.goes_on or all(rank["resumed"] == [] for rank in ranks)


@pytest.fixture(scope="module")
def train_on_blackwell(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = replace(engine_environment(fetch.NEWEST_ENGINE), name="blackwell", capability=B200)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("blackwell"))


@pytest.mark.parametrize("layout", ["tp2ep2", "cp2"])
@pytest.mark.parametrize("recipe", OF_HOPPER)
def test_a_recipe_quantises_what_it_should_in_shapes_that_its_gemms_take(
    recipe: str, layout: str, train: Train, reference: Any
) -> None:
    assert_quantised(recipe, layout, train, reference)


@pytest.mark.parametrize("layout", ["tp2ep2", "cp2"])
@pytest.mark.parametrize("recipe", OF_BLACKWELL_ALONE)
def test_so_does_a_recipe_of_blackwell(recipe: str, layout: str, train_on_blackwell: Train, reference: Any) -> None:
    assert_quantised(recipe, layout, train_on_blackwell, reference)


def assert_quantised(recipe: str, layout: str, train: Train, reference: Any) -> None:
    """The stand-in computes in BF16, so neither side is rounded further."""
    sections = {"precision": {"train": {"name": recipe}, "emulate": False}, "trainer": {"dtype": "bf16"}}
    compares_with = {"precision": {"train": {"name": "bf16"}, "emulate": "auto"}}
    case = Case("moe-fp8", layout, sections, gradients=False, compares_with=compares_with)
    ranks, engine = train(case), RECIPES[recipe]
    assert_same(ranks, reference(case))
    for rank in ranks:
        assert {name for name, *_ in rank["quantised"]} == {engine.recipe}
        modules = {module for _, module, _ in rank["quantised"]}
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= modules
        assert any("Grouped" in module for module in modules)
        dense = [shape for _, module, shape in rank["quantised"] if "Grouped" not in module]
        assert all(shape[0] % engine.token_multiple == 0 for shape in dense)

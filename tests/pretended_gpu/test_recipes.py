"""Every shipped recipe takes its first steps: its layout's class, family, precision and trainer, shrunk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pretended_gpu import fetch
from tests.pretended_gpu.cases import Case
from tests.pretended_gpu.conftest import Train, engine_environment, trainer_of
from tests.pretended_gpu.limits import assert_same

ROOT = Path(__file__).parents[2]
FAMILIES = {"qwen3_moe": "moe-fp8", "qwen3": "dense", "qwen2": "qwen2", "qwen3_5_moe": "qwen3.5"}
TAKEN = ("optimizer_steps_per_rollout", "aggregation", "dtype", "loss_low_memory", "routing_replay")
"""Of the trainer's section; sizes are the tiny model's."""


def gpu_recipes() -> dict[str, dict[str, Any]]:
    recipes = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "examples").glob("*.yaml")
    }
    return {name: raw for name, raw in sorted(recipes.items()) if raw["trainer"]["backend"] == "gpu"}


def shrunk(raw: dict[str, Any]) -> Case:
    """Sizes of 2 where the recipe's are larger; data parallel, too, as far as four ranks go."""
    parallel = {name: min(raw["parallel"].get(name, 1), 2) for name in ("tensor", "pipeline", "expert", "context")}
    parallel["sequence"] = raw["parallel"].get("sequence", False)
    stages = parallel["tensor"] * parallel["pipeline"] * parallel["context"]
    has_replicas = raw["parallel"]["num_ranks"] > _ranks_a_replica(raw)
    parallel["num_ranks"] = stages * (2 if has_replicas and stages <= 2 else 1)
    hf_config = json.loads(Path(ROOT, raw["model"]["hf_path"], "config.json").read_text(encoding="utf-8"))
    family = FAMILIES[hf_config["model_type"]] + ("-tied" if hf_config.get("tie_word_embeddings") else "")
    optimizer = {
        name: raw["trainer"]["optimizer"][name] for name in ("overlap_grad_reduce", "betas", "weight_decay", "lr")
    }
    sections = {
        "model": {"recompute": raw["model"].get("recompute", "none")},
        "objective": raw["objective"],
        "trainer": {name: raw["trainer"][name] for name in TAKEN if name in raw["trainer"]} | {"optimizer": optimizer},
        "precision": {name: value for name, value in raw.get("precision", {}).items() if name != "rollout"},
    }
    if "train" in sections["precision"]:  # Its short form is the YAML reader's.
        sections["precision"]["train"] = {"name": sections["precision"]["train"]}
    quantised = (
        {"precision": {"train": {"name": "bf16"}, "emulate": "auto"}} if "train" in sections["precision"] else {}
    )
    return Case(family, json.dumps(parallel), sections, gradients=False, compares_with=quantised)


def _ranks_a_replica(raw: dict[str, Any]) -> int:
    parallel = raw["parallel"]
    return parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("context", 1)


@pytest.fixture(scope="module")
def train(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    environment = engine_environment(fetch.NEWEST_ENGINE)
    yield from trainer_of(environment, checkpoint, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("recipe", gpu_recipes())
def test_a_recipe_takes_its_first_steps(recipe: str, train: Train, reference: Any) -> None:
    """As it is, and in FP32 without quantisation, with steps that can be seen: BF16 hides what FP32 would show."""
    case = shrunk(gpu_recipes()[recipe])
    assert_same(train(case), reference(case))
    in_fp32 = replace(
        case.with_sections(
            trainer={"dtype": "fp32", "optimizer": {"lr": 1e-3}},
            precision={"train": {"name": "bf16"}, "emulate": "auto"},
        ),
        compares_with={},
    )
    assert_same(train(in_fp32), reference(in_fp32))


def test_every_recipe_has_a_family_here() -> None:
    found = {path.stem for path in (ROOT / "examples").glob("*.yaml")}
    assert found - gpu_recipes().keys() == {"quickstart"}
    for raw in gpu_recipes().values():
        shrunk(raw)

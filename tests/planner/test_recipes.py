"""Every recipe in examples/: the papers' settings, complete, and a layout that fits and that Megatron builds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from drpo_megatron.cli import main
from drpo_megatron.config import Config, load_config
from drpo_megatron.config.checks import check_config, layout_problems
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.planner.built import built_stages, differences
from drpo_megatron.planner.model import read_model
from drpo_megatron.planner.plan import make_plan
from drpo_megatron.precision.checks import check_precision
from drpo_megatron.precision.recipes import Hardware

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path.stem != "quickstart")
GPU = 80 * 2**30
H100 = Hardware(capability=(9, 0), cuda=(13, 0), transformer_engine=(2, 10))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def baselines(path: Path) -> list[str]:
    """The overrides that the recipe's own comment gives, as a shell would pass them."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines()]
    overrides = [line for line in lines if line.startswith("objective=")]
    return [text.split("'")[0] + text.split("'")[1] if "'" in text else text.split()[0] for text in overrides]


def test_there_is_a_recipe_of_every_setting_of_the_papers() -> None:
    assert {path.stem for path in RECIPES} == {
        "qwen3_4b_base",
        "qwen3_30b_a3b_bf16",
        "qwen3_30b_a3b_fp8_rollout",
        "qwen3_30b_a3b_fp8_e2e",
        "qwen3_5_35b_a3b",
        "r1_distill_qwen_1_5b",
        "qwen3_235b_a22b",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_the_papers_settings_and_fits(path: Path) -> None:
    config = load_config(path)
    rollout, trainer, optimizer = config.rollout, config.trainer, config.trainer.optimizer
    assert config.run.name == path.stem
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_response_tokens) == (64, 8, 8192)
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1.0, -1)
    assert (trainer.optimizer_steps_per_rollout, trainer.aggregation) == (4, "seq-mean-token-sum-norm")
    assert (trainer.horizon, trainer.entropy_coef, trainer.dtype) == (None, 0.0, "bf16")
    assert (optimizer.lr, optimizer.schedule, optimizer.warmup_steps) == (1e-6, "constant", 0)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == ((0.9, 0.999), 0.01, 1.0)
    assert (config.objective.name, config.objective.delta, config.objective.anchor) == ("drpo", 12.5, "rollout")
    assert (config.objective.kl_ref, config.advantages.name, config.reward.name) == (None, "group_mean", "math")
    assert (config.eval.samples_per_prompt, config.eval.temperature) == (16, 1.0)
    assert fits(config)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_baselines_of_a_recipe_are_the_papers(path: Path) -> None:
    objectives = [load_config(path, [override]).objective for override in baselines(path)]
    grpo, spo, dppo, pg = objectives
    assert (grpo.name, grpo.eps_low, grpo.eps_high) == ("grpo", 0.2, 0.28)
    assert (spo.name, spo.eps) == ("spo", 12.5)
    assert (dppo.name, dppo.divergence) == ("dppo", "binary_tv")
    assert dppo.delta == (0.6 if path.stem.endswith("fp8_e2e") else 0.15)
    assert pg.name == "pg"
    assert fits(load_config(path, baselines(path)[:1]))  # No objective changes what a rank holds.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_nothing_speaks_against_a_recipe_or_its_baselines_but_delta(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_config(path)
    hf_path = tmp_path / recipe.model.hf_path
    shutil.copytree(ROOT / recipe.model.hf_path, hf_path)
    files = (hf_path / "tokenizer.json", tmp_path / recipe.data.train, tmp_path / recipe.data.heldout)
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    interpreter = tmp_path / recipe.rollout.engine.python
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    hf_config = json.loads((hf_path / "config.json").read_text())
    for overrides in ([], *([text] for text in baselines(path))):
        config = load_config(path, overrides)
        warnings = check_config(config)
        assert [text.split("=")[0] for text in warnings] == ([] if overrides else ["objective.delta"])
        notes = check_precision(config, hf_config, H100)
        assert not any("EMULATED" in note for note in notes)


def test_a_dry_run_says_what_a_recipe_still_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    lacking = ["data.train=nowhere/train.jsonl", "data.heldout=nowhere/heldout.jsonl"]
    assert main(["train", str(RECIPES[0]), "--dry-run", *lacking]) == 2
    text = capsys.readouterr().err
    assert "data.train: nowhere/train.jsonl" in text and "data.heldout: nowhere/heldout.jsonl" in text


def test_the_precision_of_the_three_30b_recipes_is_their_names() -> None:
    precisions = {
        name: load_config(ROOT / "examples" / f"qwen3_30b_a3b_{name}.yaml").precision
        for name in ("bf16", "fp8_rollout", "fp8_e2e")
    }
    names = {name: (precision.train.name, precision.rollout.name) for name, precision in precisions.items()}
    assert names == {
        "bf16": ("bf16", "bf16"),
        "fp8_rollout": ("bf16", "fp8-block128"),
        "fp8_e2e": ("fp8-blockwise", "fp8-block128"),
    }


def test_fp8_halves_the_engines_layers() -> None:
    bf16, fp8 = (load_config(ROOT / "examples" / f"qwen3_30b_a3b_{name}.yaml") for name in ("bf16", "fp8_rollout"))
    model = read_model(bf16.model.hf_path)
    plans = [make_plan(config, model, GPU).rollout for config in (bf16, fp8)]
    in_layers = sum(layer.total for layer in model.layers)
    assert plans[0].weight_bytes - plans[1].weight_bytes == in_layers / 2  # A byte less, on 2 GPUs.
    assert plans[1].concurrency > plans[0].concurrency


@pytest.mark.slow  # A process that builds seven models, 60 s.
def test_megatron_builds_every_recipe_as_it_is_planned() -> None:
    configs = [load_config(path) for path in RECIPES]
    for config, stages in zip(configs, built_stages(configs), strict=True):
        assert differences(read_model(config.model.hf_path), config, stages) == []


def fits(config: Config) -> bool:
    assert layout_problems(config, read_hf_config(config.model.hf_path)) == []
    return make_plan(config, read_model(config.model.hf_path), GPU).fits

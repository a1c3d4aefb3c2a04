"""The YAML file, its overrides, and what is said when they are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from drpo_megatron.config import describe_fields, load_config, load_resolved, save_config, to_yaml

ROOT = Path(__file__).parents[2]

YAML = """\
run: {name: quick, num_steps: 4}
model:
  hf_path: data/${run.name}/model
objective: {name: drpo, delta: trust-region}
trainer:
  optimizer: {lr: 1e-4}
rollout:
  prompts_per_step: 8
  samples_per_prompt: 4
  max_response_tokens: 12
data: {train: train.jsonl}
reward: arithmetic
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def problems(file: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as raised:
        load_config(file, overrides)
    assert type(raised.value) is ValueError, "users get no pydantic dump"
    return str(raised.value)


def test_references_defaults_and_names_for_sections_resolve(file: Path) -> None:
    config = load_config(file)
    assert config.model.hf_path == "data/quick/model"
    assert config.trainer.optimizer.lr == 1e-4
    assert config.objective.name == "drpo" and config.objective.delta == 0.15
    assert config.reward.name == "arithmetic"
    assert config.parallel.num_ranks == 1


def test_overrides_apply_in_order_before_references_resolve(file: Path) -> None:
    overrides = [
        "run.name=other",
        "trainer.optimizer.lr=3e-6",
        "parallel.tensor=2",
        "trainer.optimizer.betas=[0.9, 0.95]",
    ]
    config = load_config(file, [*overrides, "parallel.tensor=4"])
    assert config.model.hf_path == "data/other/model"
    assert config.trainer.optimizer.lr == 3e-6
    assert config.trainer.optimizer.betas == (0.9, 0.95)
    assert config.parallel.tensor == 4


def test_a_name_replaces_a_whole_section_and_takes_further_keys(file: Path) -> None:
    config = load_config(file, ["objective=grpo", "objective.eps_high=0.4"])
    assert config.objective.name == "grpo" and config.objective.eps_high == 0.4
    assert load_config(file, ["objective={name: drpo, delta: paper}"]).objective.delta == 12.5
    assert load_config(file, ["advantages=rloo"]).advantages.name == "rloo"


def test_a_name_without_its_required_field_is_answered_with_an_example(file: Path) -> None:
    message = problems(file, "objective=drpo")
    assert "override objective=drpo: objective.delta is missing (float > 0, <= 1e+06)" in message
    assert "Example: objective={name: drpo, delta: ...}" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.optimizer.lrr=1", "unknown key trainer.optimizer.lrr = 1; did you mean trainer.optimizer.lr?"),
        ("tensor=2", "unknown key tensor = 2; did you mean parallel.tensor?"),
        ("parallel.tp=2", "unknown key parallel.tp = 2; known keys of parallel: num_ranks, tensor, "),
        (
            "objective.name=grpo",
            "unknown key objective.delta = 'trust-region'; known keys of objective with name grpo:",
        ),
        ("objective=grop", "objective.name = 'grop'; expected one of pg, grpo, ppo,"),
        ("objective={delta: 1}", "objective.name is missing; expected one of pg,"),
        ("objective.delta=0", "objective.delta = 0; expected greater than 0"),
        ("objective.delta=-1", "objective.delta = -1; expected greater than 0"),
        ("rollout.temperature=hot", "rollout.temperature = 'hot'; expected a valid number"),
        ("trainer.dtype=fp16", "trainer.dtype = 'fp16'; expected one of fp32, bf16; did you mean bf16?"),
        ("metrics.wandb=true", "metrics.wandb = True; expected a section with keys"),
        ("reward=import", "reward.path is missing (str)"),
        ("objective.correction=tis_token", "correction=tis_token with anchor=rollout counts the mismatch twice"),
        ("run.seed.x=3", "run.seed = {'x': 3}; expected a valid integer"),
        ("data.train=${run.nam}", "data.train: Interpolation key 'run.nam' not found"),
        ("data.train=${oc.env:HOME}", "only references to other keys are allowed"),
        ("data.train=???", "data.train: Missing mandatory value"),
        ("seed", "'seed' is not KEY=VALUE, such as trainer.optimizer.lr=1e-6"),
        ("objective={", "the value is not valid YAML"),
        ("reward.name.x=1", "reward.name = 'arithmetic' is a value, not a section with keys"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(file: Path, override: str, said: str) -> None:
    assert said in problems(file, override)


def test_all_problems_come_at_once_with_their_places(file: Path) -> None:
    file.write_text(YAML.replace("hf_path:", "hf_pth:").replace("prompts_per_step: 8", "prompts_per_step: eight"))
    message = problems(file, "run.seed=-1")
    assert "4 problems" in message
    assert f"{file}:3: unknown key model.hf_pth = 'data/quick/model'; did you mean model.hf_path?" in message
    assert f"{file}:2: model.hf_path is missing (str): Directory of the Hugging Face checkpoint" in message
    assert f"{file}:8: rollout.prompts_per_step = 'eight'; expected a valid integer" in message
    assert "override run.seed=-1: run.seed = -1; expected greater than or equal to 0" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "must hold sections"),
        ("", "must hold sections"),
        ("a: 1\na: 2", "duplicate key"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    assert said in problems(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.yaml'} can't be read: No such file" in problems(tmp_path / "none.yaml")


def test_the_saved_configuration_is_complete_and_loads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["objective=dppo", "objective.delta=0.05", "objective.divergence=binary_kl"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_resolved(tmp_path / "saved.yaml") == config
    assert "virtual_pipeline: null" in to_yaml(config) and "${" not in to_yaml(config)


def test_help_gives_type_default_and_docstring_of_every_key() -> None:
    text = describe_fields()
    assert "trainer.optimizer.lr: float > 0, <= 1 (required)\n    Peak learning rate." in text
    assert "model.recompute: none | selective | full = none" in text
    assert "parallel.virtual_pipeline: int >= 1 | null = null" in text
    assert "[objective] with objective.name = drpo" in text
    assert "relative to the directory the command runs in" in " ".join(text.split())


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, drpo_megatron.config, drpo_megatron.config.checks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

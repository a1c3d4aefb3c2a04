"""Score a saved model in this process: a run's own export on its held-out problems, or any Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from drpo_megatron.config import Config, load_resolved
from drpo_megatron.config.checks import check_evaluation
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.data.prompts import read_prompts
from drpo_megatron.data.tokenize import load_tokenizer
from drpo_megatron.rewards import RewardScorer
from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.evaluation import EvalResult, evaluate_prompts
from drpo_megatron.rollout.transformers_engine import TransformersEngine


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the command line gives. None: what the run says."""

    prompts: str | None = None
    samples: int | None = None
    temperature: float | None = None
    max_response_tokens: int | None = None
    reward: str | None = None
    seed: int | None = None


def evaluate_model(directory: Path, options: EvalOptions) -> EvalResult:
    """`directory` is a run (its `hf/` is scored) or a Hugging Face checkpoint.

    Without options a run's model scores exactly what the run measured at its end: the draws are the same.
    Raises ValueError for a directory that is neither, for what a bare checkpoint doesn't say and no option gives, and
    for everything at once that `check_evaluation` finds.
    """
    disable_progress_bar()
    config = _with_options(_config_of(directory, options), options)
    if config.data.heldout is None:
        raise ValueError(f"{directory} was trained without data.heldout; give --prompts FILE")
    check_evaluation(config)
    prompts = read_prompts(config.data.heldout, load_tokenizer(config.model.hf_path), config)
    scorer = RewardScorer(config.reward)
    try:
        section = config.rollout.engine
        embedded = section if isinstance(section, TransformersEngineSection) else TransformersEngineSection()
        engine = TransformersEngine(config.model.hf_path, embedded)
        params = SamplingParams(config.rollout.max_response_tokens, config.eval.temperature)
        chosen = prompts if options.prompts else prompts[: config.eval.max_prompts]
        return evaluate_prompts(engine, scorer, chosen, config.eval.samples_per_prompt, params, config.run.seed)
    finally:
        scorer.close()


def _config_of(directory: Path, options: EvalOptions) -> dict[str, Any]:
    """The run's configuration with the model that it trained, or one around a bare checkpoint."""
    if (directory / "config.yaml").is_file():
        if not (directory / "hf" / "config.json").is_file():
            raise ValueError(
                f"{directory} has no trained model yet: {directory / 'hf'} is missing; finish the run first"
            )
        tree = load_resolved(directory / "config.yaml").model_dump(mode="json")
        tree["model"]["hf_path"] = str(directory / "hf")
        return tree
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} is neither a run (config.yaml) nor a Hugging Face checkpoint (config.json)")
    needed = {
        "--prompts": options.prompts,
        "--reward": options.reward,
        "--max-response-tokens": options.max_response_tokens,
    }
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValueError(f"{directory} is a checkpoint without a run; give {', '.join(missing)}, too")
    return {
        "run": {"name": "eval", "num_steps": 1},
        "model": {"hf_path": str(directory)},
        "objective": {"name": "pg"},
        "trainer": {"optimizer": {"lr": 1.0}},
        "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_response_tokens": options.max_response_tokens},
        "data": {"train": options.prompts},
        "reward": {"name": "arithmetic"},
        "eval": {},
    }


def _with_options(tree: dict[str, Any], options: EvalOptions) -> Config:
    if options.prompts is not None:
        tree["data"]["heldout"] = options.prompts
    if options.samples is not None:
        tree["eval"]["samples_per_prompt"] = options.samples
    if options.temperature is not None:
        tree["eval"]["temperature"] = options.temperature
    if options.max_response_tokens is not None:
        tree["rollout"]["max_response_tokens"] = options.max_response_tokens
    if options.reward is not None:
        is_path = ":" in options.reward
        tree["reward"] = {"name": "import", "path": options.reward} if is_path else {"name": options.reward}
    if options.seed is not None:
        tree["run"]["seed"] = options.seed
    return Config.model_validate(tree)

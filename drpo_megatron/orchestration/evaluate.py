"""Score a saved model in this process: a run's own export on its held-out problems, or any Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from drpo_megatron.checkpoint.model_check import require_servable
from drpo_megatron.config import Config, load_resolved
from drpo_megatron.config.checks import check_evaluation
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.data.prompts import content_hash, read_prompts
from drpo_megatron.data.tokenize import check_template, load_tokenizer
from drpo_megatron.orchestration.answers import unreadable_answers
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.rewards.scorer import RewardScorer
from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.evaluation import EvalResult, ProblemScores, score_prompts, summarise
from drpo_megatron.rollout.score_file import ScoreFile
from drpo_megatron.rollout.transformers_engine import TransformersEngine
from drpo_megatron.trainer.platform import resolve_backend
from drpo_megatron.types import Prompt

_SAMPLES_AT_ONCE = 256
"""With `out`: problems are drawn in portions of about so many samples, each on the disk before the next begins."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the command line gives. None: what the run says."""

    prompts: str | None = None
    samples: int | None = None
    temperature: float | None = None
    max_response_tokens: int | None = None
    reward: str | None = None
    threshold: float | None = None
    """Rewards from it on count as right in pass@k. None: 1 where all rewards are 0 or 1."""
    seed: int | None = None
    out: Path | None = None
    """File of the scores (score_file.py); what it holds already is not done again. None: none is kept."""


def evaluate_model(directory: Path, options: EvalOptions, say: Callable[[str], None]) -> EvalResult:
    """`directory` is a run (its `hf/` is scored) or a Hugging Face checkpoint.

    Without options a run's model scores exactly what the run measured at its end: the draws are the same.
    Raises ValueError for a directory that is neither, for what a bare checkpoint doesn't say and no option gives, and
    for everything at once that `check_evaluation` finds, and for `options.out` that holds another evaluation.
    """
    disable_progress_bar()
    config = _with_options(_config_of(directory, options), options)
    if config.data.heldout is None:
        raise ValueError(f"{directory} was trained without data.heldout; give --prompts FILE")
    check_evaluation(config)
    require_servable(config.model.hf_path)
    tokenizer = load_tokenizer(config.model.hf_path)
    check_template(tokenizer, config.data.system_prompt)
    prompts = read_prompts(config.data.heldout, tokenizer, config)
    chosen = prompts if options.prompts else prompts[: config.eval.max_prompts]
    if unreadable := unreadable_answers(config.data.heldout, prompts, config.reward):
        say("warning: " + "\n".join(unreadable))
    watch = FailureWatch(say)
    if options.out is None:
        return summarise(list(_scores(chosen, config, len(chosen), watch)), options.threshold)
    file = ScoreFile(options.out, _settings(chosen, config))
    missing = [prompt for prompt in chosen if prompt.prompt_id not in file.done]
    if file.done:
        say(f"{file.path} has {len(file.done)} of {len(chosen)} problems; {len(missing)} are left")
    at_once = max(1, _SAMPLES_AT_ONCE // config.eval.samples_per_prompt)
    for number, problem in enumerate(_scores(missing, config, at_once, watch), start=1):
        file.append(problem)
        if number % at_once == 0:
            say(f"{len(file.done)} of {len(chosen)} problems")
    return summarise([file.done[prompt.prompt_id] for prompt in chosen], options.threshold)


def _scores(prompts: Sequence[Prompt], config: Config, at_once: int, watch: FailureWatch) -> Iterator[ProblemScores]:
    """Of every prompt in turn; so many are drawn together. ValueError when every reward of the first of them fails."""
    if not prompts:
        return
    section = config.rollout.engine
    embedded = section if isinstance(section, TransformersEngineSection) else TransformersEngineSection()
    params = SamplingParams(config.rollout.max_response_tokens, config.eval.temperature)
    scorer = RewardScorer(config.reward)
    observe = partial(watch.observe, "this evaluation")

    try:
        device = "cuda" if resolve_backend(config.trainer.backend) == "gpu" else "cpu"
        engine = TransformersEngine(config.model.hf_path, embedded, device)
        for start in range(0, len(prompts), at_once):
            portion = prompts[start : start + at_once]
            samples = config.eval.samples_per_prompt
            yield from score_prompts(engine, scorer, portion, samples, params, config.run.seed, observe)
    finally:
        scorer.close()


def _settings(prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
    """All that the scores depend on."""
    weights = Path(config.model.hf_path).glob("*.safetensors")
    return {
        "model": config.model.hf_path,
        "weights_written_at": max((int(file.stat().st_mtime) for file in weights), default=0),
        "problems": content_hash(prompts),
        "samples": config.eval.samples_per_prompt,
        "temperature": config.eval.temperature,
        "max_response_tokens": config.rollout.max_response_tokens,
        "reward": config.reward.model_dump(mode="json", exclude={"num_workers", "concurrency"}, exclude_none=True),
        "seed": config.run.seed,
    }


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

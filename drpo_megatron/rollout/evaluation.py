"""Score a policy on problems with known answers: accuracy with its uncertainty, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from drpo_megatron.config.sections import Config
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sampler import make_requests
from drpo_megatron.types import Completion, Prompt

EVALUATION_STEP = -1
"""In place of a training step in the seeds: every evaluation of a run draws with the same random numbers."""


class Generates(Protocol):
    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]: ...


class Scores(Protocol):
    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> tuple[list[float], dict[str, int]]: ...


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Accuracy is the mean reward over all samples; with several samples a problem that is avg@n."""

    accuracy: float
    low: float
    """Lower end of the 95 % Wilson interval, problems (not samples) taken as independent."""
    high: float
    pass_at_k: dict[int, float]
    """k -> unbiased estimate of the chance that one of k samples is right (arXiv:2107.03374, Eq. 1)."""
    num_problems: int
    samples_per_prompt: int
    mean_response_tokens: float
    truncated_share: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(engine: Generates, rewards: Scores, prompts: Sequence[Prompt], config: Config) -> EvalResult:
    """Held-out evaluation as the run's `eval` section says."""
    section = config.eval
    params = SamplingParams(config.rollout.max_response_tokens, section.temperature)
    chosen = list(prompts)[: section.max_prompts]
    return evaluate_prompts(engine, rewards, chosen, section.samples_per_prompt, params, config.run.seed)


def evaluate_prompts(
    engine: Generates, rewards: Scores, prompts: Sequence[Prompt], samples: int, params: SamplingParams, seed: int
) -> EvalResult:
    """`samples` completions of every prompt. A reward of at least 0.5 counts as right in pass@k."""
    if not prompts:
        raise ValueError("there are no prompts to evaluate on")
    completions = engine.generate(make_requests(prompts, samples, seed=seed, step=EVALUATION_STEP), params)
    pairs = [(prompts[i // samples], completion) for i, completion in enumerate(completions)]
    scores, _ = rewards.score(pairs)
    accuracy = sum(scores) / len(scores)
    low, high = wilson_interval(accuracy, len(prompts))
    right = [sum(s >= 0.5 for s in scores[i : i + samples]) for i in range(0, len(scores), samples)]
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples})
    return EvalResult(
        accuracy=accuracy,
        low=low,
        high=high,
        pass_at_k={k: sum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks},
        num_problems=len(prompts),
        samples_per_prompt=samples,
        mean_response_tokens=sum(len(c.token_ids) for c in completions) / len(completions),
        truncated_share=sum(c.finish_reason == "length" for c in completions) / len(completions),
    )


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share over `count` independent trials."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)

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
class ProblemScores:
    """The answers to one problem, in the order of their seeds."""

    prompt_id: str
    scores: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_truncated: int
    """Answers cut at the length limit."""

    def num_right(self) -> int:
        """A reward of at least 0.5 counts as right in pass@k."""
        return sum(score >= 0.5 for score in self.scores)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Accuracy is the mean reward over all samples; with several samples a problem that is avg@n."""

    accuracy: float
    low: float
    """Lower end of the 95 % interval of accuracy (`mean_interval`), problems taken as independent."""
    high: float
    pass_at_k: dict[int, float]
    """k -> unbiased estimate of the chance that one of k samples is right (arXiv:2107.03374, Eq. 1)."""
    pass_at_k_interval: dict[int, tuple[float, float]]
    """k -> its 95 % interval, likewise."""
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
    return summarise(score_prompts(engine, rewards, chosen, section.samples_per_prompt, params, config.run.seed))


def score_prompts(
    engine: Generates, rewards: Scores, prompts: Sequence[Prompt], samples: int, params: SamplingParams, seed: int
) -> list[ProblemScores]:
    """`samples` completions of every prompt. Their seeds do not depend on the other prompts."""
    completions = engine.generate(make_requests(prompts, samples, seed=seed, step=EVALUATION_STEP), params)
    scores, _ = rewards.score([(prompts[i // samples], completion) for i, completion in enumerate(completions)])
    scored = []
    for index, prompt in enumerate(prompts):
        span = slice(index * samples, (index + 1) * samples)
        mine = completions[span]
        scored.append(
            ProblemScores(
                prompt_id=prompt.prompt_id,
                scores=tuple(scores[span]),
                num_tokens=tuple(len(completion.token_ids) for completion in mine),
                num_truncated=sum(completion.finish_reason == "length" for completion in mine),
            )
        )
    return scored


def summarise(problems: Sequence[ProblemScores]) -> EvalResult:
    """Of problems that have equally many samples. ValueError if there are none."""
    if not problems:
        raise ValueError("there are no prompts to evaluate on")
    samples = len(problems[0].scores)
    means = [sum(problem.scores) / samples for problem in problems]
    low, high = mean_interval(means, samples)
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples})
    passed = {k: [pass_at_k(samples, problem.num_right(), k) for problem in problems] for k in ks}
    num_samples = len(problems) * samples
    return EvalResult(
        accuracy=sum(means) / len(means),
        low=low,
        high=high,
        pass_at_k={k: sum(values) / len(values) for k, values in passed.items()},
        pass_at_k_interval={k: mean_interval(values, samples) for k, values in passed.items()},
        num_problems=len(problems),
        samples_per_prompt=samples,
        mean_response_tokens=sum(sum(problem.num_tokens) for problem in problems) / num_samples,
        truncated_share=sum(problem.num_truncated for problem in problems) / num_samples,
    )


def mean_interval(values: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean of problems' values in [0, 1], each estimated from `samples` samples.

    Wilson's interval with the effective number of trials n = m (1 - m) / (v / N), which has the variance v / N of the
    mean that the problems show (Korn and Graubard's use of it for clustered samples). One sample a problem: v = m (1 - m),
    plain Wilson over problems. Several: narrower, as far as problems differ less than coins would. Never more trials than
    samples, and where all values are 0, or all 1, as many as problems.
    """
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    if mean in (0.0, 1.0):
        return wilson_interval(mean, len(values))
    most = len(values) * samples
    return wilson_interval(mean, min(most, mean * (1 - mean) * len(values) / variance) if variance else most)


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share over `count` independent trials."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)

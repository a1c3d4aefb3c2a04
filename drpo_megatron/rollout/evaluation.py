"""Score a policy on problems with known answers: the mean reward with its uncertainty, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from drpo_megatron.config.sections import Config
from drpo_megatron.intervals import HeldOut, all_zero_or_one, reward_interval, share_interval
from drpo_megatron.rewards.scorer import Scored
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sampler import make_requests
from drpo_megatron.types import Completion, Prompt

EVALUATION_STEP = -1
"""In place of a training step in the seeds: every evaluation of a run draws with the same random numbers."""


class Generates(Protocol):
    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]: ...


class Scores(Protocol):
    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> Scored: ...


@dataclass(frozen=True, slots=True)
class ProblemScores:
    """The answers to one problem, in the order of their seeds."""

    prompt_id: str
    scores: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_truncated: int
    """Answers cut at the length limit."""

    def num_right(self, threshold: float) -> int:
        return sum(score >= threshold for score in self.scores)


@dataclass(frozen=True, slots=True)
class EvalResult:
    mean: float
    """Mean reward over all samples: accuracy where every reward is 0 or 1; with several samples a problem, avg@n."""
    low: float
    """Lower end of its 95 % interval (`intervals.reward_interval`), problems taken as independent."""
    high: float
    is_accuracy: bool
    """Every reward is 0 or 1."""
    threshold: float | None
    """Rewards from it on count as right in pass@k: 1 where every reward is 0 or 1, else what was asked for. None: no
    reward is said to be right, and there is no pass@k."""
    pass_at_k: dict[int, float]
    """k -> unbiased estimate of the chance that one of k samples is right (arXiv:2107.03374, Eq. 1)."""
    pass_at_k_interval: dict[int, tuple[float, float]]
    """k -> its 95 % interval, likewise."""
    num_problems: int
    samples_per_prompt: int
    mean_response_tokens: float
    truncated_share: float

    @property
    def heldout(self) -> HeldOut:
        return HeldOut(self.mean, self.low, self.high, self.is_accuracy)

    def as_dict(self) -> dict[str, Any]:
        """As JSON: `mean_reward`, and the same number as `accuracy` only where it is one."""
        fields = {"mean_reward": self.mean} | asdict(self)
        del fields["mean"]
        return ({"accuracy": self.mean} if self.is_accuracy else {}) | fields


def evaluate(
    engine: Generates,
    rewards: Scores,
    prompts: Sequence[Prompt],
    config: Config,
    watch: Callable[[Scored], None],
) -> EvalResult:
    """Held-out evaluation as the run's `eval` section says. `watch` is told the rewards, with their failures."""
    section = config.eval
    params = SamplingParams(config.rollout.max_response_tokens, section.temperature)
    chosen = list(prompts)[: section.max_prompts]
    samples = section.samples_per_prompt
    return summarise(score_prompts(engine, rewards, chosen, samples, params, config.run.seed, watch))


def score_prompts(
    engine: Generates,
    rewards: Scores,
    prompts: Sequence[Prompt],
    samples: int,
    params: SamplingParams,
    seed: int,
    watch: Callable[[Scored], None] = lambda scored: None,
) -> list[ProblemScores]:
    """`samples` completions of every prompt. Their seeds do not depend on the other prompts."""
    completions = engine.generate(make_requests(prompts, samples, seed=seed, step=EVALUATION_STEP), params)
    scored = rewards.score([(prompts[i // samples], completion) for i, completion in enumerate(completions)])
    watch(scored)
    problems = []
    for index, prompt in enumerate(prompts):
        span = slice(index * samples, (index + 1) * samples)
        mine = completions[span]
        problems.append(
            ProblemScores(
                prompt_id=prompt.prompt_id,
                scores=tuple(scored.rewards[span]),
                num_tokens=tuple(len(completion.token_ids) for completion in mine),
                num_truncated=sum(completion.finish_reason == "length" for completion in mine),
            )
        )
    return problems


def summarise(problems: Sequence[ProblemScores], threshold: float | None = None) -> EvalResult:
    """Of problems that have equally many samples. ValueError if there are none.

    threshold: rewards from it on count as right in pass@k. None: 1 where every reward is 0 or 1; else there is no pass@k.
    """
    if not problems:
        raise ValueError("there are no prompts to evaluate on")
    samples = len(problems[0].scores)
    scores = [problem.scores for problem in problems]
    low, high = reward_interval(scores)
    is_accuracy = all_zero_or_one(scores)
    if threshold is None and is_accuracy:
        threshold = 1.0
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, samples) if k <= samples}) if threshold is not None else []
    passed = {k: [pass_at_k(samples, problem.num_right(threshold), k) for problem in problems] for k in ks}
    num_samples = len(problems) * samples
    return EvalResult(
        mean=math.fsum(score for problem in scores for score in problem) / num_samples,
        low=low,
        high=high,
        is_accuracy=is_accuracy,
        threshold=threshold,
        pass_at_k={k: sum(values) / len(values) for k, values in passed.items()},
        pass_at_k_interval={k: share_interval(values, samples) for k, values in passed.items()},
        num_problems=len(problems),
        samples_per_prompt=samples,
        mean_response_tokens=sum(sum(problem.num_tokens) for problem in problems) / num_samples,
        truncated_share=sum(problem.num_truncated for problem in problems) / num_samples,
    )


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)

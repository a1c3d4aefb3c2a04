"""Accuracy, its interval and pass@k against closed forms and enumeration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest

from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.evaluation import evaluate_prompts, pass_at_k, wilson_interval
from drpo_megatron.types import Completion, Prompt


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, c: int) -> None:
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))


def test_wilson_interval_solves_its_quadratic() -> None:
    low, high = wilson_interval(0.3, 50)
    for end in (low, high):  # |p - end| = z sqrt(end (1 - end) / n)
        assert abs(0.3 - end) == pytest.approx(1.96 * (end * (1 - end) / 50) ** 0.5)
    assert wilson_interval(0.0, 10)[0] == 0.0 and wilson_interval(1.0, 10)[1] == 1.0


class Echo:
    """Answers with the parity of the request's seed; scores 1 where it is the problem's answer."""

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        return [Completion((r.seed % 2,), (0.0,), "length", str(r.seed % 2), 0) for r in requests]

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> tuple[list[float], dict[str, int]]:
        return [float(completion.text == prompt.answer) for prompt, completion in pairs], {}


def test_every_sample_is_scored_against_its_own_problem() -> None:
    prompts = [Prompt(f"p{i}", (1,), "0") for i in range(200)]
    echo = Echo()
    result = evaluate_prompts(echo, echo, prompts, 4, SamplingParams(1), seed=0)
    assert 0.42 < result.accuracy < 0.58  # 800 fair coins, 4.5 standard deviations
    assert result.pass_at_k[1] == pytest.approx(result.accuracy)
    assert 0.85 < result.pass_at_k[4] < 1.0  # 1 - 1/16
    assert (result.num_problems, result.mean_response_tokens, result.truncated_share) == (200, 1.0, 1.0)
    assert evaluate_prompts(echo, echo, prompts, 4, SamplingParams(1), seed=0) == result


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        evaluate_prompts(Echo(), Echo(), [], 1, SamplingParams(1), seed=0)

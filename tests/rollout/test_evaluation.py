"""Accuracy, its interval and pass@k against closed forms and enumeration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.evaluation import (
    EvalResult,
    ProblemScores,
    mean_interval,
    pass_at_k,
    score_prompts,
    summarise,
    wilson_interval,
)
from drpo_megatron.rollout.score_file import ScoreFile
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


def test_with_one_sample_a_problem_the_interval_is_wilsons_over_problems() -> None:
    assert mean_interval([1.0] * 30 + [0.0] * 70, samples=1) == pytest.approx(wilson_interval(0.3, 100))
    assert mean_interval([1.0] * 9, samples=16) == wilson_interval(1.0, 9)


def test_the_interval_has_the_width_of_the_problems_variance() -> None:
    values = [0.25, 0.5, 0.75, 1.0] * 50
    # Variance between problems 0.078125, of the mean 0.078125 / 200; Wilson's corrections are small at n = 600.
    low, high = mean_interval(values, samples=16)
    assert high - low == pytest.approx(2 * 1.96 * (0.078125 / 200) ** 0.5, rel=0.01)
    # Problems that are all alike: as many trials as samples.
    assert mean_interval([0.5] * 10, samples=4) == wilson_interval(0.5, 40)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    draw = random.Random(0)

    def covers() -> bool:
        """40 problems, each with its own chance (uniform, mean 1/2) and 8 samples."""
        chances = [draw.random() for _ in range(40)]
        low, high = mean_interval([sum(draw.random() < p for _ in range(8)) / 8 for p in chances], samples=8)
        return low < 0.5 < high

    assert 0.92 < sum(covers() for _ in range(1000)) / 1000 < 0.98


class Echo:
    """Answers with the parity of the request's seed; scores 1 where it is the problem's answer."""

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        return [Completion((r.seed % 2,), (0.0,), "length", str(r.seed % 2), 0) for r in requests]

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> tuple[list[float], dict[str, int]]:
        return [float(completion.text == prompt.answer) for prompt, completion in pairs], {}


def evaluated(prompts: list[Prompt]) -> EvalResult:
    return summarise(score_prompts(Echo(), Echo(), prompts, 4, SamplingParams(1), seed=0))


def test_every_sample_is_scored_against_its_own_problem() -> None:
    prompts = [Prompt(f"p{i}", (1,), "0") for i in range(200)]
    result = evaluated(prompts)
    assert 0.42 < result.accuracy < 0.58  # 800 fair coins, 4.5 standard deviations
    assert result.pass_at_k[1] == pytest.approx(result.accuracy)
    assert 0.85 < result.pass_at_k[4] < 1.0  # 1 - 1/16
    assert (result.num_problems, result.mean_response_tokens, result.truncated_share) == (200, 1.0, 1.0)
    assert result.low < result.accuracy < result.high
    assert result.pass_at_k_interval[4][0] < result.pass_at_k[4] < result.pass_at_k_interval[4][1]
    assert evaluated(prompts) == result


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        evaluated([])


def test_scores_on_disk_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path, settings = tmp_path / "new" / "scores.jsonl", {"model": "m", "samples": 2}
    problems = [ProblemScores(f"p{i}", (1.0, 0.0), (3, 4), 1) for i in range(2)]
    file = ScoreFile(path, settings)
    for problem in problems:
        file.append(problem)
    path.write_text(path.read_text()[:-9])
    again = ScoreFile(path, settings)
    assert list(again.done.values()) == problems[:1]
    again.append(problems[1])
    assert list(ScoreFile(path, settings).done.values()) == problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"settings": {"model": "m", "samples": 4}}\n', "holds scores with samples=4, not 2; give another --out"),
        ("prompt,score\n", "is no file of scores"),
        ('{"settings": {"model": "m", "samples": 2}}\n{"prompt_id": "p"}\n', "line 2 is no problem's scores"),
    ],
)
def test_scores_of_another_evaluation_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scores.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        ScoreFile(tmp_path / "scores.jsonl", {"model": "m", "samples": 2})
    assert (tmp_path / "scores.jsonl").read_text() == content

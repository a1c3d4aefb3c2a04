"""Scores of an evaluation and pass@k, against enumeration. Intervals: tests/test_intervals.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from drpo_megatron.rewards.scorer import Scored
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.evaluation import EvalResult, ProblemScores, pass_at_k, score_prompts, summarise
from drpo_megatron.rollout.score_file import ScoreFile
from drpo_megatron.types import Completion, Prompt


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, c: int) -> None:
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in combinations(right, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / len(draws))


class Echo:
    """Answers with the parity of the request's seed; scores 1 where it is the problem's answer."""

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        return [Completion((r.seed % 2,), (0.0,), "length", str(r.seed % 2), 0) for r in requests]

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> Scored:
        return Scored(
            [float(completion.text == prompt.answer) for prompt, completion in pairs], [{}] * len(pairs), 0, 0
        )


def evaluated(prompts: list[Prompt]) -> EvalResult:
    return summarise(score_prompts(Echo(), Echo(), prompts, 4, SamplingParams(1), seed=0))


def test_every_sample_is_scored_against_its_own_problem() -> None:
    prompts = [Prompt(f"p{i}", (1,), "0") for i in range(200)]
    result = evaluated(prompts)
    assert 0.42 < result.mean < 0.58  # 800 fair coins, 4.5 standard deviations
    assert result.pass_at_k[1] == pytest.approx(result.mean)
    assert 0.85 < result.pass_at_k[4] < 1.0  # 1 - 1/16
    assert (result.num_problems, result.mean_response_tokens, result.truncated_share) == (200, 1.0, 1.0)
    assert result.low < result.mean < result.high
    assert result.pass_at_k_interval[4][0] < result.pass_at_k[4] < result.pass_at_k_interval[4][1]
    assert evaluated(prompts) == result


def problems(scores: Sequence[Sequence[float]]) -> list[ProblemScores]:
    return [ProblemScores(f"p{i}", tuple(some), (3,) * len(some), 0) for i, some in enumerate(scores)]


def test_there_is_pass_at_k_only_where_a_reward_is_said_to_be_right() -> None:
    scores = [[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]
    without = summarise(problems(scores))
    assert (without.is_accuracy, without.threshold, without.pass_at_k) == (False, None, {})
    assert "accuracy" not in without.as_dict() and without.as_dict()["mean_reward"] == 0.0
    with_threshold = summarise(problems(scores), threshold=1.0)
    assert with_threshold.pass_at_k == {1: 0.5, 2: 0.75} and with_threshold.mean == 0.0
    shares = summarise(problems([[(score + 1) / 2 for score in some] for some in scores]))
    assert shares.is_accuracy and shares.pass_at_k == with_threshold.pass_at_k
    assert shares.pass_at_k_interval == with_threshold.pass_at_k_interval
    assert shares.as_dict()["accuracy"] == 0.5


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        evaluated([])


def test_scores_on_disk_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path, settings = tmp_path / "new" / "scores.jsonl", {"model": "m", "samples": 2}
    scored = [ProblemScores(f"p{i}", (1.0, 0.0), (3, 4), 1) for i in range(2)]
    file = ScoreFile(path, settings)
    for problem in scored:
        file.append(problem)
    path.write_text(path.read_text()[:-9])
    again = ScoreFile(path, settings)
    assert list(again.done.values()) == scored[:1]
    again.append(scored[1])
    assert list(ScoreFile(path, settings).done.values()) == scored


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"settings": {"model": "m", "samples": 4}}\n', "holds scores with samples=4, not 2; give another --out"),
        ("prompt,score\n", "is no file of scores"),
        ('{"settings": {"model": "m", "samples": 2}}\n{"prompt_id": "p"}\n', "line 2 is damaged"),
    ],
)
def test_scores_of_another_evaluation_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "scores.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        ScoreFile(tmp_path / "scores.jsonl", {"model": "m", "samples": 2})
    assert (tmp_path / "scores.jsonl").read_text() == content

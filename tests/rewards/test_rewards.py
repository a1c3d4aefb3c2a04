"""Rewards: what counts as right, and what a rollout's scores are when some of them fail."""

from __future__ import annotations

import logging
import os

import pytest

from drpo_megatron.config.sections import ArithmeticReward, ImportedReward, MathReward
from drpo_megatron.rewards.registry import build
from drpo_megatron.rewards.scorer import RewardScorer
from drpo_megatron.types import Completion, Prompt

PROMPT = Prompt("p1", (1,), "7", "3+4=")


def by_length(response: str, answer: str, prompt: Prompt) -> float:
    """A user's reward; the response says how it misbehaves."""
    if response == "hang":
        while True:
            pass
    if response == "die":
        os._exit(3)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    return len(response) / len(prompt.text)


def with_metrics(response: str, answer: str, prompt: Prompt) -> dict[str, float]:
    return {"reward": 1.0, "length": len(response), "inverse": float("inf") if not response else 1 / len(response)}


BY_LENGTH = f"{__name__}:by_length"


def completion(text: str) -> Completion:
    return Completion((1,), (-0.1,), "stop", text, 0)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("7", "7", 1),
        (" 7\n", "7", 1),
        ("+7", "7", 1),
        ("007", "7", 1),
        ("-7", "-7", 1),
        ("-0", "0", 1),
        ("7" * 5000, "7" * 5000, 1),
        ("8", "7", 0),
        ("-7", "7", 0),
        ("6 7", "7", 0),
        ("7.0", "7", 0),
        ("3+4", "7", 0),
        ("seven", "7", 0),
        ("٧", "7", 0),
        ("", "7", 0),
    ],
)
def test_arithmetic_wants_the_integer_and_nothing_else(response: str, answer: str, reward: float) -> None:
    scored = RewardScorer(ArithmeticReward()).score([(Prompt("p", (1,), answer), completion(response))])
    assert (scored.rewards, scored.num_failures) == ([reward], 0)


def test_math_compares_expressions_not_texts_and_is_stopped_at_its_time_limit() -> None:
    scorer = RewardScorer(MathReward(timeout_s=5, num_workers=1))
    cases = [
        (r"Therefore the answer is $\boxed{\frac{1}{2}}$.", "0.5", 1),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        (r"so we get \boxed{42}", "42", 1),
        (r"so we get \boxed{41}", "42", 0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"\boxed{9^{9^{9^{9}}}}", "1", 0),
        ("no idea", "42", 0),
        ("", "42", 0),
        (r"\boxed{1}", "1", 1),
    ]
    scored = scorer.score([(Prompt("p", (1,), answer), completion(response)) for response, answer, _ in cases])
    scorer.close()
    assert scored.rewards == [reward for _, _, reward in cases]
    assert (scored.num_timeouts, scored.num_errors) == (1, 0)
    assert scored.example is not None and "took longer than timeout_s=5" in scored.example


def test_bad_responses_are_worth_nothing_counted_and_the_first_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    scorer = RewardScorer(ImportedReward(path=BY_LENGTH, timeout_s=3, num_workers=2))
    texts = ["ab", "raise", "die", "abcd", "hang", "raise"]
    with caplog.at_level(logging.WARNING):
        scored = scorer.score([(PROMPT, completion(text)) for text in texts])
    again = scorer.score([(PROMPT, completion("ab"))])
    scorer.close()
    assert scored.rewards == [0.5, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert (scored.num_timeouts, scored.num_errors) == (1, 3)
    (record,) = caplog.records
    assert "prompt p1" in record.getMessage() and "no such thing" in record.getMessage()
    assert scored.example in record.getMessage() and again.example == scored.example
    assert (again.rewards, again.num_failures) == ([0.5], 0)


@pytest.mark.parametrize(
    ("name", "text", "what"), [("by_length", "nan", "the reward"), ("with_metrics", "", "metric 'inverse'")]
)
def test_what_is_not_finite_stops_the_run(name: str, text: str, what: str) -> None:
    scorer = RewardScorer(ImportedReward(path=f"{__name__}:{name}", timeout_s=60))
    with pytest.raises(
        ValueError, match=f"{what} of a response to prompt p1 is (nan|inf); rewards and metrics must be"
    ):
        scorer.score([(PROMPT, completion("abcd")), (PROMPT, completion(text))])
    scorer.close()


def test_metrics_come_with_their_rewards_in_order() -> None:
    scorer = RewardScorer(ImportedReward(path=f"{__name__}:with_metrics", timeout_s=60))
    scored = scorer.score([(PROMPT, completion("a" * n)) for n in range(1, 5)])
    scorer.close()
    assert scored.rewards == [1.0] * 4
    assert scored.metrics == [{"length": float(n), "inverse": 1 / n} for n in range(1, 5)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package:f", "module 'no_such_package' cannot be imported"),
        (f"{__name__}:no_such_function", "has no callable 'no_such_function'"),
        ("os.path", "not of the form package.module:function"),
    ],
)
def test_a_wrong_path_is_found_before_anything_is_scored(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(ImportedReward.model_construct(path=path))

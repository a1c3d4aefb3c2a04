"""Rewards: what counts as right, and that no response can stall, stop or poison a rollout."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from drpo_megatron.config.sections import ArithmeticReward, ImportedReward, MathReward
from drpo_megatron.rewards import RewardScorer, build
from drpo_megatron.rewards.base import RewardTimeout
from drpo_megatron.rewards.worker import WorkerReward
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
    if response == "pid":
        return float(os.getpid())
    return len(response) / len(prompt.text)


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
    assert build(ArithmeticReward())(response, answer, PROMPT) == reward


def test_math_compares_expressions_not_texts() -> None:
    scorer = RewardScorer(MathReward(timeout_s=30))
    cases = [
        (r"Therefore the answer is $\boxed{\frac{1}{2}}$.", "0.5", 1),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        (r"so we get \boxed{42}", "42", 1),
        (r"so we get \boxed{41}", "42", 0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        ("no idea", "42", 0),
        ("", "42", 0),
    ]
    pairs = [(Prompt("p", (1,), answer), completion(response)) for response, answer, _ in cases]
    rewards, counts = scorer.score(pairs)
    scorer.close()
    assert rewards == [reward for _, _, reward in cases]
    assert counts == {"num_timeouts": 0, "num_errors": 0}


def test_math_is_stopped_at_its_time_limit_and_goes_on() -> None:
    scorer = RewardScorer(MathReward(timeout_s=3))
    tower = Prompt("tower", (1,), "1")
    scorer.score([(Prompt("p", (1,), "2"), completion("$2$"))])  # sympy's caches are warm
    start = time.monotonic()
    rewards, counts = scorer.score([(tower, completion(r"\boxed{9^{9^{9^{9}}}}")), (tower, completion(r"\boxed{1}"))])
    scorer.close()
    assert rewards == [0.0, 1.0]
    assert counts["num_timeouts"] == 1
    assert time.monotonic() - start < 25


def test_a_function_that_hangs_is_killed_and_its_worker_replaced() -> None:
    reward = WorkerReward(BY_LENGTH, timeout_s=2)
    before = reward("pid", "", PROMPT)
    with pytest.raises(RewardTimeout, match="took longer than timeout_s=2"):
        reward("hang", "", PROMPT)
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)
    assert reward("abcd", "", PROMPT) == 1.0
    reward.close()


def test_a_worker_that_dies_is_an_error_of_one_response() -> None:
    reward = WorkerReward(BY_LENGTH, timeout_s=10)
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        reward("die", "", PROMPT)
    assert reward("ab", "", PROMPT) == 0.5
    reward.close()


def test_one_bad_response_is_worth_nothing_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scorer = RewardScorer(ImportedReward(path=BY_LENGTH, timeout_s=10))
    with caplog.at_level(logging.WARNING):
        rewards, counts = scorer.score([(PROMPT, completion(text)) for text in ("ab", "raise", "raise", "abcd")])
    scorer.close()
    assert rewards == [0.5, 0.0, 0.0, 1.0]
    assert counts == {"num_timeouts": 0, "num_errors": 2}
    (record,) = caplog.records
    assert "prompt p1" in record.getMessage() and "no such thing" in record.getMessage()


def test_a_reward_that_is_not_finite_stops_the_run() -> None:
    scorer = RewardScorer(ImportedReward(path=BY_LENGTH, timeout_s=10))
    with pytest.raises(ValueError, match="prompt p1 is nan; rewards must be finite"):
        scorer.score([(PROMPT, completion("nan"))])
    scorer.close()


def test_a_hanging_worker_does_not_outlive_a_killed_parent() -> None:
    code = (
        "from drpo_megatron.rewards.worker import WorkerReward; from drpo_megatron.types import Prompt;"
        f"r = WorkerReward({BY_LENGTH!r}, 2); p = Prompt('p', (1,), '', 'x');"
        "print(int(r('pid', '', p)), flush=True); r('hang', '', p)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.kill()
    deadline = time.monotonic() + 10
    while _is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(worker)


def _is_alive(pid: int) -> bool:
    """Zombies, which nobody may wait for in a container, do not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
        RewardScorer(ImportedReward(path=path))

"""What a user's reward can be instead of a function of three arguments that returns a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config.sections import ImportedReward
from drpo_megatron.imported import OBJECTIVE_ARGUMENTS, REWARD_ARGUMENTS, check_function, load_function
from drpo_megatron.rewards.base import Response
from drpo_megatron.rewards.functions import RewardFunction
from drpo_megatron.rewards.scorer import RewardScorer
from drpo_megatron.types import Completion, Prompt

PROMPT = Prompt("p1", (1,), "7", "3+4=")

_MODULE = """
import functools, os, subprocess, sys, time
import numpy as np

def good(response, answer, prompt): return 0.25
def with_default(response, answer, prompt, extra=None): return 1
def any_arguments(*args): return 1
bound = functools.partial(with_default, extra=3)
async def is_async(response, answer, prompt): return 1.0
def yields(response, answer, prompt): yield 1.0
class Scorer:
    def __init__(self, *args): pass
    def __call__(self, response, answer, prompt): return 1.0
instance = Scorer()
class AsyncScorer:
    async def __call__(self, response, answer, prompt): return 1.0
async_instance = AsyncScorer()
async_bound = functools.partial(is_async)
async def async_yields(response, answer, prompt): yield 1.0
def asks(response, answer, prompt, *, num_tokens, finish_reason, metadata): return 1.0
def asks_for_more(response, answer, prompt, *, num_tokens, temperature): return 1.0
def two(response, answer): return 1.0
def four(a, b, c, d): return 1.0
def keywords(*, response, answer, prompt): return 1.0
text = "not callable"

async def _later(): return 1.0
def gives(response, answer, prompt):
    if response == "coroutine": return _later()
    return {"bool": True, "int": 2, "numpy": np.float32(0.25), "none": None, "dict": {"score": 1.0},
            "tuple": (1.0, {}), "text": "0.5", "bytes": b"1", "complex": 1j, "list": [1.0],
            "metrics": {"reward": 0.5, "format/ok": True, "n": np.int64(3)}, "text metric": {"reward": 1.0, "n": "3"},
            "mean": {"reward": 1.0, "mean": 1.0}, "name": {"reward": 1.0, "a b": 1.0}, "number": {"reward": 1.0, 3: 1.0},
            "many": {"reward": 1.0, **{f"m{i}": 0.0 for i in range(65)}}}[response]
"""

_IMPORTS = {
    "raises": "1 / 0",
    "exits": "import sys; sys.exit(4)",
    "ends": "import os; os._exit(5)",
    "misspelt": "import no_such_package_at_all",
    "syntax": "def f(:",
    "lines": 'raise RuntimeError("first\\nsecond\\nthird")',
}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("modules")
    (directory / "user_functions.py").write_text(_MODULE)
    for name, code in _IMPORTS.items():
        (directory / f"user_{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield directory


@pytest.mark.parametrize("name", ["good", "with_default", "any_arguments", "bound", "instance"])
def test_what_can_be_called_with_three_arguments_is_taken(name: str) -> None:
    assert not RewardFunction(f"user_functions:{name}").is_async


@pytest.mark.parametrize("name", ["is_async", "async_instance", "async_bound", "asks"])
def test_async_functions_and_keywords_are_a_rewards_and_not_an_objectives(name: str) -> None:
    assert RewardFunction(f"user_functions:{name}").is_async == (name != "asks")
    with pytest.raises(ValueError, match="is async|is called with 2 positional arguments"):
        load_function("objective", f"user_functions:{name}", OBJECTIVE_ARGUMENTS)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("yields", "yields is a generator"),
        ("async_yields", "async_yields is a generator"),
        ("asks_for_more", "asks_for_more is called with 3 positional arguments"),
        ("Scorer", "Scorer is a class; give a function, or an instance"),
        ("two", r"two is called with 3 positional arguments, but is \(response, answer\)"),
        ("four", r"four is called with 3 positional arguments, but is \(a, b, c, d\)"),
        ("keywords", "keywords is called with 3 positional arguments"),
        ("text", "user_functions has no callable 'text'; it has: AsyncScorer, Scorer, any_arguments"),
        ("missing", "user_functions has no callable 'missing'"),
    ],
)
def test_what_can_not_is_refused_by_name_in_one_line(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"reward path='user_functions:{name}'.*{problem}") as caught:
        RewardFunction(f"user_functions:{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("raises", "importing user_raises fails with ZeroDivisionError: division by zero; mend the module"),
        ("exits", "importing user_exits fails with SystemExit: 4"),
        ("ends", "importing user_ends ends the process with exit code 5"),
        ("misspelt", "cannot be imported .No module named 'no_such_package_at_all'"),
        ("syntax", "importing user_syntax fails with SyntaxError"),
        ("lines", "importing user_lines fails with RuntimeError: first; mend"),
    ],
)
def test_a_module_that_fails_at_import_is_one_line_and_not_the_end_of_the_driver(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        check_function("reward", f"user_{name}:f", REWARD_ARGUMENTS)
    assert "\n" not in str(caught.value)


def test_a_check_imports_in_another_process_and_finds_what_loading_finds(modules: Path) -> None:
    check_function("reward", "user_functions:good", REWARD_ARGUMENTS)
    with pytest.raises(ValueError, match="reward path='user_functions:two': two is called with 3"):
        check_function("reward", "user_functions:two", REWARD_ARGUMENTS)
    check_function("objective", "user_functions:two", OBJECTIVE_ARGUMENTS)
    with pytest.raises(ValueError, match="objective path='user_functions:good': good is called with 2"):
        check_function("objective", "user_functions:good", OBJECTIVE_ARGUMENTS)


def test_numbers_and_dictionaries_of_numbers_are_rewards_and_nothing_else() -> None:
    scorer = RewardScorer(ImportedReward(path="user_functions:gives", timeout_s=60))
    good = {"bool": 1.0, "int": 2.0, "numpy": 0.25, "metrics": 0.5}
    bad = {
        "none": "it returned NoneType None; a reward must be one number, or a dictionary with 'reward'",
        "dict": "it returned a dictionary without 'reward': {'score': 1.0}",
        "tuple": "it returned tuple",
        "text": "it returned str '0.5'",
        "bytes": "it returned bytes",
        "complex": "it returned complex",
        "list": "it returned list",
        "coroutine": "it returned a coroutine; declare it with async def",
        "text metric": "it returned str '3'; metric 'n' must be a number",
        "mean": "the name 'mean' of a metric is the run's own; give it another",
        "name": "the name 'a b' of a metric is not of letters",
        "number": "the name 3 of a metric is not of letters",
        "many": "it returned 65 metrics; 64 are the most",
    }
    verdicts = [future.result() for future in scorer._reward.submit([Response(name, PROMPT) for name in (*good, *bad)])]
    pairs = [(PROMPT, Completion((1,), (-0.1,), "stop", name, 0)) for name in (*good, *bad)]
    scored = scorer.score(pairs)
    scorer.close()
    assert scored.rewards == [*good.values(), *[0.0] * len(bad)]
    assert scored.metrics == [{}, {}, {}, {"format/ok": 1.0, "n": 3.0}, *[{}] * len(bad)]
    assert (scored.num_timeouts, scored.num_errors) == (0, len(bad))
    for (name, problem), verdict in zip(bad.items(), verdicts[len(good) :], strict=True):
        assert problem in str(verdict.failure), name
    for part in ("user_functions:gives", bad["none"], "p1", "'none'"):
        assert part in str(scored.example)

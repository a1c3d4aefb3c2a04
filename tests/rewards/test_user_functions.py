"""What a user's reward can be instead of a function of three arguments that returns a number, and what it may start."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from drpo_megatron.config.sections import ImportedReward
from drpo_megatron.imported import check_function
from drpo_megatron.rewards import RewardScorer
from drpo_megatron.rewards import imported as reward
from drpo_megatron.rewards.base import RewardTimeout
from drpo_megatron.rewards.worker import WorkerReward
from drpo_megatron.types import Completion, Prompt

PROMPT = Prompt("p1", (1,), "7", "3+4=")

_MODULE = '''
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
def two(response, answer): return 1.0
def four(a, b, c, d): return 1.0
def keywords(*, response, answer, prompt): return 1.0
text = "not callable"

async def _later(): return 1.0
def gives(response, answer, prompt):
    if response == "coroutine": return _later()
    return {"bool": True, "int": 2, "numpy": np.float32(0.25), "none": None, "dict": {"score": 1.0},
            "tuple": (1.0, {}), "text": "0.5", "bytes": b"1", "complex": 1j, "list": [1.0]}[response]

def dies(response, answer, prompt):
    if response == "hang": time.sleep(600)
    os._exit(7)

def exits(response, answer, prompt):
    if response == "pid": return os.getpid()
    sys.exit(3)

def leaves(response, answer, prompt):
    """Starts a process in the way that the response says and returns its id."""
    if response == "fork":
        pid = os.fork()
        if pid: return pid
        time.sleep(600)
    if response == "fork and return":
        pid = os.fork()
        return pid or os.getpid()
    if response == "session":
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid
    if response == "daemon":
        read, write = os.pipe()
        if not os.fork():
            os.setsid()
            if not os.fork():
                os.write(write, str(os.getpid()).encode())
                time.sleep(600)
            os._exit(0)
        return int(os.read(read, 20))
    time.sleep(600)
'''

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
    assert callable(reward.load_function(f"user_functions:{name}"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("is_async", "is_async is async; give a plain function"),
        ("async_instance", "async_instance is async"),
        ("yields", "yields is a generator"),
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
        reward.load_function(f"user_functions:{name}")
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
        check_function("reward", f"user_{name}:f", 3)
    assert "\n" not in str(caught.value)


def test_a_check_imports_in_another_process_and_finds_what_loading_finds(modules: Path) -> None:
    check_function("reward", "user_functions:good", 3)
    with pytest.raises(ValueError, match="reward path='user_functions:two': two is called with 3"):
        check_function("reward", "user_functions:two", 3)
    check_function("objective", "user_functions:two", 2)
    with pytest.raises(ValueError, match="objective path='user_functions:good': good is called with 2"):
        check_function("objective", "user_functions:good", 2)


def test_only_numbers_are_rewards() -> None:
    scorer = RewardScorer(ImportedReward(path="user_functions:gives", timeout_s=60))
    names = ["bool", "int", "numpy", "none", "dict", "tuple", "text", "bytes", "complex", "coroutine", "list"]
    pairs = [(PROMPT, Completion((1,), (-0.1,), "stop", name, 0)) for name in names]
    rewards, counts = scorer.score(pairs)
    scorer.close()
    assert rewards == [1.0, 2.0, 0.25] + [0.0] * 8
    assert counts == {"num_timeouts": 0, "num_errors": 8}
    assert scorer.failure is not None
    for part in ("user_functions:gives", "it returned NoneType None; a reward must be one number", "p1", "'none'"):
        assert part in scorer.failure


def test_sys_exit_in_a_reward_fails_one_response_and_keeps_its_worker() -> None:
    worker = WorkerReward("user_functions:exits", timeout_s=60)
    before = worker("pid", "", PROMPT)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="SystemExit: 3"):
            worker("exit", "", PROMPT)
    assert worker("pid", "", PROMPT) == before
    worker.close()


@pytest.mark.parametrize(("how", "error"), [("die", "died with exit code 7"), ("hang", "took longer than timeout_s=1")])
def test_a_reward_that_takes_every_worker_with_it_is_given_up_after_eight(how: str, error: str) -> None:
    """A rollout of hundreds would wait for as many starts, or time limits, before anybody knew."""
    scorer = RewardScorer(ImportedReward(path="user_functions:dies", timeout_s=1 if how == "hang" else 60))
    pairs = [(PROMPT, Completion((1,), (-0.1,), "stop", how, 0))] * 50
    with pytest.raises(ValueError, match=f"the first 8 rewards each took their worker .* user_functions:dies.*{error}"):
        scorer.score(pairs)
    scorer.close()


@pytest.mark.parametrize("ends_by", ["close", "time-out"])
def test_what_a_reward_starts_ends_with_its_worker(ends_by: str) -> None:
    """Whether it forked, started a session, or made an orphan of another session."""
    worker = WorkerReward("user_functions:leaves", timeout_s=60 if ends_by == "close" else 3)
    started = [int(worker(how, "", PROMPT)) for how in ("fork", "session", "daemon")]
    ended = int(worker("fork and return", "", PROMPT))
    assert all(psutil.pid_exists(pid) for pid in started)
    if ends_by == "time-out":
        with pytest.raises(RewardTimeout, match="took longer"):
            worker("hang", "", PROMPT)
    worker.close()
    deadline = time.monotonic() + 60
    while left := [pid for pid in (*started, ended) if _is_alive(pid)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)
    assert os.getpid() not in started


def _is_alive(pid: int) -> bool:
    """Zombies, which nobody may wait for in a container, do not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

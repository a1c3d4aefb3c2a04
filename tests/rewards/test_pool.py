"""Reward workers: nothing that one response does to its process reaches another, and no process outlives its owner.

All with real processes, in a directory with a space in its name; one pool for many assertions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from drpo_megatron.rewards.base import LostWorkers, Response, Verdict
from drpo_megatron.rewards.pool import PoolOptions, WorkerPool
from drpo_megatron.types import Prompt

PROMPT = Prompt("p1", (1,), "7", "3+4=", {"level": 5})
PATIENCE_S = 60.0
"""Of a test that waits for what a busy machine may take long for."""

_MODULE = '''
import asyncio, ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path

def bad(response, answer, prompt):
    """The response says what happens to its process."""
    what, _, argument = response.partition(" ")
    if what == "hang":
        Path(argument).touch()
        time.sleep(3600)
    if what == "big":
        Path(argument).touch()
        return len(str(7 ** (7 ** 11)))  # Holds the interpreter's lock for hours.
    if what == "exit": os._exit(3)
    if what == "segfault": ctypes.string_at(0)
    if what == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise": raise KeyError("no such thing")
    if what == "sysexit": sys.exit(3)
    if what == "unprintable":
        class Strange(Exception):
            def __str__(self): raise RuntimeError
        raise Strange
    if what == "flood":
        for _ in range(24): os.write(1, b"x" * 2**20)
    if what == "fork" and not os.fork(): return 5.0
    if what == "closed": os.closerange(3, 2**16)  # A process has its parent's numbers, which may be large.
    if what == "pid": return os.getpid()
    if what == "thread": threading.Thread(target=time.sleep, args=(3600,)).start()
    if what == "children":
        kinds = [dict(), dict(start_new_session=True), dict(env={}), dict(start_new_session=True, env={**os.environ})]
        sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
        pids = [subprocess.Popen(sleep, **kind).pid for kind in kinds]
        Path(argument).write_text(" ".join(map(str, [os.getpid(), *pids])))
    return float(len(response))

waiting = 0
async def all_at_once(response, answer, prompt):
    """Comes back only when so many calls are underway in this process as the response says."""
    global waiting
    waiting += 1
    while waiting < int(response): await asyncio.sleep(0.01)
    return float(response)

async def bad_async(response, answer, prompt):
    await asyncio.sleep(0.2)  # All others have begun.
    if response == "hang": await asyncio.Event().wait()
    if response == "block": time.sleep(3600)
    if response == "exit": os._exit(3)
    if response == "raise": raise KeyError("no such thing")
    if response == "sysexit": sys.exit(3)
    if response == "refuse":
        while True:
            try: await asyncio.sleep(3600)
            except asyncio.CancelledError: pass
    if response == "subtask":
        async def block(): time.sleep(3600)
        await asyncio.create_task(block())
    if response == "caught":
        try: await asyncio.wait_for(asyncio.sleep(3600), 0.1)
        except TimeoutError: pass
    return float(len(response))

def batch(responses, answers, prompts, *, num_tokens):
    assert len(responses) == len(answers) == len(prompts) == len(num_tokens)
    if "raise" in responses: raise KeyError("no such thing")
    if "exit" in responses: os._exit(3)
    if "hang" in responses: time.sleep(3600)
    if "short" in responses: return []
    return [{"reward": len(text), "size": len(responses), "tokens": n} for text, n in zip(responses, num_tokens)]

async def batch_async(responses, answers, prompts):
    return [len(responses)] * len(responses)

def sees(response, answer, prompt, *, finish_reason, metadata, num_tokens=None):
    return {"reward": num_tokens, "is_cut": finish_reason == "length", "level": metadata["level"]}

def sees_a_little(response, answer, prompt, num_tokens=0, other=3):
    return num_tokens + other
'''


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("my rewards: here")
    (directory / "pool_functions.py").write_text(_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield directory


def pool(name: str, **options: object) -> WorkerPool:
    return WorkerPool(PoolOptions(f"pool_functions:{name}", **{"timeout_s": 60.0} | options))  # type: ignore[arg-type]


def responses(texts: Sequence[str]) -> list[Response]:
    return [Response(text, PROMPT) for text in texts]


def verdicts(futures: Sequence[Future[Verdict]]) -> list[Verdict]:
    return [future.result(PATIENCE_S) for future in futures]


def is_alive(pid: int) -> bool:
    """Zombies, which nobody may wait for in a container, do not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(is_done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_end(pids: Sequence[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), f"some of {pids} are left")


def test_hanging_calls_hold_up_nothing_but_themselves(tmp_path: Path) -> None:
    """Three of four workers hang at the same time; the fourth does all the rest meanwhile."""
    workers, ended, hung_together = pool("bad", num_workers=4, timeout_s=6.0), [], []
    marks = [tmp_path / f"hung {i}" for i in range(3)]
    texts = [f"hang {mark}" for mark in marks] + ["fine"] * 40 + ["pid"]
    futures = workers.submit(responses(texts))
    for text, future in zip(texts, futures, strict=True):
        future.add_done_callback(lambda _, text=text: ended.append(text.split()[0]))
        future.add_done_callback(lambda _: hung_together.append(all(mark.exists() for mark in marks)))
    found = verdicts(futures)
    assert ended == ["fine"] * 40 + ["pid"] + ["hang"] * 3
    assert hung_together[-3:] == [True] * 3  # All three had begun before the first was over.
    assert [verdict.is_timeout for verdict in found] == [True] * 3 + [False] * 41
    assert "bad took longer than timeout_s=6" in str(found[0].failure)
    pid = int(found[-1].reward)
    assert is_alive(pid)
    workers.close()
    assert_end([pid])


BAD = {
    "exit": "died with exit code 3",
    "fine": None,
    "segfault": "died with exit code -11",
    "killed": "died with exit code -9",
    "raise": "KeyError: 'no such thing'",
    "sysexit": "SystemExit: 3",
    "unprintable": "Strange",
    "flood": None,
    "fork": None,
    "closed": "died with exit code",
    "thread": None,
    "also fine": None,
}
"""What becomes of each: the failure, or None."""


@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_ends_a_process_costs_one_response_whoever_computes_it(
    num_workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    workers = pool("bad", num_workers=num_workers)
    first = verdicts(workers.submit(responses(["first"])))
    found = verdicts(workers.submit(responses(list(BAD))))
    workers.close()
    assert first == [Verdict(5.0)]
    for (text, failure), verdict in zip(BAD.items(), found, strict=True):
        assert verdict.is_timeout is False
        if failure is None:
            assert verdict == Verdict(float(len(text)))
        else:
            assert verdict.reward == 0.0 and failure in str(verdict.failure)
    printed = capfd.readouterr()
    assert not printed.out  # It belongs to the command whose rewards these are.
    assert 2**24 <= len(printed.err) < 2**24 + 1000 and "rewards print from here on is dropped" in printed.err


def test_a_worker_that_is_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    workers = pool("bad", num_workers=1)
    [idle] = verdicts(workers.submit(responses(["pid"])))
    os.kill(int(idle.reward), signal.SIGKILL)
    [busy] = workers.submit(responses([f"big {tmp_path / 'begun'}"]))
    wait_until((tmp_path / "begun").exists, "the call did not begin")
    [worker] = [p for p in psutil.Process().children() if p.pid != idle.reward and "settings" in str(p.cmdline())]
    worker.kill()
    assert "died with exit code -9" in str(busy.result(PATIENCE_S).failure)
    assert verdicts(workers.submit(responses(["fine"]))) == [Verdict(4.0)]
    # What is not computed when it is closed gets an error, and so does what comes later.
    late = workers.submit(responses([f"hang {tmp_path / 'x'}", "fine"]))
    workers.close()
    for future in (*late, *workers.submit(responses(["fine"]))):
        with pytest.raises(RuntimeError, match="the rewards were closed"):
            future.result(PATIENCE_S)


def test_async_calls_run_side_by_side() -> None:
    workers = pool("all_at_once", num_workers=1, concurrency=100)
    assert verdicts(workers.submit(responses(["100"] * 100))) == [Verdict(100.0)] * 100
    workers.close()


def test_an_async_call_takes_no_other_with_it() -> None:
    """What blocks its loop or ends its process is known; of a task of its own it is found out."""
    workers = pool("bad_async", num_workers=2, concurrency=64, timeout_s=2.0)
    bad = {
        "hang": True,
        "block": True,
        "refuse": True,
        "subtask": True,
        "exit": False,
        "raise": False,
        "sysexit": False,
    }
    texts = ["fine"] * 5 + [text for name in bad for text in (name, "fine", "caught")]
    found = verdicts(workers.submit(responses(texts)))
    workers.close()
    for text, verdict in zip(texts, found, strict=True):
        if text in bad:
            assert (verdict.reward, verdict.is_timeout) == (0.0, bad[text]) and verdict.failure, text
        else:
            assert verdict == Verdict(float(len(text)))


def test_a_batch_that_fails_is_called_one_by_one() -> None:
    workers = pool("batch", num_workers=2, batch_size=4, timeout_s=3.0)
    texts = ["a", "bb", "ccc", "d"] * 2 + ["a"]
    found = verdicts(workers.submit([Response(text, PROMPT, num_tokens=i) for i, text in enumerate(texts)]))
    assert [(v.reward, v.metrics["size"]) for v in found] == [
        (len(text), 4 if i < 8 else 1) for i, text in enumerate(texts)
    ]
    assert [v.metrics["tokens"] for v in found] == list(range(9))
    for bad, failure in (
        ("raise", "KeyError"),
        ("exit", "exit code 3"),
        ("hang", "took longer"),
        ("short", "0 rewards for 1"),
    ):
        found = verdicts(workers.submit(responses(["a", bad, "ccc"])))
        assert failure in str(found[1].failure)
        assert [(v.reward, v.metrics["size"]) for v in (found[0], found[2])] == [(1.0, 1.0), (3.0, 1.0)]
    workers.close()
    workers = pool("batch_async", batch_size=2)
    assert [v.reward for v in verdicts(workers.submit(responses(["a"] * 3)))] == [2.0, 2.0, 1.0]
    workers.close()


def test_a_function_sees_what_its_signature_names() -> None:
    response = Response("abc", PROMPT, num_tokens=17, finish_reason="length")
    for name, verdict in (("sees", Verdict(17.0, {"is_cut": 1.0, "level": 5.0})), ("sees_a_little", Verdict(20.0))):
        workers = pool(name)
        assert verdicts(workers.submit([response])) == [verdict]
        workers.close()


@pytest.mark.parametrize("what", ["exit", "hang"])
def test_a_reward_that_takes_every_worker_with_it_is_given_up_after_eight(what: str, tmp_path: Path) -> None:
    """A rollout of hundreds would wait for as many starts, or time limits, before anybody knew."""
    workers = pool("bad", num_workers=4, timeout_s=1.0)
    text = f"hang {tmp_path / 'mark'}" if what == "hang" else what
    for future in workers.submit(responses([text] * 50))[20:]:
        with pytest.raises(LostWorkers) as lost:
            future.result(PATIENCE_S)
        assert lost.value.count == 8 and lost.value.response.text == text
    workers.close()


_OWNER = """
import sys
from drpo_megatron.rewards.base import Response
from drpo_megatron.rewards.pool import PoolOptions, WorkerPool
from drpo_megatron.types import Prompt

if __name__ == "__main__":
    pool = WorkerPool(PoolOptions("pool_functions:bad", 3600.0, num_workers=2))
    futures = pool.submit([Response(text, Prompt("p", (), "")) for text in sys.argv[1:]])
    [future.result() for future in futures]
"""


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_nothing_outlives_the_process_that_asked_for_rewards(how: str, directory: Path, tmp_path: Path) -> None:
    """Neither a worker that holds the interpreter's lock, nor what a reward started in whatever session."""
    pids, begun = tmp_path / "pids", tmp_path / "begun"
    (tmp_path / "owner.py").write_text(_OWNER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen(
        [sys.executable, str(tmp_path / "owner.py"), f"big {begun}", f"children {pids}"],
        cwd=directory,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: begun.exists() and pids.exists() and pids.read_text().count(" ") == 4, "nothing began")
        processes = [p.pid for p in psutil.Process(owner.pid).children(recursive=True)]
        started = [int(pid) for pid in pids.read_text().split()]
        assert set(started) <= set(processes) and len(processes) == 6  # Two workers and the four that one started.
    finally:
        if how == "killed":
            owner.kill()
        else:
            os.killpg(owner.pid, signal.SIGINT)  # As a terminal does.
        owner.wait()
    assert_end(processes)

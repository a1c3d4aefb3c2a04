"""Rewards of a rollout by worker processes: against one process, of an async function, and with answers that hang.

    python tools/benchmark_rewards.py [--answers 512] [--json FILE]

Every pool has scored the same answers, but those that hang, before the clock starts: its workers are there, as in all steps
of a run but the first.

    math      answers of 36,000 characters through `reward=math`, by one worker and by as many as there are cores
    async     an async function that sleeps 2 s, all answers at once
    hanging   ten answers that never end among the others, with a time-out of 3 s and ten more workers than cores: the
              time beside that of the same answers without them
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUM_CHARACTERS = 36_000
SLEEP_S, TIMEOUT_S, NUM_HANGING = 2, 3.0, 10
_FUNCTIONS = f"""
import asyncio, time

async def sleeps(response, answer, prompt):
    await asyncio.sleep({SLEEP_S})
    return 1.0

def hangs(response, answer, prompt):
    time.sleep(0.02)
    while response == "hang": time.sleep(0.1)  # As one that waits for a service does.
    return 1.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "benchmark_functions.py").write_text(_FUNCTIONS, encoding="utf-8")
        sys.path.insert(0, scratch)
        figures = _math(args.answers, cores) | _async(args.answers) | _hanging(args.answers, cores)
    print("| what | seconds | |\n|---|---|---|")
    print(f"| {args.answers} math answers, 1 worker | {figures['math_serial_s']:.2f} | |")
    share = figures["math_speedup"] / cores
    print(
        f"| the same, {cores} workers | {figures['math_parallel_s']:.2f} | {figures['math_speedup']:.2f} times as fast: "
        f"{share:.2f} of the cores |"
    )
    print(f"| {args.answers} async calls that sleep {SLEEP_S} s | {figures['async_s']:.2f} | |")
    print(
        f"| {args.answers} calls of 20 ms, {cores + NUM_HANGING} workers; with {NUM_HANGING} that hang "
        f"| {figures['without_hanging_s']:.2f}; {figures['with_hanging_s']:.2f} | time-out {TIMEOUT_S:g} s |"
    )
    if args.json:
        args.json.write_text(json.dumps(_described(args) | figures, indent=2) + "\n", encoding="utf-8")


def _math(count: int, cores: int) -> dict[str, float]:
    from drpo_megatron.rewards.registry import MATH_PATH

    reasoning = "We note that $x^2 + 3x = 10$, hence $x = 2$ or $x = -5$; the second is out of range. "
    text = (reasoning * (NUM_CHARACTERS // len(reasoning) + 1))[: NUM_CHARACTERS - 40]
    answers = [rf"{text} The answer is $\boxed{{\frac{{{i}}}{{7}}}}$." for i in range(count)]
    seconds = {n: _seconds(MATH_PATH, answers, timeout_s=600.0, num_workers=n) for n in dict.fromkeys((1, cores))}
    return {
        "math_serial_s": seconds[1],
        "math_parallel_s": seconds[cores],
        "math_speedup": seconds[1] / seconds[cores],
    }


def _async(count: int) -> dict[str, float]:
    from drpo_megatron.config.sections import ImportedReward

    concurrency = ImportedReward(path="a:b").concurrency
    return {"async_s": _seconds("benchmark_functions:sleeps", ["x"] * count, timeout_s=60.0, concurrency=concurrency)}


def _hanging(count: int, cores: int) -> dict[str, float]:
    answers = ["x"] * count
    every = count // NUM_HANGING
    bad = ["hang" if i % every == 0 and i // every < NUM_HANGING else "x" for i in range(count)]
    options: dict[str, Any] = {"timeout_s": TIMEOUT_S, "num_workers": cores + NUM_HANGING}
    return {
        "without_hanging_s": _seconds("benchmark_functions:hangs", answers, **options),
        "with_hanging_s": _seconds("benchmark_functions:hangs", bad, **options),
    }


def _seconds(path: str, answers: list[str], **options: Any) -> float:
    """Wall time of all of them, by workers that are there already."""
    from drpo_megatron.rewards.base import Response
    from drpo_megatron.rewards.pool import PoolOptions, WorkerPool
    from drpo_megatron.types import Prompt

    prompt = Prompt("p", (), r"\frac{1}{7}")
    responses = [Response(answer, prompt) for answer in answers]
    pool = WorkerPool(PoolOptions(path, **options))
    try:
        for future in pool.submit([response for response in responses if response.text != "hang"]):
            future.result()
        started = time.perf_counter()
        verdicts = [future.result() for future in pool.submit(responses)]
        seconds = time.perf_counter() - started
    finally:
        pool.close()
    num_failed = sum(verdict.failure is not None for verdict in verdicts)
    assert num_failed == answers.count("hang"), f"{num_failed} failures"
    return seconds


def _described(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "command": shlex.join(["python", "tools/benchmark_rewards.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{len(os.sched_getaffinity(0))} cores of {cpu.partition(':')[2].strip() or platform.processor()}",
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "math-verify": version("math-verify")},
    }


if __name__ == "__main__":
    main()

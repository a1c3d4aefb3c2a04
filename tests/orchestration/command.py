"""Starts the real command line on a tiny model, in a directory of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.tiny import save_checkpoint, tiny_config, tiny_moe_config

ROOT = Path(__file__).parents[2]

_REWARD = """
def share_of_even_tokens(response, answer, prompt):
    words = response.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / len(words) if words else 0.0
"""


def prepare(directory: Path, **sections: Any) -> Path:
    """A tiny Qwen3-MoE, prompts, demonstrations, a user's reward function, and `run.yaml`, which is returned."""
    save_checkpoint(directory / "model", tiny_moe_config(num_hidden_layers=2))
    prompts = [{"id": f"p{i}", "prompt": f"t{i} t{i + 7}", "answer": "even"} for i in range(24)]
    for name, lines in (("train", prompts[:16]), ("heldout", prompts[16:])):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    demonstrations = [{"prompt": line["prompt"], "response": "t2 t4 t7"} for line in prompts]
    (directory / "warmup.jsonl").write_text("\n".join(map(json.dumps, demonstrations)))
    (directory / "my_rewards.py").write_text(_REWARD)
    defaults: dict[str, Any] = {
        "run": {"run_dir": "run", "num_steps": 4},
        "warmup": {"data": "warmup.jsonl", "num_steps": 3, "sequences_per_step": 8, "optimizer": {"lr": 1e-3}},
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "reward": {"name": "import", "path": "my_rewards:share_of_even_tokens"},
        "checkpoint": {"every": 2},
        "rollout": {"max_response_tokens": 6},
    }
    left_out = [name for name, section in sections.items() if section is None]
    sections = {
        name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults | sections if name not in left_out
    }
    config = tiny_config("model", **sections)
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


def start(directory: Path, *arguments: str, piped: bool = False, **variables: str) -> subprocess.Popen[str]:
    """`drpo-megatron ARGUMENTS` in `directory`, in a process group of its own, output in `output.txt` there.

    Args:
        piped: its output is read from the process's pipes instead.
        variables: of its environment.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "drpo_megatron.cli", *arguments]
    with (directory / "output.txt").open("w") as output:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE if piped else output,
            stderr=subprocess.PIPE if piped else output,
            text=True,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], directory: Path, timeout_s: float = 900.0) -> tuple[int, str]:
    """Exit code and output."""
    try:
        code = process.wait(timeout_s)
    finally:
        kill_group(process)
    return code, (directory / "output.txt").read_text()


def run(directory: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(directory, *arguments), directory)


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int, timeout_s: float = 600.0) -> None:
    """Until the run has logged this step."""
    deadline = time.monotonic() + timeout_s
    while not any(row["step"] >= step for row in metrics(directory / "run")):
        assert process.poll() is None, (directory / "output.txt").read_text()
        assert time.monotonic() < deadline, f"no step {step} within {timeout_s} s"
        time.sleep(0.2)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def still_running(processes: list[psutil.Process], within_s: float) -> list[str]:
    """Command lines of those that haven't ended after `within_s`."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [" ".join(p.cmdline()[:2]) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def kill_group(process: subprocess.Popen[str]) -> None:
    """Whatever a failed test left of the command."""
    if process.poll() is None:
        for child in descendants(process):
            child.kill()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

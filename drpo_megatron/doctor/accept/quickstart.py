"""Whole runs of examples/quickstart.yaml by the command that a user gives, unquantised and in FP8: they learn.

On a GPU in BF16, with fewer steps than the example's own. On a CPU one run of few steps, which only has to end well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import drpo_megatron
from drpo_megatron.data.quickstart import make
from drpo_megatron.doctor.accept.processes import die_with
from drpo_megatron.doctor.accept.stage import Results, Settings, Skip
from drpo_megatron.precision.recipes import TRAIN_RECIPES, find_hardware, what_is_missing

LEAST_GAIN = 0.05
"""Of the share of right answers, from before RL to its end: more than twice the noise of 800 samples. On a CPU the
example gains about 0.45 in 110 steps."""
_FP8_TRAINING = ("fp8-tensorwise", "fp8-delayed")
"""The first that the hardware has. The others' blocks of 32 and 128 don't fit the example's small matrices."""


def run(settings: Settings, results: Results) -> None:
    recipe = Path(drpo_megatron.__file__).parents[1] / "examples" / "quickstart.yaml"
    if not recipe.is_file():
        raise Skip(f"{recipe} does not exist: run the check from a checkout")
    make(Path(settings.scratch, "data", "quickstart"), seed=0)
    for name, overrides in _runs(settings, results).items():
        _train(settings, results, name, recipe, overrides)


def _runs(settings: Settings, results: Results) -> dict[str, list[str]]:
    """Overrides of each run, by its name."""
    common = ["checkpoint.save_hf=false", "metrics.plot=false", *_layout(settings)]
    if settings.is_tiny:
        common += [
            "run.num_steps=2",
            "warmup.num_steps=2",
            "rollout.prompts_per_step=8",
            "rollout.samples_per_prompt=4",
        ]
        common += ["warmup.sequences_per_step=16", "eval.max_prompts=8", "eval.samples_per_prompt=1", "eval.every=0"]
    else:
        common += ["run.num_steps=40", "eval.every=0"]
    if settings.device == "cpu":
        fp8 = ["precision.train=fp8-blockwise", "precision.rollout=fp8-block128"]
        return {"fp8, emulated": [*common, "trainer.backend=cpu", *fp8]}
    common += ["trainer.backend=gpu", "trainer.dtype=bf16"]
    runs = {"bf16": common}
    hardware = find_hardware("gpu")
    missing = {}
    for name in _FP8_TRAINING:
        engine = TRAIN_RECIPES[name].engine
        assert engine is not None
        missing[name] = what_is_missing(engine, hardware)
        if not missing[name]:
            fp8 = [f"precision.train={name}", "precision.rollout=fp8-block128", "precision.emulate=false"]
            return runs | {f"fp8, {name}": [*common, *fp8]}
    results.skipped("fp8", f"{_FP8_TRAINING[-1]}: {'; '.join(missing[_FP8_TRAINING[-1]])}")
    return runs


def _layout(settings: Settings) -> list[str]:
    """The example's own two ranks where there are two; the embedded engines take what GPUs are left, or CPUs."""
    if settings.num_devices >= 2:
        return []
    ranks = ["parallel.num_ranks=1", "parallel.tensor=1", "parallel.sequence=false", "parallel.expert=1"]
    return [*ranks, "rollout.engine.num_engines=1"]


def _train(settings: Settings, results: Results, name: str, recipe: Path, overrides: list[str]) -> None:
    scratch = Path(settings.scratch)
    run_dir = scratch / f"run-{name.replace(', ', '-')}"
    number = 1
    while run_dir.exists():
        number += 1
        run_dir = scratch / f"run-{name.replace(', ', '-')}-{number}"
    arguments = ["train", str(recipe), *overrides, f"run.run_dir={run_dir}"]
    results.figure(f"{name}: command, in {scratch}", f"drpo-megatron {' '.join(arguments)}")
    run = subprocess.Popen(
        [sys.executable, "-m", "drpo_megatron.cli", *arguments],
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        preexec_fn=partial(die_with, os.getpid()),  # It ends its own processes then.
    )
    try:
        code = run.wait()
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    if code:
        results.failed(name, f"exit code {code}; logs: {run_dir / 'logs'}")
        return
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["heldout_before"], summary["heldout_after"]
    for phase, rate in summary["tokens_per_s"].items():
        results.figure(f"{name}: {phase}_tokens_per_s", rate)
    results.figure(f"{name}: seconds", summary["wall_s"])
    text = f"held-out {before:.1%} -> {after:.1%} in {summary['num_steps']} steps"
    if settings.is_tiny or after >= before + LEAST_GAIN:
        results.passed(name, text)
    else:
        results.failed(name, f"{text}; it should gain at least {LEAST_GAIN:.0%}")

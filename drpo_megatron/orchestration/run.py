"""A training run from its configuration to its summary: read, start the processes, loop, export.

Everything that can be wrong with the input is found by `read_inputs`, before a process starts or a file is written.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config import Config
from drpo_megatron.data.prompts import PromptStream, read_demonstrations, read_prompts
from drpo_megatron.data.tokenize import load_tokenizer
from drpo_megatron.models import get_family
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.cluster import cluster
from drpo_megatron.orchestration.loop import Loop, RolloutSource
from drpo_megatron.orchestration.replay import DumpedRollouts
from drpo_megatron.orchestration.rollouts import Rollouts
from drpo_megatron.orchestration.run_directory import RunDirectory, versions
from drpo_megatron.orchestration.workers import Workers
from drpo_megatron.plots import draw_training
from drpo_megatron.precision.checks import check_precision
from drpo_megatron.precision.recipes import find_hardware
from drpo_megatron.sinks import MetricsLogger
from drpo_megatron.types import Prompt, Sample

Say = Callable[[str], None]

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""What a scheduler sends before a time limit or a preemption."""


@dataclass(frozen=True, slots=True)
class Inputs:
    prompts: list[Prompt]
    heldout: list[Prompt]
    demonstrations: list[Sample]
    precision_notes: list[str]
    """What is emulated, and what else one should know of the precision."""


def read_inputs(config: Config) -> Inputs:
    """Prompts and demonstrations, tokenised, after a look at the checkpoint. ValueError names file and line."""
    hf_config = HFCheckpoint(config.model.hf_path).config
    get_family(hf_config)
    # On a cluster of somebody else's, this machine says nothing about those of the trainer.
    hardware = find_hardware(config.trainer.backend) if config.cluster.ray_address is None else None
    precision_notes = check_precision(config, hf_config, hardware)
    tokenizer = load_tokenizer(config.model.hf_path)
    heldout = read_prompts(config.data.heldout, tokenizer, config) if config.data.heldout else []
    prompts = read_prompts(config.data.train, tokenizer, config)
    rollout = config.rollout
    needed = rollout.prompts_per_step * (1 + rollout.resample_equal_groups + rollout.max_staleness)
    if rollout.from_dump is not None:
        DumpedRollouts(Path(rollout.from_dump), config).check()
    elif len(prompts) < needed:
        raise ValueError(
            f"{config.data.train} has {len(prompts)} prompts, but {needed} different ones may be drawn at a time: "
            f"rollout.prompts_per_step={rollout.prompts_per_step} in up to {1 + rollout.resample_equal_groups} rounds, "
            f"for rollout.max_staleness={rollout.max_staleness} steps ahead, too; give more prompts or lower them"
        )
    return Inputs(
        prompts=prompts,
        heldout=heldout,
        demonstrations=read_demonstrations(config.warmup.data, tokenizer, config) if config.warmup else [],
        precision_notes=precision_notes,
    )


def train(config: Config, inputs: Inputs, run: RunDirectory, say: Say) -> dict[str, Any] | None:
    """The whole run, or the rest of it after the newest checkpoint of `run`.

    Returns the summary; None when the run was asked to stop before its last step, and can be resumed.
    """
    checkpoint = run.latest_checkpoint(config)
    progress = checkpoint[1] if checkpoint else None
    clock = Clock(progress.phase_s, progress.wall_s) if progress else Clock()
    total_steps, resume_step = config.run.num_steps, progress.step if progress else None
    say(f"continuing {run.path} after step {resume_step}" if progress else f"run directory: {run.path}")
    for note in inputs.precision_notes:
        say(f"note: {note}")
    with cluster(config, run.logs, clock, say) as workers:
        rollouts = rollout_source(config, inputs, workers, clock)
        metrics = MetricsLogger(run.path, config.metrics, total_steps, resume_step)
        try:
            loop = Loop(config, run, workers, rollouts, inputs.heldout, inputs.demonstrations, metrics, clock, say)
            with _stopping_at_signals(loop):
                loop.run(checkpoint)
        finally:
            metrics.close()
        if loop.stop_reason is not None:
            return None
        if config.checkpoint.save_hf:
            with clock.phase("export"):
                workers.ranks.call("write_hf", run.hf, Path(config.model.hf_path))
        summary = summarise(config, loop, workers)
    run.summary_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if config.metrics.plot:
        draw_training(run.path)
    return summary


@contextmanager
def _stopping_at_signals(loop: Loop) -> Iterator[None]:
    """One of STOP_SIGNALS, however often it comes, ends the loop after its present step, with a checkpoint."""

    def ask(signum: int, frame: Any) -> None:
        loop.request_stop(f"{signal.Signals(signum).name} received")

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rollout_source(config: Config, inputs: Inputs, workers: Workers, clock: Clock) -> RolloutSource:
    if config.rollout.from_dump is not None:
        return DumpedRollouts(Path(config.rollout.from_dump), config)
    prompts = PromptStream(inputs.prompts, shuffle=config.data.shuffle, seed=config.run.seed)
    return Rollouts(config, workers.engines, workers.rewards, prompts, clock)


def summarise(config: Config, loop: Loop, workers: Workers) -> dict[str, Any]:
    """summary.json: what came out of the run and what it took."""
    phase_s = loop.clock.totals
    num_tokens = {"generate": loop.rollouts.num_tokens, "train": loop.num_trained_tokens}
    driver_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "heldout_before": loop.accuracy.get(0),
        "heldout_after": loop.accuracy.get(config.run.num_steps),
        "wall_s": loop.clock.wall_s,
        "phase_s": phase_s,
        "tokens_per_s": {phase: count / phase_s[phase] for phase, count in num_tokens.items() if count},
        "peak_rss_mb": workers.peak_rss_mb() | {"driver": driver_mb},
        "versions": versions(),
        "seed": config.run.seed,
        "num_steps": config.run.num_steps,
        "policy_version": loop.policy_version,
    }

"""A training run from its configuration to its summary: read, start the processes, loop, export.

Everything that can be wrong with the input is found by `read_inputs`, before a process starts or a file is written.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.model_check import require_trainable
from drpo_megatron.config import Config
from drpo_megatron.data.packing import padded_length
from drpo_megatron.data.prompts import PromptStream, read_demonstrations, read_prompts
from drpo_megatron.data.tokenize import check_template, load_tokenizer
from drpo_megatron.files import write_text
from drpo_megatron.intervals import HeldOut
from drpo_megatron.orchestration.answers import unreadable_answers
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.cluster import cluster
from drpo_megatron.orchestration.loop import Loop, RolloutSource
from drpo_megatron.orchestration.replay import DumpedRollouts
from drpo_megatron.orchestration.rollouts import Rollouts
from drpo_megatron.orchestration.run_directory import Checkpoint, RunDirectory, versions
from drpo_megatron.orchestration.signals import gently
from drpo_megatron.orchestration.workers import Workers
from drpo_megatron.plots import draw_training
from drpo_megatron.precision.checks import check_precision
from drpo_megatron.precision.recipes import find_hardware
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.sinks import METRICS_FILE, MetricsLogger, read_metrics
from drpo_megatron.types import Prompt, Sample

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Inputs:
    prompts: list[Prompt]
    heldout: list[Prompt]
    demonstrations: list[Sample]
    precision_notes: list[str]
    """What is emulated, and what else one should know of the precision."""
    model_notes: list[str]
    """Files beside the weights that the run's export will not hold."""
    unreadable: list[str]
    """Answers that the reward can't read, with file and line."""


def read_inputs(config: Config) -> Inputs:
    """Prompts and demonstrations, tokenised, after a look at the checkpoint. ValueError names file and line."""
    model_notes = require_trainable(config.model.hf_path, engine=config.rollout.engine.name)
    hf_config = HFCheckpoint(config.model.hf_path).config
    # On a cluster of somebody else's, this machine says nothing about those of the trainer.
    hardware = find_hardware(config.trainer.backend) if config.cluster.ray_address is None else None
    precision_notes = check_precision(config, hf_config, hardware)
    tokenizer = load_tokenizer(config.model.hf_path)
    check_template(tokenizer, config.data.system_prompt)
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
    demonstrations = read_demonstrations(config.warmup.data, tokenizer, config) if config.warmup else []
    check_micro_batch(config, prompts, demonstrations)
    unreadable = []
    if rollout.from_dump is None:
        unreadable = unreadable_answers(config.data.train, prompts, config.reward)
        if config.data.heldout:
            unreadable += unreadable_answers(config.data.heldout, heldout, config.reward)
    return Inputs(
        prompts=prompts,
        heldout=heldout,
        demonstrations=demonstrations,
        precision_notes=precision_notes,
        model_notes=model_notes,
        unreadable=unreadable,
    )


def check_micro_batch(config: Config, prompts: Sequence[Prompt], demonstrations: Sequence[Sample]) -> None:
    """That the longest sequence that there can be fits into a micro-batch. ValueError names it, and the fix."""
    limit, response = config.trainer.max_tokens_per_micro_batch, config.rollout.max_response_tokens
    padded = partial(padded_length, context=config.parallel.context)
    sizes: dict[str, tuple[int, str]] = {}
    if config.rollout.from_dump is None:
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        size = len(longest.token_ids)
        text = f"prompt {longest.prompt_id} of {size} tokens with rollout.max_response_tokens={response}"
        sizes[config.data.train] = padded(size + response), text
    if config.warmup is not None:
        demonstration = max(demonstrations, key=lambda sample: sample.num_tokens)
        text = f"demonstration {demonstration.sample_id}"
        sizes[config.warmup.data] = padded(demonstration.num_tokens), text
    for file, (size, what) in sizes.items():
        if size > limit:
            raise ValueError(
                f"{file}: {what} makes a sequence of up to {size} tokens, more than "
                f"trainer.max_tokens_per_micro_batch={limit}; raise that to at least {size}, or remove long ones"
            )


def train(config: Config, inputs: Inputs, run: RunDirectory, say: Say) -> dict[str, Any] | None:
    """The whole run, or the rest of it after the newest checkpoint of `run`; if only what comes at the end is missing
    (an evaluation, hf/, summary.json), that.

    Returns the summary; None when the run was asked to stop before its last step, and can be resumed.
    """
    checkpoint, clock = run.latest_checkpoint(config, say), Clock()
    say(f"continuing {run.path} after {checkpoint}" if checkpoint else f"run directory: {run.path}")
    for note in (*inputs.precision_notes, *inputs.model_notes):
        say(f"note: {note}")
    if inputs.unreadable:
        say("warning: " + "\n".join(inputs.unreadable))
    with cluster(config, run.logs, clock, say) as workers:
        checkpoint = verified(checkpoint, config, run, workers, say)
        if checkpoint is not None:
            clock.go_on_from(checkpoint.progress.phase_s, checkpoint.progress.wall_s)
        watch = FailureWatch(say)
        rollouts = rollout_source(config, inputs, workers, clock, watch)
        resume_step = checkpoint.progress.step if checkpoint else None
        metrics = MetricsLogger(run.path, config.metrics, config.run.num_steps, resume_step)
        try:
            heldout, demonstrations = inputs.heldout, inputs.demonstrations
            loop = Loop(config, run, workers, rollouts, heldout, demonstrations, metrics, clock, say, watch)
            with gently(loop.request_stop):
                loop.run(checkpoint)
        finally:
            metrics.close()
        if loop.stop_reason is not None:
            return None
        if config.checkpoint.save_hf:
            say(f"writing the trained model to {run.hf} ...")
            with clock.phase("export"):
                workers.ranks.call("write_hf", run.hf, Path(config.model.hf_path))
        summary = summarise(config, loop, workers) | heldout_intervals(run, config.run.num_steps)
    write_text(run.summary_file, json.dumps(summary, indent=2) + "\n")
    if config.metrics.plot:
        try:
            draw_training(run.path)
        except OSError as error:
            say(f"warning: no picture of the run: {error}")
    return summary


def verified(
    checkpoint: Checkpoint | None, config: Config, run: RunDirectory, workers: Workers, say: Say
) -> Checkpoint | None:
    """The checkpoint, when the ranks find in its files what was saved; otherwise the one before, if that was asked for.

    Raises: ValueError that names the damaged file.
    """
    while checkpoint and (problems := workers.ranks.call("verify_checkpoint", checkpoint.trainer.absolute())[0]):
        run.set_aside(checkpoint.path, problems, say)
        checkpoint = run.latest_checkpoint(config, say)
    return checkpoint


def rollout_source(
    config: Config, inputs: Inputs, workers: Workers, clock: Clock, watch: FailureWatch
) -> RolloutSource:
    if config.rollout.from_dump is not None:
        return DumpedRollouts(Path(config.rollout.from_dump), config)
    prompts = PromptStream(inputs.prompts, shuffle=config.data.shuffle, seed=config.run.seed)
    return Rollouts(config, workers.engines, workers.rewards, prompts, clock, watch)


def heldout_intervals(run: RunDirectory, last_step: int) -> dict[str, Any]:
    """Of the mean rewards before and after, as the metrics have them; and whether these are accuracies."""
    found = {row["step"]: HeldOut.of(row) for row in read_metrics(run.path / METRICS_FILE)}
    before, after = found.get(0), found.get(last_step)
    measured = [result for result in (before, after) if result is not None]
    return {
        "heldout_is_accuracy": all(result.is_accuracy for result in measured) if measured else None,
        "heldout_before_interval": [before.low, before.high] if before else None,
        "heldout_after_interval": [after.low, after.high] if after else None,
    }


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

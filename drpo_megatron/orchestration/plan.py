"""What a run is going to do, in words, for `--dry-run`."""

from __future__ import annotations

from pathlib import Path

from drpo_megatron.config import Config
from drpo_megatron.orchestration.run import Inputs


def plan_lines(config: Config, inputs: Inputs, directory: Path) -> list[str]:
    """One aligned line each for the processes, the layout, the work of a step and of the run, and the files."""
    parallel, rollout, trainer, saving = config.parallel, config.rollout, config.trainer, config.checkpoint
    layout = [f"{name} {getattr(parallel, name)}" for name in ("tensor", "pipeline", "context", "expert", "data")]
    num_sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    num_updates = trainer.optimizer_steps_per_rollout
    longest = max(len(prompt.token_ids) for prompt in inputs.prompts) + rollout.max_response_tokens
    files = ["config.yaml", "metrics.jsonl", "logs/", "checkpoints/", "summary.json"]
    files += ["hf/"] * saving.save_hf + ["training.png"] * config.metrics.plot + ["rollouts/"] * rollout.dump
    drawing = (
        f"{rollout.engine.num_engines} engine(s), 1 for rewards"
        if rollout.from_dump is None
        else f"rollouts from {rollout.from_dump}"
    )
    lines = {
        "processes": f"{parallel.num_ranks} trainer rank(s), {drawing}",
        "layout": ", ".join(layout) + (", sequence parallel" if parallel.sequence else ""),
        "precision": "; ".join(inputs.precision_notes) or f"{trainer.dtype}, nothing quantised",
        "prompts": f"{len(inputs.prompts)} to train on, {len(inputs.heldout[: config.eval.max_prompts])} held out",
        "warm-up": f"{config.warmup.num_steps} steps of {config.warmup.sequences_per_step} of "
        f"{len(inputs.demonstrations)} demonstrations"
        if config.warmup
        else "none",
        "each step": f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = "
        f"{num_sequences} sequences, trained in {num_updates} optimiser step(s) of {num_sequences // num_updates}"
        + (f", drawn up to {rollout.max_staleness} step(s) ahead" if rollout.max_staleness else ""),
        "in all": f"{config.run.num_steps} steps, {config.run.num_steps * num_updates} optimiser steps, "
        f"{config.run.num_steps * num_sequences} sequences",
        "micro-batch": f"at most {trainer.max_tokens_per_micro_batch} tokens a rank; longest sequence {longest}",
        "checkpoints": (f"every {saving.every} steps and " if saving.every else "") + f"at the end; {saving.keep} kept",
        "files": f"{directory}: {', '.join(files)}",
    }
    return [*(f"{name:<13}{text}" for name, text in lines.items()), *_unreadable(inputs)]


def _unreadable(inputs: Inputs) -> list[str]:
    return [f"warning: {inputs.unreadable[0]}", *inputs.unreadable[1:]] if inputs.unreadable else []

"""Rollouts without training: engines and rewards of a run, every step's groups into a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drpo_megatron.config import Config, save_config
from drpo_megatron.data.prompts import PromptStream
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.cluster import cluster
from drpo_megatron.orchestration.rollouts import Rollouts
from drpo_megatron.orchestration.run import Inputs
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.rollout.dump import identity, rollout_file, write_rollout


def check_roll_out(config: Config, out: Path) -> None:
    """Raises ValueError for a directory that is in use, and for weights that only a trainer could bring to the engines."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a new directory to --out")
    if config.model.megatron_path is not None:
        raise ValueError(
            f"model.megatron_path={config.model.megatron_path}: rollouts without a trainer are drawn by model.hf_path; "
            "give model.megatron_path=null, and what drpo-megatron convert megatron-to-hf makes of it as model.hf_path"
        )
    if config.precision.rolls_out_quantized:
        raise ValueError(
            f"precision.rollout={config.precision.rollout.name}: the trainer quantises the weights of the rollouts, and there "
            "is none; set precision.rollout=bf16"
        )


def roll_out(config: Config, inputs: Inputs, out: Path, say: Callable[[str], None]) -> None:
    """`run.num_steps` rollouts of the initial policy (version 0) into `out`, one file each, for `train --from-dump`."""
    if config.warmup is not None:
        say("note: the warm-up needs a trainer and is left out: model.hf_path draws as it is")
        config = config.model_copy(update={"warmup": None})
    logs = out / "logs"
    logs.mkdir(parents=True)
    save_config(config, out / "config.yaml")
    clock = Clock()
    with cluster(config, logs, clock, say, trains=False) as workers:
        prompts = PromptStream(inputs.prompts, shuffle=config.data.shuffle, seed=config.run.seed)
        rollouts = Rollouts(config, workers.engines, workers.rewards, prompts, clock, FailureWatch(say))
        for step in range(1, config.run.num_steps + 1):
            groups, metrics = rollouts.take(step, policy_version=0)
            rollouts.draw_ahead(step)
            write_rollout(rollout_file(out, step), step, groups, identity(config))
            say(
                f"step {step}/{config.run.num_steps}  reward {metrics['reward/mean']:.3f}  "
                f"tokens {metrics['rollout/num_tokens']:,}  equal groups {metrics['rollout/equal_group_share']:.0%}"
            )
    say(f"{rollouts.num_tokens / clock.totals['generate']:,.0f} tokens/s; rollouts: {out}")

"""`drpo-megatron rollout`: generate and score, and keep it; no trainer."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from drpo_megatron.commands import BadInput, RunFailed, raise_interrupt
from drpo_megatron.commands.arguments import whole

_HELP = """\
Draw rollouts of a run's initial policy with its engines and score them with its reward, without a trainer. Every step
becomes a file of JSONL in DIR: tokens, their log-probs, rewards, policy versions. KEY=VALUE overrides a key of the file.

examples:
  drpo-megatron rollout examples/quickstart.yaml --out rollouts/base --steps 4
  drpo-megatron rollout examples/quickstart.yaml --out rollouts/cold rollout.temperature=0.7 --steps 1
  drpo-megatron train examples/quickstart.yaml --from-dump rollouts/base warmup=null run.num_steps=4
"""


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("rollout", help="generate and dump rollouts only", description=_HELP, **style)
    parser.add_argument("arguments", nargs="*", metavar="FILE KEY=VALUE", help="the run's YAML file, then overrides")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="new directory for the rollouts")
    parser.add_argument("--steps", type=whole(1), metavar="N", help="how many steps' rollouts; default: run.num_steps")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        from drpo_megatron.config import load_config
        from drpo_megatron.config.checks import check_config

        if not args.arguments or "=" in args.arguments[0]:
            raise ValueError("which run? give a YAML file, such as examples/quickstart.yaml")
        steps = [f"run.num_steps={args.steps}"] if args.steps is not None else []
        config = load_config(args.arguments[0], [*args.arguments[1:], *steps, "rollout.from_dump=null"])
        check_config(config)
        from drpo_megatron.orchestration.roll_out import check_roll_out, roll_out
        from drpo_megatron.orchestration.run import read_inputs

        check_roll_out(config, args.out)
        inputs = read_inputs(config)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    from drpo_megatron.orchestration.workers import ProcessFailure

    try:
        roll_out(config, inputs, args.out, lambda text: print(text, flush=True))
    except (ProcessFailure, ValueError, OSError) as error:
        raise RunFailed(error) from error

"""`drpo-megatron eval`: mean reward (accuracy, avg@n) and pass@k of a trained model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from drpo_megatron.commands import BadInput
from drpo_megatron.commands.arguments import real, whole

_HELP = """\
Sample answers to held-out problems and print their mean reward with its 95 % interval: accuracy, and pass@k, where every
reward is 0 or 1. For other rewards --threshold says from which reward on an answer counts as right in pass@k.
A run's model is scored on its own held-out file as the run did it; options change that. With --out every problem's
scores are written as they are made, and the same command goes on where it was killed.

examples:
  drpo-megatron eval runs/quickstart-20260101-120000
  drpo-megatron eval runs/quickstart-20260101-120000 --samples 16 --temperature 0.6 --json
  drpo-megatron eval checkpoints/my-model --prompts data/aime.jsonl --reward math --max-response-tokens 8192 \\
      --samples 16 --out aime-my-model.jsonl
"""


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("eval", help="score a trained model", description=_HELP, **style)
    parser.add_argument("model", metavar="RUN_OR_HF_DIR", type=Path, help="run directory or Hugging Face checkpoint")
    parser.add_argument("--prompts", metavar="FILE", help="JSONL of problems; default: the run's held-out file")
    parser.add_argument("--samples", type=whole(1), metavar="N", help="answers a problem; default: the run's")
    parser.add_argument("--temperature", type=real(1e-6, 100), metavar="T", help="default: the run's, or 1")
    parser.add_argument("--max-response-tokens", type=whole(1), metavar="N", help="default: the run's")
    parser.add_argument("--reward", metavar="NAME", help="arithmetic, math, or package.module:function")
    parser.add_argument(
        "--threshold", type=real(-1e30, 1e30), metavar="R", help="rewards from R on count as right in pass@k"
    )
    parser.add_argument("--seed", type=whole(0), help="of the draws; default: the run's, or 0")
    parser.add_argument("--out", metavar="FILE", type=Path, help="JSONL of every problem's scores; resumes from it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    names = ("prompts", "samples", "temperature", "max_response_tokens", "reward", "threshold", "seed", "out")
    try:
        from drpo_megatron.orchestration.evaluate import EvalOptions, evaluate_model

        result = evaluate_model(args.model, EvalOptions(**{name: getattr(args, name) for name in names}), _say)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    if args.json:
        print(json.dumps({"model": str(args.model)} | result.as_dict()))
        return
    samples = result.samples_per_prompt
    name, form = (result.heldout.name, ".1%" if result.is_accuracy else ".4g")
    name += "" if samples == 1 else f" (avg@{samples})"
    mean, low, high = (format(value, form) for value in (result.mean, result.low, result.high))
    print(f"{name} {mean} (95 % interval {low} to {high}; {result.num_problems} problems x {samples} samples)")
    if samples > 1 and result.threshold is None:
        print("no pass@k: rewards are not all 0 or 1; --threshold R says which are right")
    elif samples > 1 and not result.is_accuracy:
        print(f"pass@k: a reward of {result.threshold:g} or more counts as right")
    for k, share in result.pass_at_k.items() if samples > 1 else ():
        low, high = result.pass_at_k_interval[k]
        print(f"pass@{k} {share:.1%} ({low:.1%} to {high:.1%})")
    print(f"{result.mean_response_tokens:.1f} tokens a response, {result.truncated_share:.1%} cut at the limit")


def _say(text: str) -> None:
    """Progress is not the answer: it must not get into a file of JSON."""
    print(text, file=sys.stderr, flush=True)

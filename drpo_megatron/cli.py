"""The command line. `train` and `eval` are here, the other commands have a module each in `commands/`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM; of `train` also 75, stopped by SIGTERM or
SIGUSR1, and 76, a machine was lost: both can be continued. torch and ray are imported only when a command needs them,
so that help and bad input are answered at once.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from drpo_megatron import __version__
from drpo_megatron.commands import BadInput, MachineLost, RunFailed, Stopped, convert, plan, study

if TYPE_CHECKING:
    from drpo_megatron.config import Config
    from drpo_megatron.orchestration.run import Inputs
    from drpo_megatron.orchestration.run_directory import RunDirectory

_DESCRIPTION = "Reinforcement learning of mixture-of-experts LLMs: Megatron-Core trains, engines roll out."
_TRAIN_HELP = """\
Train a policy as FILE (YAML) says. KEY=VALUE overrides a key of the file; VALUE is YAML.

examples:
  drpo-megatron train examples/quickstart.yaml
  drpo-megatron train examples/quickstart.yaml trainer.optimizer.lr=2e-4 objective.delta=0.3
  drpo-megatron train examples/quickstart.yaml objective=grpo --dry-run
  drpo-megatron train --resume runs/quickstart-20260101-120000
  drpo-megatron train --resume runs/quickstart-20260101-120000 run.num_steps=120
  drpo-megatron train --help-config        every key with its type, default and meaning
"""
_EVAL_HELP = """\
Sample answers to held-out problems and print the share that is correct.
A run's model is scored on its own held-out file as the run did it; options change that.

examples:
  drpo-megatron eval runs/quickstart-20260101-120000
  drpo-megatron eval runs/quickstart-20260101-120000 --samples 16 --temperature 0.6 --json
  drpo-megatron eval checkpoints/my-model --prompts heldout.jsonl --reward math --max-response-tokens 2048
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args, extra = parser.parse_known_args(argv)
    if unknown := [text for text in extra if not hasattr(args, "arguments") or text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(args, "arguments"):
        args.arguments += extra  # argparse takes positional arguments in one piece; options may stand between them.
    try:
        args.run(args)
    except BadInput as error:
        return _fail(error, 2)
    except MachineLost as error:
        return _fail(error, 76)
    except RunFailed as error:
        return _fail(error, 1)
    except Stopped as stop:
        print(stop, flush=True)
        return 75
    except KeyboardInterrupt as stop:
        print("terminated" if stop.args else "interrupted", file=sys.stderr)
        return 143 if stop.args else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="drpo-megatron", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"drpo-megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a policy, or continue a run", description=_TRAIN_HELP, **style)
    train.add_argument("arguments", nargs="*", metavar="FILE KEY=VALUE", help="the run's YAML file, then overrides")
    train.add_argument("--dry-run", action="store_true", help="check everything, print config and plan, start nothing")
    train.add_argument("--resume", metavar="RUN_DIR", type=Path, help="continue this run after its newest checkpoint")
    train.add_argument("--help-config", action="store_true", help="explain every key of the YAML file")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="score a trained model", description=_EVAL_HELP, **style)
    evaluate.add_argument("model", metavar="RUN_OR_HF_DIR", type=Path, help="run directory or Hugging Face checkpoint")
    evaluate.add_argument("--prompts", metavar="FILE", help="JSONL of problems; default: the run's held-out file")
    evaluate.add_argument("--samples", type=_positive(int), metavar="N", help="answers a problem; default: the run's")
    evaluate.add_argument("--temperature", type=_positive(float), metavar="T", help="default: the run's, or 1")
    evaluate.add_argument("--max-response-tokens", type=_positive(int), metavar="N", help="default: the run's")
    evaluate.add_argument("--reward", metavar="NAME", help="arithmetic, math, or package.module:function")
    evaluate.add_argument("--seed", type=int, help="of the draws; default: the run's, or 0")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    evaluate.set_defaults(run=_eval)

    convert.add(commands, style)
    plan.add(commands, style)
    study.add(commands, style)
    return parser


# --- train --------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    if args.help_config:
        from drpo_megatron.config import describe_fields

        print(describe_fields())
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _raise_interrupt)  # While the loop runs, it has a gentler answer.
    try:
        _train_or_resume(args)
    except KeyboardInterrupt as stop:
        if stop.args:
            raise Stopped(f"stopped by {signal.Signals(stop.args[0]).name}") from stop
        raise


def _train_or_resume(args: argparse.Namespace) -> None:
    try:
        config, run = _configure(args)
        from drpo_megatron.orchestration.run import read_inputs
        from drpo_megatron.orchestration.run_directory import planned_path

        inputs = read_inputs(config)
        if args.dry_run:
            _print_plan(config, inputs, run.path if run else planned_path(config))
            return
        run = _open(config, run)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    _train_in(config, inputs, run)


def _configure(args: argparse.Namespace) -> tuple[Config, RunDirectory | None]:
    """The checked configuration; with it the run directory to continue, if any."""
    from drpo_megatron.config import load_config
    from drpo_megatron.config.checks import check_config
    from drpo_megatron.orchestration.run_directory import RunDirectory

    file = args.arguments[0] if args.arguments and "=" not in args.arguments[0] else None
    overrides = args.arguments[1:] if file else args.arguments
    run = None
    if args.resume:
        run, config = RunDirectory.reopen(args.resume, Path(file) if file else None, overrides)
    elif file:
        config = load_config(file, overrides)
    else:
        raise ValueError("which run? give a YAML file, such as examples/quickstart.yaml, or --resume RUN_DIR")
    for warning in check_config(config):
        print(f"warning: {warning}", file=sys.stderr)
    return config, run


def _open(config: Config, run: RunDirectory | None) -> RunDirectory:
    from drpo_megatron.orchestration.run_directory import RunDirectory

    if run is None:
        return RunDirectory.create(config)
    run.save_config(config)
    return run


def _train_in(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    from drpo_megatron.orchestration.run import train
    from drpo_megatron.orchestration.workers import LostMachine, ProcessFailure

    try:
        summary = train(config, inputs, run, _say)
    except LostMachine as error:
        raise MachineLost(f"{error}{_how_to_resume(run)}") from error
    except (ProcessFailure, ValueError, OSError) as error:
        raise RunFailed(f"{error}{_how_to_resume(run)}") from error
    except KeyboardInterrupt:
        _say(_how_to_resume(run).strip())
        raise
    if summary is None:
        raise Stopped(_how_to_resume(run).strip())
    _print_summary(summary, run)


def _how_to_resume(run: RunDirectory) -> str:
    if run.has_checkpoint():
        return f"\nresume with: drpo-megatron train --resume {run.path}"
    return f"\nno checkpoint was saved yet; logs: {run.logs}"


def _print_plan(config: Config, inputs: Inputs, directory: Path) -> None:
    from drpo_megatron.config import to_yaml
    from drpo_megatron.orchestration.plan import plan_lines

    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in plan_lines(config, inputs, directory)))
    print("# dry run: nothing was started or written")


def _print_summary(summary: dict[str, Any], run: RunDirectory) -> None:
    from rich.console import Console
    from rich.table import Table

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    table = Table(title="held-out problems, share correct")
    for heading in ("before RL", f"after {summary['num_steps']} steps"):
        table.add_column(heading, justify="right")
    table.add_row(share(summary["heldout_before"]), share(summary["heldout_after"]))
    console = Console()
    console.print(table)
    rates = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in summary["tokens_per_s"].items())
    console.print(f"{summary['wall_s']:.0f} s in all; {rates}", highlight=False)
    console.print(f"results: {run.path}", highlight=False, soft_wrap=True)


# --- eval ---------------------------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> None:
    names = ("prompts", "samples", "temperature", "max_response_tokens", "reward", "seed")
    try:
        from drpo_megatron.orchestration.evaluate import EvalOptions, evaluate_model

        result = evaluate_model(args.model, EvalOptions(**{name: getattr(args, name) for name in names}))
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    if args.json:
        print(json.dumps({"model": str(args.model)} | result.as_dict()))
        return
    drawn = f"{result.num_problems} problems x {result.samples_per_prompt} samples"
    print(f"accuracy {result.accuracy:.1%} (95 % interval {result.low:.1%} to {result.high:.1%}; {drawn})")
    if result.samples_per_prompt > 1:
        print(", ".join(f"pass@{k} {share:.1%}" for k, share in result.pass_at_k.items()))
    print(f"{result.mean_response_tokens:.1f} tokens a response, {result.truncated_share:.1%} cut at the limit")


# --- small things -------------------------------------------------------------------------------------------------


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    parse.__name__ = kind.__name__  # argparse names the type so: "invalid int value".
    return parse


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def _raise_interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(signum)


if __name__ == "__main__":
    sys.exit(main())

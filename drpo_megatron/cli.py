"""The command line. `train` is here, the other commands have a module each in `commands/`.

Exit codes: 0 done, 1 the run failed, 2 bad input, 70 a defect of this program, 130 Ctrl-C,
143 SIGTERM; of `train` also 75, stopped by SIGTERM or SIGUSR1, and 76, a machine was lost: both can be continued.
torch and ray are imported only when a command needs them, so that help and bad input are answered at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron import __version__
from drpo_megatron.commands import (
    BadInput,
    MachineLost,
    RunFailed,
    Stopped,
    Unforeseen,
    convert,
    doctor,
    eval,
    plan,
    quickstart,
    rollout,
    slurm,
    study,
    top,
)
from drpo_megatron.commands.unforeseen import explained, make_printable, report
from drpo_megatron.console import go_on_in, lasting_output

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
  drpo-megatron train examples/quickstart.yaml rollout.max_staleness=1        generate while training
  drpo-megatron train runs/quickstart-20260101-120000/config.yaml run.run_dir=replay --from-dump RUN_DIR/rollouts
  drpo-megatron train --help-config        every key with its type, default and meaning
"""


def main(argv: Sequence[str] | None = None) -> int:
    make_printable()
    try:
        return _main(argv)
    except Unforeseen as error:
        code = report(error.cause, (error.directory,))
        print(error.advice, file=sys.stderr)
        return code
    except Exception as error:
        return report(error)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    given = sys.argv[1:] if argv is None else list(argv)
    if empty := [text for text in given if text.startswith("--") and text.endswith("=--")]:
        parser.error(f"{empty[0]}: -- is no value")  # argparse would make an empty list of it.
    args, extra = parser.parse_known_args(given)
    if unknown := [text for text in extra if not hasattr(args, "arguments") or text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(args, "arguments"):
        args.arguments += extra  # argparse takes positional arguments in one piece; options may stand between them.
    with lasting_output():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
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
    train.add_argument("--from-dump", metavar="DIR", help="train on dumped rollouts; starts no engines")
    train.add_argument("--help-config", action="store_true", help="explain every key of the YAML file")
    train.set_defaults(run=_train)

    convert.add(commands, style)
    doctor.add(commands, style)
    eval.add(commands, style)
    plan.add(commands, style)
    quickstart.add(commands, style, _train)
    rollout.add(commands, style)
    slurm.add(commands, style)
    study.add(commands, style)
    top.add(commands, style)
    return parser


# --- train --------------------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    if args.help_config:
        from drpo_megatron.config import describe_fields

        print(describe_fields())
        return
    from drpo_megatron.orchestration import signals

    with signals.stop_signals():
        try:
            _train_or_resume(args)
        except (KeyboardInterrupt, RunFailed) as end:
            came = signals.which()
            if came in signals.STOP_SIGNALS:  # Its processes may have been told, too, and their end be what was seen.
                why = f" ({str(end).splitlines()[0]})" if isinstance(end, RunFailed) else ""
                raise Stopped(f"stopped by {signal.Signals(came).name}{why}") from end
            if isinstance(end, KeyboardInterrupt):
                raise KeyboardInterrupt from end
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
        go_on_in(run.logs / "driver.log")
        with run.locked(_say):
            run.falls_back = config.checkpoint.fallback or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
            run.latest_checkpoint(config, _say)  # For its errors, before anything is started.
            run.save_config(config)
            _train_in(config, inputs, run)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error


def _configure(args: argparse.Namespace) -> tuple[Config, RunDirectory | None]:
    """The checked configuration; with it the run directory to continue, if any."""
    from drpo_megatron.config.checks import check_config
    from drpo_megatron.orchestration.run_directory import RunDirectory

    from_dump = [f"rollout.from_dump={json.dumps(args.from_dump)}"] if args.from_dump else []
    run, config = RunDirectory.from_arguments(
        [*args.arguments, *from_dump], args.resume, example="examples/quickstart.yaml"
    )
    for warning in check_config(config):
        print(f"warning: {warning}", file=sys.stderr)
    return config, run


def _open(config: Config, run: RunDirectory | None) -> RunDirectory:
    from drpo_megatron.orchestration.run_directory import RunDirectory

    return RunDirectory.create(config) if run is None else run


def _train_in(config: Config, inputs: Inputs, run: RunDirectory) -> None:
    from drpo_megatron.orchestration.run import train
    from drpo_megatron.orchestration.workers import LostMachine, ProcessFailure

    try:
        summary = train(config, inputs, run, _say)
    except LostMachine as error:
        raise MachineLost(f"{error}{_how_to_resume(run)}") from error
    except (ProcessFailure, ValueError, OSError) as error:
        raise RunFailed(f"{error}{_how_to_resume(run)}") from error
    except Exception as error:
        raise Unforeseen(error, run.logs, _how_to_resume(run).strip()) from error
    except KeyboardInterrupt:
        _say(_how_to_resume(run).strip())
        raise
    if summary is None:
        raise Stopped(_how_to_resume(run).strip())
    _print_summary(summary, run)


def _how_to_resume(run: RunDirectory) -> str:
    if run.has_checkpoint():
        return f"\nresume with: drpo-megatron train --resume {run.path}"
    return (
        f"\nno checkpoint was saved yet; start it again with: drpo-megatron train --resume {run.path}\nlogs: {run.logs}"
    )


def _print_plan(config: Config, inputs: Inputs, directory: Path) -> None:
    from drpo_megatron.config import to_yaml
    from drpo_megatron.orchestration.plan import plan_lines

    print(to_yaml(config))
    print("\n".join(f"# {line}" for line in plan_lines(config, inputs, directory)))
    print("# dry run: nothing was started or written")


def _print_summary(summary: dict[str, Any], run: RunDirectory) -> None:
    from rich.console import Console
    from rich.table import Table

    from drpo_megatron.intervals import HeldOut

    is_accuracy = summary["heldout_is_accuracy"]

    def measured(when: str) -> str:
        mean, interval = summary[f"heldout_{when}"], summary[f"heldout_{when}_interval"]
        return "-" if mean is None else HeldOut(mean, *(interval or (math.nan, math.nan)), is_accuracy).text()

    what = "accuracy" if is_accuracy else "mean reward"
    table = Table(title=f"held-out problems, {what} (95 % interval)")
    for heading in ("before RL", f"after {summary['num_steps']} steps"):
        table.add_column(heading, justify="right")
    table.add_row(measured("before"), measured("after"))
    console = Console()
    console.print(table)
    rates = ", ".join(f"{phase} {rate:,.0f} tokens/s" for phase, rate in summary["tokens_per_s"].items())
    console.print(f"{summary['wall_s']:.0f} s in all; {rates}", highlight=False)
    console.print(f"results: {run.path}", highlight=False, soft_wrap=True)


# --- small things -------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {explained(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

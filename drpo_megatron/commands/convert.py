"""`drpo-megatron convert`: checkpoints between Hugging Face and Megatron."""

from __future__ import annotations

import argparse
import gc
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from drpo_megatron.commands import BadInput, RunFailed
from drpo_megatron.commands.arguments import decimal_size
from drpo_megatron.conversion.read_ahead import read_ahead

if TYPE_CHECKING:
    from drpo_megatron.conversion.verify import Verification

_HELP = """\
Convert checkpoints between Hugging Face and Megatron. Tensors are streamed: memory stays at a few times the largest
one. Output is written under a temporary name and renamed when it is whole. Exit code 1 when `verify` finds a
difference, 2 for bad input.

examples:
  drpo-megatron convert inspect models/Qwen3-30B-A3B
  drpo-megatron convert hf-to-megatron --hf models/Qwen3-30B-A3B --out models/Qwen3-30B-A3B-megatron
  drpo-megatron convert verify --hf models/Qwen3-30B-A3B --megatron models/Qwen3-30B-A3B-megatron --logits
  drpo-megatron convert megatron-to-hf --megatron runs/my-run/checkpoints/step_000400 --out my-model --fp8 block128
"""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PROMPT = "Twelve and thirty make forty-two; seven times eight is"
_EXPERTS = "a tensor for each expert, or a layer's in two, as transformers 5 holds them; default: as they came"
_GIVEN_HF = "Hugging Face checkpoint of the same model, for config and tokenizer; default: what --megatron kept of it"
_SKIP = "don't compare the files of --megatron with its checksums first, which reads a run's optimizer state, too"
_ITERATION_FILE = "latest_checkpointed_iteration.txt"


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("convert", help="convert, compare and inspect checkpoints", description=_HELP, **style)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    hf: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR", "help": "Hugging Face checkpoint"}
    megatron = hf | {"help": "converted checkpoint, a run's checkpoints/step_N, or a run: its newest"}
    out = hf | {"help": "what to write; it must not exist"}

    to_megatron = actions.add_parser("hf-to-megatron", help="a checkpoint to train from, in any layout", **style)
    to_megatron.add_argument("--hf", **hf)
    to_megatron.set_defaults(run=_to_megatron)

    to_hf = actions.add_parser("megatron-to-hf", help="a checkpoint to serve and share", **style)
    to_hf.add_argument("--megatron", **megatron)
    to_hf.add_argument("--max-shard-size", type=decimal_size, metavar="SIZE", help="such as 5GB; default: as it came")
    to_hf.add_argument("--fp8", choices=["block128"], help="quantise to FP8 in blocks of 128 x 128, as SGLang loads it")
    to_hf.add_argument("--experts", choices=["apart", "fused"], help=_EXPERTS)
    to_hf.add_argument("--hf", type=Path, metavar="DIR", help=_GIVEN_HF)
    to_hf.set_defaults(run=_to_hf)

    for action in (to_megatron, to_hf):
        action.add_argument("--out", **out)
        action.add_argument("--dtype", choices=_DTYPES, help="of all weights; default: each keeps its own")
        action.add_argument("--force", action="store_true", help="replace what --out names")

    verify = actions.add_parser(
        "verify", help="compare every tensor of two checkpoints, bit by bit, and config.json", **style
    )
    verify.add_argument("--hf", **hf)
    verify.add_argument("--megatron", **megatron)
    verify.add_argument("--logits", action="store_true", help="also compare both models' logits on a prompt")
    verify.add_argument("--prompt", default=_PROMPT, help="for --logits")
    verify.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of both models for --logits")
    verify.set_defaults(run=_verify)

    for action in (to_hf, verify):
        action.add_argument("--skip-checksums", action="store_true", help=_SKIP)

    inspect = actions.add_parser("inspect", help="what a directory holds, and whether it is whole", **style)
    inspect.add_argument("directory", type=Path, metavar="DIR", help="Hugging Face, Megatron, or a run")
    inspect.set_defaults(run=_inspect)


def _to_megatron(args: argparse.Namespace) -> None:
    read_ahead(args.hf)
    with _bad_input():
        from drpo_megatron.conversion.to_megatron import hf_to_megatron

        hf_to_megatron(args.hf, args.out, dtype=_dtype(args.dtype), force=args.force)


def _to_hf(args: argparse.Namespace) -> None:
    with _bad_input():
        megatron = megatron_files(args.megatron)
        read_ahead(megatron)
        from drpo_megatron.conversion.to_hf import megatron_to_hf

        megatron_to_hf(
            megatron,
            args.out,
            dtype=_dtype(args.dtype),
            max_shard_bytes=args.max_shard_size,
            fp8=args.fp8 is not None,
            experts=args.experts,
            hf=args.hf,
            force=args.force,
            skip_checksums=args.skip_checksums,
        )


def _verify(args: argparse.Namespace) -> None:
    with _bad_input():
        from drpo_megatron.conversion.verify import verify

        megatron = megatron_files(args.megatron)
        result = verify(args.hf, megatron, skip_checksums=args.skip_checksums)
    cast = f", {result.num_cast} of them after a cast" if result.num_cast else ""
    print(f"{result.num_tensors - len(result.differences)} of {result.num_tensors} tensors are equal{cast}")
    print(_about_config(result))
    if result.differences or result.config_differences:
        found = [f"{len(result.differences)} tensors differ:", *result.differences] if result.differences else []
        if keys := result.config_differences:
            found += [f"{len(keys)} keys of config.json differ:", *keys]
        raise RunFailed("\n  ".join(found))
    if args.logits:
        _verify_logits(args, megatron)


def _about_config(result: Verification) -> str:
    if not result.has_config:
        return "the Megatron checkpoint has no config.json to compare, and no tensors that aren't trained"
    return "config.json differs" if result.config_differences else "config.json says the same"


def _verify_logits(args: argparse.Namespace, megatron: Path) -> None:
    with _bad_input():
        from drpo_megatron.conversion.logits import compare_logits

        result = compare_logits(args.hf, megatron, args.prompt, _dtype(args.dtype))
    found = (
        f"logits of {result.num_tokens} tokens differ by {result.relative_difference:.2g} of the largest "
        f"(limit {result.limit:g} in {args.dtype})"
    )
    if not result.is_same:
        raise RunFailed(found)
    print(found)


def _inspect(args: argparse.Namespace) -> None:
    with _bad_input():
        from drpo_megatron.conversion.inspect import inspect

        is_megatron_lm = (args.directory / _ITERATION_FILE).is_file()
        facts = inspect(megatron_files(args.directory) if is_megatron_lm else args.directory)
    width = max(len(name) for name in facts)
    for name, fact in facts.items():
        print(f"{name:{width}}  {fact}")


def megatron_files(directory: Path) -> Path:
    """Where the Megatron files are: here, in `trainer/` of a run's step, in the newest step of a run, or in the
    iteration that Megatron-LM calls the latest."""
    if (directory / "checkpoints").is_dir():
        steps = sorted(path for path in (directory / "checkpoints").glob("step_*") if (path / "driver.json").is_file())
        if not steps:
            raise ValueError(f"{directory} is a run without a complete checkpoint")
        directory = steps[-1]
    if (latest := directory / _ITERATION_FILE).is_file():
        iteration = latest.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\d{1,12}|release", iteration):
            raise ValueError(f"{latest} holds {iteration[:40]!r}, not the number of an iteration")
        directory = directory / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
    return directory / "trainer" if (directory / "trainer").is_dir() else directory


@contextmanager
def _bad_input() -> Iterator[None]:
    """What the work finds wrong is bad input; SIGTERM ends it as Ctrl-C does, with nothing left behind."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    gc.disable()  # It took a fifth of the time: imports and plans make a million objects, and none of them garbage.
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    finally:
        gc.enable()


def _raise_interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(signum)


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, _DTYPES[name])

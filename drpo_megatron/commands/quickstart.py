"""`drpo-megatron quickstart`: the whole loop in any folder, with nothing but the installed package."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drpo_megatron
from drpo_megatron.commands import BadInput
from drpo_megatron.files import write_text

_HELP = """\
Train a small Qwen3-MoE to add, on two CPU cores in about three minutes: makes its checkpoint, tokenizer and sums in
./data/quickstart, writes the recipe to ./quickstart.yaml, and trains as `drpo-megatron train quickstart.yaml` does. What
is there already is kept, an edited recipe, too.

examples:
  drpo-megatron quickstart
  drpo-megatron quickstart run.num_steps=20 objective=grpo
"""
_RECIPE, _DATA = Path("quickstart.yaml"), Path("data/quickstart")


def add(commands: Any, style: dict[str, Any], train: Callable[[argparse.Namespace], None]) -> None:
    parser = commands.add_parser("quickstart", help="train a small MoE end to end, here", description=_HELP, **style)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to train with instead")
    parser.set_defaults(
        run=lambda args: _run(args, train), dry_run=False, resume=None, from_dump=None, help_config=False
    )


def shipped_recipe() -> Path:
    """A wheel has it in the package, a checkout beside it (setup.py)."""
    package = Path(drpo_megatron.__file__).parent
    places = [parent / "examples" / "quickstart.yaml" for parent in (package, package.parent)]
    return next(path for path in places if path.is_file())


def _run(args: argparse.Namespace, train: Callable[[argparse.Namespace], None]) -> None:
    for text in args.overrides:
        if "=" not in text:
            raise BadInput(
                f"{text}: give overrides as KEY=VALUE; a recipe of your own is trained by drpo-megatron train"
            )
    from drpo_megatron.data.quickstart import make

    try:
        if not _RECIPE.exists():
            write_text(_RECIPE, shipped_recipe().read_text(encoding="utf-8"))
        made = make(_DATA, seed=0)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    print(f"{_DATA}: {'made' if made else 'complete already'}; the recipe is {_RECIPE}", flush=True)
    args.arguments = [str(_RECIPE), *args.overrides]
    train(args)

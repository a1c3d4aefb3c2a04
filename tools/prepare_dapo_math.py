"""DAPO-Math-17k, as published, to the JSONL that the recipes train on.

    python tools/prepare_dapo_math.py dapo-math-17k.parquet data/dapo_math.jsonl --exclude data/aime.jsonl

Takes .parquet (which needs pyarrow: `pip install 'drpo_megatron[data]'`), .jsonl and .json. Answers that the `math`
reward can't read are left out, since no response could ever be right.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drpo_megatron.data.jsonl import write_jsonl
from drpo_megatron.data.math_files import INSTRUCTION, collect, sample
from drpo_megatron.rewards import math as math_reward
from drpo_megatron.types import Prompt

_NOBODY = Prompt("check", (), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="+", metavar="SOURCE", help="files of the data set")
    parser.add_argument("out", type=Path, help="JSONL to write")
    parser.add_argument(
        "--exclude", type=Path, action="append", default=[], metavar="FILE", help="of held-out problems"
    )
    parser.add_argument("--max-problems", type=int, metavar="N", help="a fixed sample of so many")
    parser.add_argument("--instruction", default=INSTRUCTION, help=f"after every problem; default: {INSTRUCTION}")
    args = parser.parse_args()
    try:
        problems, counts = collect(args.source, readable, args.exclude)
        if args.max_problems is not None:
            problems = sample(problems, args.max_problems)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(args.out, (problem.as_line(args.instruction) for problem in problems))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{counts.as_text()}; {len(problems):,} written to {args.out}")
    return 0


def readable(answer: str) -> str | None:
    """The answer, if the reward can read it."""
    return answer if math_reward.readable("", answer, _NOBODY) else None


if __name__ == "__main__":
    sys.exit(main())

"""AIME problems, as published by several hands, to the JSONL that the recipes evaluate on.

    python tools/prepare_aime.py aime_2024.parquet aime_2025.jsonl data/aime.jsonl

Takes .parquet (which needs pyarrow: `pip install 'drpo_megatron[data]'`), .jsonl and .json. Every answer of AIME is an
integer from 0 to 999: what is not is refused, `073` becomes `73` and `336^\\circ` `336`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from drpo_megatron.data.jsonl import write_jsonl
from drpo_megatron.data.math_files import INSTRUCTION, collect


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="+", metavar="SOURCE", help="files of one or more years")
    parser.add_argument("out", type=Path, help="JSONL to write")
    parser.add_argument("--instruction", default=INSTRUCTION, help=f"after every problem; default: {INSTRUCTION}")
    args = parser.parse_args()
    try:
        problems, counts = collect(args.source, integer)
        if counts.unusable or counts.contradicted:
            raise ValueError(
                f"{', '.join(map(str, args.source))}: {counts.unusable} answers are no integer from 0 to 999 and "
                f"{counts.contradicted} problems have two answers; these are no AIME files, or damaged ones"
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(args.out, (problem.as_line(args.instruction) for problem in problems))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{counts.as_text()}; {len(problems):,} written to {args.out}")
    return 0


def integer(answer: str) -> str | None:
    match = re.fullmatch(r"0*(\d{1,3})(\^\{?\\circ\}?)?", answer.strip("$ "))
    return match[1] if match else None


if __name__ == "__main__":
    sys.exit(main())

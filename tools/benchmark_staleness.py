"""Step time with generation and training in turn (rollout.max_staleness=0) and at once (1), on the quickstart.

    python tools/benchmark_staleness.py [--steps 12] [--json FILE]

Two short runs of examples/quickstart.yaml with one trainer rank and one engine, so that each has a core of its own on
two. Times are medians over the steps, the first two left out. In turn a step takes the sum of its parts; at once it
can't take less than the longer of generation (with rewards) and training, and the sync of the weights, for which both
wait. Needs two idle cores: what else runs takes from the overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
CONFIG = "examples/quickstart.yaml"
OVERRIDES = [
    "parallel={num_ranks: 1}",
    "rollout.engine.num_engines=1",
    "warmup.num_steps=10",
    "data.heldout=null",
    "checkpoint={every: 0, save_hf: false}",
    "metrics.plot=false",
]
NUM_UNCOUNTED = 2
"""Steps at the start that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    if not (ROOT / "data" / "quickstart").is_dir():
        subprocess.run([sys.executable, "tools/make_quickstart.py"], cwd=ROOT, check=True)
    in_turn, at_once = (times(max_staleness, args.steps) for max_staleness in (0, 1))
    drawing = in_turn["generate"] + in_turn["reward"]
    floor = max(drawing, in_turn["train"]) + in_turn["sync"]
    figures = {
        "in_turn": in_turn,
        "at_once": at_once,
        "sum_s": drawing + in_turn["train"] + in_turn["sync"],
        "floor_s": floor,
        "speedup": in_turn["step"] / at_once["step"],
        "step_over_floor": at_once["step"] / floor,
    }
    columns = ("generate", "reward", "train", "sync", "overlap", "wait_for_rollouts", "engines_idle", "step")
    print(f"| seconds a step | {' | '.join(name.replace('_', ' ') for name in columns)} |")
    print("|---|" + "---|" * len(columns))
    for name, row in (("in turn (k=0)", in_turn), ("at once (k=1)", at_once)):
        print(f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    print(f"sum of the parts {figures['sum_s']:.3f} s; longer of generation and training, and sync: {floor:.3f} s")
    print(
        f"at once {figures['speedup']:.2f} times as fast; {figures['step_over_floor']:.2f} of the least possible time"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def times(max_staleness: int, num_steps: int) -> dict[str, float]:
    """Median seconds of the parts of a step, and of the step."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        overrides = [*OVERRIDES, f"rollout.max_staleness={max_staleness}", f"run.num_steps={num_steps}"]
        command = [
            sys.executable,
            "-m",
            "drpo_megatron.cli",
            "train",
            CONFIG,
            f"run.run_dir={run_dir}",
            *overrides,
        ]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Nothing is drawn ahead of the last step, so it isn't like the others.
    steps = [row for row in rows if NUM_UNCOUNTED < row["step"] < num_steps]
    names = {name for row in steps for name in row if name.startswith("time/") and name.endswith("_s")}
    medians = {n.removeprefix("time/").removesuffix("_s"): median(row.get(n, 0.0) for row in steps) for n in names}
    return {"overlap": 0.0} | medians


if __name__ == "__main__":
    main()

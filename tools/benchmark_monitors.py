"""What the monitors of a training step cost, at the intervals that `precision.monitor` has by default.

    python tools/benchmark_monitors.py [--hf DIR] [--rounds 8] [--recipes bf16 fp8-blockwise] [--json FILE]

Every round trains on one rollout four times, in the same processes and in turn: without monitors, with those of every
step, with a look into the layers, and with two gradients compared. What the last two add is divided by their intervals:

    cost = every step + look / layers_every + comparison / gradient_every,   as a share of the step without monitors

Medians over the rounds of the differences within a round; the first round is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARALLEL = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}
CASES = {"none": (0, 0), "every step": (0, 0), "look": (1, 0), "comparison": (0, 1)}
"""layers_every and gradient_every of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", default="data/quickstart/model", help="Hugging Face checkpoint (default: quickstart's)")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds (default 8)")
    parser.add_argument("--sequences", type=int, default=256, help="sequences a rollout (default 256)")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "fp8-blockwise"], help="values of precision.train")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.multiprocessing as mp

    figures = {}
    print(
        f"one rollout of {args.sequences} sequences of 9 + 3 tokens in 4 optimiser steps, TP2 x EP2 on two gloo ranks"
    )
    print("| precision.train | without, s | every step | a look | a comparison | all, at the default intervals |")
    print("|---|---|---|---|---|---|")
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            mp.spawn(_rank, args=(args, recipe, scratch), nprocs=PARALLEL["num_ranks"])
            seconds = json.loads(Path(scratch, "seconds.json").read_text())
        figures[recipe] = found = costs(seconds)
        shares = " | ".join(f"{found[name]:+.1%}" for name in (*list(CASES)[1:], "all"))
        print(f"| {recipe} | {found['none']:.3f} | {shares} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def costs(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds without monitors; what each case adds to it, as shares; all at the default intervals."""
    from drpo_megatron.config.precision import MonitorSection

    def added(case: str, base: str) -> float:
        return statistics.median(
            (with_it - without) / none
            for with_it, without, none in zip(seconds[case], seconds[base], seconds["none"], strict=True)
        )

    section = MonitorSection()
    every = added("every step", "none")
    look, comparison = added("look", "every step"), added("comparison", "every step")
    return {
        "none": statistics.median(seconds["none"]),
        "every step": every,
        "look": look,
        "comparison": comparison,
        "all": every + look / section.layers_every + comparison / section.gradient_every,
    }


class _NoMonitors:
    """In place of `trainer.monitors`."""

    def before_backward(self, *args: Any) -> dict[str, Any]:
        return {}

    def during_backward(self, *args: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()

    def after_backward(self, *args: Any) -> dict[str, Any]:
        return {}


def _rank(rank: int, args: argparse.Namespace, recipe: str, scratch: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what ranks say has no place in the table.
    from drpo_megatron.config.precision import MonitorSection
    from drpo_megatron.config.sections import Config
    from drpo_megatron.objectives import diagnostics
    from drpo_megatron.trainer.setup import initialize_distributed
    from drpo_megatron.types import Sample

    config = Config.model_validate(
        {
            "run": {"name": "bench", "num_steps": 100},
            "model": {"hf_path": args.hf},
            "parallel": PARALLEL,
            "objective": {"name": "drpo", "delta": 0.15},
            "trainer": {"optimizer_steps_per_rollout": 4, "optimizer": {"lr": 1e-5}},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_response_tokens": 3},
            "data": {"train": "-"},
            "reward": {"name": "arithmetic"},
            "precision": {"train": {"name": recipe}},
        }
    )
    initialize_distributed(config, rank, PARALLEL["num_ranks"], dist.FileStore(f"{scratch}/store"), 300.0)
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(config)
    monitors, histograms = trainer.monitors, diagnostics.weight_histograms
    rng = random.Random(0)
    vocab = trainer.hf_config.vocab_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(count))

    samples = [Sample(f"{i}", tokens(9), tokens(3), (-1.0,) * 3, rng.uniform(-1, 1)) for i in range(args.sequences)]
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(1 + args.rounds):
        for case, (layers_every, gradient_every) in CASES.items():
            diagnostics.weight_histograms = histograms if case != "none" else lambda inputs, outputs: {}
            trainer.monitors = monitors if case != "none" else _NoMonitors()
            monitors.section = MonitorSection(layers_every=layers_every, gradient_every=gradient_every)
            dist.barrier()
            started = time.perf_counter()
            trainer.train_step(samples)
            seconds[case].append(time.perf_counter() - started)
    if rank == 0:
        Path(scratch, "seconds.json").write_text(json.dumps({case: times[1:] for case, times in seconds.items()}))
    dist.barrier()


if __name__ == "__main__":
    main()

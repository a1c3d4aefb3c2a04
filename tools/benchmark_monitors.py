"""What the monitors of a training step cost, at the intervals that `precision.monitor` has by default.

    python tools/benchmark_monitors.py [--hf DIR] [--rounds 8] [--recipes bf16 fp8-blockwise] [--json FILE]

Every round trains on one rollout three times: with the monitors of every step, with a look into the layers, and with two
gradients compared. The seconds inside the monitors are taken by a clock around their functions (waiting for the other
rank included), so that steps of a few per cent more or less don't hide them:

    cost = every step + look / layers_every + comparison / gradient_every,   as a share of the rest of the step

Medians over the rounds; the first round is left out.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARALLEL = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}
CASES = {"every step": (0, 0), "look": (1, 0), "comparison": (0, 1)}
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
    print("| precision.train | the rest, s | every step | a look | a comparison | all, at the default intervals |")
    print("|---|---|---|---|---|---|")
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as scratch:
            mp.spawn(_rank, args=(args, recipe, scratch), nprocs=PARALLEL["num_ranks"])
            seconds = json.loads(Path(scratch, "seconds.json").read_text())
        figures[recipe] = found = costs(seconds)
        shares = " | ".join(f"{found[name]:+.1%}" for name in (*CASES, "all"))
        print(f"| {recipe} | {found['rest']:.3f} | {shares} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def costs(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Of (inside the monitors, whole step) by case: median seconds of the rest, what each case adds as a share of it."""
    from drpo_megatron.config.precision import MonitorSection

    rest = statistics.median(whole - inside for inside, whole in seconds["every step"])
    shares = {case: statistics.median(inside for inside, _ in times) / rest for case, times in seconds.items()}
    section, every = MonitorSection(), shares["every step"]
    look, comparison = shares["look"] - every, shares["comparison"] - every
    return {
        "rest": rest,
        "every step": every,
        "look": look,
        "comparison": comparison,
        "all": every + look / section.layers_every + comparison / section.gradient_every,
    }


class _Clock:
    """Seconds inside the functions that it wraps; one inside of another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - started

        return timed


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
    clock, monitors = _Clock(), trainer.monitors
    diagnostics.weight_histograms = clock(diagnostics.weight_histograms)
    monitors.before_backward = clock(monitors.before_backward)
    monitors.after_backward = clock(monitors.after_backward)
    monitors.probe._see = clock(monitors.probe._see)
    rng = random.Random(0)
    vocab = trainer.hf_config.vocab_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(count))

    samples = [Sample(f"{i}", tokens(9), tokens(3), (-1.0,) * 3, rng.uniform(-1, 1)) for i in range(args.sequences)]
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    for _ in range(1 + args.rounds):
        for case, (layers_every, gradient_every) in CASES.items():
            monitors.section = MonitorSection(layers_every=layers_every, gradient_every=gradient_every)
            clock.seconds = 0.0
            dist.barrier()
            started = time.perf_counter()
            trainer.train_step(samples)
            seconds[case].append((clock.seconds, time.perf_counter() - started))
    if rank == 0:
        Path(scratch, "seconds.json").write_text(json.dumps({case: times[1:] for case, times in seconds.items()}))
    dist.barrier()


if __name__ == "__main__":
    main()

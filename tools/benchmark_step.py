"""How fast a trainer step is: against a bare Megatron-Core loop, and phase by phase over a finished run.

    python tools/benchmark_step.py [--hf DIR] [--vocab V] [--sequences 64] [--steps 15] [--json FILE]
    python tools/benchmark_step.py --run runs/quickstart-<stamp>

All have the same model, layout, packed batch, schedule and optimizer, and are timed in turn in the same processes
(medians over the steps, the first two left out):
    trainer        the trainer's own step: vocab-parallel kernel, objective, metrics, packing
    plain loss     Megatron's output layer, log-softmax, DRPO's formula and autograd; no metrics, packed beforehand
    cross entropy  Megatron's output layer and vocab-parallel cross entropy, no policy loss: a bare Megatron-Core loop
Memory is what one step adds to the resident memory of the largest rank, gradient buffers and optimizer state aside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PARALLEL = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hf", default="data/quickstart/model", help="Hugging Face checkpoint (default: the quickstart's)"
    )
    parser.add_argument("--vocab", type=int, help="widen that model to so many token ids, with random weights")
    parser.add_argument("--sequences", type=int, default=64, help="sequences an optimiser step (default 64)")
    parser.add_argument("--prompt", type=int, default=9, help="prompt tokens (default 9)")
    parser.add_argument("--response", type=int, default=3, help="response tokens (default 3)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--run", type=Path, help="print the phases of this finished run instead")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    figures = phases(args.run) if args.run else compare(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def phases(run: Path) -> dict[str, float]:
    """Median seconds of every phase of a step, and its share of the step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]
    at_once = {f"time/{name}_s" for name in ("step", "wait_for_rollouts", "engines_idle", "overlap")}
    names = {name for row in steps for name in row if name.startswith("time/") and name.endswith("_s")} - at_once
    total = sum(row["time/step_s"] for row in steps)
    shares = {name: sum(row.get(name, 0.0) for row in steps) / total for name in names}
    print(f"{len(steps)} steps of {run}")
    for name in sorted(names, key=lambda name: -shares[name]):
        median = statistics.median(row.get(name, 0.0) for row in steps)
        print(f"  {name:20s} median {median:7.3f} s   {shares[name]:6.1%} of all step time")
    print(f"  generation + training {shares['time/generate_s'] + shares['time/train_s']:.1%}")
    return shares


def compare(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as scratch:
        if args.vocab:
            args.hf = _widened(Path(args.hf), args.vocab, Path(scratch) / "model")
        mp.spawn(_rank, args=(args, scratch), nprocs=PARALLEL["num_ranks"])
        ranks = [json.loads(file.read_text()) for file in sorted(Path(scratch).glob("rank*.json"))]
    tokens = args.sequences * (args.prompt + args.response)
    seconds = {name: times[2:] for name, times in ranks[0]["seconds"].items()}
    print(f"one optimiser step of {args.sequences} sequences, {tokens} tokens, TP2 x EP2 on two gloo ranks")
    print("| | s | tokens/s | time, trainer / this, pair by pair | extra memory MB |")
    print("|---|---|---|---|---|")
    figures: dict[str, Any] = {"tokens": tokens, "vocab": args.vocab}
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = statistics.median(ours / other for ours, other in zip(seconds["trainer"], times, strict=True))
        megabytes = max(rank["peak_bytes"][name] for rank in ranks) / 1e6
        print(f"| {name} | {median:.3f} | {tokens / median:,.0f} | {ratio:.2f} | {megabytes:.0f} |")
        figures[name] = {"seconds": median, "trainer_time_ratio": ratio, "extra_megabytes": megabytes}
    return figures


def _widened(hf: Path, vocab: int, target: Path) -> str:
    """The checkpoint's architecture with `vocab` token ids and random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(hf)
    config.vocab_size = vocab
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(hf).save_pretrained(target)
    return str(target)


def _rank(rank: int, args: argparse.Namespace, scratch: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from drpo_megatron.config.sections import Config
    from drpo_megatron.objectives.aggregation import token_weights
    from drpo_megatron.trainer.setup import initialize_distributed
    from drpo_megatron.types import Sample

    config = Config.model_validate(
        {
            "run": {"name": "bench", "num_steps": 100},
            "model": {"hf_path": args.hf},
            "parallel": PARALLEL,
            "objective": {"name": "drpo", "delta": 0.15},
            "trainer": {"optimizer_steps_per_rollout": 1, "optimizer": {"lr": 1e-5}},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_response_tokens": args.response},
            "data": {"train": "-"},
            "reward": {"name": "arithmetic"},
        }
    )
    initialize_distributed(config, rank, 2, dist.FileStore(f"{scratch}/store", 2), 300.0)
    from drpo_megatron.trainer.bare_step import bare_step, cross_entropy_loss, plain_loss
    from drpo_megatron.trainer.loss_methods import peak_memory
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(config)
    rng = random.Random(0)
    vocab = trainer.hf_config.vocab_size

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(count))

    samples = [
        Sample(f"{i}", tokens(args.prompt), tokens(args.response), (-1.0,) * args.response, rng.uniform(-1, 1))
        for i in range(args.sequences)
    ]
    weights = token_weights([args.response] * len(samples), "token-mean", args.response)
    work = trainer._work(samples, weights)

    def timed(step: Any) -> float:
        dist.barrier()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    methods = {
        "trainer": lambda: trainer.train_step(samples),
        "plain loss": lambda: bare_step(trainer, work, plain_loss(trainer)),
        "cross entropy": lambda: bare_step(trainer, work, cross_entropy_loss(trainer)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.steps + 2):
        for name, method in methods.items():
            seconds[name].append(timed(method))
    peak_bytes = {name: peak_memory(method, torch.device("cpu")) for name, method in methods.items()}
    (Path(scratch) / f"rank{rank}.json").write_text(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

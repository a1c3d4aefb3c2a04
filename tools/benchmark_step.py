"""How fast a trainer step is: against a bare Megatron-Core loop, and phase by phase over a finished run.

    python tools/benchmark_step.py [--hf DIR] [--sequences 64] [--steps 15] [--json FILE]
    python tools/benchmark_step.py --run runs/quickstart-<stamp>

The bare loop has the same model, layout, packed batch, schedule and optimizer, and Megatron's own output layer with its
vocab-parallel cross entropy: what somebody would write who needs no policy loss, no metrics and no packing. Both are
timed in turn in the same processes; medians over the steps, the first two left out.
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
    names = sorted({name for row in steps for name in row if name.startswith("time/")} - {"time/step_s"})
    total = sum(row["time/step_s"] for row in steps)
    shares = {name: sum(row.get(name, 0.0) for row in steps) / total for name in names}
    print(f"{len(steps)} steps of {run}")
    for name in sorted(names, key=lambda name: -shares[name]):
        median = statistics.median(row.get(name, 0.0) for row in steps)
        print(f"  {name:20s} median {median:7.3f} s   {shares[name]:6.1%} of all step time")
    print(f"  generation + training {shares['time/generate_s'] + shares['time/train_s']:.1%}")
    return shares


def compare(args: argparse.Namespace) -> dict[str, float]:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, args=(args, scratch), nprocs=PARALLEL["num_ranks"])
        seconds = json.loads((Path(scratch) / "seconds.json").read_text())
    tokens = args.sequences * (args.prompt + args.response)
    ours, bare = (statistics.median(seconds[name][2:]) for name in ("trainer", "bare"))
    ratio = statistics.median(b / o for o, b in zip(seconds["trainer"][2:], seconds["bare"][2:], strict=True))
    print(f"one optimiser step of {args.sequences} sequences, {tokens} tokens, TP2 x EP2 on two gloo ranks")
    print(f"  trainer (policy loss, metrics, packing)   {ours:.3f} s   {tokens / ours:8,.0f} tokens/s")
    print(f"  bare Megatron-Core (cross entropy)        {bare:.3f} s   {tokens / bare:8,.0f} tokens/s")
    print(f"  trainer / bare, tokens/s, pair by pair    {ratio:.2f}")
    return {"trainer_s": ours, "bare_s": bare, "ratio": ratio, "tokens": tokens}


def _rank(rank: int, args: argparse.Namespace, scratch: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from drpo_megatron.config.sections import Config
    from drpo_megatron.objectives.aggregation import token_weights
    from drpo_megatron.trainer.platform import optimizer_scope
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

    def bare_step() -> None:
        for chunk in trainer.chunks:
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        trainer._run(work, _cross_entropy(trainer), forward_only=False)
        with optimizer_scope():
            trainer.optimizer.step()

    def timed(step: Any) -> float:
        dist.barrier()
        started = time.perf_counter()
        step()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
    for _ in range(args.steps + 2):
        seconds["trainer"].append(timed(lambda: trainer.train_step(samples)))
        seconds["bare"].append(timed(bare_step))
    if rank == 0:
        (Path(scratch) / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def _cross_entropy(trainer: Any) -> Any:
    """Megatron's output layer and loss, as GPTModel with labels computes them."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    from drpo_megatron.trainer.forward import unwrap

    model = unwrap(trainer.chunks[0])

    def loss(batch: Any, hidden: Any, head: Any) -> tuple[Any, None]:
        logits, _ = model.output_layer(hidden.unsqueeze(1))
        targets = batch.targets.clamp(min=0).unsqueeze(1)
        losses = vocab_parallel_cross_entropy(logits.float(), targets)
        return (losses.squeeze(1) * batch.weights).sum(), None

    return loss


if __name__ == "__main__":
    main()

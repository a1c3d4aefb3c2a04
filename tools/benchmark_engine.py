"""Tokens a second of the embedded engine against transformers' own `generate`, in the same process and run.

    python tools/benchmark_engine.py [--hf DIR] [--requests 64] [--max-response 40] [--repeats 5] [--json FILE]

Prompts have mixed lengths. `generate` gets one static batch, padded on the left, and keeps decoding all rows until the
longest is done; tokens after a row's end count for neither. The two take turns; medians. One thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.transformers_engine import TransformersEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", default="data/quickstart/model", help="checkpoint (default: the quickstart's)")
    parser.add_argument("--requests", type=int, default=64, help="requests at once (default 64)")
    parser.add_argument("--max-response", type=int, default=40, help="longest response (default 40)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()

    engine = TransformersEngine(args.hf, TransformersEngineSection())
    rng = random.Random(0)
    vocab = engine.model.config.vocab_size
    prompts = [tuple(rng.randrange(vocab) for _ in range(rng.randint(2, 20))) for _ in range(args.requests)]

    def ours(repeat: int) -> int:
        requests = [GenerationRequest(f"{i}/0", prompt, 1000 * repeat + i) for i, prompt in enumerate(prompts)]
        completions = engine.generate(requests, SamplingParams(args.max_response))
        return sum(len(completion.token_ids) for completion in completions)

    def theirs(repeat: int) -> int:
        torch.manual_seed(repeat)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        stop = sorted(engine.stop_ids)
        out = engine.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.max_response,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )[:, width:]
        ended = torch.isin(out, torch.tensor(stop)).int().cumsum(1)
        return int((ended.cumsum(1) <= 1).sum())  # up to and with the first stop token

    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    for repeat in range(args.repeats + 1):
        for name, run in (("ours", ours), ("generate", theirs)):
            started = time.perf_counter()
            tokens = run(repeat)
            if repeat:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"], strict=True))
    print(f"{args.requests} requests, up to {args.max_response} tokens each, one thread")
    print(f"  embedded engine         {medians['ours']:8,.0f} tokens/s")
    print(f"  transformers generate   {medians['generate']:8,.0f} tokens/s")
    print(f"  ratio, pair by pair     {ratio:8.2f}")
    if args.json:
        args.json.write_text(json.dumps(medians | {"ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    main()

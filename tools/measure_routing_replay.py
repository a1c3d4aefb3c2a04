"""Expert flips between engine and trainer, and |pi - mu|, with and without routing replay (docs/routing_replay.md).

    python tools/measure_routing_replay.py [--hf DIR] [--requests 96] [--max-response 48] [--json FILE]

The embedded engine draws, once with the checkpoint's FP32 weights and once with its linear layers rounded to block FP8,
as a server with FP8 weights has them. Trainers in FP32 and BF16 then measure the first optimiser step on these samples:
with their own routing (`measure`) and with the engine's (`rollout`). Without --hf the model is a random Qwen3-MoE of
8 layers with 32 experts, 4 a token. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.config.sections import Config, TransformersEngineSection
from drpo_megatron.precision.quantize import dequantize_block128, quantize_block128
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.transformers_engine import TransformersEngine
from drpo_megatron.types import Sample

COLUMNS = {
    "flips": "mismatch/router_flips/share",
    "mean |pi - mu|": "mismatch/abs_prob_shift/mean",
    "p99 |pi - mu|": "mismatch/abs_prob_shift/p99",
    "k1": "mismatch/k1",
    "k3": "mismatch/k3",
    "mean exp abs(d log p)": "mismatch/token_mult_prob_error",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", help="checkpoint of a model with experts (default: a random one)")
    parser.add_argument("--requests", type=int, default=96, help="sequences (default 96)")
    parser.add_argument("--max-response", type=int, default=48, help="longest response (default 48)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args, args.hf or random_model(Path(scratch)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def random_model(directory: Path) -> str:
    """Random weights and the quickstart's tokenizer, of which only the ids of padding and the end are used."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained("data/quickstart/model").save_pretrained(directory)
    return str(directory)


def measure(args: argparse.Namespace, hf: str) -> dict[str, Any]:
    engine = TransformersEngine(hf, TransformersEngineSection())
    rng = random.Random(0)
    vocab, room = engine.model.config.vocab_size, engine.context_length - args.max_response
    requests = [
        GenerationRequest(f"{i}/0", tuple(rng.randrange(2, vocab) for _ in range(rng.randint(2, min(24, room)))), i)
        for i in range(args.requests)
    ]
    figures: dict[str, Any] = {"reporting": reporting(engine, requests, args.max_response)}
    drawn = {"FP32": draw(engine, requests, args.max_response)}
    with torch.no_grad():
        for name, slot in engine.slots.items():
            if name.endswith("_proj.weight"):
                slot.copy_(dequantize_block128(*quantize_block128(slot)))
    drawn["FP8 weights"] = draw(engine, requests, args.max_response)
    print(f"| engine | trainer | replay | {' | '.join(COLUMNS)} |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for engine_name, samples in drawn.items():
        for dtype in ("fp32", "bf16"):
            for replay in ("measure", "rollout"):
                metrics = first_step(hf, samples, dtype, replay, args.max_response)
                row = {title: metrics[name] for title, name in COLUMNS.items()}
                numbers = " | ".join(f"{number:.3g}" for number in row.values())
                print(f"| {engine_name} | {dtype.upper()} | {'no' if replay == 'measure' else 'yes'} | {numbers} |")
                figures[f"{engine_name}, {dtype}, {replay}"] = row
    return figures


def draw(engine: TransformersEngine, requests: list[GenerationRequest], max_response: int) -> list[Sample]:
    completions = engine.generate(requests, SamplingParams(max_response, routed_experts=True))
    return [
        Sample(r.request_id, r.prompt_ids, c.token_ids, c.logprobs, (-1.0) ** i, routed_experts=c.routed_experts)
        for i, (r, c) in enumerate(zip(requests, completions, strict=True))
    ]


def reporting(engine: TransformersEngine, requests: list[GenerationRequest], max_response: int) -> dict[str, float]:
    """What it costs that the engine reports: in time, the two taking turns, and in bytes a token."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(4):
        for asked, times in seconds.items():
            start = time.perf_counter()
            completions = engine.generate(requests, SamplingParams(max_response, routed_experts=asked))
            times.append(time.perf_counter() - start)
    ratio = statistics.median(on / off for off, on in zip(seconds[False][1:], seconds[True][1:], strict=True))
    traces = [completion.routed_experts for completion in completions]
    num_bytes = sum(len(t.data) for t in traces if t) / sum(t.shape[0] for t in traces if t)
    print(f"reporting takes {ratio:.3f} x the time of drawing alone, and {num_bytes:.0f} bytes a token\n")
    return {"time_ratio": ratio, "bytes_per_token": num_bytes}


def first_step(hf: str, samples: list[Sample], dtype: str, replay: str, max_response: int) -> dict[str, float]:
    from drpo_megatron.trainer.setup import initialize_distributed

    config = Config.model_validate(
        {
            "run": {"name": "measure", "num_steps": 1},
            "model": {"hf_path": hf},
            "objective": {"name": "drpo", "delta": 0.15},
            "trainer": {
                "backend": "cpu",
                "dtype": dtype,
                "routing_replay": replay,
                "optimizer_steps_per_rollout": 1,
                "optimizer": {"lr": 1e-6},
            },
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_response_tokens": max_response},
            "data": {"train": "-"},
            "reward": {"name": "arithmetic"},
        }
    )
    if not dist.is_initialized():
        initialize_distributed(config, 0, 1, dist.HashStore(), 600.0)
    from drpo_megatron.trainer.trainer import Trainer

    return Trainer(config).train_step(samples).metrics


if __name__ == "__main__":
    main()

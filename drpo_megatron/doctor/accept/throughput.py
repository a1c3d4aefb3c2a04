"""Tokens/s of training a 0.6B model, beside a bare Megatron-Core loop over the same model, batch and optimizer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.doctor.accept.models import qwen3_06b, random_samples, save_model
from drpo_megatron.doctor.accept.ranks import TIMEOUT_S, run_ranks
from drpo_megatron.doctor.accept.stage import Results, Settings
from drpo_megatron.planner.hardware import peak_flops
from drpo_megatron.planner.model import read_model
from drpo_megatron.planner.step_time import model_flops

_WARM_UP = 2


def run(settings: Settings, results: Results) -> None:
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    hf_path = save_model(Path(settings.scratch, "model"), qwen3_06b(settings.is_tiny), dtype)
    ranks = run_ranks(settings, settings.num_devices, _measure, str(hf_path))
    first = ranks[0]
    results.figure(
        "step", f"{first['num_sequences']} sequences, {first['num_tokens']} tokens, DP {settings.num_devices}"
    )
    for name, seconds in first["seconds"].items():
        results.figure(f"{name}_tokens_per_s", first["num_tokens"] / seconds)
    ours, bare = first["seconds"]["trainer"], first["seconds"]["bare_megatron"]
    results.figure("trainer_time_of_bare_megatron", ours / bare)
    flops = model_flops(read_model(str(hf_path)), first["num_tokens"] / first["num_sequences"]) * first["num_tokens"]
    results.figure("trainer_tflops_per_s_per_rank", flops / ours / settings.num_devices / 1e12)
    if peak := peak_flops(first["device_name"]):
        results.figure("trainer_mfu", flops / ours / settings.num_devices / peak)
    if first["peak_gb"]:
        results.figure("trainer_peak_memory_gb", max(rank["peak_gb"] for rank in ranks))
    # -log p of random tokens under random weights: about the logarithm of the vocabulary, before and after few steps.
    found, expected = first["entropy"], math.log(first["vocab"])
    if math.isfinite(found) and 0.0 < found <= expected * 1.01:
        results.passed("entropy", f"{found:.3f} of at most {expected:.3f} nats")
    else:
        results.failed("entropy", f"{found:.3f} nats, and {first['vocab']} tokens allow at most {expected:.3f}")


def _measure(settings: Settings, rank: int, store: dist.Store, hf_path: str) -> dict[str, Any]:
    from drpo_megatron.doctor.accept.layouts import step_config
    from drpo_megatron.objectives.aggregation import token_weights
    from drpo_megatron.trainer.setup import initialize_distributed

    prompt, response, count, steps = (8, 24, 4, 3) if settings.is_tiny else (256, 768, 32, 10)
    num_sequences = count * settings.num_devices
    dtype = "fp32" if settings.device == "cpu" else "bf16"
    config = step_config(settings, hf_path, {"num_ranks": settings.num_devices}, dtype, response, 8192)
    initialize_distributed(config, rank, settings.num_devices, store, TIMEOUT_S)
    from drpo_megatron.trainer.bare_step import bare_step, cross_entropy_loss
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(config)
    vocab = trainer.hf_config.vocab_size
    samples = random_samples(num_sequences, vocab, prompt, response, even=True)
    work = trainer._work(samples, token_weights([response] * num_sequences, "token-mean", response))
    loss = cross_entropy_loss(trainer)
    entropy = []

    def ours() -> None:
        entropy.append(trainer.train_step(samples).metrics["policy/entropy/mean"])

    methods: dict[str, Callable[[], None]] = {"trainer": ours, "bare_megatron": lambda: bare_step(trainer, work, loss)}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(steps + _WARM_UP):  # In turns, so that a noisy machine touches both.
        for name, method in methods.items():
            seconds[name].append(_time(method, settings))
    on_gpu = settings.device == "gpu"
    return {
        "seconds": {name: statistics.median(times[_WARM_UP:]) for name, times in seconds.items()},
        "num_tokens": sum(sample.num_tokens for sample in samples),
        "num_sequences": num_sequences,
        "entropy": entropy[0],
        "vocab": vocab,
        "device_name": torch.cuda.get_device_name() if on_gpu else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    }


def _time(method: Callable[[], None], settings: Settings) -> float:
    dist.barrier()
    began = time.perf_counter()
    method()
    if settings.device == "gpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began

"""A real SGLang server: what it says of its tokens against transformers, three ways of weight sync, memory given back.

In BF16 and block FP8 on a GPU; on a CPU in FP32, where SGLang has no FP8 kernels and its memory saver moves nothing.
Every way of sync sends new weights, which the server's own checksums verify, and the next tokens are of those.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.conversion.fp8 import server_flags as fp8_flags
from drpo_megatron.doctor.accept.models import response_logprobs, save_model, small_moe
from drpo_megatron.doctor.accept.stage import Results, Settings, Skip
from drpo_megatron.precision.rollout import RolloutPrecision
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.low_precision import RoundedActivations
from drpo_megatron.rollout.model_slots import checkpoint_slots
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_server import ServerFailure, ServerKeeper, SGLangServer, server_flags
from drpo_megatron.weight_sync import publish

FP32_LIMIT = 1e-4
"""Absolute, of the root mean square over log-probs: one server's FP32 against another implementation's."""
ROUNDING_FACTOR = 3.0
"""How much farther from FP32 than transformers with the same rounding: other kernels round at other places."""
_MEMORY_SHARE = 0.3
"""Of the GPU, for the server's weights and cache."""
_STARTUP_TIMEOUT_S = 600.0
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A precision of a server."""

    title: str
    dtype: torch.dtype
    precision: RolloutPrecision | None
    flags: tuple[str, ...]


def run(settings: Settings, results: Results) -> None:
    if not Path(settings.sglang_python).exists():
        raise Skip(f"{settings.sglang_python} does not exist: make sglang-cpu or make gpu, or give --sglang-python")
    scratch = Path(settings.scratch)
    hf_path = save_model(scratch / "model", small_moe(settings.is_tiny))
    versions = itertools.count(1)
    for kind in _kinds(settings, hf_path, results):
        try:
            with _server(settings, kind, hf_path, scratch / f"server-{kind.title}.log") as server:
                for way, fields in _ways(settings, kind, results):
                    _sync(settings, results, kind, server, hf_path, way, fields, next(versions))
                _memory(settings, results, kind, server, hf_path, versions)
        except ServerFailure as failure:
            results.failed(f"{kind.title}: server", str(failure))


def _kinds(settings: Settings, hf_path: Path, results: Results) -> Iterator[Kind]:
    if settings.device == "cpu":
        yield Kind("fp32", torch.float32, None, ())
        results.skipped("fp8", "SGLang has no FP8 kernels for a CPU")
        return
    yield Kind("bf16", torch.bfloat16, None, ())
    if torch.cuda.get_device_capability() < (8, 9):
        results.skipped("fp8", f"needs sm 8.9, and this is {'.'.join(map(str, torch.cuda.get_device_capability()))}")
        return
    section = PrecisionSection.model_validate({"rollout": {"name": "fp8-block128"}})
    checkpoint = HFCheckpoint(hf_path)
    precision = RolloutPrecision.of_checkpoint(section, checkpoint.config, checkpoint.names())
    yield Kind("fp8", torch.bfloat16, precision, tuple(fp8_flags(str(hf_path), section)))


def _ways(settings: Settings, kind: Kind, results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "disk", {"sync": "disk"}
    yield "tensor", {"sync": "tensor"}
    yield "broadcast-gloo", {"sync": "distributed", "broadcast": "gloo"}
    if settings.device == "cpu" or settings.num_devices < 2:
        reason = "needs a GPU for the sender and another one for the server"
        results.skipped(f"{kind.title}: broadcast-nccl", reason)
    else:
        yield "broadcast-nccl", {"sync": "distributed", "broadcast": "nccl"}


@contextmanager
def _server(settings: Settings, kind: Kind, hf_path: Path, log: Path) -> Iterator[SGLangServer]:
    """On the last of the GPUs; a sender by NCCL is on the first."""
    flags: dict[str, Any] = {"max-running-requests": 64}
    device = "cpu"
    if settings.device == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(settings.num_devices)]
        device = f"cuda:{gpus[settings.num_devices - 1]}"
        flags |= {"mem-fraction-static": _MEMORY_SHARE, "cuda-graph-max-bs": 64}
    section = SGLangEngineSection(python=settings.sglang_python, flags=flags)
    dtype = str(kind.dtype).removeprefix("torch.")
    words = server_flags(str(hf_path), section, dtype, device, releases_memory=True) + list(kind.flags)
    server = SGLangServer(words, settings.sglang_python, device, log)
    keeper = ServerKeeper(server, section, startup_timeout_s=_STARTUP_TIMEOUT_S)
    print(f"starting a server in {kind.title}; log: {log}", flush=True)
    try:
        keeper.start()
        yield server
    finally:
        keeper.close()


def _sync(
    settings: Settings,
    results: Results,
    kind: Kind,
    server: SGLangServer,
    hf_path: Path,
    way: str,
    fields: dict[str, Any],
    version: int,
) -> None:
    """New weights by one way, and the canary on them. What fails is this way's finding, and the next one is tried."""
    title = f"{kind.title}: {way}"
    engine = SGLangEngine([server.endpoint], SGLangEngineSection(**fields), str(hf_path), _STARTUP_TIMEOUT_S)
    try:
        weights = _noisy(hf_path, kind, version)
        began = time.perf_counter()
        num_bytes = _publish(engine, kind, weights, version)
        results.figure(f"{kind.title}_{way}_mb_per_s", num_bytes / 1e6 / (time.perf_counter() - began))
        _canary(results, title, kind, engine, hf_path, weights)
    except (ValueError, OSError, RuntimeError) as error:
        results.failed(title, f"{type(error).__name__}: {error}")
    finally:
        engine.close()


def _memory(
    settings: Settings, results: Results, kind: Kind, server: SGLangServer, hf_path: Path, versions: Iterator[int]
) -> None:
    """Released, and back with the next weights."""
    title = f"{kind.title}: memory"
    engine = SGLangEngine([server.endpoint], SGLangEngineSection(sync="tensor"), str(hf_path), _STARTUP_TIMEOUT_S)
    try:
        _publish(engine, kind, _noisy(hf_path, kind, 0), next(versions))
        before = _free_bytes(settings)
        engine.release_memory()
        freed = _free_bytes(settings) - before
        if settings.device == "gpu":
            results.figure(f"{kind.title}_released_gb", freed / 1e9)
            least = _MEMORY_SHARE * torch.cuda.get_device_properties(settings.num_devices - 1).total_memory / 2
            if freed < least:
                found = f"{freed / 1e9:.1f} GB came free, of {2 * least / 1e9:.1f} GB that it was given"
                results.failed(f"{title} given back", found)
        version = next(versions)
        weights = _noisy(hf_path, kind, version)
        _publish(engine, kind, weights, version)
        _canary(results, f"{title} released and resumed", kind, engine, hf_path, weights)
    except (ValueError, OSError, RuntimeError) as error:
        results.failed(title, f"{type(error).__name__}: {error}")
    finally:
        engine.close()


def _free_bytes(settings: Settings) -> int:
    return torch.cuda.mem_get_info(settings.num_devices - 1)[0] if settings.device == "gpu" else 0


def _noisy(hf_path: Path, kind: Kind, seed: int) -> Weights:
    """The checkpoint with noise on it, in the server's dtype: never what the server was launched with."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor + 0.02 * torch.randn(tensor.shape, generator=generator) * tensor.std()).to(kind.dtype)
        for name, tensor in HFCheckpoint(hf_path).iter_tensors()
    }


def _publish(engine: SGLangEngine, kind: Kind, weights: Weights, version: int) -> int:
    """Bytes sent, in several buckets, verified by the server's checksums."""
    encode = kind.precision.quantized if kind.precision is not None else None
    size = sum(tensor.nbytes for tensor in weights.values())
    report = publish(
        weights.items(), version, engine.load_weights, engine.finish_update, bucket_bytes=size // 4, encode=encode
    )
    return report.num_bytes


def _canary(results: Results, title: str, kind: Kind, engine: SGLangEngine, hf_path: Path, weights: Weights) -> None:
    """The server's log-probs of what it drew, against transformers under the same weights."""
    rng = random.Random(0)
    vocab = len(weights["lm_head.weight"])
    prompts = [tuple(rng.randrange(vocab) for _ in range(rng.randint(4, 12))) for _ in range(16)]
    requests = [GenerationRequest(f"{i}/0", prompt, i) for i, prompt in enumerate(prompts)]
    drawn = [(prompt, c) for prompt, c in zip(prompts, engine.generate(requests, SamplingParams(16)), strict=True)]
    found = torch.tensor([value for _, completion in drawn for value in completion.logprobs])
    texts = [(prompt, completion.token_ids) for prompt, completion in drawn]
    exact = _reference(hf_path, weights, texts, torch.float32, None)
    limit = FP32_LIMIT
    if kind.dtype != torch.float32:
        limit = ROUNDING_FACTOR * _rms(_reference(hf_path, weights, texts, kind.dtype, kind.precision), exact)
    results.at_most(f"{title}: log-probs, from transformers'", _rms(found, exact), limit)


@torch.no_grad()
def _reference(
    hf_path: Path,
    weights: Weights,
    texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    dtype: torch.dtype,
    precision: RolloutPrecision | None,
) -> torch.Tensor:
    """Log-probs of the responses by transformers on the CPU; with `precision` as the embedded engine emulates it."""
    model = AutoModelForCausalLM.from_pretrained(hf_path, dtype=dtype).eval()
    slots = checkpoint_slots(model, list(weights))
    for name, tensor in weights.items():
        for part, rounded in precision.dequantized(name, tensor) if precision is not None else [(name, tensor)]:
            slots[part].copy_(rounded)
    if precision is not None:
        RoundedActivations(model, slots, precision)
    return torch.cat([response_logprobs(model, prompt, response) for prompt, response in texts])


def _rms(some: torch.Tensor, other: torch.Tensor) -> float:
    return (some.double() - other.double()).square().mean().sqrt().item()

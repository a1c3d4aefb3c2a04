"""One training step in every layout that fits, against transformers in float64 on the CPU.

FP32 with Megatron's own layers shows that every token and every gradient goes where it should: to rounding. On a GPU
BF16 follows, with Transformer Engine's layers where they are installed: it may be as far from float64 as transformers
in BF16 is, within a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from drpo_megatron.config.sections import Config
from drpo_megatron.doctor.accept.models import (
    AGGREGATION,
    Step,
    random_samples,
    save_model,
    small_moe,
    step_by_transformers,
)
from drpo_megatron.doctor.accept.ranks import TIMEOUT_S, run_ranks
from drpo_megatron.doctor.accept.stage import Results, Settings
from drpo_megatron.precision.transformer_engine import find_transformer_engine, forget_transformer_engine
from drpo_megatron.trainer.loss_methods import DELTA

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {"num_ranks": 1},
    "dp2": {"num_ranks": 2},
    "tp2": {"num_ranks": 2, "tensor": 2, "sequence": True},
    "ep2": {"num_ranks": 2, "expert": 2},
    "tp2 ep2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    "etp2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert_tensor": 2},
    "pp2": {"num_ranks": 2, "pipeline": 2},
    "pp2 vpp2": {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"num_ranks": 2, "context": 2},
    "tp2 pp2 ep2": {"num_ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
    "dp2 cp2": {"num_ranks": 4, "context": 2},
    "tp4 ep4": {"num_ranks": 4, "tensor": 4, "sequence": True, "expert": 4},
    "dp2 tp2 pp2 ep2": {"num_ranks": 8, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
    "dp4 tp2 ep8": {"num_ranks": 8, "tensor": 2, "sequence": True, "expert": 8},
    "dp2 cp2 tp2 ep2": {"num_ranks": 8, "tensor": 2, "sequence": True, "context": 2, "expert": 2},
}
FP32_LIMIT = 1e-4
"""Both sides sum thousands of terms in other orders: 2^-24 x some hundred. What goes to a wrong place shows in percents."""
BF16_FACTOR = 3.0
"""How much farther from float64 than transformers in BF16: other kernels round at other places, and experts of near ties
change sides."""
_MAX_PROMPT, _MAX_RESPONSE = 12, 16


@dataclass(frozen=True)
class Variant:
    dtype: str
    transformer_engine: bool
    limits: dict[str, float]
    """By quantity of `Step.distances`."""

    @property
    def title(self) -> str:
        return self.dtype + (", Transformer Engine" if self.transformer_engine else ", Megatron's layers")


def run(settings: Settings, results: Results) -> None:
    scratch = Path(settings.scratch)
    hf_config = small_moe(settings.is_tiny)
    hf_path = save_model(scratch / "model", hf_config)
    samples = random_samples(12, hf_config.vocab_size, _MAX_PROMPT, _MAX_RESPONSE)
    exact = step_by_transformers(hf_path, samples, _MAX_RESPONSE, torch.float64)
    fits = {name: p for name, p in LAYOUTS.items() if p["num_ranks"] <= settings.num_devices and _divides(p, hf_config)}
    for variant in _variants(settings, hf_path, samples, exact):
        for num_ranks in sorted({parallel["num_ranks"] for parallel in fits.values()}):
            chosen = {name: parallel for name, parallel in fits.items() if parallel["num_ranks"] == num_ranks}
            _compare(settings, results, variant, num_ranks, chosen, hf_path, exact)
    for name, parallel in LAYOUTS.items():
        if name not in fits:
            results.skipped(name, _reason(settings, parallel, hf_config))


def _reason(settings: Settings, parallel: dict[str, Any], hf_config: Any) -> str:
    if parallel["num_ranks"] > settings.num_devices:
        return f"needs {parallel['num_ranks']} devices, and there are {settings.num_devices}"
    return f"the model's {hf_config.num_experts} experts can't be shared out to {parallel['expert']}"


def _divides(parallel: dict[str, Any], hf_config: Any) -> bool:
    return hf_config.num_experts % parallel.get("expert", 1) == 0


def _variants(settings: Settings, hf_path: Path, samples: list[Any], exact: Step) -> list[Variant]:
    names = ("loss", "gradient norm", "log-probs", "gradients")
    variants = [Variant("fp32", False, dict.fromkeys(names, FP32_LIMIT))]
    if settings.device == "gpu":
        rounded = step_by_transformers(hf_path, samples, _MAX_RESPONSE, torch.bfloat16).distances(exact)
        # One number may agree by luck, where a vector can't: the error of the gradients bounds those of loss and norm.
        floor = {"loss": rounded["gradients"], "gradient norm": rounded["gradients"]}
        limits = {name: BF16_FACTOR * max(value, floor.get(name, 0.0)) for name, value in rounded.items()}
        variants.append(Variant("bf16", find_transformer_engine() is not None, limits))
    return variants


def _compare(
    settings: Settings,
    results: Results,
    variant: Variant,
    num_ranks: int,
    layouts: dict[str, dict[str, Any]],
    hf_path: Path,
    exact: Step,
) -> None:
    """One launch for all; where a layout takes the ranks with it, the others are launched again."""
    left = dict(layouts)
    while left:
        folder = Path(settings.scratch, f"{variant.dtype}-{num_ranks}")
        folder.mkdir(exist_ok=True)
        error = ""
        try:
            run_ranks(settings, num_ranks, _steps, num_ranks, variant, left, str(hf_path), str(folder))
        except Exception as failure:  # Whatever a rank may raise: the layout at which it was has failed.
            error = str(failure).strip()
        for name in list(left):
            file = folder / f"{name}.pt"
            if not file.exists():
                results.failed(f"{name}, {variant.title}", f"no step came out: {error[-1500:]}")
                del left[name]
                break
            del left[name]
            step: Step = torch.load(file, weights_only=False)
            file.unlink()
            _judge(results, f"{name}, {variant.title}", step.distances(exact), variant.limits)


def _judge(results: Results, name: str, found: dict[str, float], limits: dict[str, float]) -> None:
    text = ", ".join(f"{what} {value:.1e} (limit {limits[what]:.0e})" for what, value in found.items())
    wrong = [what for what, value in found.items() if not (math.isfinite(value) and value <= limits[what])]
    if wrong:
        results.failed(name, f"too far from float64 in {' and '.join(wrong)}: {text}")
    else:
        results.passed(name, text)


def _steps(
    settings: Settings,
    rank: int,
    store: dist.Store,
    num_ranks: int,
    variant: Variant,
    layouts: dict[str, dict[str, Any]],
    hf_path: str,
    folder: str,
) -> None:
    """On every rank: a step in each layout, one after the other. Rank 0 leaves it in a file of the layout's name."""
    if not variant.transformer_engine:
        forget_transformer_engine()
    joined = False
    for name, parallel in layouts.items():
        config = step_config(settings, hf_path, parallel, variant.dtype)
        if not joined:
            from drpo_megatron.trainer.setup import initialize_distributed

            initialize_distributed(config, rank, num_ranks, store, TIMEOUT_S)
            joined = True
        print(f"rank {rank}: {name}, {variant.title}", flush=True)
        step = training_step(config)
        if rank == 0:
            scratch = Path(folder, f".{name}.pt")
            torch.save(step, scratch)
            scratch.rename(Path(folder, f"{name}.pt"))
        dist.barrier()


def step_config(
    settings: Settings,
    hf_path: str,
    parallel: dict[str, Any],
    dtype: str,
    max_response: int = _MAX_RESPONSE,
    max_tokens: int = 256,
    precision: dict[str, Any] | None = None,
) -> Config:
    """One optimiser step a rollout.

    Without sharded optimizer states every data-parallel rank has the whole gradient; clipping would scale it.
    """
    raw: dict[str, Any] = {
        "run": {"name": "step", "num_steps": 8},
        "model": {"hf_path": hf_path},
        "parallel": parallel,
        "objective": {"name": "drpo", "delta": DELTA},
        "trainer": {
            "backend": settings.device,
            "dtype": dtype,
            "aggregation": AGGREGATION,
            "optimizer_steps_per_rollout": 1,
            "max_tokens_per_micro_batch": max_tokens,
            "optimizer": {"lr": 1e-5, "distributed": False, "clip_grad": 1e9},
        },
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_response_tokens": max_response},
        "data": {"train": "-"},
        "reward": {"name": "arithmetic"},
        "precision": precision or {},
    }
    return Config.model_validate(raw)


def training_step(config: Config) -> Step:
    """Of the samples of this stage. Collective; gradients are rank 0's, empty elsewhere."""
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(config)
    samples = random_samples(12, trainer.hf_config.vocab_size, _MAX_PROMPT, _MAX_RESPONSE)
    logprobs = trainer.compute_logprobs(samples)
    report = trainer.train_step(samples)
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.cpu().clone() for name, tensor in trainer.export_weights() if tensor is not None}
    return Step(
        report.metrics["objective/loss"],
        report.metrics["optim/grad_norm"],
        torch.tensor([value for sample in samples for value in logprobs[sample.sample_id]]),
        gradients,
    )

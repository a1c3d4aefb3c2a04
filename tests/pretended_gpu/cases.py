"""What is trained on the pretended GPU, and what is reported of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.pretended_gpu.worker import Environment

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2": {"num_ranks": 2},
    "tp2": {"num_ranks": 2, "tensor": 2, "sequence": True},
    "tp2ep2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    "etp2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert_tensor": 2},
    "pp2": {"num_ranks": 2, "pipeline": 2},
    "vpp2pp2": {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"num_ranks": 2, "context": 2},
    "dp2cp2": {"num_ranks": 4, "context": 2},
    "tp2pp2ep2": {"num_ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
}


@dataclass(frozen=True, slots=True)
class Case:
    family: str = "moe"
    layout: str = "one"
    """A name of LAYOUTS, or the config's section as JSON."""
    sections: dict[str, Any] = field(default_factory=dict)
    """Of the config, merged into the tiny one's."""
    goes_on: bool = False
    """Save, export, step, resume, and step again."""
    gradients: bool = True
    """Also every gradient by its HF name; needs trainer.optimizer.distributed=false."""
    compares_with: dict[str, Any] = field(default_factory=dict)
    """What of the sections is another in the reference: what the CPU can't do."""

    @property
    def parallel(self) -> dict[str, Any]:
        return json.loads(self.layout) if self.layout.startswith("{") else LAYOUTS[self.layout]

    @property
    def num_ranks(self) -> int:
        return self.parallel.get("num_ranks", 1)

    @property
    def dtype(self) -> str:
        return self.sections.get("trainer", {}).get("dtype", "fp32")

    def with_sections(self, **changes: Any) -> Case:
        return replace(self, sections=_merged(self.sections, changes))

    def reference(self) -> Case:
        """The same in one process; in the same layout if it is emulated, whose blocks are those of shards."""
        is_emulated = self.sections.get("precision", {}).get("emulate") is True
        return replace(
            self,
            layout=self.layout if is_emulated else "one",
            goes_on=False,
            sections=_merged(self.sections, self.compares_with),
            compares_with={},
        )


def makers() -> dict[str, Any]:
    from tests import tiny

    return {
        "moe": tiny.tiny_moe_config,
        "dense": tiny.tiny_dense_config,
        "dense-tied": lambda: tiny.tiny_dense_config(tie_word_embeddings=True),
        "qwen2": tiny.tiny_qwen2_config,
        "qwen2-tied": lambda: tiny.tiny_qwen2_config(tie_word_embeddings=True),
        "mixtral": tiny.tiny_mixtral_config,
        "qwen3.5": tiny.tiny_qwen3_5_text_config,
        # Widths that FP8 GEMMs take: multiples of 16 under every split.
        "moe-fp8": lambda: tiny.tiny_moe_config(hidden_size=128, head_dim=32, moe_intermediate_size=64),
    }


def run_case(rank: int, num_ranks: int, environment: Environment, hf_path: str, case: Case, scratch: str) -> Any:
    """On every rank: what the trainer said, and what it waited for."""
    from drpo_megatron.trainer.trainer import Trainer
    from tests.pretended_gpu.device import WAITS
    from tests.tiny import random_samples, tiny_config

    optimizer = {"lr": 1e-3, "distributed": not case.gradients, "clip_grad": 1e9}
    sections = _merged({"trainer": {"optimizer_steps_per_rollout": 1, "optimizer": optimizer}}, case.sections)
    sections["trainer"]["backend"] = "gpu" if environment.gpu else "cpu"
    trainer = Trainer(tiny_config(hf_path, case.parallel, **sections))
    samples = _with_traces(random_samples(12), trainer)
    result: dict[str, Any] = {"marks": wrong_marks(trainer), "engine": trainer.platform.transformer_engine}
    result["logprobs"] = trainer.compute_logprobs(samples)
    if trainer.objective.needs_old_logprobs:
        samples = [replace(s, old_logprobs=result["logprobs"][s.sample_id]) for s in samples]
    if trainer.objective.needs_reference_logprobs:
        of_reference = trainer.compute_reference_logprobs(samples)
        samples = [replace(s, reference_logprobs=of_reference[s.sample_id]) for s in samples]
    with WAITS.counted() as waits:
        result["metrics"] = trainer.train_step(samples).metrics
    result["waits"] = dict(waits)
    result["micro_batches"] = len(trainer._work(samples, [1.0] * len(samples)).batches)
    if case.goes_on:
        result |= _go_on(trainer, samples, Path(scratch))
    if case.gradients and not case.goes_on:
        result["gradients"] = _gradients(trainer)
    if environment.engine:
        from tests.pretended_gpu import engine

        result["quantised"], result["attention"] = list(engine.QUANTISED), sorted(engine.ATTENTION)
        engine.QUANTISED.clear()
    return result


def _go_on(trainer: Any, samples: Sequence[Any], scratch: Path) -> dict[str, Any]:
    """A step after a save equals, bit by bit, the same step after a resume."""
    trainer.save_checkpoint(scratch / "checkpoint")
    before = trainer.train_step(samples).metrics
    weights = {name: tensor.cpu().clone() for name, tensor in trainer.export_weights() if tensor is not None}
    trainer.load_checkpoint(scratch / "checkpoint")
    after = trainer.train_step(samples).metrics
    again = {name: tensor.cpu() for name, tensor in trainer.export_weights() if tensor is not None}
    different = [name for name, tensor in weights.items() if not tensor.equal(again[name])]
    different += [
        f"{n}: {before[n]} and {after[n]}" for n in before if before[n] != after[n] and before[n] == before[n]
    ]
    return {"resumed": different, "exported": sorted(weights)}


def _gradients(trainer: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return {name: tensor.cpu().clone().numpy() for name, tensor in trainer.export_weights() if tensor is not None}


def wrong_marks(trainer: Any) -> list[str]:
    """Parameters that are neither marked as tensor parallel shards nor the same on all tensor parallel ranks, or both."""
    import torch
    import torch.distributed as dist

    group, problems = trainer.layout.tp, []
    if group.size() == 1:
        return []
    for chunk in trainer.chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            is_marked = getattr(parameter, "tensor_model_parallel", False)
            if ".mlp.experts." in name:
                if not is_marked or getattr(parameter, "allreduce", True):
                    problems.append(f"{name}: an expert's weight is not marked")
                continue
            mine = parameter.detach().float().reshape(-1)
            everyones = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(everyones, mine, group=group)
            is_replicated = all(bool((other == everyones[0]).all()) for other in everyones)
            if is_marked == is_replicated:
                problems.append(f"{name}: marked as a shard: {is_marked}, equal on all ranks: {is_replicated}")
    return problems


def _with_traces(samples: Sequence[Any], trainer: Any) -> Sequence[Any]:
    """Random experts for every token, where the case replays routing."""
    if trainer.config.trainer.routing_replay == "off":
        return samples
    import numpy as np

    from drpo_megatron.types import RoutedExperts

    layers, config = len(trainer.expert_routing.moe_layers), trainer.hf_config
    numbers = np.random.default_rng(0)
    return [
        replace(
            sample,
            routed_experts=RoutedExperts.of(
                numbers.random((sample.num_tokens - 1, layers, config.num_experts)).argsort(-1)[
                    ..., : config.num_experts_per_tok
                ]
            ),
        )
        for sample in samples
    ]


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return base | {key: _merged(base.get(key), value) for key, value in changes.items()}

"""Layouts that a recipe could have on its GPUs, and single changes that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.config.checks import layout_problems
from drpo_megatron.config.hf_config import HFModelConfig
from drpo_megatron.planner.hardware import GPUS_PER_NODE
from drpo_megatron.planner.model import Model
from drpo_megatron.planner.plan import Plan, make_plan

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
_CONTEXTS = (1, 2, 4, 8)


def search(config: Config, model: Model, hf_config: HFModelConfig, gpu_bytes: int) -> list[Plan]:
    """Every layout of the recipe's ranks that fits, fastest (by the estimate) first."""
    plans = [make_plan(candidate, model, gpu_bytes) for candidate in _candidates(config, model, hf_config)]
    return sorted((plan for plan in plans if plan.ranks_fit), key=lambda plan: plan.time.total_s)


def remedies(config: Config, model: Model, hf_config: HFModelConfig, gpu_bytes: int) -> list[str]:
    """Single changes (`key=value`) under which the trainer's ranks fit, in the order of what they cost."""
    parallel, tokens = config.parallel, config.trainer.max_tokens_per_micro_batch
    changes: list[tuple[str, object]] = [("model.recompute", "full"), ("trainer.optimizer.distributed", True)]
    changes += [("parallel.expert", size) for size in _POWERS if size > parallel.expert]
    changes += [("parallel.context", size) for size in _CONTEXTS if size > parallel.context]
    changes += [("parallel.tensor", size) for size in _POWERS if parallel.tensor < size <= GPUS_PER_NODE]
    changes += [("parallel.pipeline", n) for n in range(parallel.pipeline + 1, len(model.layers) + 1)]
    longest = config.rollout.max_response_tokens + (config.data.max_prompt_tokens or 0)
    changes += [("trainer.max_tokens_per_micro_batch", size) for size in (tokens // 2, tokens // 4) if size > longest]
    found: dict[str, str] = {}
    for key, value in changes:
        changed = _with(config, key, value)
        if key in found or layout_problems(changed, hf_config):
            continue
        if make_plan(changed, model, gpu_bytes).ranks_fit:
            found[key] = f"{key}={str(value).lower() if isinstance(value, bool) else value}"
    return list(found.values())


def _candidates(config: Config, model: Model, hf_config: HFModelConfig) -> Iterator[Config]:
    num_ranks, num_layers = config.parallel.num_ranks, len(model.layers)
    tensors = [size for size in _POWERS if size <= GPUS_PER_NODE]
    pipelines = [n for n in range(1, num_layers + 1) if num_layers % n == 0 and num_ranks % n == 0]
    experts = [size for size in _POWERS if model.num_experts and model.num_experts % size == 0] or [1]
    for tensor, pipeline, context, expert in product(tensors, pipelines, _CONTEXTS, experts):
        layout = {
            "tensor": tensor,
            "sequence": tensor > 1,
            "pipeline": pipeline,
            "context": context,
            "expert": expert,
            "expert_tensor": 1,
            "virtual_pipeline": None,
        }
        candidate = config.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})
        if layout_problems(candidate, hf_config):
            continue
        for recompute in ("none", "full"):
            yield _with(candidate, "model.recompute", recompute)


def _with(config: Config, key: str, value: object) -> Config:
    """The config with one dotted key changed; sequence parallelism comes with tensor parallelism."""
    changed = {"sequence": True} if key == "parallel.tensor" else {}
    return _updated(config, key.split("."), value, changed)


def _updated(section: Any, keys: list[str], value: object, beside: dict[str, Any]) -> Any:
    name, *inner = keys
    if inner:
        return section.model_copy(update={name: _updated(getattr(section, name), inner, value, beside)})
    return section.model_copy(update={name: value} | beside)

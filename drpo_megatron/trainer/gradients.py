"""Gradients as they stand after the backward pass, every number of the whole model on exactly one rank.

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from drpo_megatron.precision.layers import parameter_class
from drpo_megatron.trainer.forward import unwrap
from drpo_megatron.trainer.setup import Layout

CLASSES = (
    "embedding",
    "qkv",
    "proj",
    "router",
    "fc1",
    "fc2",
    "expert_fc1",
    "expert_fc2",
    "norm",
    "head",
    "other",
)


def owned_gradients(chunks: Sequence[Any], optimizer: Any, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """(class of the parameter, flat FP32 gradient) of what this rank owns, reduced over all ranks and not clipped.

    With the distributed optimizer data-parallel ranks own a shard of a parameter each, otherwise the first owns all.
    """
    parts = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    for chunk in chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if not parameter.requires_grad or not param_is_not_shared(parameter):
                continue
            if not param_is_not_tensor_parallel_duplicate(parameter, layout.tp):
                continue
            gradient = parameter.main_grad.reshape(-1)
            if parts:
                gradient = gradient[_shard(parameter, parts)]
            elif _replicas(parameter, layout).rank() != 0:
                continue
            if gradient.numel():
                yield parameter_class(name), gradient


def squared_norms(gradients: Iterator[tuple[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """FP64 [classes], summed over all ranks. Collective."""
    by_class: dict[str, list[torch.Tensor]] = {name: [] for name in CLASSES}
    for name, gradient in gradients:
        by_class[name].append(gradient)
    total = torch.zeros(len(CLASSES), dtype=torch.float64, device=device)
    for index, name in enumerate(CLASSES):
        if by_class[name]:
            total[index] = torch.stack(torch._foreach_norm(by_class[name])).double().square().sum()
    dist.all_reduce(total)
    return total


def _shard(parameter: torch.nn.Parameter, parts: Sequence[DistributedOptimizer]) -> slice:
    """What of the flat parameter this data-parallel rank owns; distrib_optimizer.py:610 looks it up in the same way."""
    for part in parts:
        if parameter in part.model_param_gbuf_map:
            buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
            owned = part.gbuf_ranges[buffer][dtype][bucket]["param_map"].get(parameter)
            return slice(0) if owned is None else slice(owned["param"].start, owned["param"].end)
    return slice(0)


def _replicas(parameter: torch.nn.Parameter, layout: Layout) -> dist.ProcessGroup:
    return layout.groups.dp_cp if getattr(parameter, "allreduce", True) else layout.groups.expt_dp

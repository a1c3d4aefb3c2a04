"""What the policy loss asks of the tensor-parallel ranks besides row statistics, and of Megatron's parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from drpo_megatron.trainer.vocab_parallel_chunks import Head

_shard_sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""weight -> (its shape, rows of every rank's shard). Ranks see a parameter for the first time together."""


def head_shard(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    vocab_size: int | None,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_bytes: int | None,
) -> Head:
    """Where this rank's rows stand in the vocabulary. One all-gather of a number, the first time a weight is seen."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H] and [rows, H]")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; use the sampling temperature")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} is not positive; leave it out for the default")
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    sizes = [weight.shape[0]] if group is None else _gather_sizes(weight, group)
    total = sum(sizes)
    if vocab_size is not None and not 0 < vocab_size <= total:
        raise ValueError(f"vocab_size={vocab_size} does not fit the LM head's {total} rows (shards {sizes})")
    vocab_size = total if vocab_size is None else vocab_size
    rank = 0 if group is None else dist.get_rank(group)
    start = sum(sizes[:rank])
    return Head(
        weight=weight.detach()[: max(0, vocab_size - start)],
        start=start,
        vocab_size=vocab_size,
        max_shard=max(sizes),
        inv_temperature=1.0 / temperature,
        group=group,
        chunk_bytes=chunk_bytes,
    )


def _gather_sizes(weight: torch.Tensor, group: dist.ProcessGroup) -> list[int]:
    known = _shard_sizes.get(weight)
    if known is None or known[0] != (weight.shape, group):
        mine = torch.tensor([weight.shape[0]], device=weight.device)
        sizes = mine.new_empty(dist.get_world_size(group))
        dist.all_gather_into_tensor(sizes, mine, group=group)
        known = _shard_sizes[weight] = ((weight.shape, group), sizes.tolist())
    return known[1]


def gather_hidden(hidden: torch.Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> torch.Tensor:
    """[N, H] from this rank's [N/TP, H] under sequence parallelism; `hidden` itself without."""
    if group is None or not sequence_parallel:
        return hidden
    gathered = hidden.new_empty(hidden.shape[0] * dist.get_world_size(group), hidden.shape[1])
    dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=group)
    return gathered


def reduce_hidden_gradient(
    gradient: torch.Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> torch.Tensor:
    """The sum over ranks of [N, H]: this rank's [N/TP, H] of it under sequence parallelism, all of it without."""
    if group is None:
        return gradient
    if not sequence_parallel:
        dist.all_reduce(gradient, group=group)
        return gradient
    mine = gradient.new_empty(gradient.shape[0] // dist.get_world_size(group), gradient.shape[1])
    dist.reduce_scatter_tensor(mine, gradient, group=group)
    return mine


def main_grad_of(weight: torch.Tensor) -> torch.Tensor:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError(
            "main_grad_fusion=True needs weight.main_grad, which Megatron's DistributedDataParallel makes; "
            "wrap the model in it, or leave main_grad_fusion off"
        )
    return main_grad


def added_to_main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """What autograd gets in place of a gradient that is in `main_grad` already.

    Megatron's hook wants some gradient (`overlap_grad_reduce`) and ignores it where grad_added_to_main_grad is set,
    except with zero_out_wgrad (tied embeddings): there it adds what the embedding and this function return.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)

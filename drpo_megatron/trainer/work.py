"""What one rank does in one forward-backward: its packed micro-batches, and the way back to whole sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from drpo_megatron.data.packing import assign_micro_batches, context_parallel_slice, pack
from drpo_megatron.trainer.setup import Layout
from drpo_megatron.types import PackedBatch, Sample


@dataclass(frozen=True, slots=True)
class Work:
    """A rank's micro-batches, all of the length its pipeline agreed on."""

    batches: list[PackedBatch]
    whole_batches: list[PackedBatch]
    """The same before context parallel slicing."""
    length: int
    """T of every micro-batch before slicing, where pipeline stages have to know it; else 0."""
    num_padded_tokens: int
    """Over all data-parallel ranks, padding included."""


def share_out(
    samples: Sequence[Sample], weights: Sequence[float], layout: Layout, *, max_tokens: int, pad_id: int
) -> Work:
    """This rank's share of `samples`, at least one. Every rank plans for all, so nothing is communicated.

    Args:
        weights: of every response token of each sample.
        max_tokens: padded tokens of a micro-batch; ValueError for a sample that is longer.
    """
    parallel, unit = layout.parallel, layout.sequence_multiple
    lengths = [math.ceil(sample.num_tokens / unit) * unit for sample in samples]
    plan = assign_micro_batches(
        lengths,
        dp_size=layout.dp_size,
        max_tokens=max_tokens,
        multiple_of=parallel.pipeline if parallel.virtual_pipeline else 1,
    )
    # A micro-batch without samples gets one of weight 0: it then has the vectors that the other ranks' have.
    filler = [min(range(len(samples)), key=lengths.__getitem__)]

    def padded(micro_batch: Sequence[int]) -> int:
        tokens = sum(lengths[i] for i in micro_batch or filler)
        return math.ceil(tokens / layout.length_multiple) * layout.length_multiple

    # Stages of a pipeline receive activations into buffers of one shape, so there all micro-batches are as long.
    common = max(padded(m) for rank in plan for m in rank) if parallel.pipeline > 1 else None
    whole = [
        pack(
            [samples[i] for i in micro_batch or filler],
            [weights[i] for i in micro_batch] or [0.0],
            pad_id=pad_id,
            length_multiple=layout.length_multiple,
            sequence_multiple=unit,
            total_length=common,
        )
        for micro_batch in plan[layout.dp_rank]
    ]
    return Work(
        batches=[context_parallel_slice(batch, layout.cp_rank, parallel.context) for batch in whole],
        whole_batches=whole,
        length=common or 0,
        num_padded_tokens=sum(common or padded(m) for rank in plan for m in rank),
    )


def gather_context_parallel(
    wholes: Sequence[PackedBatch], locals_: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Per-token values of this context-parallel rank's rows, one tensor a micro-batch, -> those of the whole
    micro-batches, [T] each, on the host. One collective where the values are, one copy."""
    if not wholes:
        return []
    mine = torch.cat(list(locals_))
    everyones = mine.new_empty(group.size(), len(mine))
    if group.size() > 1:
        dist.all_gather_into_tensor(everyones.view(-1), mine, group=group)
    else:
        everyones[0] = mine
    parts = everyones.cpu().split([len(local) for local in locals_], dim=1)
    return [_in_order(whole, part) for whole, part in zip(wholes, parts, strict=True)]


def _in_order(whole: PackedBatch, parts: torch.Tensor) -> torch.Tensor:
    """[CP, T / CP] by rank to [T] by place."""
    values = parts.new_zeros(whole.input_ids.shape[0])
    places = replace(whole, input_ids=torch.arange(len(values)))
    for rank, part in enumerate(parts):
        values[context_parallel_slice(places, rank, len(parts)).input_ids] = part
    return values

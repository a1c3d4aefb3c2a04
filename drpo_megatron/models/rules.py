"""One rule a parameter, from which both directions, the sharding and the weight-sync stream are derived.

A `Rule` says which Hugging Face tensors make up one Megatron parameter, and its `Layout` says how:

    HF tensors  -- layout.shard(tensors, rank, size, shape) -->  this tensor-parallel rank's shard
    HF tensors  <-- layout.merge(shards of all ranks)       --  Megatron shards

Pure tensor code: which rank holds what, and how shards travel, is `trainer/weights.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Key(NamedTuple):
    """A Megatron parameter's name with global layer and expert numbers, whatever rank and layer spec it comes from.

    Example:
        Key("decoder.layers.3.mlp.experts.linear_fc1.weight", expert=5)
    """

    name: str
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """`tensor[index]` of a tensor that stacks `count` of them: a layer's experts in one tensor [E, ...]."""

    index: int
    count: int


class HFTensor(NamedTuple):
    """A tensor of the Hugging Face checkpoint, or a slice of one."""

    name: str
    shape: tuple[int, ...]
    """Of the slice, where it is one."""
    slice: Slice | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        return self.shape if self.slice is None else (self.slice.count, *self.shape)

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """What the rule speaks of, given the checkpoint's tensor."""
        return stored if self.slice is None else stored[self.slice.index]


def stack_slices(
    tensors: Iterable[tuple[HFTensor, torch.Tensor | None]],
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The checkpoint's (name, tensor) pairs from what rules give, in the order of the rules.

    Slices of one tensor follow each other from first to last; all else passes. None, where a rank is not given the
    tensors, stays None.
    """
    stacked: torch.Tensor | None = None
    for hf, tensor in tensors:
        if hf.slice is None:
            yield hf.name, tensor
            continue
        if hf.slice.index == 0:
            stacked = None if tensor is None else tensor.new_empty(hf.stored_shape)
        if stacked is not None and tensor is not None:
            stacked[hf.slice.index] = tensor
        if hf.slice.index == hf.slice.count - 1:
            yield hf.name, stacked
            stacked = None


class Layout(Protocol):
    """How one Megatron parameter is made of HF tensors and split over tensor-parallel ranks."""

    @property
    def axis(self) -> int | None:
        """The split axis; None where every tensor-parallel rank holds the whole parameter."""
        ...

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The shard of `rank` out of `size`. `shape`, the shard's, tells how far the vocabulary is padded."""
        ...

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The HF tensors, given the shards in rank order (one, if `axis` is None). May share memory with them."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of."""

    key: Key
    hf: tuple[HFTensor, ...]
    """In the order that the layout takes and gives them."""
    layout: Layout
    copies: tuple[Key, ...] = ()
    """Parameters that hold the same values: the tied head that the last pipeline stage keeps. Filled, not exported."""
    hf_copies: tuple[str, ...] = ()
    """Tensors that a checkpoint may hold beside `hf` if they are equal to it: a tied head that was written out."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the tensor as it is: norms, the router."""

    axis = None

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        return tensors[0]

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (shards[0],)


@dataclass(frozen=True, slots=True)
class Split:
    """Even slices along `axis`: 0 is column parallel, 1 is row parallel."""

    axis: int

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        return _slice(tensors[0], self.axis, rank, size)

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (_joined(shards, self.axis),)


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """q, k, v interleaved by query group, `[q ... q k v] [q ... q k v] ...`, then split by rows.

    TP may exceed the number of groups: Megatron then splits inside a group and gathers before the attention.
    """

    num_groups: int
    head_dim: int
    axis = 0

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        grouped = [tensor.reshape(self.num_groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return _slice(torch.cat(grouped, dim=1).flatten(0, 1), 0, rank, size)

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        whole = _joined(shards)
        grouped = whole.reshape(self.num_groups, -1, *whole.shape[1:])
        q_rows = grouped.shape[1] - 2 * self.head_dim
        parts = grouped.split([q_rows, self.head_dim, self.head_dim], dim=1)
        return tuple(part.clone(memory_format=torch.contiguous_format).flatten(0, 1) for part in parts)


@dataclass(frozen=True, slots=True)
class GatedQKV:
    """GroupedQKV of an attention with an output gate: `[q ... gate ... k v]` a group.

    The HF tensors are q_proj, k_proj and v_proj; q_proj holds every head's gate after its query.
    """

    num_groups: int
    head_dim: int
    axis = 0

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        q, *kv = tensors
        by_head = q.reshape(self.num_groups, -1, 2, self.head_dim, *q.shape[1:])
        q = by_head.transpose(1, 2).flatten(0, 3)
        return GroupedQKV(self.num_groups, self.head_dim).shard([q, *kv], rank, size, shape)

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        q, k, v = GroupedQKV(self.num_groups, self.head_dim).merge(shards)
        by_kind = q.reshape(self.num_groups, 2, -1, self.head_dim, *q.shape[1:])
        return by_kind.transpose(1, 2).flatten(0, 3).contiguous(), k, v


@dataclass(frozen=True, slots=True)
class Sections:
    """Rows in sections, each split by rows, stacked on every rank in the order of the HF tensors.

    Example: a gated delta net's q and k of 4 rows and v of 8 in one tensor, its gate of 8 in another

        Sections(((4, 4, 8), (8,)))       rank r holds [q_r; k_r; v_r; gate_r]
    """

    rows: tuple[tuple[int, ...], ...]
    """Of every HF tensor, the sizes of its sections."""
    axis = 0

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        sections = [part for tensor, rows in zip(tensors, self.rows, strict=True) for part in tensor.split(rows)]
        return torch.cat([_slice(section, 0, rank, size) for section in sections])

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        sizes = [rows // len(shards) for tensor in self.rows for rows in tensor]
        by_section = zip(*(shard.split(sizes) for shard in shards), strict=True)
        return tuple(_joined([part for _ in rows for part in next(by_section)]) for rows in self.rows)


@dataclass(frozen=True, slots=True)
class GateUp:
    """gate and up, each split by rows, stacked on every rank: rank r holds [gate_r; up_r]."""

    axis = 0

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([_slice(tensor, 0, rank, size) for tensor in tensors])

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(_joined(parts) for parts in zip(*halves, strict=True))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Rows of the vocabulary, padded with zeros at the end to what tensor parallelism needs."""

    vocab_size: int
    axis = 0

    def shard(self, tensors: Sequence[torch.Tensor], rank: int, size: int, shape: tuple[int, ...]) -> torch.Tensor:
        if shape[0] * size < self.vocab_size:
            raise ValueError(
                f"vocab_size={self.vocab_size} does not fit the model's {shape[0]} rows on each of {size} ranks; "
                "pad the model's vocabulary up, not down"
            )
        rows = tensors[0][rank * shape[0] : (rank + 1) * shape[0]]
        if rows.shape[0] == shape[0]:
            return rows  # The largest tensor there is: without a copy.
        padding = rows.new_zeros(shape[0] - rows.shape[0], *rows.shape[1:])
        return torch.cat([rows, padding])

    def merge(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rows = shards[0].shape[0]
        live = [shard[: max(0, self.vocab_size - rank * rows)] for rank, shard in enumerate(shards)]
        return (_joined(live),)


def _joined(parts: Sequence[torch.Tensor], axis: int = 0) -> torch.Tensor:
    """One part as it is: of a large model every copy counts."""
    return torch.cat(list(parts), dim=axis) if len(parts) > 1 else parts[0]


def _slice(tensor: torch.Tensor, axis: int, rank: int, size: int) -> torch.Tensor:
    if tensor.shape[axis] % size:
        raise ValueError(
            f"axis {axis} of a tensor of shape {tuple(tensor.shape)} can't be split over {size} ranks; "
            f"use a tensor parallel size that divides {tensor.shape[axis]}"
        )
    length = tensor.shape[axis] // size
    return tensor.narrow(axis, rank * length, length)

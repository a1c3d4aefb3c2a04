"""From samples to the packed micro-batches of every rank. Pure functions of their arguments: all ranks plan alike.

    samples -> split_optimizer_steps -> assign_micro_batches -> pack -> context_parallel_slice

A packed micro-batch lays whole sequences end to end (THD); attention keeps them apart by `cu_seqlens`.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from drpo_megatron.types import PackedBatch, Sample

IGNORED_TARGET = -100

_OPTIONAL_VECTORS = {
    "old_logprobs": torch.float32,
    "reference_logprobs": torch.float32,
    "topk_ids": torch.int64,
    "topk_behavior_logprobs": torch.float32,
}
"""What samples may carry for every response token, under the same names as in PackedBatch."""


def split_optimizer_steps(samples: Sequence[Sample], num_steps: int, seed: int) -> list[list[Sample]]:
    """Shuffle the samples of one rollout and deal them into one share an optimiser step.

    Shares differ by at most one sample. Raises ValueError if there are fewer samples than steps.
    """
    if len(samples) < num_steps:
        raise ValueError(
            f"{len(samples)} samples cannot be shared by {num_steps} optimiser steps; lower "
            "trainer.optimizer_steps_per_rollout or draw more samples"
        )
    shuffled = list(samples)
    random.Random(seed).shuffle(shuffled)
    ends = [len(shuffled) * step // num_steps for step in range(num_steps + 1)]
    return [shuffled[begin:end] for begin, end in pairwise(ends)]


def assign_micro_batches(
    lengths: Sequence[int], *, dp_size: int, max_tokens: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Which samples go into which micro-batch of which data-parallel rank.

    Args:
        lengths: tokens of every sample, padded as `pack` will pad it.
        max_tokens: upper limit of one micro-batch.
        multiple_of: every rank gets a multiple of this number of micro-batches (interleaved pipelines need it).

    Returns:
        `[rank][micro-batch]` -> indices of samples, ascending; every sample once, as many micro-batches on every rank.
        Ranks' token sums differ by at most the longest sample, and the i-th micro-batches of all ranks are of similar
        size, because expert-parallel ranks wait for each other in every one of them. A micro-batch is empty only when
        there are fewer samples than micro-batches. Raises ValueError if a sample is longer than max_tokens.
    """
    longest = max(range(len(lengths)), key=lambda i: lengths[i], default=None)
    if longest is not None and lengths[longest] > max_tokens:
        raise ValueError(
            f"sample {longest} has {lengths[longest]} tokens with padding, more than "
            f"max_tokens_per_micro_batch={max_tokens}; raise the limit"
        )
    at_least = max(math.ceil(sum(lengths) / (dp_size * max_tokens)), 1)
    per_rank = math.ceil(at_least / multiple_of) * multiple_of
    bins = _longest_first(lengths, dp_size * per_rank)
    while max(load for load, _ in bins) > max_tokens:
        per_rank += multiple_of
        bins = _longest_first(lengths, dp_size * per_rank)

    # Rows of bins of similar size, one of them a rank; the fullest bin of a row goes to the emptiest rank.
    bins.sort(key=lambda item: (-item[0], item[1]))
    plan: list[list[list[int]]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for row in range(per_rank):
        emptiest_first = sorted(range(dp_size), key=lambda rank: loads[rank])
        for rank, (load, indices) in zip(emptiest_first, bins[row * dp_size : (row + 1) * dp_size], strict=True):
            plan[rank].append(indices)
            loads[rank] += load
    return plan


def _longest_first(lengths: Sequence[int], num_bins: int) -> list[tuple[int, list[int]]]:
    """Longest-processing-time rule: each sample, longest first, into the emptiest bin. (load, ascending indices)."""
    heap = [(0, b) for b in range(num_bins)]
    members: list[list[int]] = [[] for _ in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, emptiest = heap[0]
        heapq.heapreplace(heap, (load + lengths[index], emptiest))
        members[emptiest].append(index)
    return [(load, sorted(members[b])) for load, b in heap]


def padded_length(num_tokens: int, context: int) -> int:
    """Of a sequence alone, as `pack` pads it for so many context-parallel ranks."""
    multiple = 2 * context if context > 1 else 1
    return math.ceil(num_tokens / multiple) * multiple


def pack(
    samples: Sequence[Sample],
    token_weights: Sequence[float],
    *,
    pad_id: int,
    length_multiple: int,
    sequence_multiple: int,
    total_length: int | None = None,
) -> PackedBatch:
    """Lay samples end to end. With prompt p and response y, positions len(p) - 1 ... len(p) + len(y) - 2 predict y.

    Args:
        token_weights: weight of every response token of each sample. A sample of weight 0 carries no loss.
        length_multiple: T is padded to it (TP with SP, times what CP needs); a multiple of sequence_multiple.
        sequence_multiple: every sequence is padded to it (2 x CP, so that its zig-zag chunks are equal).
        total_length: pad T up to this, for pipeline stages that must agree on one shape.

    Padding at the end of T is a sequence of its own, without a name. No samples at all give a batch of padding.
    Raises ValueError for a sample without prompt, for vectors that are not of the response's length or that only some
    samples have, and if the samples do not fit in total_length.
    """
    if length_multiple % sequence_multiple:
        raise ValueError(
            f"length_multiple={length_multiple} is not a multiple of sequence_multiple={sequence_multiple}; the "
            "padding at the end could not be shared by the context parallel ranks"
        )
    input_ids: list[int] = []
    position_ids: list[int] = []
    sequence_ids: list[int] = []
    targets: list[int] = []
    behavior_logprobs: list[float] = []
    advantages: list[float] = []
    weights: list[float] = []
    starts: list[int] = []
    ends = [0]
    for index, (sample, weight) in enumerate(zip(samples, token_weights, strict=True)):
        _check(sample)
        size = math.ceil(sample.num_tokens / sequence_multiple) * sequence_multiple
        padding = size - sample.num_tokens
        input_ids += [*sample.prompt_ids, *sample.response_ids, *[pad_id] * padding]
        position_ids += range(size)
        sequence_ids += [index] * sample.num_tokens + [-1] * padding
        starts.append(ends[-1] + len(sample.prompt_ids) - 1)
        ends.append(ends[-1] + size)
        # Position t speaks of token t + 1, so the response's values begin one position before the response.
        before, num_targets, after = len(sample.prompt_ids) - 1, len(sample.response_ids), 1 + padding
        no_loss_before, no_loss_after = [0.0] * before, [0.0] * after
        live_targets = sample.response_ids if weight else [IGNORED_TARGET] * num_targets
        targets += [*[IGNORED_TARGET] * before, *live_targets, *[IGNORED_TARGET] * after]
        behavior_logprobs += [*no_loss_before, *sample.behavior_logprobs, *no_loss_after]
        advantages += [*no_loss_before, *[sample.advantage] * num_targets, *no_loss_after]
        weights += [*no_loss_before, *[weight] * num_targets, *no_loss_after]

    length = _padded_length(ends[-1], length_multiple, total_length)
    routed_experts = _routed_experts(samples, token_weights, ends, length)
    tail = length - ends[-1]
    if tail:
        ends.append(length)
    zeros = [0.0] * tail
    return PackedBatch(
        input_ids=torch.tensor(input_ids + [pad_id] * tail, dtype=torch.int64),
        position_ids=torch.tensor([*position_ids, *range(tail)], dtype=torch.int64),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(end - begin for begin, end in pairwise(ends)),
        targets=torch.tensor(targets + [IGNORED_TARGET] * tail, dtype=torch.int64),
        behavior_logprobs=torch.tensor(behavior_logprobs + zeros, dtype=torch.float32),
        advantages=torch.tensor(advantages + zeros, dtype=torch.float32),
        weights=torch.tensor(weights + zeros, dtype=torch.float32),
        sequence_ids=torch.tensor(sequence_ids + [-1] * tail, dtype=torch.int64),
        sample_ids=tuple(sample.sample_id for sample in samples),
        routed_experts=routed_experts,
        **{name: _optional_vector(name, samples, starts, length) for name in _OPTIONAL_VECTORS},
    )


def _optional_vector(name: str, samples: Sequence[Sample], starts: Sequence[int], length: int) -> torch.Tensor | None:
    """[length] or [length, K] with every sample's values from its place in `starts` on, 0 elsewhere. None: not given."""
    if not _all_have(name, samples):
        return None
    per_sample = [getattr(sample, name) for sample in samples]
    values = torch.tensor([value for values in per_sample for value in values], dtype=_OPTIONAL_VECTORS[name])
    vector = values.new_zeros(length, *values.shape[1:])
    vector[[start + i for start, values in zip(starts, per_sample, strict=True) for i in range(len(values))]] = values
    return vector


def _routed_experts(
    samples: Sequence[Sample], weights: Sequence[float], begins: Sequence[int], length: int
) -> torch.Tensor | None:
    """[length, layers, experts a token] with every sample's rows from its place in `begins` on, -1 elsewhere.

    -1 also for samples of weight 0, which only fill a micro-batch: their tokens count in no statistic.
    """
    if not _all_have("routed_experts", samples):
        return None
    traces = [sample.routed_experts.ids() for sample in samples if sample.routed_experts is not None]
    packed = np.full((length, *traces[0].shape[1:]), -1, dtype=np.int16)
    for begin, trace, weight in zip(begins[:-1], traces, weights, strict=True):
        if weight:
            packed[begin : begin + len(trace)] = trace
    return torch.from_numpy(packed)


def _all_have(name: str, samples: Sequence[Sample]) -> bool:
    """Whether all samples have the field; False also for no samples. ValueError when only some have it."""
    missing = [sample.sample_id for sample in samples if getattr(sample, name) is None]
    if missing and len(missing) < len(samples):
        raise ValueError(f"sample {missing[0]} has no {name} and others in its micro-batch have; give all or none")
    return bool(samples) and not missing


def _padded_length(num_tokens: int, length_multiple: int, total_length: int | None) -> int:
    length = max(math.ceil(num_tokens / length_multiple), 1) * length_multiple
    if total_length is None:
        return length
    if total_length < length or total_length % length_multiple:
        raise ValueError(
            f"total_length={total_length} must be a multiple of length_multiple={length_multiple} and at least "
            f"{length}: these samples need it"
        )
    return total_length


def _check(sample: Sample) -> None:
    if not sample.prompt_ids:
        raise ValueError(f"sample {sample.sample_id} has no prompt tokens; nothing predicts its first response token")
    for name in ("behavior_logprobs", *_OPTIONAL_VECTORS):
        values = getattr(sample, name)
        if values is not None and len(values) != len(sample.response_ids):
            raise ValueError(
                f"sample {sample.sample_id} has {len(sample.response_ids)} response tokens and {len(values)} {name}; "
                "one is needed for every response token"
            )


def context_parallel_slice(batch: PackedBatch, cp_rank: int, cp_size: int) -> PackedBatch:
    """The positions of one context-parallel rank: chunks r and 2 cp - 1 - r of the 2 cp chunks of every sequence.

    The zig-zag share of Megatron and Transformer Engine for THD, in which causal attention costs every rank the same.
    A sequence's two chunks follow each other in order. `cu_seqlens` and `max_seqlen` stay those of the whole sequences,
    which is what the attention of every rank asks for; the [T] vectors become [T / cp].
    """
    if cp_size == 1:
        return batch
    num_chunks = 2 * cp_size
    ends = batch.cu_seqlens.tolist()
    pieces = []
    for begin, end in pairwise(ends):
        if (end - begin) % num_chunks:
            raise ValueError(
                f"a packed sequence has {end - begin} positions, not a multiple of 2 x context parallel = "
                f"{num_chunks}; pack with sequence_multiple={num_chunks}"
            )
        chunk = (end - begin) // num_chunks
        for place in (cp_rank, num_chunks - 1 - cp_rank):
            pieces.append(torch.arange(begin + place * chunk, begin + (place + 1) * chunk))
    rows = torch.cat(pieces)
    names = ("routed_experts", *_OPTIONAL_VECTORS)
    optional = {name: vector[rows] for name in names if (vector := getattr(batch, name)) is not None}
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        position_ids=batch.position_ids[rows],
        targets=batch.targets[rows],
        behavior_logprobs=batch.behavior_logprobs[rows],
        advantages=batch.advantages[rows],
        weights=batch.weights[rows],
        sequence_ids=batch.sequence_ids[rows],
        **optional,
    )


def unpack_token_values(batch: PackedBatch, values: torch.Tensor) -> dict[str, list[float]]:
    """Values [T] at the positions with a target, as one list a sample in the order of its response tokens.

    Every sample of the batch has an entry; it is empty when the sample carries no loss.
    """
    live = batch.targets != IGNORED_TARGET
    unpacked: dict[str, list[float]] = {sample_id: [] for sample_id in batch.sample_ids}
    for index, value in zip(batch.sequence_ids[live].tolist(), values[live].tolist(), strict=True):
        unpacked[batch.sample_ids[index]].append(value)
    return unpacked

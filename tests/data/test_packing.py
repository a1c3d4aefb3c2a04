"""Packing: what is predicted where, how work is balanced, and what each context-parallel rank sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_megatron.data.packing import (
    assign_micro_batches,
    context_parallel_slice,
    pack,
    split_optimizer_steps,
    unpack_token_values,
)
from drpo_megatron.types import RoutedExperts, Sample
from tests.tiny import random_samples

PAD = 99


def sample(name: str, prompt: tuple[int, ...], response: tuple[int, ...], **changes: object) -> Sample:
    fields = dict(
        sample_id=name,
        prompt_ids=prompt,
        response_ids=response,
        behavior_logprobs=tuple(-float(t) for t in response),
        advantage=0.5,
    )
    return Sample(**(fields | changes))


def test_pack_by_hand() -> None:
    batch = pack(
        [sample("a", (1, 2), (3, 4)), sample("b", (5,), (6,), advantage=-1.0)],
        [0.25, 2.0],
        pad_id=PAD,
        length_multiple=4,
        sequence_multiple=1,
    )
    # a: 1 2 3 4   b: 5 6   padding: 99 99
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, PAD, PAD]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.max_seqlen == 4
    # The position of token 2 predicts 3, that of 3 predicts 4, that of 5 predicts 6.
    assert batch.targets.tolist() == [-100, 3, 4, -100, 6, -100, -100, -100]
    assert batch.behavior_logprobs.tolist() == [0, -3, -4, 0, -6, 0, 0, 0]
    assert batch.advantages.tolist() == [0, 0.5, 0.5, 0, -1, 0, 0, 0]
    assert batch.weights.tolist() == [0, 0.25, 0.25, 0, 2, 0, 0, 0]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, -1, -1]
    assert batch.old_logprobs is None
    assert batch.sample_ids == ("a", "b")
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_a_sequence_is_padded_inside_its_own_bounds() -> None:
    batch = pack([sample("a", (1, 2), (3,))] * 2, [1.0, 1.0], pad_id=PAD, length_multiple=4, sequence_multiple=4)
    assert batch.input_ids.tolist() == [1, 2, 3, PAD] * 2
    assert batch.sequence_ids.tolist() == [0, 0, 0, -1, 1, 1, 1, -1]
    assert batch.cu_seqlens.tolist() == [0, 4, 8]


def test_a_sample_of_weight_zero_has_no_targets() -> None:
    batch = pack([sample("a", (1,), (2, 3))], [0.0], pad_id=PAD, length_multiple=1, sequence_multiple=1)
    assert batch.targets.tolist() == [-100] * 3
    assert unpack_token_values(batch, torch.ones(3)) == {"a": []}


def test_no_samples_make_one_sequence_of_padding() -> None:
    batch = pack([], [], pad_id=PAD, length_multiple=4, sequence_multiple=2, total_length=8)
    assert batch.input_ids.tolist() == [PAD] * 8
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.weights.sum() == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (sample("x", (), (1,)), "sample x has no prompt"),
        (sample("x", (1,), (2, 3), behavior_logprobs=(-1.0,)), "sample x has 2 response tokens and 1 behavior"),
        (sample("x", (1,), (2,), old_logprobs=()), "sample x has 1 response tokens and 0 old_logprobs"),
    ],
)
def test_a_broken_sample_is_refused_by_name(broken: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([broken], [1.0], pad_id=PAD, length_multiple=1, sequence_multiple=1)


def test_old_logprobs_are_all_or_none() -> None:
    samples = [sample("a", (1,), (2,), old_logprobs=(-1.0,)), sample("b", (1,), (2,))]
    with pytest.raises(ValueError, match="sample b has no old_logprobs"):
        pack(samples, [1.0, 1.0], pad_id=PAD, length_multiple=1, sequence_multiple=1)
    batch = pack(samples[:1], [1.0], pad_id=PAD, length_multiple=3, sequence_multiple=1)
    assert batch.old_logprobs is not None
    assert batch.old_logprobs.tolist() == [-1.0, 0, 0]


def test_vectors_that_samples_may_carry_stand_at_their_targets() -> None:
    vectors = dict(reference_logprobs=(-3.0, -4.0), topk_ids=((3, 9), (8, 4)))
    first = sample("a", (1, 2), (3, 4), topk_behavior_logprobs=((-3.0, -9.0), (-8.0, -4.0)), **vectors)
    second = sample("b", (5,), (6,), reference_logprobs=(-6.0,), topk_ids=((6, 7),), topk_behavior_logprobs=((-6, -7),))
    batch = pack([first, second], [1.0, 1.0], pad_id=PAD, length_multiple=4, sequence_multiple=4)
    assert batch.targets.tolist() == [-100, 3, 4, -100, 6, -100, -100, -100]
    assert batch.reference_logprobs is not None and batch.topk_ids is not None
    assert batch.reference_logprobs.tolist() == [0, -3, -4, 0, -6, 0, 0, 0]
    assert batch.topk_ids.tolist() == [[0, 0], [3, 9], [8, 4], [0, 0], [6, 7], [0, 0], [0, 0], [0, 0]]
    assert batch.topk_behavior_logprobs is not None
    assert torch.equal(batch.topk_behavior_logprobs, -batch.topk_ids.float())
    assert batch.old_logprobs is None
    # Two context-parallel ranks have positions 0 and 3, and 1 and 2, of either sequence.
    inner = context_parallel_slice(batch, 1, 2)
    assert inner.reference_logprobs is not None and inner.topk_ids is not None
    assert inner.reference_logprobs.tolist() == [-3, -4, 0, 0]
    assert inner.topk_ids.tolist() == [[3, 9], [8, 4], [0, 0], [0, 0]]
    assert inner.topk_behavior_logprobs is not None
    assert torch.equal(inner.topk_behavior_logprobs, -inner.topk_ids.float())


def test_routed_experts_stand_at_their_own_tokens() -> None:
    def routed(*rows: int) -> RoutedExperts:
        return RoutedExperts.of(np.array(rows).reshape(-1, 1, 2))

    # Three tokens, of which the last was never fed to the engine; then two; then one that only fills up.
    first, second = (sample("a", (1, 2), (3,), routed_experts=routed(1, 2, 3, 4)), sample("b", (5,), (6,)))
    with pytest.raises(ValueError, match="sample b has no routed_experts"):
        pack([first, second], [1.0, 1.0], pad_id=PAD, length_multiple=4, sequence_multiple=4)
    samples = [first, replace(second, routed_experts=routed(5, 6)), replace(first, sample_id="c")]
    batch = pack(samples, [1.0, 1.0, 0.0], pad_id=PAD, length_multiple=16, sequence_multiple=4)
    none = [-1, -1]
    assert batch.routed_experts is not None and batch.routed_experts.dtype == torch.int16
    assert batch.routed_experts[:, 0].tolist() == [[1, 2], [3, 4], none, none, [5, 6], *[none] * 11]
    outer = context_parallel_slice(batch, 0, 2)
    assert outer.routed_experts is not None
    assert outer.routed_experts[:, 0].tolist() == [[1, 2], none, [5, 6], *[none] * 5]


def test_total_length_must_hold_the_samples() -> None:
    with pytest.raises(ValueError, match="total_length=2 must be .* at least 4"):
        pack([sample("a", (1,), (2, 3))], [1.0], pad_id=PAD, length_multiple=2, sequence_multiple=1, total_length=2)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    dp_size=st.integers(1, 4),
    spare=st.integers(0, 100),
    multiple_of=st.integers(1, 3),
)
def test_micro_batches_hold_every_sample_once_balanced_and_within_the_limit(
    lengths: list[int], dp_size: int, spare: int, multiple_of: int
) -> None:
    longest = max(lengths, default=1)
    plan = assign_micro_batches(lengths, dp_size=dp_size, max_tokens=longest + spare, multiple_of=multiple_of)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) > 0 and len(plan[0]) % multiple_of == 0
    flat = [micro_batch for rank in plan for micro_batch in rank]
    assert sorted(i for m in flat for i in m) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in m) <= longest + spare for m in flat)
    loads = [sum(lengths[i] for m in rank for i in m) for rank in plan]
    assert max(loads) - min(loads) <= longest
    assert sum(not m for m in flat) == max(len(flat) - len(lengths), 0)


def test_micro_batches_are_as_few_as_fit() -> None:
    # 12 x 10 tokens over 2 ranks: 60 a rank, so two micro-batches of 30 within 40.
    plan = assign_micro_batches([10] * 12, dp_size=2, max_tokens=40)
    assert [[len(m) for m in rank] for rank in plan] == [[3, 3], [3, 3]]


def test_a_sample_beyond_the_limit_is_refused_by_index() -> None:
    with pytest.raises(ValueError, match="sample 1 has 9 tokens .* max_tokens_per_micro_batch=8"):
        assign_micro_batches([3, 9], dp_size=1, max_tokens=8)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 40), num_steps=st.integers(1, 8), seed=st.integers(0, 5))
def test_optimizer_steps_share_the_samples(count: int, num_steps: int, seed: int) -> None:
    samples = random_samples(count)
    if count < num_steps:
        with pytest.raises(ValueError, match=f"{count} samples cannot be shared by {num_steps}"):
            split_optimizer_steps(samples, num_steps, seed)
        return
    shares = split_optimizer_steps(samples, num_steps, seed)
    sizes = [len(share) for share in shares]
    assert len(sizes) == num_steps and max(sizes) - min(sizes) <= 1
    assert sorted(s.sample_id for share in shares for s in share) == sorted(s.sample_id for s in samples)
    assert shares == split_optimizer_steps(samples, num_steps, seed)


def test_another_seed_shares_otherwise() -> None:
    samples = random_samples(40)
    assert split_optimizer_steps(samples, 4, seed=0) != split_optimizer_steps(samples, 4, seed=1)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_context_parallel_slices_are_the_zig_zag_shares_and_cover_everything(cp_size: int) -> None:
    unit = 2 * cp_size
    samples = random_samples(7)
    batch = pack(samples, [1.0] * 7, pad_id=PAD, length_multiple=unit * 2, sequence_multiple=unit)
    slices = [context_parallel_slice(batch, rank, cp_size) for rank in range(cp_size)]
    # Reference: the owner of position p of a sequence of size n is its chunk c = p // (n / 2cp), mirrored.
    owners: list[int] = []
    ends = batch.cu_seqlens.tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        for position in range(end - begin):
            chunk = position // ((end - begin) // unit)
            owners.append(min(chunk, unit - 1 - chunk))
    for rank, part in enumerate(slices):
        mine = torch.tensor(owners) == rank
        for name in ("input_ids", "position_ids", "targets", "weights", "advantages", "behavior_logprobs"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[mine]), name
        assert torch.equal(part.cu_seqlens, batch.cu_seqlens)
        assert part.max_seqlen == batch.max_seqlen
    assert sum(float(part.weights.sum()) for part in slices) == float(batch.weights.sum())


def test_context_parallel_needs_divisible_sequences() -> None:
    batch = pack(random_samples(3), [1.0] * 3, pad_id=PAD, length_multiple=1, sequence_multiple=1)
    with pytest.raises(ValueError, match="pack with sequence_multiple=4"):
        context_parallel_slice(batch, 0, 2)


def test_token_values_come_back_to_their_samples_in_order() -> None:
    samples = random_samples(9)
    batch = pack(samples, [1.0] * 9, pad_id=PAD, length_multiple=8, sequence_multiple=4)
    expected = {s.sample_id: torch.tensor(s.behavior_logprobs).tolist() for s in samples}
    assert unpack_token_values(batch, batch.behavior_logprobs) == expected

"""The policy loss on real gloo ranks. One world of ranks runs all checks, because starting ranks takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from drpo_megatron.objectives import build
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_logprobs, vocab_parallel_policy_loss
from tests.distributed import run_ranks
from tests.loss.reference import Case, make_case, reference_policy_loss, relative_error

DRPO = build({"name": "drpo", "delta": 0.15})
EVERY_MODE = [
    {"sequence_parallel": sequence_parallel, **mode}
    for sequence_parallel in (False, True)
    for mode in ({}, {"chunk_bytes": 4096}, {"low_memory": True})
]
NUM_TOKENS, VOCAB = 48, 212
TOLERANCE = 1e-5
"""As in test_policy_loss.py: ten times FP32's rounding; a wrong shard is off by 1e-2."""


def even_shards(vocab: int = VOCAB) -> list[int]:
    return [vocab // dist.get_world_size()] * dist.get_world_size()


def run(case: Case, sizes: list[int], objective: Any = DRPO, **options: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """This rank's share of the case: output, gradient of its hidden states, gradient of its rows of the head."""
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden = case.hidden.chunk(world)[rank] if options.get("sequence_parallel") and len(case.hidden) else case.hidden
    hidden = hidden.clone().requires_grad_()
    weight = case.weight.split(sizes)[rank].clone().requires_grad_()
    out = vocab_parallel_policy_loss(
        hidden, weight, *case.vectors(), objective=objective, tp_group=dist.group.WORLD, **options
    )
    out.loss.backward()
    return out, hidden.grad, weight.grad


def assert_agrees(case: Case, sizes: list[int], objective: Any = DRPO, **options: Any) -> None:
    out, grad_hidden, grad_weight = run(case, sizes, objective, **options)
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in ("chunk_bytes", "low_memory"):
        options.pop(name, None)
    sequence_parallel = options.pop("sequence_parallel", False)
    expected = reference_policy_loss(case, objective, **options)
    expected_hidden = expected.grad_hidden.chunk(world)[rank] if sequence_parallel else expected.grad_hidden
    assert (out.loss - expected.loss).abs() < TOLERANCE * expected.loss_magnitude
    for name in ("logprobs", "entropy", "coef"):
        assert relative_error(getattr(out, name), getattr(expected, name)) < TOLERANCE, name
    # Over the whole gradient's magnitude: a shard's own may be tiny.
    assert (grad_hidden - expected_hidden).abs().max() < TOLERANCE * expected.grad_hidden.abs().max()
    difference = grad_weight - expected.grad_weight.split(sizes)[rank]
    assert difference.numel() == 0 or difference.abs().max() < TOLERANCE * expected.grad_weight.abs().max()


def check_agreement_with_dense_float64() -> None:
    case = make_case(NUM_TOKENS, vocab_size=VOCAB)
    for mode in EVERY_MODE:
        assert_agrees(case, even_shards(), **mode)
        assert_agrees(case, even_shards(), temperature=0.7, entropy_coef=0.2, **mode)


def check_sequence_level_and_topk_objectives() -> None:
    case = make_case(NUM_TOKENS, vocab_size=VOCAB)
    sequence_ids = torch.arange(NUM_TOKENS) // 12
    assert_agrees(case, even_shards(), build({"name": "gspo"}), sequence_ids=sequence_ids, sequence_parallel=True)
    logits = torch.randn(NUM_TOKENS, VOCAB, generator=torch.Generator().manual_seed(4))
    top = logits.log_softmax(-1).topk(5)  # spread over all shards
    topk = build({"name": "dppo", "divergence": "topk_kl", "delta": 0.02, "num_topk": 5})
    for mode in EVERY_MODE:
        assert_agrees(case, even_shards(), topk, topk_ids=top.indices, topk_behavior_logprobs=top.values, **mode)


def check_uneven_and_empty_shards() -> None:
    case = make_case(NUM_TOKENS, vocab_size=211)
    by_world = {2: ([150, 61], [211, 0], [0, 211]), 4: ([100, 0, 60, 51], [0, 0, 1, 210], [53, 53, 53, 52])}
    for sizes in by_world[dist.get_world_size()]:
        for mode in EVERY_MODE:
            assert_agrees(case, list(sizes), entropy_coef=0.1, **mode)


def check_padding_rows_may_hold_nan() -> None:
    vocab = VOCAB // dist.get_world_size() * (dist.get_world_size() - 1) - 3  # the last shard is padding only
    case = make_case(NUM_TOKENS, vocab_size=vocab)
    padded = case.with_(weight=torch.cat([case.weight, torch.full((VOCAB - vocab, 32), float("nan"))]))
    expected = reference_policy_loss(case, DRPO)
    for mode in EVERY_MODE:
        out, grad_hidden, grad_weight = run(padded, even_shards(), vocab_size=vocab, **mode)
        assert (out.loss - expected.loss).abs() < TOLERANCE * expected.loss_magnitude  # Rows cancel.
        assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()
        if dist.get_rank() == dist.get_world_size() - 1:
            assert (grad_weight == 0).all()


def check_logprobs_are_bitwise_equal_on_all_ranks() -> None:
    case = make_case(NUM_TOKENS, vocab_size=VOCAB)
    for mode in EVERY_MODE:
        out, grad_hidden, _ = run(case, even_shards(), entropy_coef=0.1, **mode)
        same = [out.logprobs, out.entropy, out.loss.detach().reshape(1)]
        same += [] if mode["sequence_parallel"] else [grad_hidden.flatten()]
        for mine in same:
            everyone = mine.new_empty(dist.get_world_size(), *mine.shape).flatten(0, 1)
            dist.all_gather_into_tensor(everyone, mine.contiguous())
            assert all(torch.equal(theirs, mine) for theirs in everyone.chunk(dist.get_world_size()))


def check_nothing_live_joins_every_collective() -> None:
    for num_tokens in (0, NUM_TOKENS):
        case = make_case(num_tokens, vocab_size=VOCAB).with_(weights=torch.zeros(num_tokens))
        for mode in EVERY_MODE:
            out, grad_hidden, grad_weight = run(case, even_shards(), **mode)
            assert out.loss.item() == 0 and (grad_hidden == 0).all() and (grad_weight == 0).all()


def check_logprobs_alone() -> None:
    case = make_case(NUM_TOKENS, vocab_size=VOCAB)
    expected = reference_policy_loss(case, DRPO, temperature=0.7)
    rank, world = dist.get_rank(), dist.get_world_size()
    for sequence_parallel in (False, True):
        out = vocab_parallel_logprobs(
            case.hidden.chunk(world)[rank] if sequence_parallel else case.hidden,
            case.weight.chunk(world)[rank],
            case.targets,
            temperature=0.7,
            tp_group=dist.group.WORLD,
            sequence_parallel=sequence_parallel,
            with_entropy=True,
        )
        assert relative_error(out.logprobs, expected.logprobs) < TOLERANCE
        assert relative_error(out.entropy, expected.entropy) < TOLERANCE


def check_communication_does_not_grow_with_the_vocabulary() -> None:
    num_rows = int((make_case(NUM_TOKENS).weights * make_case(NUM_TOKENS).advantages != 0).sum())
    for mode in EVERY_MODE:
        mode = {key: value for key, value in mode.items() if key != "chunk_bytes"}
        sent = []
        for vocab in (VOCAB, 10 * VOCAB):
            case = make_case(NUM_TOKENS, vocab_size=vocab)
            case = case.with_(advantages=torch.where(case.advantages == 0, 1.0, case.advantages))
            with _CountedCollectives() as counted:
                run(case, even_shards(vocab), **mode)
            sent.append(counted.sizes)
        assert sent[0] == sent[1]
    shard = VOCAB // dist.get_world_size()
    case = make_case(NUM_TOKENS, vocab_size=VOCAB)
    with _CountedCollectives() as counted:
        run(case, even_shards(), chunk_bytes=4 * shard * 4)  # four rows a chunk
    num_chunks = -(-num_rows // 4)
    assert num_chunks > 1 and len(counted.sizes) <= 2 * num_chunks


class _CountedCollectives:
    """Elements of the first tensor of every collective."""

    def __enter__(self) -> _CountedCollectives:
        self.sizes: list[int] = []
        self.patch = pytest.MonkeyPatch()
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            self.patch.setattr(dist, name, self._counting(getattr(dist, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(tensor.numel())
            return function(tensor, *args, **kwargs)

        return call


def _all_checks(rank: int, world_size: int) -> list[str]:
    checks = [function for name, function in globals().items() if name.startswith("check_")]
    for check in checks:
        check()
    return [check.__name__ for check in checks]


@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_loss_keeps_the_contract(world_size: int) -> None:
    names = run_ranks(world_size, _all_checks)
    assert len(names[0]) == 8 and all(name == names[0] for name in names)

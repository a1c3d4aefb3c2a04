"""Where the weight's gradient goes: autograd's .grad, Megatron's main_grad, tied embeddings, several micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.objectives import build
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_policy_loss
from tests.loss.reference import Case, make_case, reference_policy_loss, relative_error

DRPO = build({"name": "drpo", "delta": 0.15})
MODES = {"fused": {}, "low_memory": {"low_memory": True}}


@pytest.fixture(params=MODES, name="mode")
def _mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODES[request.param]


def loss_of(case: Case, hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
    return vocab_parallel_policy_loss(hidden, weight, *case.vectors(), objective=DRPO, **options).loss


def megatron_parameter(case: Case, main_grad_dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A parameter as Megatron's DistributedDataParallel leaves it."""
    weight = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.zeros_like(weight, dtype=main_grad_dtype)
    weight.grad_added_to_main_grad = False
    return weight


def megatron_hook(weight: torch.nn.Parameter) -> None:
    """What DistributedDataParallel's post-backward hook does (megatron-core 0.16.1, _make_backward_post_hook)."""
    assert weight.grad is not None
    if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
        weight.main_grad.add_(weight.grad.data)
    weight.grad = None


def test_two_micro_batches_add_up_in_grad(mode: dict[str, Any]) -> None:
    case = make_case()
    expected = reference_policy_loss(case, DRPO)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    for _ in range(2):
        loss_of(case, hidden, weight, **mode).backward()
    assert relative_error(weight.grad, 2 * expected.grad_weight) < 1e-5
    assert relative_error(hidden.grad, 2 * expected.grad_hidden) < 1e-5


def test_two_micro_batches_add_up_in_main_grad(mode: dict[str, Any]) -> None:
    case, weight = make_case(), megatron_parameter(make_case())
    expected = reference_policy_loss(case, DRPO)
    for _ in range(2):
        loss_of(case, case.hidden.clone().requires_grad_(), weight, main_grad_fusion=True, **mode).backward()
        assert weight.grad_added_to_main_grad
        megatron_hook(weight)
    assert relative_error(weight.main_grad, 2 * expected.grad_weight) < 1e-5


def test_a_forward_alone_leaves_main_grad_untouched(mode: dict[str, Any]) -> None:
    case, weight = make_case(), megatron_parameter(make_case())
    loss_of(case, case.hidden.clone().requires_grad_(), weight, main_grad_fusion=True, **mode)
    assert (weight.main_grad == 0).all() and not weight.grad_added_to_main_grad


@pytest.mark.parametrize("main_grad_fusion", [False, True])
def test_gradients_follow_the_loss_scale(main_grad_fusion: bool, mode: dict[str, Any]) -> None:
    case, weight = make_case(), megatron_parameter(make_case())
    expected = reference_policy_loss(case, DRPO)
    hidden = case.hidden.clone().requires_grad_()
    (3 * loss_of(case, hidden, weight, main_grad_fusion=main_grad_fusion, **mode)).backward()
    megatron_hook(weight)
    assert relative_error(hidden.grad, 3 * expected.grad_hidden) < 1e-5
    assert relative_error(weight.main_grad, 3 * expected.grad_weight) < 1e-5


def test_main_grad_may_be_bf16(mode: dict[str, Any]) -> None:
    case, weight = make_case(), megatron_parameter(make_case(), torch.bfloat16)
    loss_of(case, case.hidden.clone().requires_grad_(), weight, main_grad_fusion=True, **mode).backward()
    assert relative_error(weight.main_grad, reference_policy_loss(case, DRPO).grad_weight) < 2**-7


@pytest.mark.parametrize("main_grad_fusion", [False, True])
def test_tied_embedding_gets_both_gradients(main_grad_fusion: bool, mode: dict[str, Any]) -> None:
    case, weight = make_case(), megatron_parameter(make_case())
    weight.zero_out_wgrad = True  # Megatron sets it on a weight that the embedding and the head share
    tokens = torch.arange(48)
    hidden = torch.nn.functional.embedding(tokens, weight)
    loss_of(case.with_(hidden=hidden.detach()), hidden, weight, main_grad_fusion=main_grad_fusion, **mode).backward()
    megatron_hook(weight)
    expected = reference_policy_loss(case.with_(hidden=case.weight[tokens]), DRPO)
    total = expected.grad_weight.index_add(0, tokens, expected.grad_hidden)
    assert relative_error(weight.main_grad, total) < 1e-5


def test_padding_rows_of_main_grad_stay_zero(mode: dict[str, Any]) -> None:
    case = make_case()
    padded = case.with_(weight=torch.cat([case.weight, torch.full((3, 32), float("nan"))]))
    weight = megatron_parameter(padded)
    hidden = case.hidden.clone().requires_grad_()
    loss_of(padded, hidden, weight, vocab_size=211, main_grad_fusion=True, **mode).backward()
    assert (weight.main_grad[211:] == 0).all()
    assert relative_error(weight.main_grad[:211], reference_policy_loss(case, DRPO).grad_weight) < 1e-5


def test_a_second_backward_is_refused() -> None:
    case = make_case()
    loss = loss_of(case, case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run backward twice"):
        loss.backward()

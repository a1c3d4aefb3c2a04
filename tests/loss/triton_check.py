"""Run by test_triton.py in a process of its own, because TRITON_INTERPRET is read when Triton is imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.objectives import build
from drpo_megatron.trainer import vocab_parallel_rows as rows_module
from drpo_megatron.trainer import vocab_parallel_triton as kernels
from drpo_megatron.trainer.vocab_parallel import vocab_parallel_policy_loss
from tests.loss.reference import make_case, reference_policy_loss, relative_error


def check_row_statistics() -> None:
    spread = torch.tensor([0.1, 1.0, 30.0, 30.0, 30.0])[:, None]  # Flat, where every column counts, and peaked.
    for columns in (1, 100, 4096, 9001):  # less than a block, exactly one, and two and a bit
        logits = torch.randn(5, columns) * spread
        logits[3] += 1e4
        expected = rows_module.row_statistics(logits, torch.empty(2, logits.numel()))
        assert_same_statistics(kernels.row_statistics(logits), expected)
        for missing in {0, columns // 2, columns - 1} if columns > 1 else ():
            fewer = logits[:, torch.arange(columns) != missing]
            with pytest.raises(AssertionError):
                assert_same_statistics(rows_module.row_statistics(fewer, torch.empty(2, fewer.numel())), expected)


def assert_same_statistics(ours: Any, expected: Any) -> None:
    # sqrt(9001) unit roundoffs of a sum are 6e-6 (measured: 1e-7). One column of 9001 is 1e-4 of the flat row's sums.
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def check_logit_gradient() -> None:
    logits = torch.randn(4, 5000) * 3
    maximum = logits.amax(1)
    log_sum = (logits - maximum[:, None]).logsumexp(1)
    softmax = rows_module.SoftmaxRows(maximum, log_sum, torch.rand(4), torch.zeros(1, 4))
    targets = torch.tensor([0, 4999, -3, 5000])  # the last two belong to other tiles
    for entropy_scale in (None, torch.rand(4)):
        for dtype in (torch.float32, torch.bfloat16):
            scale = torch.randn(4)
            ours = kernels.logit_gradient(
                logits, softmax.maximum, softmax.log_sum, softmax.entropy, scale, entropy_scale, targets, dtype
            )
            expected = rows_module.logit_gradient_(
                logits.clone(), softmax, scale, entropy_scale, targets, dtype, torch.empty(2, logits.numel())
            )
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, expected)


def check_whole_loss() -> None:
    case = make_case(num_tokens=12, hidden_size=16, vocab_size=5000, seed=3)
    objective = build({"name": "drpo", "delta": 0.15})
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    out = vocab_parallel_policy_loss(hidden, weight, *case.vectors(), objective=objective, entropy_coef=0.1)
    out.loss.backward()
    expected = reference_policy_loss(case, objective, entropy_coef=0.1)
    assert (out.loss - expected.loss).abs() < 1e-5 * expected.loss_magnitude  # Rows cancel.
    assert relative_error(hidden.grad, expected.grad_hidden) < 1e-5
    assert relative_error(weight.grad, expected.grad_weight) < 1e-5


if __name__ == "__main__":
    torch.manual_seed(0)
    check_row_statistics()
    check_logit_gradient()
    rows_module._uses_triton = lambda logits: True
    check_whole_loss()
    print("triton kernels agree")

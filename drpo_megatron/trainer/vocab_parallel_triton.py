"""The row-wise work of `vocab_parallel_rows` as two Triton kernels: one pass over a tile of logits each.

Importing this module raises ImportError without Triton. With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 2048
"""Columns a program holds in registers at a time. With 4096 the gradient in FP32 with entropy spills on sm_100."""


def row_statistics(logits: torch.Tensor) -> torch.Tensor:
    """[3, n] FP32: max z, sum exp(z - max), sum exp(z - max) (z - max) of the rows of [n, C]."""
    num_rows, num_columns = logits.shape
    out = logits.new_empty(3, num_rows)
    _row_statistics[(num_rows,)](logits, out, num_rows, num_columns, logits.stride(0), BLOCK=STATISTICS_BLOCK)
    return out


def logit_gradient(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    target_scale: torch.Tensor,
    entropy_scale: torch.Tensor | None,
    target_columns: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """target_scale (onehot - p) + entropy_scale p (log p + entropy), [n, C], formed in FP32 and rounded once."""
    num_rows, num_columns = logits.shape
    out = torch.empty_like(logits, dtype=out_dtype)
    _logit_gradient[(num_rows, triton.cdiv(num_columns, GRADIENT_BLOCK))](
        logits,
        out,
        maximum.contiguous(),
        log_sum.contiguous(),
        entropy.contiguous(),
        target_scale.contiguous(),
        target_scale if entropy_scale is None else entropy_scale.contiguous(),
        target_columns.contiguous(),
        num_columns,
        logits.stride(0),
        out.stride(0),
        HAS_ENTROPY=entropy_scale is not None,
        BLOCK=GRADIENT_BLOCK,
    )
    return out


@triton.jit
def _row_statistics(logits, out, num_rows, num_columns, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    maximum = -3.0e38  # finite: the first block's correction is 0 * -3e38, not 0 * -inf
    sum_exp = 0.0
    sum_shifted = 0.0
    for begin in range(0, num_columns, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + row * row_stride + columns, mask=inside, other=-float("inf"))
        larger = tl.maximum(maximum, tl.max(z, axis=0))
        correction = maximum - larger
        scale = tl.exp(correction)
        shifted = tl.where(inside, z - larger, 0.0)
        exponentials = tl.where(inside, tl.exp(shifted), 0.0)
        sum_shifted = (sum_shifted + sum_exp * correction) * scale + tl.sum(exponentials * shifted, axis=0)
        sum_exp = sum_exp * scale + tl.sum(exponentials, axis=0)
        maximum = larger
    tl.store(out + row, maximum)
    tl.store(out + num_rows + row, sum_exp)
    tl.store(out + 2 * num_rows + row, sum_shifted)


@triton.jit
def _logit_gradient(
    logits,
    out,
    maximum,
    log_sum,
    entropy,
    target_scale,
    entropy_scale,
    target_columns,
    num_columns,
    row_stride,
    out_stride,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    z = tl.load(logits + row * row_stride + columns, mask=inside, other=0.0)
    logprob = (z - tl.load(maximum + row)) - tl.load(log_sum + row)
    scale = tl.load(target_scale + row)
    factor = -scale
    if HAS_ENTROPY:
        factor = tl.load(entropy_scale + row) * (logprob + tl.load(entropy + row)) - scale
    dz = tl.exp(logprob) * factor + tl.where(columns == tl.load(target_columns + row), scale, 0.0)
    tl.store(out + row * out_stride + columns, dz.to(out.dtype.element_ty), mask=inside)

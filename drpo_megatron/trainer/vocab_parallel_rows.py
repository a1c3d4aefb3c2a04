"""Row-wise work on one tile of logits: softmax statistics, and logits turned into their gradient in place.

Both exist twice: here in torch, and in `vocab_parallel_triton` for CUDA, where each is one pass over the tile.

Statistics of n rows are one FP32 tensor [3 + P, n], so that one all-gather carries them between ranks:
    MAXIMUM        m = max z
    SUM_EXP        s = sum exp(z - m)
    SUM_SHIFTED    t = sum exp(z - m) (z - m), for the entropy
    PICKED ...     z of P chosen token ids a row (the target, then the engine's top-k), 0 where another rank owns the id
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

try:
    from drpo_megatron.trainer import vocab_parallel_triton as triton_kernels
except ImportError:  # Triton is an optional dependency: torch does the same work in more passes
    triton_kernels = None

MAXIMUM, SUM_EXP, SUM_SHIFTED, PICKED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class SoftmaxRows:
    """What n rows of the full, sharded softmax amount to. Bitwise equal on all ranks.

    log p = (z - maximum) - log_sum, in this order: their sum, log-sum-exp, has no digits left for large logits.
    """

    maximum: torch.Tensor
    """[n] max z"""
    log_sum: torch.Tensor
    """[n] log sum exp(z - maximum)"""
    entropy: torch.Tensor
    """[n] nats"""
    logprobs: torch.Tensor
    """[P, n] of the picked ids."""

    def select(self, rows: torch.Tensor | slice) -> SoftmaxRows:
        return SoftmaxRows(self.maximum[rows], self.log_sum[rows], self.entropy[rows], self.logprobs[:, rows])

    def put(self, rows: torch.Tensor, other: SoftmaxRows) -> None:
        self.maximum[rows] = other.maximum
        self.log_sum[rows] = other.log_sum
        self.entropy[rows] = other.entropy
        self.logprobs[:, rows] = other.logprobs


def empty_statistics(num_rows: int, num_picked: int, like: torch.Tensor) -> torch.Tensor:
    statistics = like.new_zeros(PICKED + num_picked, num_rows)
    statistics[MAXIMUM] = -torch.inf
    return statistics


def new_scratch(buffer: torch.Tensor, tile_elements: int) -> torch.Tensor | None:
    """Room for two tiles beside the logits in `buffer`, if the torch version runs: a fresh tile costs six times the
    arithmetic in page faults."""
    return None if _uses_triton(buffer) else buffer.new_empty(2, tile_elements)


def update_statistics(
    statistics: torch.Tensor, logits: torch.Tensor, columns: torch.Tensor, scratch: torch.Tensor | None
) -> None:
    """Merge a tile [n, C] of logits into `statistics`; `columns` [n, P] are the ids, counted from its first."""
    tile = triton_kernels.row_statistics(logits) if scratch is None else row_statistics(logits, scratch)
    statistics[:PICKED] = _merge(torch.stack([statistics[:PICKED], tile]))
    inside = (columns >= 0) & (columns < logits.shape[1])
    picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1))
    statistics[PICKED:] += torch.where(inside, picked, 0.0).T


def combine_over_ranks(statistics: torch.Tensor, group: dist.ProcessGroup | None) -> SoftmaxRows:
    """The softmax of the whole vocabulary. One all-gather of (3 + P) n numbers; ranks are summed in a fixed order."""
    if group is None:
        gathered = statistics[None]
    else:
        gathered = statistics.new_empty(dist.get_world_size(group) * statistics.shape[0], statistics.shape[1])
        dist.all_gather_into_tensor(gathered, statistics, group=group)
        gathered = gathered.unflatten(0, (-1, statistics.shape[0]))
    maximum, sum_exp, sum_shifted = _merge(gathered[:, :PICKED])
    log_sum = sum_exp.log()
    logprobs = (gathered[:, PICKED:].sum(0) - maximum) - log_sum
    return SoftmaxRows(maximum, log_sum, log_sum - sum_shifted / sum_exp, logprobs.clamp_(max=0))


def logit_gradient_(
    logits: torch.Tensor,
    rows: SoftmaxRows,
    target_scale: torch.Tensor,
    entropy_scale: torch.Tensor | None,
    target_columns: torch.Tensor,
    out_dtype: torch.dtype,
    scratch: torch.Tensor | None,
) -> torch.Tensor:
    """dz = target_scale (onehot - p) + entropy_scale p (log p + entropy) of a tile [n, C], formed before it is rounded.

    `logits` is overwritten in the torch version. target_scale is d loss / d log p(target), entropy_scale is
    -d loss / d entropy, both [n]; `target_columns` [n] counts from the tile's first column.
    """
    if scratch is None:
        return triton_kernels.logit_gradient(
            logits, rows.maximum, rows.log_sum, rows.entropy, target_scale, entropy_scale, target_columns, out_dtype
        )
    logits.sub_(rows.maximum[:, None])
    if entropy_scale is None:
        logits.exp_().mul_((-target_scale * rows.log_sum.neg().exp())[:, None])
    else:
        logits.sub_(rows.log_sum[:, None])
        factor = torch.add(logits, rows.entropy[:, None], out=_tile(scratch[0], logits))
        factor.mul_(entropy_scale[:, None]).sub_(target_scale[:, None])
        logits.exp_().mul_(factor)
    inside = (target_columns >= 0) & (target_columns < logits.shape[1])
    columns = target_columns.clamp(0, logits.shape[1] - 1)
    logits.scatter_add_(1, columns[:, None], torch.where(inside, target_scale, 0.0)[:, None])
    return logits.to(out_dtype)


def _uses_triton(logits: torch.Tensor) -> bool:
    return triton_kernels is not None and logits.is_cuda and logits.dtype == torch.float32


def row_statistics(logits: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """[3, n]: MAXIMUM, SUM_EXP and SUM_SHIFTED of the rows of a tile."""
    maximum = logits.amax(1)
    shifted = torch.sub(logits, maximum[:, None], out=_tile(scratch[0], logits))
    exponentials = torch.exp(shifted, out=_tile(scratch[1], logits))
    return torch.stack([maximum, exponentials.sum(1), shifted.mul_(exponentials).sum(1)])


def _tile(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return flat[: like.numel()].view_as(like)


def _merge(parts: torch.Tensor) -> torch.Tensor:
    """[K, 3, n] statistics of disjoint columns -> [3, n] of all of them. A part without columns holds (-inf, 0, 0)."""
    maximum = parts[:, MAXIMUM].amax(0)
    shift = (parts[:, MAXIMUM] - maximum).clamp_(min=-1e30)  # a finite stand-in: 0 * -inf would be NaN
    scale = shift.exp()
    sum_exp = (parts[:, SUM_EXP] * scale).sum(0)
    sum_shifted = ((parts[:, SUM_SHIFTED] + parts[:, SUM_EXP] * shift) * scale).sum(0)
    return torch.stack([maximum, sum_exp, sum_shifted])

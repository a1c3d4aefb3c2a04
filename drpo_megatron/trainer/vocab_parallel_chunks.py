"""Matmuls of the LM head over tiles of the vocabulary: [N, V/TP] logits never exist at once.

Three walks, made of the same tiles:
    measure             one matmul: the softmax of every row, with one all-gather for all rows
    fused_gradient      three matmuls: a chunk of rows keeps its logits until the objective has given their gradient
    recomputed_gradient three matmuls after `measure`'s one: nothing larger than a tile is kept, no collective
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from drpo_megatron.trainer.vocab_parallel_rows import (
    SoftmaxRows,
    combine_over_ranks,
    empty_statistics,
    logit_gradient_,
    new_scratch,
    update_statistics,
)

CPU_TILE_BYTES = 2**21
"""A tile of FP32 logits that is still in a core's cache when its row statistics are taken."""
CPU_TILE_ROWS = 1024
CPU_CHUNK_BYTES = 2**25
CPU_TRAINER_CHUNK_BYTES = 2**26
"""A run's own limit, where none is given. The kernel alone takes half."""
CUDA_TILE_BYTES = 2**28
CUDA_TILE_ROWS = 8192
CUDA_CHUNK_BYTES = 2**30
CUDA_CHUNK_ROWS = 4096
"""At least so many rows a chunk: its matmul then takes several times as long as reading and writing dW does."""
TILE_MULTIPLE = 128
"""Of a tile's width. Rows of logits and dz then begin at multiples of 256 bytes: cuBLAS's aligned matmuls take them, and
the Triton kernels load and store 128 bits at a time. A width of any other number would be odd half of the time."""

LogitScales = tuple[torch.Tensor, torch.Tensor | None]
"""target_scale and entropy_scale of `logit_gradient_`, [n] each."""


def loss_chunk_bytes(megabytes: int | None, on_cuda: bool) -> int | None:
    """The limit of a run's chunks from `trainer.loss_chunk_mb`. None: that of `chunk_rows`."""
    if megabytes is not None:
        return megabytes * 2**20
    return None if on_cuda else CPU_TRAINER_CHUNK_BYTES


def chunk_rows(max_shard: int, itemsize: int, chunk_bytes: int | None, on_cuda: bool) -> int:
    """Rows whose logits `fused_gradient` holds at once: each chunk of them reads and writes all of dW.

    The same for every batch, and never asked of the free memory: another number would round dW's sums differently.
    """
    row_bytes = max(1, max_shard) * itemsize
    if chunk_bytes is not None:
        return max(1, chunk_bytes // row_bytes)
    if on_cuda:
        return max(CUDA_CHUNK_ROWS, CUDA_CHUNK_BYTES // row_bytes)
    return max(16, CPU_CHUNK_BYTES // row_bytes)


@dataclass(frozen=True, slots=True)
class Head:
    """This rank's rows of the LM head, without padding rows, and where they stand among the ranks'."""

    weight: torch.Tensor
    """[rows, H], detached. May have no rows."""
    start: int
    """Token id of the first row."""
    vocab_size: int
    """Token ids over all ranks, without padding."""
    max_shard: int
    """Rows of the largest shard: whatever sets the number of collectives must be equal on every rank."""
    inv_temperature: float
    group: dist.ProcessGroup | None
    chunk_bytes: int | None

    @property
    def num_ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of logits and sums: FP32 (FP64 for FP64 weights)."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def operand_dtype(self) -> torch.dtype:
        """BF16 operands with FP32 output where the BLAS can (CUDA); elsewhere tiles are widened, which is exact."""
        return self.weight.dtype if self.weight.is_cuda else self.compute_dtype

    @property
    def tile_elements(self) -> int:
        limit = CUDA_TILE_BYTES if self.weight.is_cuda else CPU_TILE_BYTES
        return max(1, min(limit, self.chunk_bytes or limit) // self.compute_dtype.itemsize)

    def tile_width(self, num_rows: int) -> int:
        """Columns of a tile of so many rows: equal tiles, a multiple of TILE_MULTIPLE where the limit leaves room for one."""
        shard = max(1, self.weight.shape[0])
        limit = max(1, self.tile_elements // max(1, num_rows))
        if limit < TILE_MULTIPLE:
            return limit
        limit -= limit % TILE_MULTIPLE
        num_tiles = -(-shard // limit)
        return -(-shard // (num_tiles * TILE_MULTIPLE)) * TILE_MULTIPLE

    def chunk_rows(self) -> int:
        return chunk_rows(self.max_shard, self.compute_dtype.itemsize, self.chunk_bytes, self.weight.is_cuda)

    def tiles(self, width: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tiles of the vocabulary: the slice of this rank's rows, and those rows as matmul operands."""
        for begin in range(0, self.weight.shape[0], width):
            columns = slice(begin, min(begin + width, self.weight.shape[0]))
            yield columns, self.weight[columns].to(self.operand_dtype)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """hidden weight^T / temperature as the first numbers of the flat `buffer`."""
        out = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
        if hidden.dtype == out.dtype:
            return torch.addmm(out, hidden, weight.T, beta=0, alpha=self.inv_temperature, out=out)
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        return out if self.inv_temperature == 1.0 else out.mul_(self.inv_temperature)


@dataclass(frozen=True, slots=True)
class GradientSums:
    """Where gradients are accumulated. None: not asked for."""

    hidden: torch.Tensor | None
    """[n, H] of the compacted rows, compute dtype; this rank's share (the sum over ranks is the gradient)."""
    weight: torch.Tensor | None
    """[rows, H] of the head, any float dtype."""

    def add(self, rows: slice, columns: slice, dz: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        if self.hidden is not None:
            _add_matmul(self.hidden[rows], dz, weight)
        if self.weight is not None:
            _add_matmul(self.weight[columns], dz.T, hidden)


def measure(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> SoftmaxRows:
    """Softmax of the rows [n, H], with log-probs of ids [n, P]. One all-gather."""
    num_rows = hidden.shape[0]
    statistics = empty_statistics(num_rows, ids.shape[1], like=hidden.new_empty(0, dtype=head.compute_dtype))
    for rows, columns, weight, buffer, scratch in _recompute_tiles(head, num_rows):
        logits = head.logits(hidden[rows], weight, buffer)
        update_statistics(statistics[:, rows], logits, ids[rows] - (head.start + columns.start), scratch)
    return combine_over_ranks(statistics, head.group)


def recomputed_gradient(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    softmax: SoftmaxRows,
    scales: LogitScales,
    sums: GradientSums,
) -> None:
    """Gradients of rows that `measure` has seen; everything is [n]. No collective."""
    for rows, columns, weight, buffer, scratch in _recompute_tiles(head, hidden.shape[0]):
        logits = head.logits(hidden[rows], weight, buffer)
        dz = _logit_gradient(head, logits, softmax, scales, targets, rows, columns, scratch)
        sums.add(rows, columns, dz, hidden[rows], weight)


def fused_gradient(
    head: Head,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    scales_of: Callable[[slice, SoftmaxRows], LogitScales],
    sums: GradientSums,
) -> None:
    """Gradient of all rows, chunk by chunk, one all-gather each; `scales_of(rows, softmax)` asks the objective."""
    num_rows, chunk_rows = hidden.shape[0], min(head.chunk_rows(), max(1, hidden.shape[0]))
    width = head.tile_width(chunk_rows)
    buffer = hidden.new_empty(chunk_rows * head.weight.shape[0], dtype=head.compute_dtype)
    scratch = new_scratch(buffer, chunk_rows * min(width, head.weight.shape[0]))
    for begin in range(0, num_rows, chunk_rows):
        rows = slice(begin, min(begin + chunk_rows, num_rows))
        chunk = hidden[rows]
        statistics = empty_statistics(chunk.shape[0], ids.shape[1], like=buffer)
        tiles = []
        for columns, weight in head.tiles(width):
            logits = head.logits(chunk, weight, buffer[columns.start * chunk_rows :])
            update_statistics(statistics, logits, ids[rows] - (head.start + columns.start), scratch)
            tiles.append(logits)
        softmax = combine_over_ranks(statistics, head.group)
        scales = scales_of(rows, softmax)
        for (columns, weight), logits in zip(head.tiles(width), tiles, strict=True):
            dz = _logit_gradient(head, logits, softmax, scales, ids[rows, 0], slice(None), columns, scratch)
            sums.add(rows, columns, dz, chunk, weight)


def _recompute_tiles(
    head: Head, num_rows: int
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(rows, columns, weight tile, buffer, scratch), vocabulary outside: a tile of W and of dW is visited once."""
    tile_rows = CUDA_TILE_ROWS if head.weight.is_cuda else CPU_TILE_ROWS
    block = max(1, min(num_rows, tile_rows, head.tile_elements // TILE_MULTIPLE))
    width = head.tile_width(block)
    buffer = head.weight.new_empty(block * min(width, max(1, head.weight.shape[0])), dtype=head.compute_dtype)
    scratch = new_scratch(buffer, buffer.shape[0])
    for columns, weight in head.tiles(width):
        for begin in range(0, num_rows, block):
            yield slice(begin, min(begin + block, num_rows)), columns, weight, buffer, scratch


def _logit_gradient(
    head: Head,
    logits: torch.Tensor,
    softmax: SoftmaxRows,
    scales: LogitScales,
    targets: torch.Tensor,
    rows: slice,
    columns: slice,
    scratch: torch.Tensor | None,
) -> torch.Tensor:
    """dz of the given rows, with the temperature's 1/T already in it."""
    target_scale, entropy_scale = scales
    return logit_gradient_(
        logits,
        softmax.select(rows),
        target_scale[rows] * head.inv_temperature,
        None if entropy_scale is None else entropy_scale[rows] * head.inv_temperature,
        targets[rows] - (head.start + columns.start),
        head.operand_dtype,
        scratch,
    )


def _add_matmul(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, accumulated in FP32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)

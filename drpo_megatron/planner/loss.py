"""Memory of the policy loss on the last stage: the kernel that tiles the vocabulary, and plain logits beside it."""

from __future__ import annotations

from drpo_megatron.config import Config
from drpo_megatron.planner.activations import tokens_of_rank
from drpo_megatron.planner.model import Model
from drpo_megatron.trainer.setup import padded_vocab_size
from drpo_megatron.trainer.vocab_parallel_chunks import (
    CPU_TILE_BYTES,
    CUDA_CHUNK_ROWS,
    CUDA_TILE_BYTES,
    chunk_rows,
    loss_chunk_bytes,
)

_LOGIT_BYTES = 4
_PLAIN_BYTES_A_LOGIT = 12
"""Plain logits in FP32, their log-softmax, and the gradient."""


def loss_workspace_bytes(model: Model, config: Config) -> tuple[int, int]:
    """(with this kernel, with plain logits) of one micro-batch."""
    shard, tokens = _shard(model.vocab_size, config), tokens_of_rank(config)
    width = 2 if config.trainer.dtype == "bf16" else 4
    rows = tokens * model.hidden * (width + 4)  # Gathered hidden states, and their gradient in FP32.
    chunk = _LOGIT_BYTES * shard * min(tokens, _chunk_rows(shard, config))
    tile = CUDA_TILE_BYTES if _on_gpu(config) else CPU_TILE_BYTES
    return rows + chunk + tile, rows + _PLAIN_BYTES_A_LOGIT * tokens * shard


def chunk_line(vocab_size: int, config: Config) -> str:
    """How many rows a chunk has, how often the head's gradient is read and written, and why not seldomer."""
    shard, tokens = _shard(vocab_size, config), tokens_of_rank(config)
    if config.trainer.loss_low_memory:
        return "no chunks of logits under trainer.loss_low_memory=true"
    rows = min(tokens, _chunk_rows(shard, config))
    walks = -(-tokens // rows)
    line = (
        f"{rows} of {tokens} rows of logits at once, so the head's gradient is read and written {walks} x a micro-batch"
    )
    given = config.trainer.loss_chunk_mb
    if given is not None and _on_gpu(config) and rows < min(tokens, CUDA_CHUNK_ROWS):
        needed = -(-CUDA_CHUNK_ROWS * _LOGIT_BYTES * shard // 2**20)
        line += (
            f"; fewer than {CUDA_CHUNK_ROWS} rows, because trainer.loss_chunk_mb={given}: give {needed} or leave it out, "
            "where the memory allows"
        )
    return line


def _shard(vocab_size: int, config: Config) -> int:
    """Rows of the LM head on a tensor-parallel rank."""
    return padded_vocab_size(vocab_size, config.parallel.tensor) // config.parallel.tensor


def _chunk_rows(shard: int, config: Config) -> int:
    on_gpu = _on_gpu(config)
    return chunk_rows(shard, _LOGIT_BYTES, loss_chunk_bytes(config.trainer.loss_chunk_mb, on_gpu), on_gpu)


def _on_gpu(config: Config) -> bool:
    return config.trainer.backend != "cpu"

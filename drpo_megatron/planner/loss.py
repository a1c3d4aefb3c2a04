"""Memory of the policy loss on the last stage: the kernel that tiles the vocabulary, and plain logits beside it."""

from __future__ import annotations

from drpo_megatron.config import Config
from drpo_megatron.planner.activations import tokens_of_rank
from drpo_megatron.planner.model import Model
from drpo_megatron.trainer.setup import padded_vocab_size

_CHUNK_BYTES = {"cpu": 64 * 2**20, "gpu": 2**30}
"""Of FP32 logits, where trainer.loss_chunk_mb is not given."""
_TILE_BYTES = {"cpu": 2**21, "gpu": 2**28}
"""What the kernel keeps of the logits under trainer.loss_low_memory, and its scratch otherwise."""
_PLAIN_BYTES_A_LOGIT = 12
"""Plain logits in FP32, their log-softmax, and the gradient."""


def loss_workspace_bytes(model: Model, config: Config) -> tuple[int, int]:
    """(with this kernel, with plain logits) of one micro-batch."""
    platform = "cpu" if config.trainer.backend == "cpu" else "gpu"
    tokens, tensor = tokens_of_rank(config), config.parallel.tensor
    num_logits = tokens * padded_vocab_size(model.vocab_size, tensor) // tensor
    width = 2 if config.trainer.dtype == "bf16" else 4
    rows = tokens * model.hidden * (width + 4)  # Gathered hidden states, and their gradient in FP32.
    megabytes = config.trainer.loss_chunk_mb
    chunk = min(megabytes * 2**20 if megabytes else _CHUNK_BYTES[platform], 4 * num_logits)
    return rows + chunk + _TILE_BYTES[platform], rows + _PLAIN_BYTES_A_LOGIT * num_logits

"""How per-token losses become one number: as a constant weight a token, known before any forward pass.

Because the weights are made from the whole global batch of an optimiser step, the loss is a plain sum afterwards: it
cannot depend on the split into micro-batches, the packing or the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

AggregationMode = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def token_weights(
    num_response_tokens_per_sequence: Sequence[int], mode: AggregationMode, horizon: int | None = None
) -> list[float]:
    """The weight of every live token of each sequence, so that sum(weights * loss) over the global batch is the loss.

        token-mean               1 / (all live tokens)                         DAPO, arXiv:2503.14476
        seq-mean-token-mean      1 / (sequences * the sequence's live tokens)  GRPO, arXiv:2402.03300
        seq-mean-token-sum-norm  1 / (sequences * horizon)                     Dr. GRPO, arXiv:2503.20783; DRPO's runs

    `num_response_tokens_per_sequence` speaks of the whole global batch, not of one rank's share. A sequence without
    live tokens has the weight 0 and does not count as a sequence. Raises ValueError for a negative count, an unknown
    mode, and seq-mean-token-sum-norm without a positive horizon.
    """
    counts = list(num_response_tokens_per_sequence)
    if any(count < 0 for count in counts):
        raise ValueError(f"num_response_tokens_per_sequence holds {min(counts)}; counts cannot be negative")
    num_tokens, num_sequences = sum(counts), sum(count > 0 for count in counts)
    if mode == "token-mean":
        return [1 / num_tokens if count else 0.0 for count in counts]
    if mode == "seq-mean-token-mean":
        return [1 / (num_sequences * count) if count else 0.0 for count in counts]
    if mode != "seq-mean-token-sum-norm":
        raise ValueError(
            f"aggregation={mode!r} is unknown; use token-mean, seq-mean-token-mean or seq-mean-token-sum-norm"
        )
    if horizon is None or horizon <= 0:
        raise ValueError(f"aggregation=seq-mean-token-sum-norm needs a horizon of at least 1 token; it is {horizon}")
    return [1 / (num_sequences * horizon) if count else 0.0 for count in counts]

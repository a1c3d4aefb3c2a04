"""What every policy objective takes and gives: per-token vectors, nothing of the vocabulary or of ranks.

The vocab-parallel kernel computes log-probs, calls the objective once, and turns `coef` into the gradient of the
logits. A new objective therefore needs no kernel work and no autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """Live response tokens only (masked and bad-mu rows never get here). All [T] FP32, detached.

    `anchor_logprobs` is what the ratio is taken against: behavior_logprobs for `anchor: rollout`, old_logprobs for
    `anchor: recompute`. Core formulas read `logprobs`, `anchor_logprobs` and `advantages` only.
    """

    logprobs: torch.Tensor
    """log pi of the sampled token under the trained policy, at the sampling temperature."""
    behavior_logprobs: torch.Tensor
    """log mu: what the rollout engine reported. Finite, <= 0."""
    advantages: torch.Tensor
    anchor_logprobs: torch.Tensor
    weights: torch.Tensor
    """mask / global normaliser. Only sequence-level objectives need it."""
    old_logprobs: torch.Tensor | None = None
    """log pi_old: the trainer's own, before the first optimiser step of the batch."""
    reference_logprobs: torch.Tensor | None = None
    """log pi_ref of a frozen reference policy, for the optional KL term."""
    sequence_ids: torch.Tensor | None = None
    """[T] int64. Tokens of one sequence share an id; needed by sequence-level objectives and corrections."""
    topk_logprobs: torch.Tensor | None = None
    """[T, K] log pi of the engine's top-k tokens (dppo top-k only)."""
    topk_behavior_logprobs: torch.Tensor | None = None
    """[T, K] log mu of the same tokens."""
    log_ratio_max: float = 20.0
    """Upper limit of log r; the coefficient uses the truncated ratio."""


@dataclass(frozen=True, slots=True)
class ObjectiveOutputs:
    """All [T] FP32, not multiplied by `weights`: the batch's loss is sum(weights * loss)."""

    loss: torch.Tensor
    """Per-token loss, to be minimised. Exactly 0 where the advantage is 0 (and there is no KL term)."""
    coef: torch.Tensor
    """d(sum_s weights_s loss_s) / d logprobs_t divided by weights_t: what multiplies grad log pi_t. For a per-token
    objective d loss_t / d logprobs_t."""
    weight: torch.Tensor
    """w of coef = -A r w: the multiplier of the unregularised policy gradient (1 for pg, 0 where clipped or masked,
    negative where DRPO corrects). 1 where the advantage is 0; truncated where r underflows."""


class Objective(Protocol):
    """A built objective. `build` in `drpo_megatron.objectives` makes one from its config."""

    name: str
    sequence_level: bool
    """True when coef of one token depends on the log-probs of the other tokens of its sequence: the kernel then
    needs all log-probs before the first coefficient (two passes)."""
    needs_old_logprobs: bool
    needs_reference_logprobs: bool
    num_topk: int
    """How many of the engine's top tokens it needs (0 for almost all)."""

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutputs: ...


CoreFormula = Callable[[ObjectiveInputs], ObjectiveOutputs]

"""The records that travel once around the loop, in the order in which they come to be.

    Prompt -> Completion -> RolloutGroup -> Sample -> PackedBatch -> StepReport

All are frozen. Token ids and log-probs of single sequences are plain tuples (they cross process
boundaries often and stay small); only `PackedBatch`, which never leaves a trainer rank, holds tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, tokenised once by the chat template.

    Example:
        Prompt(prompt_id="train-17", token_ids=(1, 8, 12, 9, 3), answer="16", text="3+8+5=")
    """

    prompt_id: str
    """Unique within its file; the key of everything derived from the prompt (seeds, dumps, logs)."""
    token_ids: tuple[int, ...]
    """Chat template already applied, generation prompt included: exactly what the engine continues."""
    answer: str
    """What the reward compares with. Never shown to the policy."""
    text: str = ""
    """The user's question before the chat template, for logs and reward functions."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The rest of the JSONL line, handed to reward functions."""


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """Which experts the engine's routers chose for a sequence, as bytes: a long one has millions of them.

    Row t is of the token at position t of prompt + response. The last token drawn was never fed to the model, so there
    are len(prompt) + len(response) - 1 rows.
    """

    shape: tuple[int, int, int]
    """(tokens, layers with experts, experts a token)"""
    data: bytes
    """Expert ids in C order: one byte each, or two (little-endian, signed) where an id is above 255."""

    @staticmethod
    def of(ids: np.ndarray) -> RoutedExperts:
        """Packs integers [tokens, layers with experts, experts a token], none negative."""
        tokens, layers, experts = ids.shape
        small = ids.max(initial=0) < 256
        return RoutedExperts((tokens, layers, experts), ids.astype(np.uint8 if small else "<i2").tobytes())

    def ids(self) -> np.ndarray:
        """A read-only view of the ids, in the shape."""
        is_small = len(self.data) == math.prod(self.shape)
        return np.frombuffer(self.data, np.uint8 if is_small else "<i2").reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine drew for one prompt, with the probability it drew each token with.

    Example:
        Completion(token_ids=(6, 4, 2), logprobs=(-0.1, -0.7, -0.01), finish_reason="stop", text="64", policy_version=3)
    """

    token_ids: tuple[int, ...]
    """Sampled tokens in order. A stop token (EOS) that was sampled is the last of them: it is trained too."""
    logprobs: tuple[float, ...]
    """log mu of every token: natural log, of the distribution actually sampled from, at the sampling temperature."""
    finish_reason: FinishReason
    text: str
    """Decoded token_ids without special tokens; what the reward reads."""
    policy_version: int
    """The weights that drew it (count of optimiser steps' publications; 0 = the initial weights); the oldest of several."""
    topk_ids: tuple[tuple[int, ...], ...] | None = None
    """The K most probable tokens at every position, most probable first. None: not asked for."""
    topk_logprobs: tuple[tuple[float, ...], ...] | None = None
    """log mu of topk_ids."""
    routed_experts: RoutedExperts | None = None
    """Of prompt and response. None: not asked for."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(policy version, number of tokens that it drew), in order, where weights changed on the way. Empty: one drew all."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G completions of one prompt and their rewards: the unit over which advantages are centred."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    reward_metrics: tuple[Mapping[str, float], ...] = ()
    """What the reward returned beside the number, of every completion. Empty: nothing of any."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on. Prompt tokens are context only; response tokens carry the loss."""

    sample_id: str
    """`{prompt_id}/{index in group}`, unique within a rollout."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    behavior_logprobs: tuple[float, ...]
    """log mu of every response token. Same length as response_ids."""
    advantage: float
    """The sequence's advantage, broadcast to its response tokens."""
    policy_version: int = 0
    old_logprobs: tuple[float, ...] | None = None
    """log pi_old of every response token, by the trainer before the first optimiser step (anchor: recompute)."""
    reference_logprobs: tuple[float, ...] | None = None
    """log pi_ref of every response token, by the trainer with its frozen reference weights (kl_ref)."""
    topk_ids: tuple[tuple[int, ...], ...] | None = None
    """The engine's K most probable tokens at every response token, for objectives that compare with them."""
    topk_behavior_logprobs: tuple[tuple[float, ...], ...] | None = None
    """log mu of topk_ids."""
    routed_experts: RoutedExperts | None = None
    """The engine's, of prompt and response (trainer.routing_replay)."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one data-parallel rank: whole sequences laid end to end (THD), padded at the end.

    T is the padded length, a multiple of what TP and CP need. Position t of the per-token vectors speaks of the
    *next* token: `targets[t]` is the token that the logits at position t predict, and the other vectors are its own.
    """

    input_ids: torch.Tensor
    """[T] int64. Padding holds the tokenizer's pad id."""
    position_ids: torch.Tensor
    """[T] int64, restarting at 0 with every sequence."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32, ends of the sequences with their padding; the last entry is T."""
    max_seqlen: int
    targets: torch.Tensor
    """[T] int64, -100 where weights is 0."""
    behavior_logprobs: torch.Tensor
    """[T] FP32, log mu of targets."""
    advantages: torch.Tensor
    """[T] FP32."""
    weights: torch.Tensor
    """[T] FP32: the mask over the global normaliser, so that sum(weights * loss) over the whole global batch is the loss."""
    old_logprobs: torch.Tensor | None
    """[T] FP32 or None."""
    reference_logprobs: torch.Tensor | None
    """[T] FP32 or None."""
    topk_ids: torch.Tensor | None
    """[T, K] int64 or None: the engine's most probable tokens in the place of targets."""
    topk_behavior_logprobs: torch.Tensor | None
    """[T, K] FP32 or None, log mu of topk_ids."""
    routed_experts: torch.Tensor | None
    """[T, layers with experts, experts a token] int16 or None: the engine's choice for the token at each position itself;
    -1 where there is none: padding, and the last token of every sequence."""
    sequence_ids: torch.Tensor
    """[T] int64, the index of the token's sequence in `sample_ids`; -1 in padding."""
    sample_ids: tuple[str, ...]
    """Names of the sequences, in order."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What `train_step` says of one batch (all of its optimiser steps)."""

    policy_version: int
    """The version of the weights after the step."""
    metrics: dict[str, float]
    """Reduced over all ranks, named `group/name/statistic`."""
    num_tokens: int
    """Tokens (prompt and response, without padding) that went through forward and backward."""

"""How much one step of a run asks of its ranks: sequences, tokens, micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config import Config
from drpo_megatron.planner.hardware import MEAN_RESPONSE_SHARE, PROMPT_TOKENS


@dataclass(frozen=True, slots=True)
class Work:
    num_sequences: int
    """Of a rollout."""
    num_updates: int
    """Optimiser steps on it."""
    prompt_tokens: int
    """Mean of a prompt."""
    mean_response_tokens: float
    longest_tokens: int
    """Of a prompt and its response."""
    num_micro_batches: int
    """Of a data-parallel rank in one optimiser step."""
    tokens_per_micro_batch: float
    """Of a rank, after context parallelism, on average."""

    @property
    def mean_tokens(self) -> float:
        """Of a sequence."""
        return self.prompt_tokens + self.mean_response_tokens

    @property
    def num_tokens(self) -> float:
        """Of a rollout, prompts included."""
        return self.num_sequences * self.mean_tokens


def work_of(config: Config) -> Work:
    rollout, trainer, parallel = config.rollout, config.trainer, config.parallel
    num_sequences, num_updates = (
        rollout.prompts_per_step * rollout.samples_per_prompt,
        trainer.optimizer_steps_per_rollout,
    )
    prompt = min(PROMPT_TOKENS, config.data.max_prompt_tokens or PROMPT_TOKENS)
    response = rollout.max_response_tokens * MEAN_RESPONSE_SHARE
    tokens = num_sequences / num_updates * (prompt + response) / parallel.data
    num_micro_batches = max(1, math.ceil(tokens / trainer.max_tokens_per_micro_batch))
    if parallel.virtual_pipeline:
        num_micro_batches = math.ceil(num_micro_batches / parallel.pipeline) * parallel.pipeline
    return Work(
        num_sequences=num_sequences,
        num_updates=num_updates,
        prompt_tokens=prompt,
        mean_response_tokens=response,
        longest_tokens=(config.data.max_prompt_tokens or prompt) + rollout.max_response_tokens,
        num_micro_batches=num_micro_batches,
        tokens_per_micro_batch=tokens / num_micro_batches / parallel.context,
    )

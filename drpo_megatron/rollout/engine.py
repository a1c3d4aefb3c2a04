"""What a rollout engine is: it continues prompts, says with which probability it drew every token, and takes weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from drpo_megatron.types import Completion


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw. temperature 0 is greedy (evaluation only; mu is then reported at T = 1)."""

    max_response_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    num_topk: int = 0
    """How many of the most probable tokens to report with every draw. Has no influence on the draw."""
    routed_experts: bool = False
    """Report the experts of every token, prompts included. Models with experts only; no influence on the draw."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to draw. A group of G samples is G requests with G seeds."""

    request_id: str
    """`{prompt_id}/{index in group}`; a retried request keeps its id, so a sample can't be doubled."""
    prompt_ids: tuple[int, ...]
    seed: int
    """Draws depend on it alone (with the prompt and the weights), not on what else is in the batch, where the engine can."""


class RolloutEngine(Protocol):
    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """Completions in the order of the requests."""
        ...

    def stream(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> Iterator[list[tuple[int, Completion]]]:
        """The same (index of the request, completion) pairs as `generate`, some at a time, as they are drawn."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy HF-named tensors into the model. May be called many times (buckets) before `finish_update`."""
        ...

    def finish_update(self, policy_version: int, expected_checksums: dict[str, str]) -> None:
        """Publish the version after verifying every tensor's checksum; ValueError names the tensors that differ or miss."""
        ...

"""Either side of an engine call: what to draw for a rollout's prompts, and what to train on of what was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from drpo_megatron.objectives.advantages import AdvantageName, group_advantages
from drpo_megatron.rollout.engine import GenerationRequest
from drpo_megatron.types import Prompt, RolloutGroup, Sample


def make_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, *, step: int, seed: int
) -> list[GenerationRequest]:
    """`samples_per_prompt` requests of every prompt, in the order of the prompts.

    A request's seed follows from (run seed, step, prompt id, index) alone: not from the order of prompts, the process,
    or how often the run was resumed.
    """
    return [
        GenerationRequest(
            request_id=f"{prompt.prompt_id}/{index}",
            prompt_ids=prompt.token_ids,
            seed=_request_seed(seed, step, prompt.prompt_id, index),
        )
        for prompt in prompts
        for index in range(samples_per_prompt)
    ]


def _request_seed(seed: int, step: int, prompt_id: str, index: int) -> int:
    """63 bits, which torch generators and servers alike take."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def to_samples(groups: Sequence[RolloutGroup], advantages: AdvantageName) -> list[Sample]:
    """One sample a completion, with its advantage within its group. Completions without tokens are left out.

    Raises ValueError if a prompt has two groups, because sample ids would no longer be unique.
    """
    samples: list[Sample] = []
    seen: set[str] = set()
    for group in groups:
        prompt = group.prompt
        if prompt.prompt_id in seen:
            raise ValueError(f"prompt {prompt.prompt_id} has two groups in one rollout; its samples' ids would clash")
        seen.add(prompt.prompt_id)
        group_values = group_advantages(group.rewards, advantages)
        for index, (completion, advantage) in enumerate(zip(group.completions, group_values, strict=True)):
            if completion.token_ids:
                samples.append(
                    Sample(
                        sample_id=f"{prompt.prompt_id}/{index}",
                        prompt_ids=prompt.token_ids,
                        response_ids=completion.token_ids,
                        behavior_logprobs=completion.logprobs,
                        advantage=advantage,
                        policy_version=completion.policy_version,
                        topk_ids=completion.topk_ids,
                        topk_behavior_logprobs=completion.topk_logprobs,
                        routed_experts=completion.routed_experts,
                    )
                )
    return samples

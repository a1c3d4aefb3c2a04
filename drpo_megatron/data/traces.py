"""Whether the routed experts that engines report are of the samples and the model they came with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from drpo_megatron.config.hf_config import ExpertRouting
from drpo_megatron.types import Sample


def check_traces(samples: Sequence[Sample], routing: ExpertRouting, *, required: bool) -> None:
    """Raises ValueError that names the first sample whose trace is missing, or isn't one of this model.

    Args:
        required: every sample must have one; else all or none.
    """
    required = required or any(sample.routed_experts is not None for sample in samples)
    for sample in samples:
        if (trace := sample.routed_experts) is None:
            if required:
                raise ValueError(
                    f"sample {sample.sample_id} has no routed experts, and routing can't be guessed; let the engine "
                    "report them for all samples (trainer.routing_replay), or set trainer.routing_replay=off"
                )
            continue
        expected = (sample.num_tokens - 1, len(routing.moe_layers), routing.experts_per_token)
        if trace.shape != expected:
            raise ValueError(
                f"sample {sample.sample_id}: routed experts have shape {trace.shape}, but its "
                f"{len(sample.prompt_ids)} + {len(sample.response_ids)} tokens need {expected} (tokens but the last, "
                "layers with experts, experts a token); the engine serves another model, or lost a part"
            )
        ids = trace.ids()
        # A router never chooses an expert twice; rows that nobody filled in repeat one value.
        if ids.min() < 0 or ids.max() >= routing.num_experts or np.any(ids[..., 1:] == ids[..., :-1]):
            raise ValueError(
                f"sample {sample.sample_id}: its routed experts are none: ids from {ids.min()} to {ids.max()}, "
                f"{routing.experts_per_token} different ones of {routing.num_experts} in each row were expected; "
                "the engine's report is damaged"
            )

"""How often a step may wait for the device, and whose lines may."""

from __future__ import annotations

from typing import Any

COPIES_A_MICRO_BATCH, COPIES_A_STEP = 2, 10
OBJECTS = 2
"""Copies to the device of a line: an object broadcast has two, its size and its bytes."""
MEGATRONS = {
    # The dispatcher copies how many tokens go to which expert, in every layer with experts; masked_select there is the
    # unfused permutation's, in the place of Transformer Engine's kernel.
    "megatron/core/transformer/moe/moe_utils.py",
    "megatron/core/transformer/moe/token_dispatcher.py",
    "megatron/core/tensor_parallel/layers.py",  # The embedding's rows of other ranks, by a boolean index.
    "megatron/core/pipeline_parallel/schedules.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/optimizer/clip_grads.py",  # The norm, once an optimizer.
    "megatron/core/optimizer/optimizer.py",
    "transformer_engine/pytorch/utils.py",  # An empty tensor, made once in a process.
    # The torch rule of gated delta nets: with flash-linear-attention a kernel's.
    "megatron/core/ssm/gated_delta_net.py",
    "megatron/core/ssm/gated_delta_net/common.py",
}
WITHOUT_ENGINE = {"megatron/core/models/common/embeddings/rope_utils.py"}
"""Lengths of the packed sequences, twice a layer."""


def problems(rank: dict[str, Any], allowed: set[str]) -> list[str]:
    """Of one rank's step: lines beyond the budget, with how often they waited. [] if it is kept."""
    ours = {key: count for key, count in rank["waits"].items() if key[1] == key[2]}
    budget = COPIES_A_MICRO_BATCH * rank["micro_batches"] + COPIES_A_STEP
    sent = {line: n for (what, line, _), n in ours.items() if "copy to the device" in what}
    found = [f"{n} x copy to the device, pageable or blocking, at {line}" for line, n in sent.items() if n > OBJECTS]
    if sum(ours.values()) > budget:
        lines = ", ".join(f"{n} x {what} at {line}" for (what, line, _), n in ours.items())
        found.append(f"{sum(ours.values())} waits, the budget is {budget}: {lines}")
    for (what, line, inner), count in rank["waits"].items():
        if line != inner and inner.rpartition(":")[0] not in allowed:
            found.append(f"{count} x {what} at {inner}, called from {line}")
    return found

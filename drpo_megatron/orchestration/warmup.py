"""Supervised warm-up before RL: maximum likelihood on demonstrations, by the same trainer ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from drpo_megatron.config.sections import WarmupSection
from drpo_megatron.orchestration.workers import ActorGroup
from drpo_megatron.types import Sample

_NUM_LINES = 5
"""How often the progress is said."""


def warm_up(
    section: WarmupSection, seed: int, demonstrations: Sequence[Sample], ranks: ActorGroup, say: Callable[[str], None]
) -> dict[str, float]:
    """All optimiser steps of the warm-up; then the ranks start RL with a fresh optimizer.

    Returns: metrics: the loss of the first and of the last step.
    """
    losses = []
    batches = shuffled_batches(demonstrations, section.sequences_per_step, seed)
    for step in range(1, section.num_steps + 1):
        report = ranks.call("supervised_step", next(batches))[0]
        losses.append(report.metrics["objective/loss"])
        if step == 1 or step % max(1, section.num_steps // _NUM_LINES) == 0:
            say(f"warm-up step {step}/{section.num_steps}: loss {losses[-1]:.3f}")
    ranks.call("start_rl")
    return {"warmup/loss/first": losses[0], "warmup/loss/last": losses[-1]}


def shuffled_batches(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of `size` without end. Every pass over the samples is in a new order; a batch may span two passes."""
    generator = random.Random(seed)
    queue: list[Sample] = []
    while True:
        while len(queue) < size:
            queue += generator.sample(samples, len(samples))
        yield queue[:size]
        del queue[:size]

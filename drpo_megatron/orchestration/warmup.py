"""Supervised warm-up before RL: maximum likelihood on demonstrations, by the same trainer ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from drpo_megatron.config.sections import WarmupSection
from drpo_megatron.orchestration.workers import ActorGroup
from drpo_megatron.types import Sample

_NUM_LINES = 5
"""How often the progress is said."""


@dataclass(frozen=True, slots=True)
class WarmupProgress:
    num_steps: int
    """Done so far."""
    first_loss: float
    last_loss: float


def warm_up(
    section: WarmupSection,
    seed: int,
    demonstrations: Sequence[Sample],
    ranks: ActorGroup,
    say: Callable[[str], None],
    before: WarmupProgress | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> WarmupProgress:
    """The optimiser steps of the warm-up that are left after `before`; then the ranks start RL with a fresh optimizer.

    Once `must_stop()`, it ends after the present step, and the ranks stay as they are: they save it as a warm-up.
    """
    batches, done = shuffled_batches(demonstrations, section.sequences_per_step, seed), before
    for _ in range(done.num_steps if done else 0):
        next(batches)
    for step in range((done.num_steps if done else 0) + 1, section.num_steps + 1):
        loss = ranks.call("supervised_step", next(batches))[0].metrics["objective/loss"]
        done = WarmupProgress(step, done.first_loss if done else loss, loss)
        if step == 1 or step % max(1, section.num_steps // _NUM_LINES) == 0:
            say(f"warm-up step {step}/{section.num_steps}: loss {loss:.3f}")
        if must_stop() and step < section.num_steps:
            return done
    assert done is not None
    ranks.call("start_rl")
    return done


def shuffled_batches(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of `size` without end. Every pass over the samples is in a new order; a batch may span two passes."""
    generator = random.Random(seed)
    queue: list[Sample] = []
    while True:
        while len(queue) < size:
            queue += generator.sample(samples, len(samples))
        yield queue[:size]
        del queue[:size]

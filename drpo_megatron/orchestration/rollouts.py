"""Rollouts for the trainer: what a step trains on, drawn in time, and some of it ahead of time.

    take(step)        prompts_per_step groups; waits for them, and asks for what is missing
    draw_ahead(step)  asks for the groups of the next max_staleness steps, and does not wait
    settle()          waits until everything that was asked for is there

    prompts --requests--> engines --completions as they are drawn--> groups --> rewards --> RolloutBuffer --take-->

Only `take` and `settle` wait; in the meantime every wait of the driver (for the trainer ranks, mostly) moves groups on.
A group goes to the rewards as soon as its last completion is there, while others are still drawn, and to the buffer as
soon as its last reward is there, while others are still scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.data.prompts import PromptStream
from drpo_megatron.objectives.advantages import is_equal_group
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.workers import EngineGroup, RewardGroup
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.rewards.scorer import Scored, metric_means
from drpo_megatron.rollout.buffer import RolloutBuffer
from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.sampler import make_requests
from drpo_megatron.types import Completion, Prompt, RolloutGroup


@dataclass(slots=True)
class _Drawing:
    """A group that has been asked for and is not in the buffer yet."""

    prompt: Prompt
    completions: list[Completion | None]
    num_missing: int


class Rollouts:
    def __init__(
        self,
        config: Config,
        engines: EngineGroup,
        rewards: RewardGroup,
        prompts: PromptStream,
        clock: Clock,
        watch: FailureWatch | None = None,
    ) -> None:
        """`watch` is told of rewards that fail."""
        self.config, self.engines, self.rewards, self.prompts, self.clock = config, engines, rewards, prompts, clock
        rollout = config.rollout
        self.params = SamplingParams(
            rollout.max_response_tokens,
            rollout.temperature,
            num_topk=config.objective.needed_topk,
            routed_experts=config.trainer.routing_replay != "off",
        )
        self.buffer = RolloutBuffer(rollout.max_staleness, replaces_equal_groups=rollout.resample_equal_groups > 0)
        self.num_tokens = 0
        """Tokens drawn so far."""
        self.num_reward_failures = 0
        """Rewards that timed out or raised so far, and counted as 0."""
        self._watch = watch or FailureWatch(print)
        self._scored: list[Scored] = []
        """Since the last `take`."""
        self._in_flight: dict[int, _Drawing] = {}
        """By ticket."""
        self._next_ticket = 0
        self._num_awaited = 0
        """Completions that are asked for and not there."""
        self._num_scorings = 0

    def take(self, step: int, policy_version: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """`prompts_per_step` groups for the trainer at `policy_version`, and the metrics of all that was drawn for them.

        Groups without a gradient (equal rewards) are replaced in up to `resample_equal_groups` further rounds. Every
        group that was drawn counts in the metrics of one step: the one that trains on it, passes it over or drops it.
        Raises ValueError when rewards fail as `FailureWatch` says.
        """
        count, buffer = self.config.rollout.prompts_per_step, self.buffer
        num_rounds = self.config.rollout.resample_equal_groups
        first_ticket = self._next_ticket
        dropped: list[RolloutGroup] = []
        with self.clock.phase("wait_for_rollouts"):
            while True:
                self._wait(lambda: buffer.num_wanted >= count)
                dropped += buffer.drop_stale(policy_version)
                num_missing = count - len(buffer) - len(self._in_flight)
                if num_missing > 0:
                    self._draw(num_missing, step)  # What there has to be at least: no further round.
                elif buffer.num_wanted >= count or (num_rounds == 0 and len(buffer) >= count):
                    break
                elif not self._in_flight:
                    self._draw(count - buffer.num_wanted, step)
                    num_rounds -= 1
        scored, self._scored = self._scored, []
        self._watch.observe(f"step {step}", *scored)
        chosen, passed_over = buffer.take(count, first_ticket)
        counters = {"rollout/num_dropped/sum": buffer.num_dropped, "reward/failures/sum": self.num_reward_failures}
        others = [*passed_over, *dropped]
        self._watch.observe_rewards(f"step {step}", [group.rewards for group in (*chosen, *others)])
        return chosen, rollout_metrics(chosen, policy_version, others=others) | counters

    def draw_ahead(self, step: int) -> None:
        """After the take of `step`: what the steps up to `max_staleness` later need, if the run has them."""
        rollout = self.config.rollout
        num_steps = min(rollout.max_staleness, self.config.run.num_steps - step)
        self._draw(num_steps * rollout.prompts_per_step - len(self._in_flight) - len(self.buffer), step + 1)

    def settle(self) -> None:
        with self.clock.phase("wait_for_rollouts"):
            self._wait(lambda: False)

    def state_dict(self) -> dict[str, Any]:
        """As JSON, of rollouts that have settled."""
        assert not self._in_flight
        return {
            "prompt_stream": self.prompts.state_dict(),
            "buffer": self.buffer.state_dict(),
            "next_ticket": self._next_ticket,
            "num_tokens": self.num_tokens,
            "num_reward_failures": self.num_reward_failures,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompt_stream"])
        self.buffer.load_state_dict(state["buffer"])
        self._next_ticket = state["next_ticket"]
        self.num_tokens = state["num_tokens"]
        self.num_reward_failures = state["num_reward_failures"]

    # --- from a prompt to a group in the buffer ---------------------------------------------------------------------

    def _wait(self, is_enough: Callable[[], bool]) -> None:
        self.engines.supervisor.wait_until(lambda: is_enough() or not self._in_flight)

    def _draw(self, count: int, step: int) -> None:
        """Ask for `count` groups of prompts that are not underway already."""
        if count <= 0:
            return
        size = self.config.rollout.samples_per_prompt
        underway = [drawing.prompt for drawing in self._in_flight.values()] + [group.prompt for group in self.buffer]
        prompts = self.prompts.take(count, exclude={prompt.prompt_id for prompt in underway})
        first = self._next_ticket
        self._next_ticket += count
        for ticket, prompt in enumerate(prompts, start=first):
            self._in_flight[ticket] = _Drawing(prompt, [None] * size, size)
        requests = make_requests(prompts, size, seed=self.config.run.seed, step=step)

        def receive(drawn: list[tuple[int, Completion]]) -> None:
            self._receive([(first + index // size, index % size, completion) for index, completion in drawn])

        self._num_awaited += len(requests)
        self.clock.begin("generate")
        self.engines.stream(requests, self.params, receive)

    def _receive(self, drawn: list[tuple[int, int, Completion]]) -> None:
        """Completions by ticket and place in the group. Each group that is complete now goes to the rewards."""
        complete = []
        for ticket, place, completion in drawn:
            drawing = self._in_flight[ticket]
            assert drawing.completions[place] is None, f"{drawing.prompt.prompt_id}/{place} was drawn twice"
            drawing.completions[place] = completion
            drawing.num_missing -= 1
            self.num_tokens += len(completion.token_ids)
            if not drawing.num_missing:
                complete.append(ticket)
        self._num_awaited -= len(drawn)
        if not self._num_awaited:
            self.clock.end("generate")
        for ticket in sorted(complete):
            self._score(ticket)

    def _score(self, ticket: int) -> None:
        prompt = self._in_flight[ticket].prompt
        completions = tuple(c for c in self._in_flight[ticket].completions if c is not None)

        def receive(scored: Scored) -> None:
            self._scored.append(scored)
            self.num_reward_failures += scored.num_failures
            metrics = tuple(scored.metrics) if any(scored.metrics) else ()
            self.buffer.put(ticket, RolloutGroup(prompt, completions, tuple(scored.rewards), metrics))
            del self._in_flight[ticket]
            self._num_scorings -= 1
            if not self._num_scorings:
                self.clock.end("reward")

        self._num_scorings += 1
        self.clock.begin("reward")
        self.rewards.submit([(prompt, completion) for completion in completions], receive)


def rollout_metrics(
    chosen: Sequence[RolloutGroup], policy_version: int, others: Sequence[RolloutGroup] = ()
) -> dict[str, float]:
    """Of all that was drawn for a step of the trainer at `policy_version`; staleness of what it trains on.

    `others` were drawn and are not trained on: passed over for others, or too old.
    """
    groups = [*chosen, *others]
    completions = [completion for group in groups for completion in group.completions]
    rewards = [reward for group in groups for reward in group.rewards]
    staleness = [policy_version - completion.policy_version for group in chosen for completion in group.completions]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return metric_means("reward", chain.from_iterable(group.reward_metrics for group in groups)) | {
        "reward/mean": math.fsum(rewards) / len(rewards),
        "rollout/num_tokens": num_tokens,
        "rollout/response_length/mean": num_tokens / len(completions),
        "rollout/equal_group_share": sum(is_equal_group(group.rewards) for group in groups) / len(groups),
        "rollout/truncated_share": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "rollout/staleness/mean": sum(staleness) / len(staleness),
        "rollout/staleness/max": max(staleness),
    }

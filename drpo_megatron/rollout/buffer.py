"""Finished groups on their way to the trainer, in the order in which they were asked for, none older than allowed."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from typing import Any

from drpo_megatron.objectives.advantages import is_equal_group
from drpo_megatron.rollout.dump import group_from_dict, group_to_dict
from drpo_megatron.types import RolloutGroup


class RolloutBuffer:
    """Groups by ticket: the place in the order in which they were asked for, which is not that of their ends.

    A group's staleness is the trainer's policy version minus the oldest version that drew any of its tokens.
    `max_staleness=0` is synchronous training.
    """

    def __init__(self, max_staleness: int, *, replaces_equal_groups: bool) -> None:
        """replaces_equal_groups: groups of equal rewards, which have no gradient, are the last choice."""
        self.max_staleness, self.replaces_equal_groups = max_staleness, replaces_equal_groups
        self.num_dropped = 0
        """Groups that were too stale when the trainer asked for them, since the run began."""
        self._groups: list[tuple[int, RolloutGroup]] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[RolloutGroup]:
        return (group for _, group in self._groups)

    @property
    def num_wanted(self) -> int:
        """How many of the groups are a first choice."""
        return sum(map(self._is_wanted, self))

    def put(self, ticket: int, group: RolloutGroup) -> None:
        insort(self._groups, (ticket, group), key=lambda item: item[0])

    def drop_stale(self, policy_version: int) -> list[RolloutGroup]:
        """Remove, count and return what the trainer at `policy_version` may no longer train on."""
        stale = [item for item in self._groups if policy_version - _version(item[1]) > self.max_staleness]
        self.num_dropped += len(stale)
        gone = {ticket for ticket, _ in stale}
        self._groups = [item for item in self._groups if item[0] not in gone]
        return [group for _, group in stale]

    def take(self, count: int, drawn_from: float = math.inf) -> tuple[list[RolloutGroup], list[RolloutGroup]]:
        """(`count` groups, those passed over for them), each in the order of their tickets.

        Groups of equal rewards come last among the `count`. Passed over are those of them that were not needed and had
        an earlier ticket than the last of the `count`, or one from `drawn_from` on, which stands for what was drawn to
        replace them; they leave the buffer, too. What was drawn ahead for later steps stays.
        """
        wanted = [item for item in self._groups if self._is_wanted(item[1])]
        others = [item for item in self._groups if not self._is_wanted(item[1])]
        chosen = [*wanted, *others][:count]
        last = max((ticket for ticket, _ in chosen), default=-1)
        left = others[max(0, count - len(wanted)) :]
        passed_over = [item for item in left if item[0] < last or item[0] >= drawn_from]
        gone = {ticket for ticket, _ in (*chosen, *passed_over)}
        self._groups = [item for item in self._groups if item[0] not in gone]
        groups = sorted((group for _, group in chosen), key=lambda group: is_equal_group(group.rewards))
        return groups, [group for _, group in passed_over]

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, as JSON."""
        groups = [{"ticket": ticket} | group_to_dict(group) for ticket, group in self._groups]
        return {"num_dropped": self.num_dropped, "groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_dropped = state["num_dropped"]
        place = "the saved rollout buffer"
        self._groups = [(fields["ticket"], group_from_dict(fields, place)) for fields in state["groups"]]

    def _is_wanted(self, group: RolloutGroup) -> bool:
        return not (self.replaces_equal_groups and is_equal_group(group.rewards))


def _version(group: RolloutGroup) -> int:
    return min(completion.policy_version for completion in group.completions)

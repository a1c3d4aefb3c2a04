"""Finished groups on their way to the trainer, first in, first out, none older than allowed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from drpo_megatron.rollout.dump import group_from_dict
from drpo_megatron.types import RolloutGroup


class RolloutBuffer:
    """Groups in the order in which they were finished.

    A group's staleness is the trainer's policy version minus the oldest version that drew any of its completions.
    `max_staleness=0` is synchronous training.
    """

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self.num_dropped = 0
        """Groups that were too stale when the trainer asked for them, since the run began."""
        self._groups: deque[RolloutGroup] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def put(self, groups: Iterable[RolloutGroup]) -> None:
        self._groups.extend(groups)

    def take(self, count: int, policy_version: int) -> list[RolloutGroup]:
        """The `count` oldest groups that are fresh enough for `policy_version`; none at all while there are too few.

        Groups that are too stale are dropped and counted.
        """
        fresh = [group for group in self._groups if policy_version - _version(group) <= self.max_staleness]
        self.num_dropped += len(self._groups) - len(fresh)
        taken = fresh[:count] if len(fresh) >= count else []
        self._groups = deque(fresh[len(taken) :])
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, as JSON."""
        return {"num_dropped": self.num_dropped, "groups": [asdict(group) for group in self._groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_dropped = state["num_dropped"]
        self._groups = deque(group_from_dict(fields, "the saved rollout buffer") for fields in state["groups"])


def _version(group: RolloutGroup) -> int:
    return min(completion.policy_version for completion in group.completions)

"""The per-token vectors of the policy loss, and which rows of them do what."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from drpo_megatron.objectives.base import Objective, ObjectiveInputs
from drpo_megatron.trainer.transfer import to_device


@dataclass(frozen=True, slots=True)
class Rows:
    """Row numbers in ascending order, equal on every tensor-parallel rank. Any other row is never read."""

    live: torch.Tensor
    """Weight not 0: their log-probs are reported."""
    good: torch.Tensor
    """Live, with a finite behavior_logprobs: they enter the objective and the metrics."""
    gradient: torch.Tensor
    """Good, and not certain to have no gradient (A = 0 without entropy or KL term)."""
    only_logprobs: torch.Tensor
    """Live without gradient."""
    num_bad_behavior: int

    def to(self, device: torch.device) -> Rows:
        numbers = (self.live, self.good, self.gradient, self.only_logprobs)
        return Rows(*(to_device(rows, device) for rows in numbers), num_bad_behavior=self.num_bad_behavior)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """[N] each, the full vectors on every rank; [N, K] for topk. None: not given.

    On the host until `to`: which rows do what is decided there, and no GPU has to be waited for.
    """

    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    reference_logprobs: torch.Tensor | None
    sequence_ids: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_behavior_logprobs: torch.Tensor | None

    @property
    def num_ids(self) -> int:
        return 1 if self.topk_ids is None else 1 + self.topk_ids.shape[1]

    def to(self, device: torch.device) -> TokenBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{name: None if x is None else to_device(x, device) for name, x in values.items()})

    def check(self, objective: Objective, num_rows: int) -> None:
        """Raises: ValueError for a vector of the wrong length, or one that the objective needs and nobody gave."""
        for name in self.__slots__:
            value = getattr(self, name)
            width = (objective.num_topk,) if name.startswith("topk") else ()
            if value is not None and value.shape != (num_rows, *width):
                raise ValueError(
                    f"{name} has shape {list(value.shape)}; hidden has {num_rows} rows over all ranks, so give "
                    f"{[num_rows, *width]}: per-token vectors are never sharded"
                )
        needed = {
            "old_logprobs": objective.needs_old_logprobs,
            "reference_logprobs": objective.needs_reference_logprobs,
            "sequence_ids": objective.sequence_level,
            "topk_ids": objective.num_topk > 0,
            "topk_behavior_logprobs": objective.num_topk > 0,
        }
        for name, is_needed in needed.items():
            if is_needed and getattr(self, name) is None:
                raise ValueError(f"objective {objective.name} needs {name}, which is None")

    def rows(self, *, every_row: bool, bad_behavior: Literal["drop", "raise"]) -> Rows:
        """`every_row`: rows with A = 0 have a gradient too. Raises: ValueError, see `bad_behavior`."""
        live = self.weights != 0
        bad = live & ~self.behavior_logprobs.isfinite()
        num_bad = int(bad.sum())
        if num_bad and bad_behavior == "raise":
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"behavior_logprobs[{row}]={self.behavior_logprobs[row].item()} is not finite, and so are "
                f"{num_bad - 1} more rows'; check the engine's log-probs, or set bad_behavior: drop"
            )
        good = live & ~bad
        gradient = good if every_row else good & (self.advantages != 0)
        numbers = [mask.nonzero().squeeze(1) for mask in (live, good, gradient, live & ~gradient)]
        return Rows(*numbers, num_bad_behavior=num_bad)

    def ids(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, 1 + K] token ids whose log-probs are needed: the target first."""
        targets = self.targets[rows, None]
        return targets if self.topk_ids is None else torch.cat([targets, self.topk_ids[rows]], dim=1)

    def inputs(
        self, rows: torch.Tensor, logprobs: torch.Tensor, *, old_is_anchor: bool, log_ratio_max: float
    ) -> ObjectiveInputs:
        """What the objective sees of `rows`, given the log-probs [1 + K, n] of their ids."""

        def chosen(vector: torch.Tensor | None) -> torch.Tensor | None:
            return None if vector is None else vector[rows]

        behavior = self.behavior_logprobs[rows].to(logprobs.dtype).clamp(max=0)
        old = chosen(self.old_logprobs)
        return ObjectiveInputs(
            logprobs=logprobs[0],
            behavior_logprobs=behavior,
            advantages=self.advantages[rows].to(logprobs.dtype),
            anchor_logprobs=old if old_is_anchor else behavior,
            weights=self.weights[rows].to(logprobs.dtype),
            old_logprobs=old,
            reference_logprobs=chosen(self.reference_logprobs),
            sequence_ids=chosen(self.sequence_ids),
            topk_logprobs=None if self.topk_ids is None else logprobs[1:].T,
            topk_behavior_logprobs=chosen(self.topk_behavior_logprobs),
            log_ratio_max=log_ratio_max,
        )


def check_targets(targets: torch.Tensor, rows: torch.Tensor, vocab_size: int) -> None:
    chosen = targets[rows]
    outside = (chosen < 0) | (chosen >= vocab_size)
    if outside.any():
        row = int(rows[outside][0])
        raise ValueError(
            f"targets[{row}]={targets[row].item()} is not a token id below vocab_size={vocab_size}, but the row has "
            "weight; give it weight 0 or a token"
        )

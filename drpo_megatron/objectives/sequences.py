"""Sums over the tokens of a sequence, for objectives and corrections that look at whole sequences."""

from __future__ import annotations

import torch


def sequence_sums(sequence_ids: torch.Tensor | None, *values: torch.Tensor) -> list[torch.Tensor]:
    """For each of `values` [T], the sum over the token's own sequence, at every token: [T].

    Ids are any integers in any order. Sums are taken in FP64, so that the order of a GPU's atomic additions does not
    show in the FP32 result. Raises ValueError without ids.
    """
    if sequence_ids is None:
        raise ValueError("a sequence-level objective or correction needs sequence_ids; none were given")
    unique, index = torch.unique(sequence_ids, return_inverse=True)
    return [
        torch.zeros(unique.numel(), dtype=torch.float64, device=value.device)
        .scatter_add_(0, index, value.double())[index]
        .to(value.dtype)
        for value in values
    ]

"""The frozen policy of the KL term: a second set of this rank's weights, exchanged with the model's for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferenceWeights:
    """A copy of the parameters that `chunks` hold now, in host memory. Each rank keeps its own shards: no collectives."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._outside = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
        """What the model doesn't hold at the moment: the reference, or inside `in_place` the policy."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the reference weights inside the block; afterwards it holds the policy's, bit by bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, outside in zip(self._parameters, self._outside, strict=True):
            held = parameter.detach().to("cpu", copy=True)
            parameter.copy_(outside)
            outside.copy_(held)

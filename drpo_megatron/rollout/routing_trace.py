"""Which experts a transformers model routes the tokens of a decoded batch to, read from its routers while it decodes.

with RoutingTrace(model, num_rows, num_columns) as trace:
    model(...)                       # every router reports its choice
    trace.store(rows, first_column)  # what the routers said since the last call
trace.of(row, begin, end)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from drpo_megatron.types import RoutedExperts

_ROUTER = "TopKRouter"
"""What transformers 5 calls the class of every router; it returns (logits, scores, expert ids [tokens, k])."""


class RoutingTrace:
    """A table [rows, columns, layers with experts, experts a token] that forward passes fill in."""

    def __init__(self, model: torch.nn.Module, num_rows: int, num_columns: int) -> None:
        """Raises ValueError for a model without routers."""
        self._routers = [module for module in model.modules() if type(module).__name__.endswith(_ROUTER)]
        if not self._routers:
            raise ValueError(f"{type(model).__name__} has no routers; a dense model can't report routed experts")
        first: Any = self._routers[0]
        dtype = np.uint8 if first.num_experts <= 256 else np.int16
        self._table = np.zeros((num_rows, num_columns, len(self._routers), first.top_k), dtype)
        self._said: list[torch.Tensor] = []

    def __enter__(self) -> RoutingTrace:
        self._hooks = [router.register_forward_hook(self._listen) for router in self._routers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def store(self, rows: Sequence[int], column: int) -> None:
        """The last forward pass was over tokens [len(rows), S]: write its choices to columns `column` ... column + S - 1."""
        ids = torch.stack(self._said, dim=1).cpu().numpy()
        ids = ids.reshape(len(rows), -1, *ids.shape[1:])
        self._table[np.asarray(rows), column : column + ids.shape[1]] = ids
        self._said.clear()

    def of(self, row: int, begin: int, end: int) -> RoutedExperts:
        return RoutedExperts.of(self._table[row, begin:end])

    def _listen(self, router: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._said.append(output[2])

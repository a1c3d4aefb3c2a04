"""What of this rank's model computes in low precision: installed where it is emulated, and audited where it runs.

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.precision.layers import is_kept
from drpo_megatron.precision.recipes import HISTORY_LENGTH, TrainPrecision
from drpo_megatron.trainer.emulation import ROLES, EmulatedProduct, Role, emulate
from drpo_megatron.trainer.forward import unwrap


@dataclass
class LowPrecision:
    models: list[Any]
    """Bare PolicyModels of this rank's chunks."""
    precision: TrainPrecision | None
    keep_bf16: tuple[str, ...]
    products: list[EmulatedProduct]
    """What is emulated. Empty where Transformer Engine computes, or nothing is quantised."""
    _is_audited: bool = False

    @classmethod
    def of(cls, chunks: Sequence[Any], section: PrecisionSection, precision: TrainPrecision | None) -> LowPrecision:
        """Installs the emulation, if `precision` says so, in chunks that are built and not yet used."""
        models = [unwrap(chunk) for chunk in chunks]
        emulated = precision is not None and precision.emulated
        products = emulate(models, precision.recipe, section.keep_bf16) if precision and emulated else []
        return cls(models, precision, section.keep_bf16, products)

    def audit_once(self) -> None:
        """After the first forward and backward pass: print what ran in low precision. Raises ValueError if nothing did."""
        if self.precision is None or self._is_audited:
            return
        self._is_audited = True
        print(f"precision.train={self.precision.describe()}", flush=True)
        print("\n".join(f"  {line}" for line in audit_lines(self.models, self.keep_bf16)), flush=True)

    @contextmanager
    def off(self) -> Iterator[None]:
        """In the block the model computes unquantised, with the same weights."""
        assert self.precision is not None
        flags = ("fp8", "fp4")
        before = {model: {flag: getattr(model.config, flag, None) for flag in flags} for model in self.models}
        try:
            self._switch(False)
            for model in self.models:
                for flag in flags:
                    setattr(model.config, flag, None)
            yield
        finally:
            self._switch(True)
            for model, values in before.items():
                for flag, value in values.items():
                    setattr(model.config, flag, value)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Delayed scaling forgets what it sees in the block."""
        with ExitStack() as stack:
            for product in self.products:
                stack.enter_context(product.unrecorded())
            yield

    def amax_history(self) -> dict[str, torch.Tensor]:
        """What delayed scaling remembers on this rank, for its checkpoint: FP64 [uses] by layer, linear and operand."""
        return {
            name: torch.tensor(history, dtype=torch.float64)
            for name, (product, role) in self._remembered().items()
            if (history := product.history.get(role))
        }

    def load_amax_history(self, saved: dict[str, torch.Tensor]) -> None:
        """Go on with the history of a checkpoint; without one, or with another layout's, begin a new one and say so."""
        remembered = self._remembered()
        if not remembered:
            return
        if not saved or not saved.keys() <= remembered.keys():
            print(
                "precision.train: delayed scaling begins anew; the checkpoint has no history of this layout", flush=True
            )
            saved = {}
        for name, (product, role) in remembered.items():
            product.history.pop(role, None)
            if name in saved:
                product.history[role] = deque(saved[name].tolist(), maxlen=HISTORY_LENGTH)

    def _remembered(self) -> dict[str, tuple[EmulatedProduct, Role]]:
        return {
            f"layers.{product.layer}.{product.name}.{role}": (product, role)
            for product in self.products
            if product.recipe.operands.has_history
            for role in ROLES
        }

    def _switch(self, is_on: bool) -> None:
        for product in self.products:
            product.is_on = is_on


def audit_lines(models: Sequence[Any], keep_bf16: Sequence[str] = ()) -> list[str]:
    """One line for each set of decoder layers that compute alike, and one for what lies outside of them.

    Only what the modules themselves say after a forward pass counts, not the configuration. ValueError when a decoder
    layer of this rank that isn't to be kept has no module that ran in low precision.
    """
    by_content: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
    outside: set[str] = set()
    for model in models:
        layers = {id(module) for layer in model.decoder.layers for module in layer.modules()}
        outside |= {name for name, module in _with_weights(model) if id(module) not in layers}
        for layer in model.decoder.layers:
            low = {name: _runs_in_low_precision(module) for name, module in _with_weights(layer)}
            content = tuple(tuple(_counted(name for name in low if low[name] is wanted)) for wanted in (True, False))
            number = layer.layer_number - 1
            if not content[0] and not is_kept(number, model.config.num_layers, keep_bf16):
                raise ValueError(
                    f"precision.train asks for low precision, but nothing in decoder layer {number} ran in it"
                )
            by_content[content].append(number)
    lines = [
        f"layers {_ranges(numbers)}: in low precision {', '.join(low) or 'nothing'}; kept {', '.join(kept) or 'nothing'}"
        for (low, kept), numbers in by_content.items()
    ]
    return [*lines, f"outside of the layers, kept: {', '.join(sorted(outside)) or 'nothing'}"]


def _with_weights(module: Any) -> Iterator[tuple[str, Any]]:
    for name, child in module.named_modules():
        if name and next(child.parameters(recurse=False), None) is not None:
            yield name, child


def _runs_in_low_precision(module: Any) -> bool:
    """Of a linear layer of Megatron's with an emulated product, or of Transformer Engine's, which sets flags as it runs."""
    product = getattr(module, "_forward_impl", None)
    if isinstance(product, EmulatedProduct):
        return product.has_run
    return bool(getattr(module, "fp8", False) or getattr(module, "fp4", False))


def _counted(names: Any) -> list[str]:
    """Names in order, experts as one with their number."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        head, separator, tail = name.partition("local_experts.")
        counts[head + "*." + tail.partition(".")[2] if separator else name] += 1
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)

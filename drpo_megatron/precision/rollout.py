"""What a rollout recipe does to the weights that engines are sent, and to the activations that they compute.

The trainer's weights stay as they are; what an engine gets is quantised from them at every update, per matrix of the
checkpoint: q, k and v, gate and up, and every expert on its own, as a block-FP8 checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch

from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.models import HFConfig, get_family
from drpo_megatron.models.family import typed_config
from drpo_megatron.models.rules import Rule
from drpo_megatron.precision.layers import quantised_names
from drpo_megatron.precision.quantize import Format, Noise, fake_quantize, quantize_block128
from drpo_megatron.precision.recipes import rollout_formats

_SCALE_SUFFIX = "_scale_inv"
_GATE_UP = "gate_up_proj"
"""Stacked experts, [E, 2 I, H]: gate's rows, then up's."""


@dataclass(frozen=True, slots=True)
class RolloutPrecision:
    weight: Format | Noise
    activation: Format | Noise
    names: frozenset[str]
    """HF tensors that are quantised."""

    @classmethod
    def of(cls, section: PrecisionSection, rules: Iterable[Rule], num_layers: int) -> RolloutPrecision | None:
        """None: nothing is quantised. `rules` are those of the checkpoint whose names the engine knows."""
        formats = rollout_formats(section.rollout)
        if formats is None:
            return None
        return cls(*formats, frozenset(quantised_names(rules, num_layers, section.keep_bf16)))

    @classmethod
    def of_checkpoint(
        cls, section: PrecisionSection, hf_config: HFConfig, names: Collection[str]
    ) -> RolloutPrecision | None:
        """For the checkpoint of a model; `names` are all of its tensors'."""
        rules = get_family(hf_config).rules(hf_config, names)
        return cls.of(section, rules, typed_config(hf_config).num_hidden_layers)

    def dequantized(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """For an engine that emulates: the tensor with what is left of its values, in its own dtype."""
        yield name, self._rounded(name, tensor) if name in self.names else tensor

    def quantized(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """For an engine that computes in FP8: X.weight as E4M3 [N, K] with X.weight_scale_inv, or the tensor itself.

        Experts that are stacked in one tensor come apart: each matrix has scales of its own.
        """
        if name not in self.names:
            yield name, tensor
            return
        for part, matrix in _matrices(name, tensor):
            values, scale_inv = quantize_block128(matrix)
            yield part, values
            yield part + _SCALE_SUFFIX, scale_inv

    def rounded_activation(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] as a linear layer of the engine sees it."""
        return fake_quantize(x, self.activation).to(x.dtype)

    def _rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        rounded = [fake_quantize(matrix, self.weight).to(tensor.dtype) for _, matrix in _matrices(name, tensor)]
        return torch.cat(rounded).reshape(tensor.shape)


def _matrices(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices in a tensor, by the names that checkpoints with unstacked experts have for them."""
    if tensor.ndim == 2:
        yield name, tensor
        return
    stem, _, kind = name.rpartition(".")
    for index, expert in enumerate(tensor):
        if kind == _GATE_UP:
            gate, up = expert.chunk(2)
            yield f"{stem}.{index}.gate_proj.weight", gate
            yield f"{stem}.{index}.up_proj.weight", up
        else:
            yield f"{stem}.{index}.{kind}.weight", expert

"""Both sides of a model without its weights: the rule of every parameter, and where Megatron's checkpoints keep it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from drpo_megatron.checkpoint.model_check import differences
from drpo_megatron.checkpoint.torch_dist import Box, TorchDistCheckpoint
from drpo_megatron.config import Config
from drpo_megatron.models import Family, get_family
from drpo_megatron.models.family import typed_config
from drpo_megatron.models.names import spellings
from drpo_megatron.models.rules import HFTensor, Rule
from drpo_megatron.trainer.pieces import CheckpointMap, Parameter, Piece, map_checkpoint

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LAYERS = re.compile(r"decoder\.layers\.(\D.*)")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    family: Family
    hf_config: Any
    """The typed config of the text model."""
    rules: list[Rule]
    checkpoint: CheckpointMap

    @classmethod
    def of(cls, config: dict[str, Any], names: Collection[str], directory: Path) -> ModelPlan:
        """Of config.json and the names of the checkpoint's tensors. ValueError for a model that is not supported.

        Args:
            directory: that the config is from, for errors.
        """
        family = get_family(config, f"{directory}/config.json")
        hf_config = typed_config(config)
        rules = family.rules(config, names)
        checkpoint = map_checkpoint(bare_config(), family, hf_config)
        unmatched = {rule.key for rule in rules} ^ checkpoint.parameters.keys()
        assert not unmatched, f"rules and Megatron's parameters differ: {sorted(map(str, unmatched))}"
        return cls(family, hf_config, rules, checkpoint)

    def parameter(self, rule: Rule) -> Parameter:
        return self.checkpoint.parameters[rule.key]

    def moved(self, rule: Rule) -> dict[HFTensor, Piece]:
        """The HF tensors of a rule that stand in the checkpoint as they are, byte for byte, as one piece: most of them.

        The layout says so itself: what it merges from one whole parameter is a part of its memory, or new.
        """
        shape, pieces = self.parameter(rule)
        whole = torch.empty(shape, dtype=torch.uint8)  # Never written or read, so it takes no memory.
        places = {
            (tensor.storage_offset(), tensor.numel()): hf
            for hf, tensor in zip(rule.hf, rule.layout.merge([whole]), strict=True)
            if tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and tensor.is_contiguous()
        }
        found = {}
        for piece in pieces:
            part = piece.of(whole)
            hf = places.get((part.storage_offset(), part.numel()))
            if hf is not None and part.is_contiguous():
                found[hf] = piece
        return found

    def unstacked(self) -> ModelPlan:
        """The same model in the names of a checkpoint that holds every expert's tensors on their own."""
        plain = {hf.name for rule in self.rules for hf in rule.hf if hf.slice is None}
        return replace(self, rules=self.family.rules(self.hf_config, plain))

    def stacked(self) -> ModelPlan:
        """The same model in the names of a checkpoint that holds a layer's experts in two tensors, as transformers does."""
        assert self.family.stacked_rules is not None
        return replace(
            self, rules=self.family.stacked_rules(self.hf_config, [hf.name for r in self.rules for hf in r.hf])
        )

    def extra(self, names: Collection[str]) -> list[str]:
        """Those of the names that belong to no parameter."""
        known = {name for rule in self.rules for name in (*(hf.name for hf in rule.hf), *rule.hf_copies)}
        return [name for name in names if name not in known]

    def fitted(self, checkpoint: TorchDistCheckpoint) -> ModelPlan:
        """The same model in the keys of a checkpoint: layers stacked in one tensor or each on its own, and norms as either
        layer spec calls them. What isn't there in any of these ways keeps its key."""
        num_layers, keys = self.hf_config.num_hidden_layers, checkpoint.tensors.keys()
        parameters = {
            key: Parameter(parameter.shape, tuple(_found(piece, keys, num_layers) for piece in parameter.pieces))
            for key, parameter in self.checkpoint.parameters.items()
        }
        return replace(self, checkpoint=CheckpointMap(parameters, self.checkpoint.objects))

    def check(self, checkpoint: TorchDistCheckpoint) -> None:
        """ValueError that lists all keys of the model that the checkpoint lacks or has in another shape."""
        problems = set()
        for parameter in self.checkpoint.parameters.values():
            for piece in parameter.pieces:
                key = piece.box.key
                if key not in checkpoint.tensors:
                    problems.add(f"missing: {key} {list(piece.global_shape)}")
                elif not _fits(piece, checkpoint.shape(key)):
                    problems.add(
                        f"misshapen: {key} is {list(checkpoint.shape(key))}, the config says {list(piece.global_shape)}"
                    )
        if problems:
            raise ValueError(differences(f"{checkpoint.directory} and config.json", problems))

    def read(self, checkpoint: TorchDistCheckpoint, rule: Rule) -> tuple[torch.Tensor, ...]:
        """The HF tensors of a rule, in the dtype of the checkpoint."""
        return rule.layout.merge([self.read_parameter(checkpoint, rule)])

    def read_parameter(self, checkpoint: TorchDistCheckpoint, rule: Rule) -> torch.Tensor:
        """A whole parameter; a padded vocabulary has the padding of one rank."""
        shape, pieces = self.parameter(rule)
        tensor = torch.empty(shape, dtype=checkpoint.dtype(pieces[0].box.key))
        for piece in pieces:
            target, box = piece.of(tensor), piece.box
            if piece.is_padded:
                rows = min(box.size[0], checkpoint.shape(box.key)[0])
                target[rows:] = 0
                target, box = target[:rows], box._replace(size=(rows, *box.size[1:]))
            checkpoint.read(box, target)
        return tensor


def bare_config(dtype: Literal["fp32", "bf16"] = "fp32") -> Config:
    """A configuration around nothing but a model, in one process."""
    return Config.model_validate(
        {
            "run": {"name": "convert", "num_steps": 1},
            "model": {"hf_path": "."},
            "objective": {"name": "pg"},
            "trainer": {"backend": "cpu", "dtype": dtype, "optimizer": {"lr": 1.0}},
            "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_response_tokens": 1},
            "data": {"train": "-"},
            "reward": {"name": "arithmetic"},
        }
    )


def _found(piece: Piece, keys: Collection[str], num_layers: int) -> Piece:
    """The piece, where a checkpoint of these keys has it."""
    box = piece.box
    for key in spellings(box.key):
        if key in keys:
            return piece._replace(box=box._replace(key=key))
        if match := _LAYER.fullmatch(key):
            stacked = f"decoder.layers.{match[2]}"
            if stacked in keys:
                offset, size = (int(match[1]), *box.offset), (1, *box.size)
                return piece._replace(box=Box(stacked, offset, size), global_shape=(num_layers, *piece.global_shape))
        elif match := _LAYERS.fullmatch(key):
            apart = f"decoder.layers.{box.offset[0]}.{match[1]}"
            if apart in keys:
                return piece._replace(box=Box(apart, box.offset[1:], box.size[1:]), global_shape=piece.global_shape[1:])
    return piece


def _fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    if piece.is_padded:  # A padded vocabulary may be longer or, padded for fewer ranks, shorter.
        return shape[1:] == piece.global_shape[1:]
    return shape == piece.global_shape

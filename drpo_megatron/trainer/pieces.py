"""Where every parameter of a model lies in Megatron's distributed checkpoints, learnt from Megatron itself.

A checkpoint's keys are not the parameters: equal layers are stacked, experts are, and gate and up lie apart. Megatron
says how in `sharded_state_dict`; here a model without weights, on one rank, is asked, so that files can be read and
written without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from drpo_megatron.checkpoint.torch_dist import Box, Shape
from drpo_megatron.config.sections import Config, ParallelSection
from drpo_megatron.models import Family
from drpo_megatron.models.names import canonical_key
from drpo_megatron.models.rules import Key
from drpo_megatron.trainer import platform as platforms
from drpo_megatron.trainer import setup


class Piece(NamedTuple):
    """A part of a parameter, and the box of the checkpoint that holds it."""

    box: Box
    global_shape: Shape
    """Of the checkpoint's tensor."""
    is_padded: bool
    """Whether other layouts store a tensor of more rows: the vocabulary, padded for their tensor parallel size."""
    shape: Shape
    stride: tuple[int, ...]
    start: int

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """This piece of the parameter, in the shape of the box."""
        return parameter.as_strided(self.shape, self.stride, self.start).view(self.box.size)


class Parameter(NamedTuple):
    """One parameter of the whole model: its shape, and the pieces that cover it."""

    shape: Shape
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class CheckpointMap:
    """What a checkpoint of a model holds."""

    parameters: dict[Key, Parameter]
    objects: tuple[str, ...]
    """Keys of per-module states. Ours have none, but Megatron looks for them."""


@contextmanager
def single_process() -> Iterator[None]:
    """A world of this process alone, unless one is there already. Leaves no process group of its own behind."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def map_checkpoint(config: Config, family: Family, hf_config: Any) -> CheckpointMap:
    """The map of a model's checkpoints. Takes no memory for weights, and a few seconds for thousands of experts."""
    platform = platforms.activate("cpu")
    with single_process():
        layout = setup.build_layout(ParallelSection(), seed=0)
        with torch.device("meta"):
            (model,) = setup.build_policy_models(config, family, hf_config, layout, platform)
        return _map(model, layout.groups.dp_cp)


def _map(model: Any, dp_cp_group: dist.ProcessGroup) -> CheckpointMap:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    state = model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": dp_cp_group})
    apply_factories(state)
    layers = range(len(model.decoder.layers))
    objects: list[str] = []
    parameters: dict[Key, Parameter] = {}
    for name, parameter in model.named_parameters():
        pieces = tuple(_piece(shard, parameter) for shard in _leaves(state.pop(name)))
        parameters[canonical_key(name, layers, first_expert=0)] = Parameter(tuple(parameter.shape), pieces)
    for entry in state.values():
        for leaf in _leaves(entry):
            if isinstance(leaf, ShardedObject):
                objects.append(leaf.unique_key)
            else:
                assert not isinstance(leaf, ShardedTensor), f"{leaf.key} is in checkpoints, but no parameter"
    return CheckpointMap(parameters, tuple(objects))


def _piece(shard: Any, parameter: torch.Tensor) -> Piece:
    data = shard.data
    assert data.untyped_storage()._cdata == parameter.untyped_storage()._cdata, f"{shard.key} is a copy"
    size = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return Piece(
        Box(shard.key, tuple(shard.global_offset), size),
        tuple(shard.global_shape),
        shard.allow_shape_mismatch,
        tuple(data.shape),
        tuple(data.stride()),
        data.storage_offset(),
    )


def _leaves(entry: Any) -> Iterator[Any]:
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from _leaves(part)
    elif isinstance(entry, dict):
        yield from _leaves(list(entry.values()))
    else:
        yield entry

"""Hugging Face weights into a Megatron model's shards, and out of them again, one parameter at a time.

What a parameter is made of is declared in `drpo_megatron.models`; here is who holds which shard, and how it travels:

    shard --all-gather over TP (ETP for experts)--> [TP, shard] --broadcast over EP--> --broadcast over PP--> HF tensors

Import only after `platform.activate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from drpo_megatron.models import HFConfig, get_family
from drpo_megatron.models.names import canonical_key
from drpo_megatron.models.rules import HFTensor, Key, Rule, stack_slices
from drpo_megatron.trainer.forward import unwrap


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    get_tensor: Callable[[str], torch.Tensor],
    groups: ProcessGroupCollection,
    names: Collection[str] | None = None,
) -> None:
    """Fill every parameter of this rank's chunks (bare or in DDP). Collective over all ranks.

    Args:
        get_tensor: the checkpoint's tensor of a name, whole, in any dtype; KeyError if there is none. Called for the
            tensors that this rank needs only, never for more than one parameter's at a time.
        names: every name in the checkpoint, so that tensors which no parameter takes are found, too; and, of a family
            that calls its tensors by more than one name, which those are.

    Raises: ValueError on all ranks with everything that is wrong on any of them: missing, extra and misshapen tensors,
        Megatron parameters without a rule, rules without a parameter.
    """
    shards = _Shards.of(model_chunks, hf_config, groups, names)
    problems = shards.uncovered()
    source = _Source(get_tensor)
    for rule in shards.rules:
        for key in (rule.key, *rule.copies):
            if key in shards.parameters:
                problems += _load(rule, shards.parameters[key], source, shards.tensor_group(key), names or ())
    if names is not None:
        family = get_family(hf_config)
        known = {name for rule in shards.rules for name in (*(hf.name for hf in rule.hf), *rule.hf_copies)}
        extra = [name for name in names if name not in known and not family.ignores(name)]
        problems += [f"extra: {name} belongs to no parameter of the model" for name in extra]
    _raise_everywhere(problems)


def export_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    hf_config: HFConfig,
    groups: ProcessGroupCollection,
    dtype: torch.dtype | None = None,
    everywhere: bool = False,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(HF name, whole tensor) of every parameter in the order of the checkpoint, without vocabulary padding.

    Collective: all ranks iterate to the end, in step. Tensors are new, on the model's device; a rank holds a few times
    the largest tensor at most.

    Args:
        dtype: cast shards before they travel. None: the parameter's own.
        everywhere: yield tensors on all ranks. Otherwise on rank 0, and None on the others.
        names: those of the checkpoint that the export shall look like. None: the published ones of the family.

    Raises: ValueError where the model's parameters are not those of `hf_config`.
    """
    shards = _Shards.of(model_chunks, hf_config, groups, names)
    _raise_everywhere(shards.uncovered())
    yield from stack_slices(_merged(shards, dtype, everywhere))


def _merged(
    shards: _Shards, dtype: torch.dtype | None, everywhere: bool
) -> Iterator[tuple[HFTensor, torch.Tensor | None]]:
    for rule in shards.rules:
        gathered = shards.gather(rule, dtype, everywhere)
        if gathered is None:
            yield from ((hf, None) for hf in rule.hf)
            continue
        own = _storage(shards.parameters[rule.key]) if rule.key in shards.parameters else None
        tensors = rule.layout.merge(gathered.unbind())
        del gathered
        for hf, tensor in zip(rule.hf, tensors, strict=True):
            yield hf, tensor.clone() if _storage(tensor) == own else tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Place(NamedTuple):
    """Where a parameter lives, and what one shard of it looks like."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Shards:
    """This rank's parameters by key, and the pipeline stage of everybody's."""

    rules: list[Rule]
    groups: ProcessGroupCollection
    experts_per_rank: int
    parameters: dict[Key, torch.Tensor]
    places: dict[str, _Place]
    """By parameter name; all experts of a layer live on its stage."""

    @classmethod
    def of(
        cls,
        model_chunks: Sequence[torch.nn.Module],
        hf_config: HFConfig,
        groups: ProcessGroupCollection,
        names: Collection[str] | None,
    ) -> _Shards:
        rules = get_family(hf_config).rules(hf_config, names)
        num_experts = 1 + max((rule.key.expert for rule in rules if rule.key.expert is not None), default=-1)
        experts_per_rank = num_experts // groups.ep.size()
        parameters: dict[Key, torch.Tensor] = {}
        for model in map(unwrap, model_chunks):
            layers = [layer.layer_number - 1 for layer in model.decoder.layers]
            for name, parameter in model.named_parameters():
                key = canonical_key(name, layers, groups.ep.rank() * experts_per_rank)
                assert key not in parameters, f"{key} twice on one rank"
                parameters[key] = parameter.detach()
        mine = {key.name: _Place(groups.pp.rank(), tuple(p.shape), p.dtype) for key, p in parameters.items()}
        stages: list[dict[str, _Place]] = [{}] * groups.pp.size()
        dist.all_gather_object(stages, mine, group=groups.pp)
        places = {name: place for stage in reversed(stages) for name, place in stage.items()}
        return cls(rules, groups, experts_per_rank, parameters, places)

    def tensor_group(self, key: Key) -> dist.ProcessGroup:
        return self.groups.tp if key.expert is None else self.groups.expt_tp

    def uncovered(self) -> list[str]:
        """Parameters of this rank without a rule; rules that this rank, or no rank at all, holds a parameter for."""
        known = {key for rule in self.rules for key in (rule.key, *rule.copies)}
        problems = [f"no rule for Megatron's parameter {_text(key)}" for key in self.parameters if key not in known]
        for rule in self.rules:
            place = self.places.get(rule.key.name)
            expected_here = place is not None and place.stage == self.groups.pp.rank() and self._is_mine(rule.key)
            if place is None or (expected_here and rule.key not in self.parameters):
                names = ", ".join(hf.name for hf in rule.hf)
                problems.append(f"no Megatron parameter {_text(rule.key)} to take {names}")
        return problems

    def gather(self, rule: Rule, dtype: torch.dtype | None, everywhere: bool) -> torch.Tensor | None:
        """[TP, *shard] ([1, *shard] if replicated) of one parameter; None where it is not wanted."""
        key, groups, place = rule.key, self.groups, self.places[rule.key.name]
        is_expert = key.expert is not None
        tensor_group = self.tensor_group(key)
        replica = groups.expt_dp.rank() if is_expert else groups.dp_cp.rank()
        if replica != 0 and not everywhere:
            return None
        is_on_stage = place.stage == groups.pp.rank()
        whole = None
        if is_on_stage and self._is_mine(key):
            shard = self.parameters[key].to(dtype or place.dtype)
            whole = _gather_shards(shard, tensor_group) if rule.layout.axis is not None else shard[None]
        if tensor_group.rank() != 0 and not everywhere:
            return None
        if whole is None:
            num_shards = 1 if rule.layout.axis is None else tensor_group.size()
            device = next(iter(self.parameters.values())).device
            whole = torch.empty(num_shards, *place.shape, dtype=dtype or place.dtype, device=device)
        if is_expert and is_on_stage and groups.ep.size() > 1:
            dist.broadcast(whole, group=groups.ep, group_src=self._expert_rank(key))
        if is_expert and groups.ep.rank() != 0 and not everywhere:
            return None
        if groups.pp.size() > 1:
            dist.broadcast(whole, group=groups.pp, group_src=place.stage)
        return whole if everywhere or groups.pp.rank() == 0 else None

    def _expert_rank(self, key: Key) -> int:
        assert key.expert is not None
        return key.expert // self.experts_per_rank

    def _is_mine(self, key: Key) -> bool:
        """Whether this rank's experts include the key's; the other parameters are on every expert-parallel rank."""
        return key.expert is None or self._expert_rank(key) == self.groups.ep.rank()


class _Source:
    """A checkpoint's tensors. The last one stays at hand: the experts that it stacks are asked for one by one."""

    def __init__(self, get_tensor: Callable[[str], torch.Tensor]) -> None:
        self._get_tensor = get_tensor
        self._last: tuple[str, torch.Tensor] | None = None

    def stored(self, name: str) -> torch.Tensor:
        """The whole tensor. KeyError if there is none of that name."""
        if self._last is None or self._last[0] != name:
            self._last = None  # Before the next one is read: there is room for one.
            self._last = name, self._get_tensor(name)
        return self._last[1]


def _load(
    rule: Rule,
    parameter: torch.Tensor,
    source: _Source,
    tensor_group: dist.ProcessGroup,
    names: Collection[str],
) -> list[str]:
    """Fill one parameter; what is wrong with its tensors."""
    problems: list[str] = []
    tensors = []
    for hf in rule.hf:
        try:
            stored = source.stored(hf.name)
        except KeyError:
            problems.append(f"missing: {hf.name} {list(hf.stored_shape)}")
            continue
        if tuple(stored.shape) == hf.stored_shape:
            tensors.append(hf.of(stored))
        else:
            problems.append(f"misshapen: {hf.name} is {list(stored.shape)}, the config says {list(hf.stored_shape)}")
    if problems:
        return problems
    for copy in (name for name in rule.hf_copies if name in names):
        if not torch.equal(source.stored(copy), tensors[0]):
            problems.append(
                f"untied: {copy} differs from {rule.hf[0].name}, but config.json says tie_word_embeddings=true; "
                "set it to false"
            )
    try:
        shard = rule.layout.shard(tensors, tensor_group.rank(), tensor_group.size(), tuple(parameter.shape))
    except ValueError as error:
        return [*problems, f"{_text(rule.key)}: {error}"]
    if shard.shape != parameter.shape:
        return [*problems, f"{_text(rule.key)}: the model's shard is {list(parameter.shape)}, not {list(shard.shape)}"]
    parameter.copy_(shard)
    return problems


def _gather_shards(shard: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[TP, *shard]. Forward only: all-gathers one parameter over the group."""
    if group.size() == 1:
        return shard[None]
    whole = shard.new_empty(group.size(), *shard.shape)
    dist.all_gather_into_tensor(whole.flatten(0, 1), shard.contiguous(), group=group)
    return whole


def _raise_everywhere(problems: list[str]) -> None:
    """One ValueError on all ranks if any has a problem, so that none waits in a collective for one that stopped."""
    everybodys: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everybodys, problems)
    if found := sorted({problem for rank in everybodys for problem in rank}):
        raise ValueError(f"checkpoint and model differ in {len(found)} points:\n  " + "\n  ".join(found))


def _text(key: Key) -> str:
    return key.name if key.expert is None else f"{key.name} of expert {key.expert}"

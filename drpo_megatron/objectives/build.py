"""From a config section to a callable objective: anchor -> core formula -> correction -> KL."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from drpo_megatron.config.objective import (
    DPPOConfig,
    DRPOConfig,
    GSPOConfig,
    ImportedObjectiveConfig,
    ObjectiveBase,
    parse_objective,
)
from drpo_megatron.objectives.base import CoreFormula, ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.cispo import cispo
from drpo_megatron.objectives.correction import apply_correction
from drpo_megatron.objectives.dppo import dppo
from drpo_megatron.objectives.drpo import drpo
from drpo_megatron.objectives.grpo import grpo
from drpo_megatron.objectives.gspo import gspo
from drpo_megatron.objectives.imported import imported, load_function
from drpo_megatron.objectives.kl import add_kl
from drpo_megatron.objectives.pg import pg
from drpo_megatron.objectives.sapo import sapo
from drpo_megatron.objectives.sft import sft
from drpo_megatron.objectives.spo import spo

REGISTRY: dict[str, Callable[..., ObjectiveOutputs]] = {
    "pg": pg,
    "grpo": grpo,
    "ppo": grpo,
    "spo": spo,
    "dppo": dppo,
    "drpo": drpo,
    "cispo": cispo,
    "gspo": gspo,
    "sapo": sapo,
    "sft": sft,
}


@dataclass(frozen=True, slots=True)
class ConfiguredObjective:
    """An `Objective` with its constants. Call it with the live tokens of a micro-batch."""

    config: ObjectiveBase
    core: CoreFormula
    name: str
    sequence_level: bool
    """Also True for `tis_sequence`: its factor needs all tokens of a sequence in one call."""
    needs_old_logprobs: bool
    needs_reference_logprobs: bool
    """True with a KL term, which also acts on tokens whose advantage is 0: do not skip them."""
    num_topk: int
    delta: float | None
    """The trust region's boundary of |pi - mu|, for the diagnostics. None where the objective has none."""

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutputs:
        outputs = self.core(replace(inputs, anchor_logprobs=self._anchor(inputs)))
        if self.config.correction is not None:
            outputs = apply_correction(outputs, inputs, self.config.correction)
        if self.config.kl_ref is not None:
            outputs = add_kl(outputs, inputs, self.config.kl_ref)
        return outputs

    def _anchor(self, inputs: ObjectiveInputs) -> torch.Tensor:
        if self.config.anchor == "rollout":
            return inputs.behavior_logprobs
        if inputs.old_logprobs is None:
            raise ValueError(f"objective {self.name} with anchor=recompute needs old_logprobs; none were given")
        return inputs.old_logprobs


def build(config: dict[str, Any] | ObjectiveBase) -> ConfiguredObjective:
    """The objective of a config section, or of a plain dictionary like {"name": "drpo", "delta": 0.15}.

    Raises ValueError (pydantic's) for an unknown name, key or constant, and for a user's function that cannot be
    imported. Warns when DRPO's delta is so large that nothing can be beyond its boundary.
    """
    config = parse_objective(config)
    name: str = config.name  # type: ignore[attr-defined]
    if isinstance(config, ImportedObjectiveConfig):
        core: CoreFormula = partial(imported, config=config, function=load_function(config.path))
    else:
        core = partial(REGISTRY[name], config=config)
    if isinstance(config, DRPOConfig) and config.penalty == "l2" and config.advantage_weighted and config.delta >= 1:
        warnings.warn(
            f"drpo with delta={config.delta}: |pi - mu| cannot exceed 1, so the weight stays within "
            f"[{1 - 1 / config.delta:.3g}, {1 + 1 / config.delta:.3g}] and no update is ever corrected; "
            "delta: trust-region (0.15) puts the boundary where it can be reached",
            stacklevel=2,
        )
    has_boundary = isinstance(config, DRPOConfig) or (
        isinstance(config, DPPOConfig) and config.divergence == "binary_tv"
    )
    return ConfiguredObjective(
        config=config,
        core=core,
        name=name,
        sequence_level=(
            isinstance(config, GSPOConfig)
            or (isinstance(config, ImportedObjectiveConfig) and config.sequence_level)
            or (config.correction is not None and config.correction.name == "tis_sequence")
        ),
        needs_old_logprobs=config.anchor == "recompute",
        needs_reference_logprobs=config.kl_ref is not None,
        num_topk=config.needed_topk,
        delta=config.delta if isinstance(config, DPPOConfig | DRPOConfig) and has_boundary else None,
    )

"""The policy objective: a tagged union by `name`. One section an objective; `docs/objectives.md` has every equation.

objective: {name: drpo, delta: trust-region}
objective: {name: grpo, eps_high: 0.28, anchor: recompute, correction: {name: tis_token, max_ratio: 2.0}}
objective: {name: import, path: "my_package.my_module:my_objective", options: {temperature: 2}}
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from drpo_megatron.config.base import Count, ImportPath, Positive, Section, Share, UpperRatio

DELTA_PRESETS = {"paper": 12.5, "trust-region": 0.15}
"""`paper`: the released runs' constant, under which no token is ever corrected. `trust-region`: DPPO's boundary."""


def _resolve_delta(value: Any) -> Any:
    if isinstance(value, str) and value in DELTA_PRESETS:
        return DELTA_PRESETS[value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            presets = ", ".join(f"{name} ({number})" for name, number in DELTA_PRESETS.items())
            raise ValueError(f"delta={value!r} is neither a number nor a preset; presets: {presets}") from None
    return value


Delta = Annotated[Positive, BeforeValidator(_resolve_delta)]


class TISTokenConfig(Section):
    name: Literal["tis_token"] = "tis_token"
    max_ratio: Positive = 2.0
    """Upper limit of pi_old / mu of a token."""


class TISSequenceConfig(Section):
    name: Literal["tis_sequence"] = "tis_sequence"
    max_ratio: Positive = 2.0
    """Upper limit of the product of pi_old / mu over a sequence's tokens."""


class IcePopConfig(Section):
    name: Literal["icepop"] = "icepop"
    min_ratio: Positive = 0.5
    """Tokens with pi_old / mu below it are masked."""
    max_ratio: Positive = 5.0
    """Tokens with pi_old / mu above it are masked."""

    @model_validator(mode="after")
    def _ordered(self) -> IcePopConfig:
        if self.min_ratio >= self.max_ratio:
            raise ValueError(f"min_ratio={self.min_ratio} is not below max_ratio={self.max_ratio}")
        return self


CorrectionConfig = Annotated[TISTokenConfig | TISSequenceConfig | IcePopConfig, Field(discriminator="name")]


class KLReferenceConfig(Section):
    coef: Positive
    """Weight of the KL term in the loss, per token. It also acts on tokens whose advantage is 0."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimators of KL(pi || pi_ref). On-policy, only k2's gradient is that of the KL; k1's has mean 0."""


class ObjectiveBase(Section):
    """What all objectives share: the distribution that the ratio is taken against, and two optional terms."""

    anchor: Literal["rollout", "recompute"] = "rollout"
    """`rollout`: r = pi / mu with the engine's own mu. `recompute`: r = pi / pi_old, with pi_old from one more forward
    pass of the trainer before the first optimiser step."""
    correction: CorrectionConfig | None = None
    """Weight or mask by pi_old / mu, for `anchor: recompute`, whose ratio does not see the engine's mismatch."""
    kl_ref: KLReferenceConfig | None = None
    """KL to the policy at the start of RL, frozen: the checkpoint at model.hf_path or, after a warm-up, what the warm-up
    made of it. Costs one forward pass a rollout, and every rank's share of the weights in host memory. None in the
    paper."""

    @property
    def needed_topk(self) -> int:
        """How many top tokens the engine has to report with every draw."""
        return 0

    @model_validator(mode="after")
    def _correction_needs_recompute(self) -> ObjectiveBase:
        if self.correction is not None and self.anchor == "rollout":
            raise ValueError(
                f"correction={self.correction.name} with anchor=rollout counts the mismatch twice: r = pi/mu already "
                "holds it; set anchor: recompute or drop the correction"
            )
        return self


class PGConfig(ObjectiveBase):
    """Unregularised importance-weighted policy gradient."""

    name: Literal["pg"] = "pg"


class GRPOConfig(ObjectiveBase):
    """PPO's clipped surrogate with separate limits (clip-higher) and an optional dual clip."""

    name: Literal["grpo", "ppo"] = "grpo"
    eps_low: Share = 0.2
    """With A < 0, tokens with r < 1 - eps_low are clipped."""
    eps_high: Positive = 0.28
    """With A > 0, tokens with r > 1 + eps_high are clipped."""
    dual_clip: UpperRatio | None = None
    """With A < 0, tokens with r above it are clipped too (3 is usual). None: off."""


class SPOConfig(ObjectiveBase):
    """Simple Policy Optimization: chi-squared penalty."""

    name: Literal["spo"] = "spo"
    eps: Positive = 12.5
    """The penalty is |A| (r - 1)^2 / (2 eps): the smaller, the harder."""


class DPPOConfig(ObjectiveBase):
    """Masks updates that leave a trust region of probability, not of ratio."""

    name: Literal["dppo"] = "dppo"
    divergence: Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"] = "binary_tv"
    """binary: sampled token against all others; topk: the engine's top tokens, the sampled one and the rest."""
    delta: Positive
    """Boundary of the divergence. The papers: 0.15 for binary TV in BF16, 0.6 under FP8, 0.05 for binary KL."""
    num_topk: Count = 20
    """Top tokens the engine reports; read by topk_tv and topk_kl only."""

    @property
    def needed_topk(self) -> int:
        return self.num_topk if self.divergence.startswith("topk") else 0

    @model_validator(mode="after")
    def _topk_needs_rollout(self) -> DPPOConfig:
        if self.divergence.startswith("topk") and self.anchor == "recompute":
            raise ValueError(
                f"divergence={self.divergence} compares with the engine's top tokens, but anchor=recompute; "
                "use anchor: rollout, or divergence: binary_tv or binary_kl"
            )
        return self


class DRPOConfig(ObjectiveBase):
    """Divergence-regularised policy optimisation, arXiv:2606.09821, and its ablations."""

    name: Literal["drpo"] = "drpo"
    delta: Delta
    """Where the weight w = 1 - sign(A (r - 1)) |pi - mu| / delta crosses 0. A number, `paper` (12.5) or `trust-region`
    (0.15). With delta >= 1 no token can ever be beyond the boundary."""
    advantage_weighted: bool = True
    """False, an ablation: the penalty is not multiplied by |A|."""
    delta_mask: Share | None = None
    """Mask-DRPO, an ablation: the penalty acts only where |pi - mu| > delta_mask. None: everywhere."""
    penalty: Literal["l2", "kl", "k3", "tv"] = "l2"
    """What takes the place of mu (r - 1)^2 / 2. l2 is the paper's; the others are its ablations."""


class CISPOConfig(ObjectiveBase):
    """Clipped importance-sampling weights: no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    eps_low: Share = 1.0
    """The weight is at least 1 - eps_low. 1: no lower limit, as in the paper."""
    eps_high: Positive = 4.0
    """The weight is at most 1 + eps_high."""


class GSPOConfig(ObjectiveBase):
    """PPO's clip on the sequence's geometric-mean ratio."""

    name: Literal["gspo"] = "gspo"
    eps_low: Share = 3e-4
    """With A < 0, sequences with s < 1 - eps_low are clipped."""
    eps_high: Positive = 4e-4
    """With A > 0, sequences with s > 1 + eps_high are clipped."""


class SAPOConfig(ObjectiveBase):
    """A soft sigmoid gate instead of the clip."""

    name: Literal["sapo"] = "sapo"
    tau_pos: Positive = 1.0
    """Steepness of the gate where A > 0."""
    tau_neg: Positive = 1.05
    """Steepness of the gate where A < 0; larger, because such updates unsettle training more."""


class SFTConfig(ObjectiveBase):
    """Negative log-likelihood times the advantage, for the supervised warm-up. There is no ratio."""

    name: Literal["sft"] = "sft"


class ImportedObjectiveConfig(ObjectiveBase):
    """A user's own objective: `function(inputs: ObjectiveInputs, options: dict) -> ObjectiveOutputs`."""

    name: Literal["import"] = "import"
    path: ImportPath
    """`package.module:function`, importable by the trainer's processes."""
    options: dict[str, Any] = {}
    """Handed to the function as it is."""
    sequence_level: bool = False
    """True if a token's coefficient depends on the other tokens of its sequence."""


ObjectiveConfig = Annotated[
    PGConfig
    | GRPOConfig
    | SPOConfig
    | DPPOConfig
    | DRPOConfig
    | CISPOConfig
    | GSPOConfig
    | SAPOConfig
    | SFTConfig
    | ImportedObjectiveConfig,
    Field(discriminator="name"),
]

_ADAPTER: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)


def parse_objective(config: dict[str, Any] | ObjectiveBase) -> ObjectiveBase:
    """The typed section of a plain dictionary. Raises pydantic's ValidationError (a ValueError) on anything unknown."""
    return config if isinstance(config, ObjectiveBase) else _ADAPTER.validate_python(config)

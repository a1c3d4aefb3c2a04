"""The `precision` section: what is computed in FP8 or FP4, in the trainer and in the rollout engines, and what watches it.

`drpo_megatron.precision.recipes` says what each name means and checks that it can run.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from drpo_megatron.config.base import Count, CountOrNone, Positive, Section

TrainRecipeName = Literal["bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8", "nvfp4", "e5m2", "mxfp4"]
RolloutRecipeName = Literal["bf16", "fp8-block128", "e4m3", "e4m3-row", "e5m2", "mxfp8", "nvfp4", "mxfp4"]


class TrainRecipe(Section):
    name: TrainRecipeName
    """Of the linear layers' matrix products. `bf16`: nothing is quantised, they compute in `trainer.dtype`. The others
    are Transformer Engine's recipes, but for `e5m2` and `mxfp4`, which exist as emulation only, for studies."""


class RolloutRecipe(Section):
    name: RolloutRecipeName
    """Of the engines' linear layers. `bf16`: not quantised, as the engine is. `fp8-block128`: weights 128 x 128,
    activations 1 x 128 (what SGLang runs). `e4m3`, `e5m2`: one scale a tensor; `e4m3-row`: one a row of the weights
    and one a token."""


class NoiseRecipe(Section):
    """A controlled error in place of a number format."""

    name: Literal["noise"] = "noise"
    size: Positive
    """Weights, activations (and gradients) are multiplied by 1 + size x N(0, 1). E4M3 has about the error of 0.027."""


class EarlyWarningSection(Section):
    """The mismatch between engine and trainer, against its own history: the best predictor of a collapse."""

    action: Literal["log", "stop", "bf16-rollout"] = "log"
    """`log`: print a warning. `stop`: end the run with an error, checkpoint written. `bf16-rollout`: send the engines
    unquantised weights from then on, and compute with them unquantised."""
    factor: Positive = 3.0
    """Warn when the mean of the last `window` steps is above `factor` times the median of all steps before them."""
    window: Count = 5
    """Steps that are compared with the history."""
    min_history: Count = 20
    """Steps of history before the rule judges."""


class MonitorSection(Section):
    layers_every: CountOrNone = 10
    """Rollouts between looks into the quantised layers: amax, underflow, saturation and signal-to-noise of activations,
    weights and gradients in one micro-batch. Of emulated layers only. 0: never."""
    gradient_every: CountOrNone = 50
    """Rollouts between comparisons of the low-precision gradient of a micro-batch with its high-precision gradient, and
    of the experts that routers choose in both. Costs two more forward-backward passes of it. 0: never."""
    early_warning: EarlyWarningSection = EarlyWarningSection()


class PrecisionSection(Section):
    train: Annotated[TrainRecipe | NoiseRecipe, Field(discriminator="name")] = TrainRecipe(name="bf16")
    """Of the trainer. Router, embeddings, norms and LM head always stay in `trainer.dtype`."""
    rollout: Annotated[RolloutRecipe | NoiseRecipe, Field(discriminator="name")] = RolloutRecipe(name="bf16")
    """Of the rollout engines, which then draw from another policy than the trainer's: mu says by how much."""
    keep_bf16: tuple[Literal["first", "last"], ...] = ()
    """Decoder layers that stay unquantised, in training and in rollouts: the `first`, the `last`."""
    params_in_fp8: bool = False
    """Transformer Engine holds the layers' weights in FP8 only, beside the optimizer's FP32 masters: less memory. Of a
    real recipe; emulation has no use for it."""
    emulate: Literal["auto", True, False] = "auto"
    """Quantise and dequantise in torch instead of computing in FP8: same numbers, no speed. auto: where Transformer
    Engine or the hardware is missing, which the log says. false: an error there. true: everywhere, as an experiment."""
    monitor: MonitorSection = MonitorSection()

    @property
    def trains_quantized(self) -> bool:
        return self.train.name != "bf16"

    @property
    def rolls_out_quantized(self) -> bool:
        return self.rollout.name != "bf16"

"""The one table of precision recipes: what a name means in Transformer Engine, in Megatron-Core, and in emulation.

A recipe says how the three matrix products of a linear layer are quantised, y = x w^T, dx = g w and dw = g^T x, each
operand in blocks along the dimension that is summed over. Transformer Engine is imported by who asks for it only: on a
machine without CUDA its import fails.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from drpo_megatron.config.precision import NoiseRecipe, PrecisionSection, RolloutRecipe, TrainRecipe
from drpo_megatron.precision.quantize import BLOCK128, FORMATS, GROUP128, Format, Noise
from drpo_megatron.precision.transformer_engine import find_transformer_engine

TENSOR = FORMATS["e4m3"]
HISTORY_LENGTH = 1024
"""Steps of amax that delayed scaling looks back on: Transformer Engine's default. Megatron-Core's is 1."""
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Without it Transformer Engine rounds blockwise scales to powers of two, and SGLang doesn't."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Formats of what a linear layer multiplies. Blocks [rows, columns] are those of the products that sum over
    columns; where a product sums over rows, the format is transposed."""

    activation: Format | Noise
    weight: Format | Noise
    gradient: Format | Noise
    has_history: bool = False
    """Scales come from the largest amax of the last `HISTORY_LENGTH` uses (delayed scaling), not from the tensor."""

    @property
    def block(self) -> int | None:
        """Side of a weight's square blocks, if it has such."""
        block = self.weight.block if isinstance(self.weight, Format) else (None, None)
        return block[0] if block[0] == block[1] else None


@dataclass(frozen=True, slots=True)
class Engine:
    """What Transformer Engine needs for a recipe."""

    megatron: dict[str, Any]
    """Fields of Megatron-Core's TransformerConfig."""
    recipe: str
    """Class in transformer_engine.common.recipe."""
    version: tuple[int, int]
    """The first Transformer Engine that has it."""
    capability: tuple[tuple[int, int], tuple[int, int]]
    """Compute capabilities from, to."""
    cuda: tuple[int, int] = (12, 0)
    environment: dict[str, str] = field(default_factory=dict)
    """Read while Transformer Engine is imported, so a process must be started with it."""
    token_multiple: int = 16
    """What the rows of a quantised matrix must be a multiple of, and what Megatron-Core's router pads every expert's rows
    to. The router pads with the rank's own rows: with fewer than this many, an expert stays short of a multiple."""
    width_multiple: int = 16
    """What the sides of a rank's weights must be a multiple of: `assert_dim_for_fp8_exec` of its forward and backward; MXFP8's
    blocks (`MXFP8Quantizer.is_quantizable`); what NVFP4's kernel checks (quantize_transpose_nvfp4.cuh)."""
    expert_width_multiple: int = 16
    """The same of experts, whose matrices are quantised together."""


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    operands: Operands
    engine: Engine | None
    """None: there is only the emulation."""


_HOPPER_ON = ((9, 0), (99, 0))
_HOPPER = ((9, 0), (9, 9))
_BLACKWELL_ON = ((10, 0), (99, 0))
_HISTORY = {"fp8_amax_history_len": HISTORY_LENGTH, "fp8_amax_compute_algo": "max"}


def _fp8(recipe: str, number_format: str, **further: Any) -> dict[str, Any]:
    return {"fp8": number_format, "fp8_recipe": recipe} | further


TRAIN_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "fp8-delayed",
            Operands(TENSOR, TENSOR, FORMATS["e5m2"], has_history=True),
            Engine(_fp8("delayed", "hybrid", **_HISTORY), "DelayedScaling", (1, 0), _HOPPER_ON),
        ),
        Recipe(
            "fp8-tensorwise",
            Operands(TENSOR, TENSOR, FORMATS["e5m2"]),
            Engine(_fp8("tensorwise", "hybrid"), "Float8CurrentScaling", (2, 2), _HOPPER_ON),
        ),
        Recipe(
            "fp8-blockwise",
            Operands(GROUP128, BLOCK128, GROUP128),
            Engine(
                _fp8("blockwise", "e4m3"),
                "Float8BlockScaling",
                (2, 3),
                _HOPPER,
                cuda=(12, 9),
                environment={FP32_SCALES: "1"},
                token_multiple=128,
            ),
        ),
        Recipe(
            "mxfp8",
            Operands(FORMATS["mxfp8"], FORMATS["mxfp8"], FORMATS["mxfp8"]),
            Engine(
                _fp8("mxfp8", "e4m3"),
                "MXFP8BlockScaling",
                (2, 1),
                _BLACKWELL_ON,
                cuda=(12, 8),
                token_multiple=32,
                width_multiple=32,
                expert_width_multiple=32,
            ),
        ),
        Recipe(
            "nvfp4",
            Operands(FORMATS["nvfp4"], FORMATS["nvfp4-16x16"], FORMATS["nvfp4"]),
            Engine(
                {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
                "NVFP4BlockScaling",
                (2, 7),
                _BLACKWELL_ON,
                cuda=(12, 8),
                token_multiple=128,
                width_multiple=32,
                expert_width_multiple=128,
            ),
        ),
        Recipe("e5m2", Operands(FORMATS["e5m2"], FORMATS["e5m2"], FORMATS["e5m2"]), None),
        Recipe("mxfp4", Operands(FORMATS["mxfp4"], FORMATS["mxfp4"], FORMATS["mxfp4"]), None),
    )
}

ROLLOUT_FORMATS: dict[str, tuple[Format, Format]] = {
    "fp8-block128": (BLOCK128, GROUP128),
    "e4m3": (TENSOR, TENSOR),
    "e4m3-row": (FORMATS["e4m3-row"], FORMATS["e4m3-row"]),
    "e5m2": (FORMATS["e5m2"], FORMATS["e5m2"]),
    "mxfp8": (FORMATS["mxfp8"], FORMATS["mxfp8"]),
    "nvfp4": (FORMATS["nvfp4"], FORMATS["nvfp4"]),
    "mxfp4": (FORMATS["mxfp4"], FORMATS["mxfp4"]),
}
"""(weights, activations) of an engine's linear layers."""


def train_recipe(section: TrainRecipe | NoiseRecipe) -> Recipe | None:
    """None: nothing is quantised."""
    if isinstance(section, NoiseRecipe):
        noise = Noise(section.size)
        return Recipe("noise", Operands(noise, noise, noise), None)
    return TRAIN_RECIPES[section.name] if section.name != "bf16" else None


def rollout_formats(section: RolloutRecipe | NoiseRecipe) -> tuple[Format | Noise, Format | Noise] | None:
    """(weights, activations) of the engines. None: nothing is quantised."""
    if isinstance(section, NoiseRecipe):
        return Noise(section.size), Noise(section.size)
    return ROLLOUT_FORMATS[section.name] if section.name != "bf16" else None


# --- what runs it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hardware:
    """What decides whether a recipe runs for real. None: there is none of it."""

    capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    transformer_engine: tuple[int, int] | None = None


def find_hardware(backend: str) -> Hardware:
    """Of this process, under `trainer.backend`. Raises: ValueError for a Transformer Engine that doesn't import."""
    if backend == "cpu" or not torch.cuda.is_available():
        return Hardware()
    version = find_transformer_engine()
    return Hardware(
        torch.cuda.get_device_capability(),
        _version(torch.version.cuda or "0.0"),
        None if version is None else _version(version),
    )


def what_is_missing(engine: Engine, hardware: Hardware) -> list[str]:
    """Why this hardware can't run the recipe, in words. [] if it can."""
    if hardware.capability is None:
        return ["there is no CUDA device"]
    missing = []
    lowest, highest = engine.capability
    if not lowest <= hardware.capability <= highest:
        upper = "" if highest[0] == 99 else f" to {_dotted(highest)}"
        missing.append(
            f"compute capability is {_dotted(hardware.capability)}, it needs {_dotted(lowest)}{upper or ' or newer'}"
        )
    if hardware.cuda is None or hardware.cuda < engine.cuda:
        missing.append(f"torch has CUDA {_dotted(hardware.cuda)}, it needs {_dotted(engine.cuda)}")
    if hardware.transformer_engine is None or hardware.transformer_engine < engine.version:
        found = _dotted(hardware.transformer_engine)
        missing.append(f"Transformer Engine is {found}, it needs {_dotted(engine.version)}")
    return missing


@dataclass(frozen=True, slots=True)
class TrainPrecision:
    """What a trainer rank does about `precision.train`."""

    recipe: Recipe
    emulated: bool
    reason: str
    """Why it is emulated; "" if it is not."""

    def describe(self) -> str:
        return f"{self.recipe.name}, " + (f"EMULATED: {self.reason}" if self.emulated else "by Transformer Engine")


def resolve(section: PrecisionSection, hardware: Hardware) -> TrainPrecision | None:
    """How `precision.train` runs on this hardware; None if nothing is quantised.

    Raises: ValueError when it can't run for real and precision.emulate=false.
    """
    recipe = train_recipe(section.train)
    if recipe is None:
        return None
    if section.emulate is True:
        return TrainPrecision(recipe, True, "precision.emulate=true")
    missing = what_is_missing(recipe.engine, hardware) if recipe.engine else ["it exists as emulation only"]
    if not missing:
        return TrainPrecision(recipe, False, "")
    if section.emulate is False:
        raise ValueError(
            f"precision.train={recipe.name} can't run here, and precision.emulate=false: {'; '.join(missing)}; use "
            "precision.emulate=auto, precision.train=bf16, or another machine"
        )
    return TrainPrecision(recipe, True, "; ".join(missing))


def environment(section: PrecisionSection) -> dict[str, str]:
    """Variables that a trainer process must be started with."""
    recipe = train_recipe(section.train)
    return dict(recipe.engine.environment) if recipe and recipe.engine else {}


def megatron_flags(
    precision: TrainPrecision | None, section: PrecisionSection, num_experts: int | None
) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig: {} where nothing is quantised, or by emulation."""
    if precision is None or precision.emulated:
        return {}
    engine = precision.recipe.engine
    assert engine is not None
    flags = dict(engine.megatron)
    if section.keep_bf16:
        flags |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": int("first" in section.keep_bf16),
            "num_layers_at_end_in_bf16": int("last" in section.keep_bf16),
        }
    if section.params_in_fp8:
        flags["fp8_param"] = True
    if num_experts is not None:
        flags["moe_router_padding_for_quantization"] = True
    return flags


def transformer_engine_recipe(recipe: Recipe) -> Any:
    """Transformer Engine's recipe object. Raises ImportError where it isn't installed or finds no CUDA."""
    from transformer_engine.common import recipe as recipes

    assert recipe.engine is not None
    arguments: dict[str, Any] = {}
    if number_format := recipe.engine.megatron.get("fp8"):
        arguments["fp8_format"] = recipes.Format[number_format.upper()]
    if recipe.operands.has_history:
        arguments |= {"amax_history_len": HISTORY_LENGTH, "amax_compute_algo": "max"}
    return getattr(recipes, recipe.engine.recipe)(**arguments)


def transformer_engine_linear(recipe: Recipe, outputs: int, inputs: int) -> Any:
    """(x, w) -> y by a linear layer of Transformer Engine under the recipe, BF16; its weights become w's, which gets their
    gradient. One layer over all calls: delayed scaling remembers.
    """
    import transformer_engine.pytorch as te

    linear = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    engine_recipe = transformer_engine_recipe(recipe)

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            linear.weight.copy_(w)
        linear.weight.grad = None
        linear.weight.register_post_accumulate_grad_hook(lambda weight: setattr(w, "grad", weight.grad))
        with te.fp8_autocast(enabled=True, fp8_recipe=engine_recipe):
            y: torch.Tensor = linear(x)
        return y

    return multiply


def _version(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", text)] + [0, 0]
    return numbers[0], numbers[1]


def _dotted(version: tuple[int, int] | None) -> str:
    return "not there" if version is None else f"{version[0]}.{version[1]}"

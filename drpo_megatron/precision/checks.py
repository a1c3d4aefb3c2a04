"""Whether the `precision` section can run with this model, layout and machine, before any process starts.

FP8 that would be ignored in silence is refused; what is emulated, or quantised in other blocks than one would think,
is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.config.problems import listed
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.precision.recipes import (
    Hardware,
    TrainPrecision,
    resolve,
    rollout_formats,
    train_recipe,
)

SGLANG_RECIPES = ("bf16", "fp8-block128")


def check_precision(config: Config, hf_config: dict[str, Any], hardware: Hardware | None) -> list[str]:
    """What the user should know: what is emulated and why, and where blocks don't align.

    Args:
        hf_config: the checkpoint's config.json.
        hardware: of the trainer's machines. None: not known here.
    Raises: ValueError that lists everything that can't work, each with the keys, their values and what to do.
    """
    model = hf_config.get("text_config", hf_config)
    problems = [*_ignored(config), *_rollout_problems(config, hardware)]
    problems += [*_server_problems(config, model), *_block_problems(config, model)]
    precision = None
    if hardware is not None:
        try:
            precision = resolve(config.precision, hardware)
        except ValueError as error:
            problems.append(str(error))
    if precision is not None and not precision.emulated:
        problems += _engine_problems(config, model)
    if problems:
        raise ValueError(listed("this precision can't run", problems))
    return [*_notes(config, precision, hardware), *_alignment_notes(config, model)]


def _ignored(config: Config) -> Iterator[str]:
    section = config.precision
    trains, rolls_out = section.trains_quantized, section.rolls_out_quantized
    if section.keep_bf16 and not (trains or rolls_out):
        yield (
            f"precision.keep_bf16=[{', '.join(section.keep_bf16)}] with precision.train=bf16 and "
            "precision.rollout=bf16: nothing is quantised anyway; leave it out, or choose a recipe"
        )
    if section.keep_bf16 and section.train.name == "fp8-delayed":
        yield (
            f"precision.keep_bf16=[{', '.join(section.keep_bf16)}] with precision.train=fp8-delayed: Megatron-Core can't "
            "except layers from delayed scaling; use fp8-tensorwise or fp8-blockwise, or leave keep_bf16 out"
        )
    if section.params_in_fp8 and not section.train.name.startswith(("fp8-", "mxfp8")):
        yield (
            f"precision.params_in_fp8=true with precision.train={section.train.name}: no layer would hold FP8 weights; "
            "set it to false, or choose one of Transformer Engine's FP8 recipes"
        )
    if section.monitor.early_warning.action == "bf16-rollout" and not rolls_out:
        yield (
            "precision.monitor.early_warning.action=bf16-rollout with precision.rollout=bf16: there is nothing to fall "
            "back from; use log or stop"
        )


def _rollout_problems(config: Config, hardware: Hardware | None) -> Iterator[str]:
    section, engine = config.precision, config.rollout.engine.name
    if not section.rolls_out_quantized:
        return
    if engine == "sglang" and section.monitor.early_warning.action == "bf16-rollout":
        yield (
            "precision.monitor.early_warning.action=bf16-rollout with rollout.engine=sglang: a server computes in the "
            "precision that it was launched in; use log or stop"
        )
    is_launched = isinstance(config.rollout.engine, SGLangEngineSection) and not config.rollout.engine.servers
    if is_launched and hardware is not None and hardware.capability is None:
        yield (
            f"precision.rollout={section.rollout.name} with rollout.engine=sglang: SGLang has no FP8 kernels for this "
            "CPU; use rollout.engine=transformers, which emulates them, or a machine with GPUs"
        )
    if engine == "sglang" and section.rollout.name not in SGLANG_RECIPES:
        yield (
            f"precision.rollout={section.rollout.name} with rollout.engine=sglang: SGLang runs "
            f"{' and '.join(SGLANG_RECIPES)}; use one of them, or rollout.engine=transformers, which emulates all"
        )
    if engine == "transformers" and section.emulate is False:
        yield (
            f"precision.rollout={section.rollout.name} with rollout.engine=transformers and precision.emulate=false: the "
            "embedded engine can only emulate; use precision.emulate=auto, or rollout.engine=sglang"
        )


def _server_problems(config: Config, model: dict[str, Any]) -> Iterator[str]:
    """SGLang gives every rank whole blocks, of each matrix that it fuses with others, too."""
    engine = config.rollout.engine
    rollout = config.precision.rollout.name
    if rollout == "bf16" or rollout not in SGLANG_RECIPES or not isinstance(engine, SGLangEngineSection):
        return
    tensor = engine.tensor_parallel
    sizes = _widths(model, tensor, tensor)
    odd = [f"{name}={size} / {ranks} ranks" for name, (size, ranks) in sizes.items() if size % (128 * ranks)]
    if odd:
        yield (
            f"precision.rollout={rollout} with rollout.engine=sglang and rollout.engine.tensor_parallel={tensor}: SGLang "
            f"serves whole blocks of 128 only, and {', '.join(odd)} leaves a part of one; use a smaller "
            "rollout.engine.tensor_parallel, precision.rollout=bf16, or rollout.engine=transformers"
        )


def _widths(model: dict[str, Any], tensor: int, expert_tensor: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the matrices that are quantised, by the keys that they are made of: (size, among how many ranks)."""
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    head_dim = model.get("head_dim") or model["hidden_size"] // heads
    sizes = {"hidden_size": (model["hidden_size"], 1), "num_attention_heads x head_dim": (heads * head_dim, tensor)}
    sizes["num_key_value_heads x head_dim"] = kv_heads * head_dim, min(tensor, kv_heads)
    has_dense = not model.get("moe_intermediate_size") or bool(model.get("mlp_only_layers"))
    inner = ("intermediate_size",) * has_dense + ("moe_intermediate_size", "shared_expert_intermediate_size")
    for name in inner:
        if model.get(name):
            sizes[name] = model[name], expert_tensor if name == _experts_key(model) else tensor
    for kind in ("key", "value"):
        if model.get(f"linear_num_{kind}_heads"):
            name = f"linear_num_{kind}_heads x linear_{kind}_head_dim"
            sizes[name] = model[f"linear_num_{kind}_heads"] * model[f"linear_{kind}_head_dim"], tensor
    return sizes


def _experts_key(model: dict[str, Any]) -> str:
    """Of an expert's rows: Qwen's, or Mixtral's. A dense model has neither's experts."""
    is_mixtral = model.get("num_local_experts") and not model.get("moe_intermediate_size")
    return "intermediate_size" if is_mixtral else "moe_intermediate_size"


def _block_problems(config: Config, model: dict[str, Any]) -> Iterator[str]:
    recipe, parts = train_recipe(config.precision.train), config.parallel.expert_tensor
    block = recipe.operands.block if recipe else None
    inner = model.get(_experts_key(model))
    if block and parts > 1 and inner and (inner // parts) % block:
        yield (
            f"precision.train={config.precision.train.name} with parallel.expert_tensor={parts}: it cuts an expert's "
            f"{inner} rows into {inner // parts}, which breaks its {block} x {block} blocks; use "
            "parallel.expert_tensor=1 and a larger parallel.expert"
        )


def _engine_problems(config: Config, model: dict[str, Any]) -> Iterator[str]:
    """Of a recipe that Transformer Engine runs."""
    has_experts = any(model.get(name) for name in ("num_experts", "num_local_experts"))
    if has_experts and config.model.moe_token_dispatcher == "allgather":
        yield (
            f"precision.train={config.precision.train.name} with model.moe_token_dispatcher=allgather: every expert's "
            "tokens are padded to a multiple of the recipe's, which Megatron-Core does with alltoall only; use "
            "model.moe_token_dispatcher=alltoall"
        )
    recipe = train_recipe(config.precision.train)
    assert recipe is not None and recipe.engine is not None
    parallel = config.parallel
    sizes = _widths(model, parallel.tensor, parallel.expert_tensor)
    for name, (size, ranks) in sizes.items():
        of_experts = has_experts and name in ("hidden_size", _experts_key(model))
        multiple = recipe.engine.expert_width_multiple if of_experts else recipe.engine.width_multiple
        if size % (multiple * ranks):
            yield (
                f"precision.train={recipe.name} with parallel.tensor={parallel.tensor} and parallel.expert_tensor="
                f"{parallel.expert_tensor}: {name}={size} / {ranks} ranks is no multiple of {multiple}, and Transformer "
                "Engine's kernels take no other sides of a matrix; cut less, or use precision.train=bf16"
            )
    if config.trainer.dtype != "bf16":
        yield (
            f"precision.train={config.precision.train.name} with trainer.dtype={config.trainer.dtype}: around FP8 layers "
            "Megatron-Core computes in BF16; use trainer.dtype=bf16"
        )


def _notes(config: Config, precision: TrainPrecision | None, hardware: Hardware | None) -> Iterator[str]:
    section = config.precision
    if section.trains_quantized:
        if hardware is None:
            yield f"precision.train={section.train.name}: whether it is emulated is decided on the trainer's machines"
        elif precision is not None:
            yield f"precision.train={precision.describe()}"
            if precision.emulated and section.params_in_fp8:
                yield "precision.params_in_fp8=true has no effect in emulation"
    if section.rolls_out_quantized and config.rollout.engine.name == "transformers":
        yield f"precision.rollout={section.rollout.name}, EMULATED: the embedded engine computes in FP32"


def _alignment_notes(config: Config, model: dict[str, Any]) -> Iterator[str]:
    """Megatron keeps q, k and v (by group) and gate and up in one matrix each, and cuts matrices by rank."""
    recipe, rollout = train_recipe(config.precision.train), rollout_formats(config.precision.rollout)
    block = recipe.operands.block if recipe else None
    if block is None or rollout is None:
        return
    sizes = {
        "head_dim": model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"],
        "moe_intermediate_size": model.get("moe_intermediate_size"),
        "intermediate_size": model.get("intermediate_size"),
        "hidden_size": model["hidden_size"],
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size and size % block]
    if odd:
        yield (
            f"{', '.join(odd)} {'is' if len(odd) == 1 else 'are'} not a multiple of {block}: ragged blocks are padded "
            "with zeros, and the trainer's blocks cover other rows than the engines', so that FP8 on both sides still "
            "leaves a mismatch"
        )

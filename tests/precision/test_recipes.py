"""The table of recipes, where each can run, and what is refused before any process starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drpo_megatron.config import load_config
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.precision.checks import check_precision
from drpo_megatron.precision.recipes import (
    TRAIN_RECIPES,
    Hardware,
    environment,
    megatron_flags,
    resolve,
    train_recipe,
)
from drpo_megatron.trainer.platform import activate
from tests.tiny import tiny_config, tiny_dense_config, tiny_moe_config

HOPPER = Hardware((9, 0), (12, 9), (2, 20))
BLACKWELL = Hardware((10, 0), (13, 0), (2, 20))
CPU = Hardware()


def section(**keys: Any) -> PrecisionSection:
    named = {key: {"name": value} for key, value in keys.items() if key in ("train", "rollout")}
    return PrecisionSection.model_validate(keys | named)


WHOLE_BLOCKS = dict(hidden_size=256, head_dim=64, moe_intermediate_size=256)


def check(
    hardware: Hardware | None = CPU, moe: bool = True, shape: dict[str, int] | None = None, **sections: Any
) -> list[str]:
    """`check_precision` of the tiny model, whose head_dim is 16 and whose experts have 24 rows unless `shape` has them."""
    for key in ("train", "rollout"):
        if isinstance(name := sections.get("precision", {}).get(key), str):
            sections["precision"] = sections["precision"] | {key: {"name": name}}
    config = tiny_config("unused", **sections)
    shape = {name: size for name, size in (shape or {}).items() if moe or not name.startswith("moe_")}
    model = tiny_moe_config(**shape) if moe else tiny_dense_config(**shape)
    return check_precision(config, model.to_dict(), hardware)


@pytest.mark.parametrize(
    ("name", "on_hopper", "on_blackwell"),
    [
        ("fp8-delayed", True, True),
        ("fp8-tensorwise", True, True),
        ("fp8-blockwise", True, False),
        ("mxfp8", False, True),
        ("nvfp4", False, True),
        ("e5m2", False, False),
        ("mxfp4", False, False),
    ],
)
def test_every_recipe_runs_for_real_where_it_can_and_is_emulated_elsewhere(
    name: str, on_hopper: bool, on_blackwell: bool
) -> None:
    for hardware, runs in ((HOPPER, on_hopper), (BLACKWELL, on_blackwell), (CPU, False)):
        precision = resolve(section(train=name), hardware)
        assert precision is not None and precision.emulated is not runs
        assert ("EMULATED: " in precision.describe()) is not runs
        if not runs:
            with pytest.raises(
                ValueError, match=rf"precision.train={name} can't run here, and precision.emulate=false"
            ):
                resolve(section(train=name, emulate=False), hardware)
    assert resolve(section(train=name, emulate=True), HOPPER).reason == "precision.emulate=true"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name, recipe in TRAIN_RECIPES.items() if recipe.engine])
def test_megatrons_router_can_pad_every_expert_in_the_smallest_micro_batch(name: str) -> None:
    """It pads with rows of the rank's own, so it needs as many as it pads to; what is left would be padded again by
    Transformer Engine under Megatron-Core 0.16.1, and not at all under 0.19."""
    activate("cpu")
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, pad_routing_map

    engine = TRAIN_RECIPES[name].engine
    assert engine is not None
    flags = dict(fp8=None, fp8_recipe=None, fp4=None, fp4_recipe=None) | engine.megatron
    multiple = get_align_size_for_quantization(SimpleNamespace(use_transformer_engine_op_fuser=False, **flags))
    counts = torch.arange(engine.token_multiple + 1)  # Of the tokens of one expert each.
    chosen = torch.arange(engine.token_multiple)[:, None] < counts
    padded = pad_routing_map(chosen, multiple).sum(0)
    assert engine.token_multiple % multiple == 0
    assert (padded % multiple == 0).all() and (padded >= counts).all()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="there is no CUDA device"):
        resolve(section(train="mxfp8", emulate=False), CPU)
    old = Hardware((8, 0), (12, 4), (2, 1))
    with pytest.raises(ValueError, match=r"capability is 8\.0, it needs 9\.0.*CUDA 12\.4.*12\.9.*Engine is 2\.1.*2\.3"):
        resolve(section(train="fp8-blockwise", emulate=False), old)
    without = Hardware((9, 0), (12, 9), None)
    assert resolve(section(train="fp8-tensorwise"), without).reason == (  # type: ignore[union-attr]
        "Transformer Engine is not there, it needs 2.2"
    )


def test_flags_are_fields_of_megatrons_config_and_only_of_what_runs_for_real() -> None:
    activate("cpu")
    from megatron.core.transformer.transformer_config import TransformerConfig

    for name, recipe in TRAIN_RECIPES.items():
        chosen = section(train=name, keep_bf16=["first"] if name != "fp8-delayed" else [])
        assert megatron_flags(resolve(chosen, CPU), chosen, num_experts=4) == {}
        if recipe.engine is None:
            continue
        hardware = BLACKWELL if "fp8-" not in name else HOPPER
        flags = megatron_flags(resolve(chosen, hardware), chosen, num_experts=None)
        assert flags.keys() <= TransformerConfig.__dataclass_fields__.keys()
        TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=4, bf16=True, **flags)
    delayed = section(train="fp8-delayed")
    flags = megatron_flags(resolve(delayed, HOPPER), delayed, num_experts=4)
    assert (flags["fp8_amax_history_len"], flags["fp8_amax_compute_algo"]) == (1024, "max")
    assert flags["moe_router_padding_for_quantization"] is True


def test_blockwise_ranks_are_started_with_fp32_scales() -> None:
    assert environment(section(train="fp8-blockwise")) == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    assert environment(section(train="mxfp8")) == environment(section()) == {}


def test_noise_is_a_recipe() -> None:
    noise = PrecisionSection.model_validate({"train": {"name": "noise", "size": 0.02}})
    recipe = train_recipe(noise.train)
    assert recipe is not None and recipe.operands.weight.size == 0.02  # type: ignore[union-attr]
    assert train_recipe(section().train) is None


def test_the_same_thing_on_a_cpu_is_said_and_not_silent() -> None:
    assert check() == []
    assert check(precision={"train": "fp8-tensorwise"}) == [
        "precision.train=fp8-tensorwise, EMULATED: there is no CUDA device"
    ]
    [note] = check(precision={"rollout": "fp8-block128"})
    assert note.startswith("precision.rollout=fp8-block128, EMULATED")
    *_, odd = check(precision={"train": "fp8-blockwise", "rollout": "fp8-block128"})
    assert odd.startswith(
        "head_dim=16, moe_intermediate_size=24, intermediate_size=48, hidden_size=32 are not a multiple"
    )
    [note] = check(hardware=None, precision={"train": "mxfp8"})
    assert note == "precision.train=mxfp8: whether it is emulated is decided on the trainer's machines"
    assert "precision.params_in_fp8=true has no effect in emulation" in check(
        precision={"train": "mxfp8", "params_in_fp8": True}
    )


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ({"keep_bf16": ["first"]}, "keep_bf16=.first.*nothing is quantised anyway"),
        ({"train": "fp8-delayed", "keep_bf16": ["last"]}, "can't except layers from delayed scaling"),
        ({"params_in_fp8": True}, "params_in_fp8=true with precision.train=bf16: no layer would hold FP8"),
        ({"train": "nvfp4", "params_in_fp8": True}, "params_in_fp8=true with precision.train=nvfp4"),
        ({"train": "mxfp8", "emulate": False}, "can't run here"),
        ({"rollout": "e4m3", "emulate": False}, "the embedded engine can only emulate"),
        ({"monitor": {"early_warning": {"action": "bf16-rollout"}}}, "there is nothing to fall back from"),
    ],
)
def test_what_would_be_ignored_or_cannot_run_is_refused(precision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(precision=precision)


def test_layouts_that_do_not_suit_a_recipe_are_refused() -> None:
    with pytest.raises(ValueError, match="expert_tensor=2: it cuts an expert's 24 rows into 12.*128 x 128 blocks"):
        check(precision={"train": "fp8-blockwise"}, parallel={"expert_tensor": 2})
    check(precision={"train": "mxfp8"}, parallel={"expert_tensor": 2})
    real = {"trainer": {"dtype": "bf16"}, "precision": {"train": "fp8-tensorwise"}}
    with pytest.raises(ValueError, match="moe_token_dispatcher=allgather.*use model.moe_token_dispatcher=alltoall"):
        check(HOPPER, model={"moe_token_dispatcher": "allgather"}, **real)
    assert check(CPU, model={"moe_token_dispatcher": "allgather"}, **real) != []
    assert check(HOPPER, moe=False, model={"moe_token_dispatcher": "allgather"}, **real) == [
        "precision.train=fp8-tensorwise, by Transformer Engine"
    ]
    with pytest.raises(ValueError, match="trainer.dtype=fp32.*use trainer.dtype=bf16"):
        check(HOPPER, precision={"train": "fp8-tensorwise"})
    with pytest.raises(ValueError, match="rollout=mxfp8 with rollout.engine=sglang: SGLang runs bf16 and fp8-block128"):
        check(precision={"rollout": "mxfp8"}, rollout={"engine": {"name": "sglang"}})


@pytest.mark.parametrize(
    ("train", "hardware", "multiple", "of_experts"),
    [
        ("fp8-delayed", HOPPER, 16, 16),
        ("fp8-blockwise", HOPPER, 16, 16),
        ("mxfp8", BLACKWELL, 32, 32),
        ("nvfp4", BLACKWELL, 32, 128),
    ],
)
def test_gemms_get_the_widths_that_they_take(train: str, hardware: Hardware, multiple: int, of_experts: int) -> None:
    """Of matrices as ranks hold them: an expert's rows are cut by expert_tensor, a dense layer's by tensor."""
    real: dict[str, Any] = {"trainer": {"dtype": "bf16"}, "precision": {"train": train}}
    parts, inner = {"num_ranks": 2, "tensor": 2, "expert_tensor": 2, "sequence": True}, 256 * of_experts
    dense = dict(hidden_size=multiple, head_dim=multiple, intermediate_size=2 * multiple)
    experts = dense | dict(hidden_size=of_experts, moe_intermediate_size=inner)
    check(hardware, shape=experts, parallel=parts, **real)
    check(hardware, moe=False, shape=dense, parallel=parts, **real)
    for moe, sizes, found, needed in (
        (
            True,
            {"moe_intermediate_size": inner + of_experts},
            f"moe_intermediate_size={inner + of_experts} / 2",
            of_experts,
        ),
        (True, {"hidden_size": of_experts + 8}, f"hidden_size={of_experts + 8} / 1", of_experts),
        (True, {"head_dim": multiple // 2}, f"num_key_value_heads x head_dim={multiple} / 2", multiple),
        (False, {"intermediate_size": 3 * multiple}, f"intermediate_size={3 * multiple} / 2", multiple),
        (False, {"hidden_size": multiple + 8}, f"hidden_size={multiple + 8} / 1", multiple),
    ):
        shape = (experts if moe else dense) | sizes
        with pytest.raises(ValueError, match=f"{found} ranks is no multiple of {needed}, and"):
            check(hardware, moe=moe, shape=shape, parallel=parts, **real)


def test_sglang_computes_in_fp8_where_it_has_kernels() -> None:
    precision, shape = {"rollout": "fp8-block128"}, WHOLE_BLOCKS
    with pytest.raises(ValueError, match="SGLang has no FP8 kernels for this CPU; use rollout.engine=transformers"):
        check(CPU, shape=shape, precision=precision, rollout={"engine": {"name": "sglang"}})
    assert check(HOPPER, shape=shape, precision=precision, rollout={"engine": {"name": "sglang"}}) == []
    outside = {"name": "sglang", "servers": ["http://gpu:30000"]}
    assert check(CPU, shape=shape, precision=precision, rollout={"engine": outside}) == []
    fallback = {"monitor": {"early_warning": {"action": "bf16-rollout"}}}
    with pytest.raises(ValueError, match="a server computes in the precision that it was launched in"):
        check(HOPPER, shape=shape, precision=precision | fallback, rollout={"engine": {"name": "sglang"}})


@pytest.mark.parametrize(
    ("shape", "tensor_parallel", "odd"),
    [
        ({}, 2, "num_key_value_heads x head_dim=128 / 2 ranks leaves"),
        ({"moe_intermediate_size": 192}, 1, "moe_intermediate_size=192 / 1 ranks leaves"),
        ({"hidden_size": 192}, 1, "hidden_size=192 / 1 ranks leaves"),
    ],
)
def test_sglang_serves_whole_blocks_only(shape: dict[str, int], tensor_parallel: int, odd: str) -> None:
    engine = {"name": "sglang", "tensor_parallel": tensor_parallel}
    with pytest.raises(ValueError, match=f"SGLang serves whole blocks of 128 only, and {odd}"):
        check(HOPPER, shape=WHOLE_BLOCKS | shape, precision={"rollout": "fp8-block128"}, rollout={"engine": engine})


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    quickstart = Path(__file__).parents[2] / "examples" / "quickstart.yaml"
    with pytest.raises(ValueError, match="expected one of bf16, .*noise; did you mean fp8-blockwise"):
        load_config(quickstart, ["precision.train=fp8-blockwize"])
    with pytest.raises(ValueError, match="precision.emulate = 'maybe'; expected one of auto, True, False"):
        load_config(quickstart, ["precision.emulate=maybe"])
    config = load_config(quickstart, ["precision.train=fp8-blockwise", "precision.rollout={name: noise, size: 0.1}"])
    assert config.precision.train.name == "fp8-blockwise" and config.precision.rollout.name == "noise"

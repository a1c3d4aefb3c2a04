"""Quantised rollouts: what an engine is sent, what it computes, and that it can be switched off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.conversion.fp8 import quantised_infos, server_flags
from drpo_megatron.models import get_family
from drpo_megatron.precision.quantize import dequantize_block128, fake_quantize
from drpo_megatron.precision.rollout import RolloutPrecision
from drpo_megatron.rollout.sglang_layout import ServerChecksums
from drpo_megatron.rollout.transformers_engine import TransformersEngine
from drpo_megatron.weight_sync import publish
from tests.tiny import (
    save_checkpoint,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

CONFIGS = {
    "qwen3": tiny_dense_config,
    "qwen3_moe": tiny_moe_config,
    "mixtral": tiny_mixtral_config,
    "qwen3_5_moe": tiny_qwen3_5_text_config,
}
KEPT = ("norm", "embed", "lm_head", "mlp.gate.", "shared_expert_gate", "conv1d", "A_log", "dt_bias", "in_proj_a")
"""Parts of names of tensors that no engine quantises."""


def section(name: str, **keys: Any) -> PrecisionSection:
    return PrecisionSection.model_validate({"rollout": {"name": name}} | keys)


def precision_of(path: Path, chosen: PrecisionSection) -> RolloutPrecision:
    checkpoint = HFCheckpoint(path)
    precision = RolloutPrecision.of_checkpoint(chosen, checkpoint.config, checkpoint.names())
    assert precision is not None
    return precision


def quantised_engine(path: Path, chosen: PrecisionSection) -> TransformersEngine:
    """An engine that was sent its own checkpoint's weights, as a run sends them. Checksums are compared."""
    engine = TransformersEngine(str(path), TransformersEngineSection(), precision=chosen)
    exported = [(name, engine.slots[name].clone()) for name in engine.slots]
    encode = precision_of(path, chosen).dequantized
    publish(exported, 1, engine.load_weights, engine.finish_update, dtype=torch.float32, encode=encode)
    assert engine.policy_version == 1
    return engine


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("recipe", ["fp8-block128", "mxfp4"])
def test_an_engine_multiplies_rounded_weights_with_rounded_activations(
    family: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the model of transformers with another `F.linear`, expert by expert."""
    path = save_checkpoint(tmp_path, CONFIGS[family]())
    engine = quantised_engine(path, section(recipe))
    precision = precision_of(path, section(recipe))
    plain = TransformersEngine(str(path), TransformersEngineSection())
    exact = logits(plain.model)
    assert all(not any(part in name for part in KEPT) for name in precision.names)

    model = plain.model
    if family != "qwen3":
        model.set_experts_implementation("eager")
    linear = torch.nn.functional.linear
    starts = {plain.slots[name].data_ptr() for name in precision.names}
    ends = {plain.slots[name].data_ptr() + plain.slots[name].nbytes for name in precision.names}

    def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.data_ptr() not in starts or weight.data_ptr() + weight.nbytes not in ends:
            return linear(x, weight, bias)
        # An expert's gate and up are one product, and two matrices.
        parts = weight.chunk(2) if weight.data_ptr() + weight.nbytes // 2 in starts else (weight,)
        rounded = torch.cat([fake_quantize(part, precision.weight) for part in parts])
        return linear(fake_quantize(x, precision.activation), rounded, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", rounded_linear)
    expected = logits(model)
    monkeypatch.undo()
    assert (expected - exact).abs().max() > 0.01
    torch.testing.assert_close(logits(engine.model), expected, rtol=1e-4, atol=1e-4)


def test_without_rounded_activations_only_the_weights_differ(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_moe_config())
    engine = quantised_engine(path, section("fp8-block128"))
    both = logits(engine.model)
    engine.round_activations(False)
    only_weights = logits(engine.model)
    assert not torch.equal(both, only_weights)
    original = [(name, tensor.float()) for name, tensor in HFCheckpoint(path).iter_tensors()]
    publish(original, 2, engine.load_weights, engine.finish_update)
    plain = TransformersEngine(str(path), TransformersEngineSection())
    torch.testing.assert_close(logits(engine.model), logits(plain.model), rtol=1e-5, atol=1e-5)


def test_an_fp8_engine_is_sent_the_two_tensors_of_a_block_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_moe_config())
    precision = precision_of(path, section("fp8-block128"))
    for name, tensor in HFCheckpoint(path).iter_tensors():
        sent = dict(precision.quantized(name, tensor))
        if name not in precision.names:
            assert sent == {name: tensor}
            continue
        infos = quantised_infos(name, tuple(tensor.shape))
        assert {n: (t.dtype, tuple(t.shape)) for n, t in sent.items()} == {
            n: (i.dtype, i.shape) for n, i in infos.items()
        }
        # Both engines compute with the same numbers.
        [(_, dequantized)] = precision.dequantized(name, tensor.float())
        values, scale_inv = sent.values()
        assert torch.equal(dequantize_block128(values, scale_inv), dequantized)


def test_stacked_experts_come_apart_for_an_fp8_engine(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_qwen3_5_config())
    checkpoint = HFCheckpoint(path)
    precision = precision_of(path, section("fp8-block128"))
    stacked = [name for name in precision.names if ".experts." in name]
    sent = {part for name in stacked for part, _ in precision.quantized(name, checkpoint.get(name))}
    plain = [name for name in checkpoint.names() if ".experts." not in name]
    rules = get_family(checkpoint.config).rules(checkpoint.config, plain)
    experts = {hf.name for rule in rules for hf in rule.hf if ".mlp.experts." in hf.name}
    assert stacked and {name for name in sent if not name.endswith("_scale_inv")} == experts
    # Rounded together for an embedded engine, each with blocks of its own all the same.
    name = next(name for name in stacked if name.endswith("gate_up_proj"))
    [(_, whole)] = precision.dequantized(name, checkpoint.get(name).float())
    parts = dict(precision.quantized(name, checkpoint.get(name)))
    up = name.replace("gate_up_proj", "2.up_proj.weight")
    assert torch.equal(whole[2].chunk(2)[1], dequantize_block128(parts[up], parts[f"{up}_scale_inv"]))


def test_an_sglang_server_starts_in_fp8_and_is_expected_to_hash_what_its_weights_stand_for(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_moe_config(num_hidden_layers=1, moe_intermediate_size=256))
    *_, override = server_flags(path, section("fp8-block128"))
    config = json.loads(override)["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= set(config["modules_to_not_convert"])
    assert "model.layers.0.mlp.experts.0.up_proj" not in config["modules_to_not_convert"]

    precision, model = precision_of(path, section("fp8-block128")), read_hf_config(path)
    sent = [item for name, tensor in HFCheckpoint(path).iter_tensors() for item in precision.quantized(name, tensor)]
    checksums, same = ServerChecksums(model, 1), ServerChecksums(model, 1)
    checksums.add(sent[::-1])  # Scales before weights: the order is the transport's.
    values = {name: tensor for name, tensor in sent if not name.endswith("_scale_inv")}
    scales = dict(sent)
    for name, tensor in values.items():
        if (scale := scales.get(f"{name}_scale_inv")) is not None:
            tensor = dequantize_block128(tensor, scale).to(torch.bfloat16)
        same.add([(name, tensor)])
    assert checksums.of_rank(0) == same.of_rank(0)
    assert not any(name.endswith("_scale_inv") for name in checksums.of_rank(0))
    unfinished = ServerChecksums(model, 1)
    unfinished.add(
        (name, tensor) for name, tensor in sent if name != "model.layers.0.self_attn.o_proj.weight_scale_inv"
    )
    with pytest.raises(ValueError, match="o_proj.weight were not all exported"):
        unfinished.of_rank(0)


def test_layers_to_keep_are_kept(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tiny_moe_config())
    names = precision_of(path, section("mxfp8", keep_bf16=["first", "last"])).names
    assert {name.split(".")[2] for name in names} == {"1", "2"}

"""Checkpoints with FP8 in them: every number is dequantised, or the tensor is refused by name. References are numpy's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.stored import Quantisation, StoredTensors
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.conversion.verify import verify
from tests.checkpoint.test_convert import edit, edit_config, silent
from tests.tiny import save_checkpoint, tiny_moe_config, tiny_qwen3_5_config

Tensors = dict[str, torch.Tensor]
BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MTP = "mtp.layers.0.mlp.experts.0.up_proj.weight"
BF16 = 2.0**-8 + 2.0**-23
"""Relative: half a unit of 8 bits, after the product was rounded to FP32's 24."""
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def e4m3(bits: int) -> float:
    """The value of a byte, by the format's definition: 1 sign, 4 exponent bits of bias 7, 3 mantissa bits; 0x7f is NaN."""
    sign, exponent, mantissa = -1.0 if bits & 0x80 else 1.0, (bits >> 3) & 15, bits & 7
    if bits & 0x7F == 0x7F:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


E4M3 = np.array([e4m3(bits) for bits in range(256)])


def reference(values: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """float64, element by element: each weight times the scale of the block that it lies in."""
    bits, factors = values.view(torch.uint8).numpy(), scale.double().numpy()
    found = np.empty(bits.shape)
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            found[i, j] = E4M3[bits[i, j]] * factors[i // rows, j // columns]
    return found


def quantised(name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...], seed: int = 0, **kinds: Any) -> Tensors:
    """An FP8 tensor of every finite byte and scales of 1e-4 to 1e-2."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 254, shape, generator=generator, dtype=torch.uint8)
    bits[bits == 0x7F] = 0
    scale = torch.rand(scale_shape, generator=generator) * 0.01 + 1e-4
    suffix, dtype = kinds.get("suffix", "_scale_inv"), kinds.get("scale_dtype", torch.float32)
    return {name: bits.view(torch.float8_e4m3fn), name + suffix: scale.to(dtype)}


def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """All matrices of attention and experts in FP8, of sizes that fill no block, with scales in BF16."""
    sizes: dict[str, Any] = dict(hidden_size=160, intermediate_size=208, moe_intermediate_size=136, head_dim=40)
    source = save_checkpoint(tmp_path / "moe" / "hf", tiny_moe_config(num_hidden_layers=1, **sizes))

    def change(tensors: Tensors) -> None:
        for seed, (name, tensor) in enumerate(list(tensors.items())):
            tensors[name] = tensor.bfloat16()
            if "_proj.weight" in name:
                tensors |= quantised(name, tensor.shape, blocks(tensor.shape), seed, scale_dtype=torch.bfloat16)

    edit(source, change)
    edit_config(source, quantization_config=BLOCK, dtype="bfloat16")
    return source


@pytest.fixture
def mtp(tmp_path: Path) -> Path:
    """A Qwen3.5 whose multi-token prediction, which no rule covers, is in FP8, too."""
    source = save_checkpoint(tmp_path / "mtp" / "hf", tiny_qwen3_5_config())
    edit(source, lambda tensors: tensors.update(quantised(MTP, (200, 300), blocks((200, 300)))))
    edit_config(source, quantization_config=BLOCK)
    return source


def there_and_back(source: Path, **options: Any) -> Tensors:
    hf_to_megatron(source, source.parent / "megatron", say=silent, **options)
    result = verify(source, source.parent / "megatron")
    assert (result.differences, result.config_differences) == ([], [])
    megatron_to_hf(source.parent / "megatron", source.parent / "back", say=silent)
    assert "quantization_config" not in json.loads((source.parent / "back" / "config.json").read_text())
    return load_file(source.parent / "back" / "model.safetensors")


def refusal(source: Path) -> str:
    with pytest.raises(ValueError) as error:
        hf_to_megatron(source, source.parent / "out", say=silent)
    assert not (source.parent / "out").exists()
    return str(error.value)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_fp8_matrix_is_the_product_of_its_bytes_and_scales(moe: Path, dtype: torch.dtype | None) -> None:
    before, back = load_file(moe / "model.safetensors"), there_and_back(moe, dtype=dtype)
    scaled = {name for name in before if f"{name}_scale_inv" in before}
    assert len(scaled) == 16 and set(back) == {name for name in before if not name.endswith("_scale_inv")}
    bound = BF16 if dtype is None else 2.0**-24
    for name in back:
        if name in scaled:
            expected = reference(before[name], before[f"{name}_scale_inv"], 128, 128)
            assert (np.abs(back[name].double().numpy() - expected) <= np.abs(expected) * bound).all(), name
        else:
            assert torch.equal(back[name], before[name].to(dtype or torch.bfloat16)), name


def test_fp8_in_layers_that_no_rule_covers_is_dequantised_too(mtp: Path) -> None:
    before, back = load_file(mtp / "model.safetensors"), there_and_back(mtp)
    expected = reference(before[MTP], before[f"{MTP}_scale_inv"], 128, 128)
    assert back[MTP].dtype == torch.bfloat16 and f"{MTP}_scale_inv" not in back
    assert (np.abs(back[MTP].double().numpy() - expected) <= np.abs(expected) * BF16).all()


@pytest.mark.parametrize(
    ("scale_shape", "suffix"), [((), "_scale"), ((1,), "_scale_inv"), ((64, 1), "_scale"), ((64,), "_scale")]
)
def test_a_scale_of_a_tensor_or_of_each_row_is_read(tmp_path: Path, scale_shape: tuple[int, ...], suffix: str) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    new = quantised(Q_PROJ, (64, 32), scale_shape, suffix=suffix)
    edit(source, lambda tensors: tensors.update(new))
    edit_config(source, quantization_config=PER_TENSOR)
    expected = reference(new[Q_PROJ], new[Q_PROJ + suffix].reshape(-1, 1).expand(64, 1), 1, 32)
    found = there_and_back(source)[Q_PROJ]
    assert (np.abs(found.double().numpy() - expected) <= np.abs(expected) * BF16).all()


def test_stacked_experts_in_fp8_are_read_slice_by_slice(tmp_path: Path) -> None:
    tensors = quantised("experts.down_proj", (3, 200, 300), (3, 2, 3))
    directory = tmp_path / "stack"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"quantization_config": BLOCK}))
    save_file(tensors, directory / "model.safetensors")
    stored = StoredTensors(HFCheckpoint(directory))
    assert stored.names == ["experts.down_proj"] and list(stored.problems()) == []
    whole = stored.get("experts.down_proj", dtype=torch.float32)
    for expert in range(3):
        expected = reference(
            tensors["experts.down_proj"][expert], tensors["experts.down_proj_scale_inv"][expert], 128, 128
        )
        found = stored.get("experts.down_proj", expert, torch.float32)
        assert torch.equal(found, whole[expert]) and np.array_equal(found.numpy(), expected.astype(np.float32))


def test_blocks_of_any_size_and_scales_of_powers_of_two_are_read() -> None:
    quantisation = Quantisation.of({"quantization_config": BLOCK | {"weight_block_size": [1, 32]}})
    assert quantisation is not None and quantisation.scale_shapes((5, 70)) == [(5, 3)]
    tensors = quantised("x", (5, 70), (5, 3))
    scale = torch.tensor([[2.0**-k for k in range(3)]] * 5).to(torch.float8_e8m0fnu)
    found = quantisation.dequantised(tensors["x"], scale)
    assert np.array_equal(found.numpy(), reference(tensors["x"], scale.float(), 1, 32).astype(np.float32))


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def put(**new: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in new.items()})


SCALE = f"{MTP}_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(SCALE), f"dtype: {MTP} is float8_e4m3fn without a {SCALE}"),
        (drop(MTP), f"scale: {SCALE} has no tensor that it scales"),
        (lambda t: t.update({MTP: torch.ones(200, 300)}), f"scale: {SCALE} scales {MTP}, which is float32 and not FP8"),
        (
            lambda t: t.update({SCALE: torch.ones(2, 2)}),
            rf"misshapen: {SCALE} is [2, 2], blocks of 128 x 128 in [200, 300]",
        ),
        (lambda t: t.update({SCALE: torch.ones(2, 3).int()}), f"dtype: {SCALE} is int32, which no scale can be"),
        (lambda t: t.update({f"{MTP}_scale": torch.ones(2, 3)}), f"scale: {MTP} has two, "),
        (
            lambda t: t.update({MTP: t[MTP].float().to(torch.float8_e5m2)}),
            "quantization_config speaks of float8_e4m3fn",
        ),
        (lambda t: t.update({SCALE: torch.full((2, 3), float("nan"))}), f"{SCALE} of .* holds NaN or infinity"),
        (put(mtp__packed=torch.zeros(4, 4, dtype=torch.uint8)), "dtype: mtp.packed is uint8: weights that are packed"),
        (
            put(mtp__qweight=torch.zeros(4, 4, dtype=torch.int32)),
            "dtype: mtp.qweight is int32: weights that are packed",
        ),
        (put(mtp__input_scale=torch.ones(1)), "scale: mtp.input_scale has no tensor that it scales"),
        (
            lambda t: t.update({"model.visual.x": torch.ones(2, 2).to(torch.float8_e4m3fn)}),
            "dtype: model.visual.x is float8_e4m3fn without a model.visual.x_scale_inv",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(mtp: Path, change: Callable[[Tensors], Any], message: str) -> None:
    edit(mtp, change)
    found = refusal(mtp)
    assert all(part in found for part in message.split(" .* ")), found


def test_fp8_without_a_word_in_the_config_is_refused(mtp: Path) -> None:
    edit_config(mtp, quantization_config=None)
    assert f"{MTP} is float8_e4m3fn without a {SCALE} and a quantization_config for it" in refusal(mtp)


@pytest.mark.parametrize(
    "section",
    [
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"bits": 4}},
        {"quantization_config": BLOCK | {"weight_block_size": [128]}},
        {"quantization_config": BLOCK | {"activation_scheme": "static"}},
        {"quantization_config": BLOCK | {"fmt": "mxfp8"}},
        {"quantization_config": "fp8"},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_other_methods_are_refused_by_name(moe: Path, section: dict[str, Any]) -> None:
    edit_config(moe, **({"quantization_config": None} | section))
    found = refusal(moe)
    assert str(moe) in found and "take the unquantised checkpoint" in found


def test_a_method_that_the_text_model_or_another_file_speaks_of_is_refused(mtp: Path, moe: Path) -> None:
    config = json.loads((mtp / "config.json").read_text())
    text = config["text_config"] | {"quantization_config": {"quant_method": "gptq"}}
    edit_config(mtp, quantization_config=None, text_config=text)
    assert "text_config.quantization_config" in refusal(mtp)
    (moe / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json, which is not understood" in refusal(moe)


def test_verify_sees_a_changed_scale(mtp: Path) -> None:
    hf_to_megatron(mtp, mtp.parent / "megatron", say=silent)

    def change(tensors: Tensors) -> None:
        tensors[SCALE][0, 0] *= 2

    edit(mtp, change)
    (found,) = verify(mtp, mtp.parent / "megatron").differences
    assert found.startswith(f"{MTP}: ")

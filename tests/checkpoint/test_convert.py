"""Conversions in one process: byte for byte there and back, FP8, types, and bad input named in full."""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drpo_megatron.checkpoint.checksums import CHECKSUMS_FILE
from drpo_megatron.checkpoint.hf import INDEX_FILE, HFCheckpoint
from drpo_megatron.checkpoint.torch_dist import Box, TorchDistCheckpoint
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.conversion.verify import verify
from tests.tiny import (
    save_checkpoint,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

MODELS: dict[str, Any] = {
    "qwen2_tied": tiny_qwen2_config(tie_word_embeddings=True),
    "qwen3": tiny_dense_config(),
    "qwen3_moe": tiny_moe_config(num_hidden_layers=2),
    "qwen3_moe_some_dense": tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[3]),
    "mixtral": tiny_mixtral_config(num_hidden_layers=2),
    "qwen3_5_moe": tiny_qwen3_5_config(),
    "qwen3_5_moe_text": tiny_qwen3_5_text_config(),
}


def silent(text: str) -> None: ...


def shard(directory: Path, num_shards: int) -> None:
    """Cut model.safetensors into files with names and an index of their own, and metadata that must be kept."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index in range(num_shards):
        names = list(tensors)[index::num_shards]
        file = f"part-{index}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt", "part": str(index)})
        weight_map |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"weight_map": weight_map, "metadata": {"total_size": size, "by": "somebody"}}
    (directory / INDEX_FILE).write_text(json.dumps(index_file))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    return save_checkpoint(tmp_path_factory.mktemp("source") / "hf", tiny_moe_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def converted(model: Path) -> Path:
    hf_to_megatron(model, model.parent / "megatron", say=silent)
    return model.parent / "megatron"


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The same checkpoint, to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "hf"))


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_the_same_directory_byte_for_byte(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", MODELS[name])
    shard(source, 3)
    (source / "LICENSE").write_text("of the weights")
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    assert same_files(source, tmp_path / "back")
    result = verify(source, tmp_path / "megatron")
    assert (result.num_cast, result.differences, result.config_differences) == (0, [], [])


def test_only_what_changes_is_read_and_copies_are_the_same_as_reads(
    model: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()
    really_read = TorchDistCheckpoint.read

    def noted(self: TorchDistCheckpoint, box: Box, into: torch.Tensor) -> None:
        read.add(box.key)
        really_read(self, box, into)

    monkeypatch.setattr(TorchDistCheckpoint, "read", noted)
    megatron_to_hf(converted, tmp_path / "copied", say=silent)
    assert read and all("linear_qkv" in key for key in read)
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    megatron_to_hf(converted, tmp_path / "read", say=silent)
    assert any("experts" in key for key in read)
    assert same_files(model, tmp_path / "copied") and same_files(model, tmp_path / "read")


def test_mixed_dtypes_and_a_written_out_tied_head_come_back(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16() if "norm" not in name else tensors[name]
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].half()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = save_checkpoint(tmp_path / "hf", tiny_dense_config(tie_word_embeddings=True))
    edit(source, change)
    said: list[str] = []
    hf_to_megatron(source, tmp_path / "megatron", say=said.append)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    assert same_files(source, tmp_path / "back")
    assert "mixed dtypes" in said[0] and "1 of float16" in said[0]
    assert "config.json says float32, but the tensors are bfloat16" in said[1]


def test_a_dtype_is_for_all_weights_and_stands_in_the_config(model: Path, tmp_path: Path) -> None:
    hf_to_megatron(model, tmp_path / "megatron", dtype=torch.bfloat16, say=silent)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    back, original = HFCheckpoint(tmp_path / "back"), HFCheckpoint(model)
    assert all(torch.equal(back.get(name), original.get(name).bfloat16()) for name in original.names())
    assert back.config["dtype"] == "bfloat16"
    assert verify(model, tmp_path / "megatron").num_cast == len(original.names())


def test_new_shards_are_at_most_as_large_as_asked(model: Path, converted: Path, tmp_path: Path) -> None:
    megatron_to_hf(converted, tmp_path / "back", max_shard_bytes=20_000, say=silent)
    back, original = HFCheckpoint(tmp_path / "back"), HFCheckpoint(model)
    assert len(back.headers) > 3
    assert all(sum(i.num_bytes for i in header.tensors.values()) <= 20_000 for header in back.headers.values())
    assert all(torch.equal(back.get(name), original.get(name)) for name in original.names())
    total = json.loads((tmp_path / "back" / INDEX_FILE).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for _, tensor in original.iter_tensors())


# --- FP8 ------------------------------------------------------------------------------------------------------------


def reference_dequantised(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """Block by block, with torch's own cast."""
    wide = weight.to(torch.float32)
    for row in range(scale_inv.shape[0]):
        for column in range(scale_inv.shape[1]):
            wide[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128] *= scale_inv[row, column]
    return wide


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(original, its FP8 export). No size is a multiple of 128, and most matrices have several blocks."""
    root = tmp_path_factory.mktemp("fp8")
    shape: dict[str, Any] = dict(hidden_size=160, intermediate_size=208, moe_intermediate_size=136, head_dim=40)
    source = save_checkpoint(root / "hf", tiny_moe_config(num_hidden_layers=2, decoder_sparse_step=2, **shape))
    edit(source, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    hf_to_megatron(source, root / "megatron", say=silent)
    said: list[str] = []
    megatron_to_hf(root / "megatron", root / "fp8", fp8=True, say=said.append)
    assert "FP8 tensors have blocks that aren't full, such as model.layers.0.mlp.down_proj.weight [160, 208]" in said[0]
    return source, root / "fp8"


def test_fp8_quantises_projections_and_nothing_else(fp8: tuple[Path, Path]) -> None:
    original, exported = HFCheckpoint(fp8[0]), HFCheckpoint(fp8[1])
    quantised = {name for name in original.names() if exported.info(name).dtype == torch.float8_e4m3fn}
    assert quantised == {name for name in original.names() if "_proj.weight" in name}
    assert set(exported.names()) == set(original.names()) | {f"{name}_scale_inv" for name in quantised}
    kept = [name for name in original.names() if name not in quantised]
    assert all(torch.equal(exported.get(name), original.get(name)) for name in kept)
    section = exported.config["quantization_config"]
    assert section.pop("modules_to_not_convert") == sorted(name.removesuffix(".weight") for name in kept)
    assert section == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def test_dequantised_weights_are_within_half_a_step(fp8: tuple[Path, Path]) -> None:
    """A step of E4M3 is 2^-3 of the binade: half of it is 2^-4 of the value, or 2^-10 scales near 0."""
    original, exported = HFCheckpoint(fp8[0]), HFCheckpoint(fp8[1])
    for name in (name for name in exported.names() if exported.info(name).dtype == torch.float8_e4m3fn):
        weight, scale_inv = original.get(name).float(), exported.get(f"{name}_scale_inv")
        error = (reference_dequantised(exported.get(name), scale_inv) - weight).abs()
        assert (error <= (weight.abs() * 2**-4).clamp(min=scale_inv.max().item() * 2**-10) * 1.001).all(), name


def test_an_fp8_checkpoint_is_read_as_bf16(fp8: tuple[Path, Path], tmp_path: Path) -> None:
    hf_to_megatron(fp8[1], tmp_path / "megatron", say=silent)
    assert verify(fp8[1], tmp_path / "megatron").differences == []
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    exported, back = HFCheckpoint(fp8[1]), HFCheckpoint(tmp_path / "back")
    assert "quantization_config" not in back.config
    assert set(back.names()) == set(HFCheckpoint(fp8[0]).names())
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    expected = reference_dequantised(exported.get(name), exported.get(f"{name}_scale_inv")).bfloat16()
    assert torch.equal(back.get(name), expected)


def test_stacked_experts_come_apart_in_fp8(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_qwen3_5_config())
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fp8", fp8=True, say=silent)
    original, exported = HFCheckpoint(source), HFCheckpoint(tmp_path / "fp8")
    layer = "model.language_model.layers.0"
    stacked = original.get(f"{layer}.mlp.experts.gate_up_proj")[1]
    name = f"{layer}.mlp.experts.1.up_proj.weight"
    found = reference_dequantised(exported.get(name), exported.get(f"{name}_scale_inv"))
    torch.testing.assert_close(found, stacked[stacked.shape[0] // 2 :], rtol=2**-4, atol=1e-3)
    dtypes = {name: exported.info(f"{layer}.linear_attn.{name}.weight").dtype for name in ("in_proj_qkv", "in_proj_b")}
    assert dtypes == {"in_proj_qkv": torch.float8_e4m3fn, "in_proj_b": torch.float32}
    hf_to_megatron(tmp_path / "fp8", tmp_path / "again", say=silent)
    assert verify(tmp_path / "fp8", tmp_path / "again").differences == []


# --- bad input ------------------------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed(copy: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.gate.weight"], tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.9.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(51, 32, dtype=torch.int8)
        tensors["model.embed_tokens.weight"] = torch.zeros(51, 32).to(torch.float8_e4m3fn)

    edit(copy, damage)
    with pytest.raises(ValueError) as error:
        hf_to_megatron(copy, tmp_path / "out", say=silent)
    assert str(error.value) == (
        f"{copy} and its config.json don't fit: "
        "2 dtype: lm_head.weight is int8: weights that are packed can't be unpacked here; "
        "model.embed_tokens.weight is float8_e4m3fn without a model.embed_tokens.weight_scale_inv and a "
        "quantization_config for it; "
        "1 extra: model.layers.9.extra belongs to no parameter of the model; "
        "1 misshapen: model.layers.0.self_attn.q_proj.weight is [3, 4], the config says [64, 32]; "
        "2 missing: model.layers.0.mlp.gate.weight [4, 32]; model.norm.weight [32]"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_head_that_differs_is_named(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_dense_config(num_hidden_layers=1))
    edit_config(source, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"untied: lm_head.weight differs from model.embed_tokens.weight.*set it to fa"
    ):
        hf_to_megatron(source, tmp_path / "out", say=silent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known; the known ones are .*qwen3, .*qwen3_moe"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'.*only fp8 in blocks of"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: only silu"),
    ],
)
def test_models_that_cant_be_converted_are_named(
    copy: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(copy, tmp_path / "out", say=silent)


def test_pickled_weights_are_no_input(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        hf_to_megatron(copy, tmp_path / "out", say=silent)


def test_existing_output_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="already exists; choose another directory, or --force"):
        hf_to_megatron(model, tmp_path / "out", say=silent)
    assert (tmp_path / "out" / "mine").exists()
    hf_to_megatron(model, tmp_path / "out", force=True, say=silent)
    assert verify(model, tmp_path / "out").differences == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_is_read(copy: Path, tmp_path: Path) -> None:
    for out in (copy, copy.parent):
        with pytest.raises(ValueError, match=r"can't be written while .*hf is read from it"):
            hf_to_megatron(copy, out, force=True, say=silent)
    assert HFCheckpoint(copy).names()


def test_a_full_disk_is_seen_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"has 1,000 bytes of disk free, but \d+,\d+ are needed"):
        hf_to_megatron(model, tmp_path / "out", say=silent)
    assert list(tmp_path.iterdir()) == []


# --- damaged Megatron checkpoints -------------------------------------------------------------------------------------


def test_damaged_megatron_checkpoints_are_named(converted: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(converted, tmp_path / "broken"))
    (broken / CHECKSUMS_FILE).unlink()  # As other tools and older versions leave them.
    file = broken / "__0_0.distcp"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    (broken / "__1_0.distcp").unlink()
    with pytest.raises(
        ValueError, match=rf"__0_0.distcp has {size - 1} bytes, but {size} are described; __1_0.* is mis"
    ):
        megatron_to_hf(broken, tmp_path / "out", say=silent)
    (broken / "metadata.json").unlink()
    with pytest.raises(ValueError, match=r"not a finished Megatron checkpoint.*metadata.json is missing"):
        megatron_to_hf(broken, tmp_path / "out", say=silent)


def test_a_checkpoint_of_another_shape_is_named(converted: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    edit_config(other / "hf", num_local_experts=3, moe_intermediate_size=16)
    with pytest.raises(
        ValueError, match=r"misshapen: decoder.layers.0.mlp.experts.experts.linear_fc1.weight is \[4, 48"
    ):
        megatron_to_hf(other, tmp_path / "out", skip_checksums=True, say=silent)


class Boom:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)  # Not `print`: Ray puts its own in place of it.


def test_metadata_never_runs_code(converted: Path, tmp_path: Path) -> None:
    trap = Path(shutil.copytree(converted, tmp_path / "trap"))
    (trap / ".metadata").write_bytes(pickle.dumps(Boom(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"refers to posix.mkdir, which checkpoints have no use for"):
        megatron_to_hf(trap, tmp_path / "out", skip_checksums=True, say=silent)
    assert not (tmp_path / "executed").exists()


def test_a_flipped_bit_in_any_file_is_found_before_anything_is_written(converted: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(converted, tmp_path / "damaged"))
    files = [path for path in sorted(damaged.rglob("*")) if path.is_file()]
    assert {".metadata", "common.pt", "__0_0.distcp", "tensors.json", CHECKSUMS_FILE} <= {path.name for path in files}
    for number, file in enumerate(files):
        good = file.read_bytes()
        place = (number * 7919 + len(good) // 2) % len(good)
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(file.name)):
            megatron_to_hf(damaged, tmp_path / "out", say=silent)
        with pytest.raises(ValueError, match=re.escape(file.name)):
            verify(tmp_path / "unread", damaged)  # Nothing else is looked at before.
        file.write_bytes(good)
    megatron_to_hf(damaged, tmp_path / "out", say=silent)


def test_a_changed_weight_is_found(model: Path, converted: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 5] += 0.5
        tensors["model.norm.weight"][:2] -= 1

    changed = Path(shutil.copytree(model, tmp_path / "hf"))
    edit(changed, change)
    assert verify(changed, converted).differences == [
        "model.layers.1.mlp.experts.2.up_proj.weight: 1 of 768 values differ, by up to 0.5",
        "model.norm.weight: 2 of 32 values differ, by up to 1",
    ]

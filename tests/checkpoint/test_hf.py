"""Hugging Face checkpoint files: damage is named before loading, writing is all or nothing."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.checkpoint.hf import INDEX_FILE, HFCheckpoint, tensor_checksum, write_hf_checkpoint
from drpo_megatron.checkpoint.safetensors_file import Header
from tests.tiny import save_checkpoint, tiny_moe_config


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "source", tiny_moe_config(num_hidden_layers=1))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_written_checkpoint_is_the_same_model(source: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    original = HFCheckpoint(source)
    target = write_hf_checkpoint(tmp_path / "out", original.iter_tensors(), source, max_shard_bytes=max_shard_bytes)
    written = HFCheckpoint(target)
    assert (target / INDEX_FILE).is_file() == (max_shard_bytes == 20_000)
    assert sorted(written.names()) == sorted(original.names())
    assert all(torch.equal(written.get(name), original.get(name)) for name in original.names())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(path) for path in (source, target)]
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_written_checkpoint_is_as_readable_as_the_umask_says(source: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        target = write_hf_checkpoint(tmp_path / "out", HFCheckpoint(source).iter_tensors(), source)
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "model.safetensors").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask


def test_an_interrupted_write_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_hf_checkpoint(tmp_path / "out", interrupted(), source, max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_output_is_refused_unless_forced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tensors = list(HFCheckpoint(source).iter_tensors())
    with pytest.raises(ValueError, match="already exists"):
        write_hf_checkpoint(tmp_path / "out", tensors, source)
    assert HFCheckpoint(write_hf_checkpoint(tmp_path / "out", tensors, source, force=True)).names()


def test_damage_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        HFCheckpoint(tmp_path / "nowhere")
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"has {len(whole) - 100} bytes, but its header describes {len(whole)}"):
        HFCheckpoint(source)
    weights.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="is truncated"):
        HFCheckpoint(source)
    weights.unlink()
    with pytest.raises(ValueError, match="has neither model.safetensors nor"):
        HFCheckpoint(source)
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        HFCheckpoint(source)


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "tensor b begins at byte 4 of the data, but the one before ends at 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, "tensor b begins at byte 0 of the data, but the one before ends at 8"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "tensor b begins at byte 8 of the data, but the one before ends at 4"),
        ({"a": entry(4, 12)}, "tensor a begins at byte 4 of the data, but the one before ends at 0"),
        ({"a": entry(0, 8, shape=[-1, -2])}, "tensor a has shape .* must be whole numbers from 0"),
        ({"a": entry(0, 8, shape=[2.0])}, "tensor a has shape .* must be whole numbers from 0"),
        ({"a": entry(0, 8, shape=[3])}, "tensor a F32 .3. takes 12 bytes, but has 8"),
        ({"a": entry(0, 8, dtype="F4")}, "tensor a is of dtype F4; known are F64"),
        ({"a": entry(0, 8, shape=None)}, "its header is damaged"),
        ({"a": {"dtype": "F32"}}, "its header is damaged"),
        ({"__metadata__": [], "a": entry(0, 8)}, "its header is damaged"),
        (["a"], "its header holds a list"),
        ("x", "its header holds a str"),
    ],
)
def test_headers_that_safetensors_would_not_write_are_refused(header: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Header.parse(json.dumps(header))
    with pytest.raises(Exception, match=r".+"):  # Neither does the library itself take any of them.
        entries = header.values() if isinstance(header, dict) else ()
        size = max((e["data_offsets"][1] for e in entries if "data_offsets" in e), default=0)
        text = json.dumps(header).encode()
        safetensors.deserialize(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 3}}', '"x"'])
def test_an_index_of_another_shape_is_named(source: Path, text: str) -> None:
    (source / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=INDEX_FILE):
        HFCheckpoint(source)


def test_all_problems_of_an_index_are_listed(source: Path, tmp_path: Path) -> None:
    target = write_hf_checkpoint(tmp_path / "out", HFCheckpoint(source).iter_tensors(), source, max_shard_bytes=20_000)
    index = json.loads((target / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["ghost"] = files[0]
    (target / INDEX_FILE).write_text(json.dumps(index))
    (target / files[-1]).unlink()
    with pytest.raises(ValueError) as error:
        HFCheckpoint(target)
    assert f"{files[-1]} is named by" in str(error.value) and f"tensor ghost is not in {files[0]}" in str(error.value)


def test_a_checksum_sees_dtype_shape_and_every_bit() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    flipped = tensor.clone()
    flipped.view(torch.int32)[3] ^= 1
    variants = [tensor, tensor.reshape(2, 3), tensor.view(torch.int32), flipped, tensor.bfloat16()]
    assert len({tensor_checksum(variant) for variant in variants}) == len(variants)
    assert tensor_checksum(tensor.clone()) == tensor_checksum(tensor)
    assert tensor_checksum(torch.stack([tensor, tensor]).T[:, 0]) == tensor_checksum(tensor)

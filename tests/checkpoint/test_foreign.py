"""Checkpoints that Megatron-Core wrote without us, as Megatron-LM and Megatron-Bridge call it, become Hugging Face's.

The expected tensors are cut from the parameters by hand. Its layers are stacked in one tensor, in ours every layer of
experts has its own; with Transformer Engine the norm before experts has another name.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.cli import main
from drpo_megatron.conversion.verify import verify
from drpo_megatron.models.names import spellings
from tests.tiny import save_checkpoint, tiny_dense_config, tiny_moe_config

HEADS, GROUPS, SIZE, HIDDEN = 4, 2, 16, 32
TE_NORM = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


def expected(p: dict[str, torch.Tensor], is_moe: bool) -> dict[str, torch.Tensor]:
    """By the names of Hugging Face: q, k, v lie group by group in one matrix, gate on up in another."""
    found = {
        "model.embed_tokens.weight": p["embedding.word_embeddings.weight"],
        "model.norm.weight": p["decoder.final_layernorm.weight"],
        "lm_head.weight": p["output_layer.weight"],
    }
    for layer in range(3):
        theirs, ours = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = p[f"{theirs}.self_attention.linear_qkv.weight"].view(GROUPS, HEADS // GROUPS + 2, SIZE, HIDDEN)
        found[f"{ours}.self_attn.q_proj.weight"] = qkv[:, :-2].reshape(-1, HIDDEN)
        found[f"{ours}.self_attn.k_proj.weight"] = qkv[:, -2].reshape(-1, HIDDEN)
        found[f"{ours}.self_attn.v_proj.weight"] = qkv[:, -1].reshape(-1, HIDDEN)
        found[f"{ours}.self_attn.o_proj.weight"] = p[f"{theirs}.self_attention.linear_proj.weight"]
        for name in "qk":
            found[f"{ours}.self_attn.{name}_norm.weight"] = p[f"{theirs}.self_attention.{name}_layernorm.weight"]
        found[f"{ours}.input_layernorm.weight"] = p[f"{theirs}.input_layernorm.weight"]
        found[f"{ours}.post_attention_layernorm.weight"] = p[f"{theirs}.pre_mlp_layernorm.weight"]
        mlps = {f"{ours}.mlp": f"{theirs}.mlp"}
        if is_moe:
            found[f"{ours}.mlp.gate.weight"] = p[f"{theirs}.mlp.router.weight"]
            mlps = {f"{ours}.mlp.experts.{e}": f"{theirs}.mlp.experts.local_experts.{e}" for e in range(4)}
        for mlp, module in mlps.items():
            gate, up = p[f"{module}.linear_fc1.weight"].chunk(2)
            found[f"{mlp}.gate_proj.weight"], found[f"{mlp}.up_proj.weight"] = gate, up
            found[f"{mlp}.down_proj.weight"] = p[f"{module}.linear_fc2.weight"]
    return found


def rename(file: Path, old: str, new: str) -> None:
    """Keys in .metadata that end so."""
    found = pickle.loads(file.read_bytes())
    places = {replace(i, fqn=i.fqn.replace(old, new)): place for i, place in found.storage_data.items()}
    tensors = {key.replace(old, new): value for key, value in found.state_dict_metadata.items()}
    file.write_bytes(pickle.dumps(replace(found, state_dict_metadata=tensors, storage_data=places)))


@pytest.mark.parametrize("kind", ["moe", "dense"])
def test_a_checkpoint_of_megatron_alone_is_exported_bit_by_bit(kind: str, tmp_path: Path) -> None:
    directory, is_moe = tmp_path / "megatron", kind == "moe"
    script = [sys.executable, str(Path(__file__).with_name("foreign.py")), str(directory), kind]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        script, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    iteration = directory / "iter_0000007"
    with zipfile.ZipFile(iteration / "common.pt") as archive:  # What torch.load would make objects of.
        names = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert b"Namespace" in names and b"AttnBackend" in names

    config: Any = (tiny_moe_config if is_moe else tiny_dense_config)(num_hidden_layers=3, vocab_size=128)
    given = save_checkpoint(tmp_path / "given", config)
    command = ["convert", "megatron-to-hf", "--megatron", str(directory), "--hf", str(given)]
    wanted = expected(torch.load(directory / "parameters.pt", weights_only=True), is_moe)
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    exported = HFCheckpoint(tmp_path / "out")
    assert set(exported.names()) == set(wanted)
    assert all(torch.equal(exported.get(name), tensor.contiguous()) for name, tensor in wanted.items())
    assert all(exported.info(name).dtype == torch.bfloat16 for name in wanted)
    assert verify(tmp_path / "out", iteration).differences == []
    if is_moe:
        rename(iteration / ".metadata", *TE_NORM)
        assert main([*command, "--out", str(tmp_path / "te")]) == 0
        again = HFCheckpoint(tmp_path / "te")
        assert all(torch.equal(again.get(name), exported.get(name)) for name in wanted)


def test_a_layer_that_is_not_there_in_any_spelling_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = save_checkpoint(tmp_path / "given", tiny_moe_config(num_hidden_layers=1))
    assert main(["convert", "hf-to-megatron", "--hf", str(given), "--out", str(tmp_path / "megatron")]) == 0
    (tmp_path / "megatron/checksums.json").unlink()
    rename(tmp_path / "megatron/.metadata", TE_NORM[0], "another_norm.weight")
    code = main(["convert", "verify", "--hf", str(given), "--megatron", str(tmp_path / "megatron")])
    error = capsys.readouterr().err
    assert code == 2 and re.search(r"1 missing: decoder.layers.0.mlp.linear_fc1.layer_norm_weight \[32\]", error), error


def test_spellings_are_those_of_both_layer_specs() -> None:
    assert list(spellings("decoder.layers.3.mlp.linear_fc1.layer_norm_weight"))[1:] == [
        "decoder.layers.3.pre_mlp_layernorm.weight"
    ]
    assert set(spellings("optimizer.state.exp_avg.decoder.layers.3.input_layernorm.weight")) >= {
        "optimizer.state.exp_avg.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    }
    assert list(spellings("decoder.final_layernorm.weight")) == ["decoder.final_layernorm.weight"]

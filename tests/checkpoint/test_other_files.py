"""What lies beside the weights: every file comes back or is named, whatever it is called, linked or allowed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drpo_megatron.checkpoint.checksums import CHECKSUMS_FILE
from drpo_megatron.checkpoint.hf import INDEX_FILE, HFCheckpoint, write_hf_checkpoint
from drpo_megatron.checkpoint.hf_files import FOLDER, keep_hf_files_of_training
from drpo_megatron.cli import main
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.conversion.verify import verify
from tests.checkpoint.test_convert import shard, silent
from tests.tiny import save_checkpoint, tiny_moe_config

CARRIED = (
    "LICENSE",
    "no_suffix",
    ".gitattributes",
    "chat_template.jinja",
    "speaker.pt",
    "notes.bin",
    "training_args.bin",
    "tokenizer.model",
    "modeling_x.py",
    "tensors.json",
    "untrained.safetensors",
    "additional_chat_templates/tool_use.jinja",
    "assets/deep/er/table.csv",
    ".cache/huggingface/x.lock",
    "1_Pooling/config.json",
)
COPIES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "original/consolidated.01.pth",
    "q4.gguf",
)
"""Of the weights, by their names."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    for name in (*CARRIED, *COPIES):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"{name} as it was")
    save_file({"adapter.weight": torch.zeros(2)}, directory / "adapter_model.safetensors")
    save_file({"model.norm.weight": torch.zeros(32)}, directory / "old_weights.safetensors")
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_there_and_back_keeps_every_file_of_every_folder(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    hf_to_megatron(source, tmp_path / "megatron", say=said.append)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=said.append)
    assert tree(tmp_path / "back") == tree(source)
    assert not any("left in" in line for line in said)


def test_after_training_copies_of_the_old_weights_are_left_and_named(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    weights = [(name, tensor * 2) for name, tensor in HFCheckpoint(source).iter_tensors()]
    write_hf_checkpoint(tmp_path / "run", weights, source, say=said.append)
    copies = {*COPIES, "old_weights.safetensors"}
    assert set(tree(source)) - set(tree(tmp_path / "run")) == copies
    assert [line.partition(" (")[0] for line in said] == [f"note: left in {source}: {', '.join(sorted(copies))}"]
    same = set(CARRIED) | {"adapter_model.safetensors", "tokenizer.json", "config.json"}
    assert all(tree(source)[name] == tree(tmp_path / "run")[name] for name in same)
    keep_hf_files_of_training(source, tmp_path / "step")  # What a checkpoint of the run holds.
    assert not copies & set(tree(tmp_path / "step")) and set(tree(tmp_path / "step")) >= same - {
        "untrained.safetensors"
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_named_and_nothing_hangs(source: Path, tmp_path: Path) -> None:
    os.symlink("../blobs/none", source / "dangling")
    os.symlink(source, source / "loop")
    os.mkfifo(source / "pipe")
    (source / ".git").mkdir()
    (source / ".git" / "object").touch()
    hf_to_megatron(source, source / "megatron", say=silent)  # Inside of what is read.
    said: list[str] = []
    hf_to_megatron(source, tmp_path / "again", say=said.append)
    found = "\n".join(said)
    for expected in (
        "dangling (a link to nothing)",
        "loop/ (a link to the folder that it lies in)",
        "pipe (no file but a pipe)",
        ".git/ (version control, with copies of the weights)",
        "megatron/ (a Megatron checkpoint)",
    ):
        assert expected in found
    assert not {"dangling", "loop", "pipe", ".git", "megatron"} & {
        p.name for p in (tmp_path / "again" / FOLDER).iterdir()
    }


def test_new_shards_replace_files_of_the_same_name_that_were_no_weights(source: Path, tmp_path: Path) -> None:
    """An old shard that no index names comes back, but not in the place of a new one."""
    save_file({"x": torch.zeros(3)}, source / "model-00001-of-00002.safetensors")
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    said: list[str] = []
    size = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=size * 2 // 3, say=said.append)
    back = HFCheckpoint(tmp_path / "back")
    assert sorted(back.headers) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert "model-00001-of-00002.safetensors (new files have the same name)" in said[0]
    assert all(torch.equal(back.get(name), tensor) for name, tensor in load_file(source / "model.safetensors").items())


def test_a_read_only_cache_of_links_in_a_path_with_spaces(tmp_path: Path) -> None:
    """As the Hub's client lays it out; modes bind no root, so the output's own are looked at, too."""
    plain = save_checkpoint(tmp_path / "plain", tiny_moe_config(num_hidden_layers=1))
    shard(plain, 2)
    cache = tmp_path / "my hub" / "models--org--m"
    (snapshot := cache / "snapshots" / "0123").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (cache / "blobs" / str(number)).chmod(0o444)
        os.symlink(f"../../blobs/{number}", snapshot / file.name)
    snapshot.chmod(0o555)
    try:
        hf_to_megatron(snapshot, tmp_path / "out dir", dtype=torch.float16, say=silent)
        hf_to_megatron(snapshot, tmp_path / "as it is", say=silent)
    finally:
        snapshot.chmod(0o755)
    megatron_to_hf(tmp_path / "as it is", tmp_path / "back again", say=silent)
    megatron_to_hf(tmp_path / "as it is", tmp_path / "fp8", fp8=True, say=silent)
    assert tree(tmp_path / "back again") == tree(plain)
    written = [p for d in ("out dir", "back again", "fp8") for p in (tmp_path / d).rglob("*") if p.is_file()]
    assert all(p.stat().st_mode & 0o200 and not p.is_symlink() for p in written)
    assert json.loads((tmp_path / "out dir" / FOLDER / "config.json").read_text())["dtype"] == "float16"
    with pytest.raises(ValueError, match=r"it is a cache, give .*models--org--m/snapshots/0123"):
        HFCheckpoint(cache)


def test_a_single_file_beside_an_index_of_others_is_refused_everywhere(tmp_path: Path) -> None:
    """transformers takes the single file, SGLang and a reader of the index the others."""
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    shutil.copy(source / "model.safetensors", tmp_path / "old")
    shard(source, 2)
    shutil.copy(tmp_path / "old", source / "model.safetensors")
    with pytest.raises(ValueError, match=r"both model.safetensors and model.safetensors.index.json.*out of date"):
        HFCheckpoint(source)
    tensors = load_file(source / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (source / INDEX_FILE).write_text(json.dumps(index))  # One that names the single file contradicts nobody.
    assert set(HFCheckpoint(source).names()) == set(tensors)


def test_shards_in_folders_come_back_where_they_were(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    shard(source, 2)
    (source / "w").mkdir()
    index = json.loads((source / INDEX_FILE).read_text())
    for file in ("part-0.safetensors", "part-1.safetensors"):
        (source / file).rename(source / "w" / file)
    index["weight_map"] = {name: f"w/{file}" for name, file in index["weight_map"].items()}
    (source / INDEX_FILE).write_text(json.dumps(index))
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    assert not (tmp_path / "megatron" / FOLDER / "w").exists()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    assert tree(tmp_path / "back") == tree(source)


def test_a_git_lfs_pointer_is_told_from_a_truncated_file(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(ValueError, match=r"model.safetensors is a git-lfs pointer.*git lfs pull"):
        HFCheckpoint(source)


@pytest.mark.parametrize(("kind", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_an_export_says_the_type_that_it_holds(tmp_path: Path, kind: torch.dtype, name: str) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    weights = [(name, tensor.to(kind)) for name, tensor in HFCheckpoint(source).iter_tensors()]
    write_hf_checkpoint(tmp_path / "run", weights, source, say=silent)
    written = HFCheckpoint(tmp_path / "run")
    assert written.config == config | {"torch_dtype": name}
    assert {written.info(tensor).dtype for tensor in written.names()} == {kind}


def test_another_tools_checkpoint_is_exported_with_the_files_of_a_given_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    hf_to_megatron(source, tmp_path / "own", say=silent)
    foreign = tmp_path / "foreign" / "iter_0000010"
    shutil.copytree(tmp_path / "own", foreign, ignore=shutil.ignore_patterns(FOLDER, CHECKSUMS_FILE))
    (foreign.parent / "latest_checkpointed_iteration.txt").write_text("10\n")
    other = save_checkpoint(tmp_path / "other", tiny_moe_config(num_hidden_layers=1), seed=1)
    shard(other, 2)
    (other / "LICENSE").write_text("of the other")

    assert main(["convert", "inspect", str(foreign.parent)]) == 0
    assert "Megatron checkpoint (torch_dist)" in capsys.readouterr().out
    command = ["convert", "megatron-to-hf", "--megatron", str(foreign.parent), "--out", str(tmp_path / "back")]
    assert main(command) == 2
    assert "name a Hugging Face checkpoint of the same model with --hf" in capsys.readouterr().err
    assert main([*command, "--hf", str(other)]) == 0
    assert set(tree(tmp_path / "back")) == set(tree(other))
    back, expected = HFCheckpoint(tmp_path / "back"), HFCheckpoint(source)
    assert all(torch.equal(back.get(name), expected.get(name)) for name in expected.names())
    for file in other.glob("*.safetensors*"):
        file.unlink()
    megatron_to_hf(foreign, tmp_path / "bare", hf=other, say=silent)  # Config and tokenizer are enough.
    bare = HFCheckpoint(tmp_path / "bare")
    assert set(bare.names()) == set(expected.names()) and (tmp_path / "bare" / "LICENSE").is_file()
    assert all(torch.equal(bare.get(name), expected.get(name)) for name in expected.names())
    assert main(["convert", "verify", "--hf", str(source), "--megatron", str(foreign.parent)]) == 0
    assert "has no config.json to compare" in capsys.readouterr().out


def test_verify_compares_what_the_configs_say(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=1))
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": rope["rope_theta"]}))
    assert verify(source, tmp_path / "megatron").config_differences == []  # The same, as older versions write it.
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6, "rms_norm_eps": 1e-5}))
    result = verify(source, tmp_path / "megatron")
    assert result.differences == [] and result.config_differences == [
        "config.json: rms_norm_eps is 1e-05 here, 1e-06 there",
        "config.json: rope_parameters.rope_theta is 5000000.0 here, 10000.0 there",
    ]

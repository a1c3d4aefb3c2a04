"""Experts apart and fused, in every family that has them: read, written, trained from and served, the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.model_check import require_trainable
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.conversion.verify import verify
from drpo_megatron.rollout.transformers_engine import checkpoint_slots
from tests.checkpoint.test_convert import same_files, shard, silent
from tests.tiny import save_checkpoint, tiny_mixtral_config, tiny_moe_config, tiny_qwen3_5_text_config

MODELS: dict[str, Any] = {
    "qwen3_moe": tiny_moe_config(num_hidden_layers=2, decoder_sparse_step=2),
    "mixtral": tiny_mixtral_config(num_hidden_layers=2),
    "qwen3_5_moe_text": tiny_qwen3_5_text_config(),
}


@pytest.fixture(scope="module", params=MODELS)
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as transformers saves it in either format, by our names of them."""
    root = tmp_path_factory.mktemp(request.param)
    source = save_checkpoint(root / "apart", MODELS[request.param])
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(root / "fused", save_original_format=False)
    for file in source.iterdir():
        if not (root / "fused" / file.name).exists():
            (root / "fused" / file.name).write_bytes(file.read_bytes())
    assert any(name.endswith(".experts.gate_up_proj") for name in HFCheckpoint(root / "fused").names())
    return {"apart": root / "apart", "fused": root / "fused"}


def state(directory: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of it."""
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return dict(model.state_dict())


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", ["apart", "fused"])
def test_both_layouts_come_back_and_become_each_other(layouts: dict[str, Path], layout: str, tmp_path: Path) -> None:
    source = layouts[layout]
    original = state(source)
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    result = verify(source, tmp_path / "megatron")
    assert (result.differences, result.num_cast) == ([], 0)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", say=silent)
    assert same_files(source, tmp_path / "back")
    for experts in ("apart", "fused"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / experts, experts=experts, say=silent)  # type: ignore[arg-type]
        is_fused = any(name.endswith(".experts.gate_up_proj") for name in HFCheckpoint(tmp_path / experts).names())
        assert is_fused == (experts == "fused") and is_same(state(tmp_path / experts), original)
        hf_to_megatron(tmp_path / experts, tmp_path / f"{experts}-megatron", say=silent)
        assert verify(source, tmp_path / f"{experts}-megatron").differences == []


def test_fused_experts_of_many_shards_are_written_once(layouts: dict[str, Path], tmp_path: Path) -> None:
    """The experts of one layer lie in all three files; the fused tensor takes the place of the first."""
    source = save_checkpoint(tmp_path / "hf", AutoModelForCausalLM.from_pretrained(layouts["apart"]).config)
    shard(source, 3)
    hf_to_megatron(source, tmp_path / "megatron", say=silent)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "fused", experts="fused", say=silent)
    assert is_same(state(tmp_path / "fused"), state(source))
    assert set(HFCheckpoint(tmp_path / "fused").headers) <= {f"part-{i}.safetensors" for i in range(3)}


def test_a_run_can_start_from_both_layouts_and_its_engine_finds_every_tensor(layouts: dict[str, Path]) -> None:
    for directory in layouts.values():
        assert require_trainable(directory) == []
        model = AutoModelForCausalLM.from_pretrained(directory)
        names = HFCheckpoint(directory).names()
        assert set(checkpoint_slots(model, names)) == set(names)
    model_type = HFCheckpoint(layouts["fused"]).config["model_type"]
    if model_type in ("qwen3_moe", "mixtral"):
        with pytest.raises(ValueError, match=rf"SGLang can't load for {model_type}.*--experts apart"):
            require_trainable(layouts["fused"], engine="sglang")


def test_fp8_and_fused_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FP8 needs a scale for each block of each expert"):
        megatron_to_hf(tmp_path, tmp_path / "out", fp8=True, experts="fused", say=silent)


def test_missing_experts_are_one_line_with_a_count(tmp_path: Path) -> None:
    """18,432 lines of a 30B were no help."""
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=2))
    config = (source / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 48')
    (source / "config.json").write_text(config)
    with pytest.raises(ValueError) as error:
        require_trainable(source)
    # 46 layers: 4 matrices and 4 norms of attention and layer, a router, 4 experts of 3 matrices.
    assert f"{46 * (4 + 4 + 1 + 4 * 3)} missing: model.layers.10.input_layernorm.weight [32]; " in str(error.value)
    assert str(error.value).endswith(" ...") and len(str(error.value)) < 400 and "\n" not in str(error.value)

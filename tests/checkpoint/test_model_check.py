"""A model that doesn't fit its config is found from the headers, before any process starts, by train, rollout and eval."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from drpo_megatron.checkpoint.model_check import require_servable, require_trainable
from drpo_megatron.orchestration.evaluate import EvalOptions, evaluate_model
from drpo_megatron.orchestration.run import read_inputs
from tests.checkpoint.test_convert import edit, edit_config
from tests.tiny import save_checkpoint, tiny_config, tiny_moe_config


def drop_a_layer(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=3)


def widen(directory: Path) -> None:
    edit_config(directory, hidden_size=48)


def pack(directory: Path) -> None:
    edit(directory, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))


def quantise(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    edit(directory, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))


def stale(directory: Path) -> None:
    save_file({"x": torch.zeros(1)}, directory / "new.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "new.safetensors"}}))


def adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a layer too few": (drop_a_layer, r"21 missing: model.layers.2.input_layernorm.weight .32.; .* \.\.\."),
    "another width": (widen, r"misshapen: lm_head.weight is .51, 32., the config says .51, 48."),
    "packed": (pack, "1 dtype: model.norm.weight is int8"),
    "FP8 without a scale": (quantise, "q_proj.weight is float8_e4m3fn without a"),
    "two sets of weights": (stale, "both model.safetensors and model.safetensors.index.json"),
    "an adapter": (adapter, "adapter_config.json: where peft is installed"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_runs_and_evaluations_say_what_is_wrong_with_a_model_in_one_line(what: str, tmp_path: Path) -> None:
    """Nothing else of the inputs is there: the model is looked at first."""
    damage, message = BROKEN[what]
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=2))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "t1 t2", "answer": "3"}) + "\n")
    assert require_trainable(source) == [] and require_servable(source) is None
    damage(source)
    options = EvalOptions(prompts=str(prompts), reward="arithmetic", max_response_tokens=4, samples=1)
    for start in (
        lambda: read_inputs(tiny_config(source)),
        lambda: evaluate_model(source, options, say=print),
    ):
        with pytest.raises(ValueError, match=message) as error:
            start()
        assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_a_quantised_model_is_not_trained_but_what_it_becomes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=2))
    edit_config(source, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ValueError, match="is quantised .quantization_config.; training needs the checkpoint"):
        require_trainable(source)


def test_a_run_says_which_files_its_export_will_not_hold(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "hf", tiny_moe_config(num_hidden_layers=2))
    (source / "consolidated.00.pth").touch()
    assert require_trainable(source) == [
        f"left in {source}: consolidated.00.pth (the model's weights in another file, from before the training)"
    ]

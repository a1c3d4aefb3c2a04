"""Counts of the planner against published totals and against the model that Megatron builds at the same world size."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.planner.built import built_stages, differences
from drpo_megatron.planner.model import read_model
from drpo_megatron.planner.parameters import layers_of_stage, stage_parameters, state_bytes
from tests.tiny import tiny_config, tiny_dense_config, tiny_moe_config

MODELS = Path(__file__).parents[2] / "examples" / "models"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # As published, in billions.
        ("Qwen3-4B-Base", 4.02, 4.02),
        ("Qwen3-30B-A3B-Base", 30.53, 3.35),
        ("Qwen3-235B-A22B", 235.09, 22.19),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1.78, 1.78),
    ],
)
def test_totals_are_those_of_the_published_models(name: str, total: float, active: float) -> None:
    model = read_model(str(MODELS / name))
    assert round(model.num_parameters / 1e9, 2) == total
    assert round(model.num_active_parameters / 1e9, 2) == active


LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B-Base": {"tensor": 2, "pipeline": 4, "virtual_pipeline": 2, "context": 2, "expert": 8},
    "Qwen3-235B-A22B": {"tensor": 4, "pipeline": 2, "expert": 32},
}


def test_counts_equal_what_megatron_builds_at_1024_ranks() -> None:
    configs = [
        tiny_config(MODELS / name, layout | {"num_ranks": 1024, "sequence": True}, trainer={"dtype": "bf16"})
        for name, layout in LAYOUTS.items()
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    built = built_stages(configs)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for config, stages in zip(configs, built, strict=True):
        assert differences(read_model(config.model.hf_path), config, stages) == []
        assert set(stages) >= {0, config.parallel.pipeline - 1}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20  # Seconds of CPU, not of waiting.


def test_counts_of_small_models_equal_what_megatron_builds(tmp_path: Path) -> None:
    """A tied head on two stages, a frozen router, a padded vocabulary, and an optimizer that is not sharded."""
    tied = tiny_dense_config(vocab_size=1001, tie_word_embeddings=True)
    experts = tiny_moe_config(vocab_size=1001, num_experts=8)
    for name, hf_config in (("tied", tied), ("experts", experts)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config.to_dict()))
        assert read_model(str(tmp_path / name)).num_parameters == _numel_by_transformers(hf_config)
    pipeline = {"num_ranks": 8, "tensor": 2, "pipeline": 2}
    expert = {"num_ranks": 16, "tensor": 2, "sequence": True, "expert": 4, "expert_tensor": 2}
    whole = {"dtype": "bf16", "optimizer": {"distributed": False}}
    configs = [
        tiny_config(tmp_path / "tied", pipeline, trainer={"dtype": "bf16"}),
        tiny_config(tmp_path / "experts", expert, trainer=whole, model={"freeze_router": True}),
        tiny_config(tmp_path / "experts", expert, model={"freeze_router": True}),
    ]
    for config, stages in zip(configs, built_stages(configs), strict=True):
        model, is_sharded = read_model(config.model.hf_path), config.trainer.optimizer.distributed
        found = differences(model, config, stages)
        # Megatron's buffer pads every tensor of odd size to 64 elements. These models have such, published ones don't.
        assert [text for text in found if "optimizer" not in text or not is_sharded] == []
        for stage, counts in stages.items():
            assert counts.optimizer == pytest.approx(stage_parameters(model, config, stage).optimizer, rel=0.05)


def _numel_by_transformers(hf_config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(hf_config).parameters())


@pytest.mark.slow  # A process of its own, 10 s.
def test_a_layout_that_megatron_refuses_is_told_with_its_reason() -> None:
    config = tiny_config(MODELS / "Qwen3-4B-Base", {"num_ranks": 8, "tensor": 3})
    with pytest.raises(ValueError, match="Megatron can't build this layout: .*divisible"):
        built_stages([config])


def test_stages_share_out_all_layers_as_megatron_deals_chunks() -> None:
    parallel = tiny_config("x", {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2}).parallel
    assert layers_of_stage(parallel, 8, 0) == [0, 1, 4, 5]
    assert layers_of_stage(parallel, 8, 1) == [2, 3, 6, 7]


def test_bf16_states_take_6_bytes_a_parameter_and_12_over_its_replicas() -> None:
    config = tiny_config(MODELS / "Qwen3-4B-Base", {"num_ranks": 8}, trainer={"dtype": "bf16"})
    states = state_bytes(stage_parameters(read_model(config.model.hf_path), config, 0), is_bf16=True)
    assert (states.parameters, states.gradients) == (2 * 4_022_468_096, 4 * 4_022_468_096)
    assert states.optimizer == 12 * 4_022_468_096 / 8

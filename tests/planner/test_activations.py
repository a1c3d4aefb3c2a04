"""The planner's estimate of activations against what autograd saves in real forward passes on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.planner.activations import micro_batch_bytes
from drpo_megatron.planner.model import read_model
from tests.distributed import run_ranks
from tests.tiny import tiny_config, tiny_dense_config, tiny_moe_config
from tools.measure_activations import saved_bytes

SHAPE = {"vocab_size": 1024, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 32, "num_key_value_heads": 4}
MODELS: dict[str, Any] = {
    "moe": tiny_moe_config(**SHAPE, num_experts=8, moe_intermediate_size=96),
    "dense": tiny_dense_config(**SHAPE, intermediate_size=384),
}
PRECISIONS = (("fp32", "none"), ("bf16", "none"), ("fp32", "selective"), ("bf16", "selective"), ("bf16", "full"))
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    *((model, {}, dtype, recompute) for model in MODELS for dtype, recompute in PRECISIONS),
    ("moe", {"tensor": 2, "sequence": True}, "bf16", "none"),
    ("moe", {"expert": 2}, "bf16", "none"),
    ("moe", {"tensor": 2, "sequence": True, "expert": 2}, "fp32", "none"),
    ("moe", {"tensor": 2, "sequence": True, "expert_tensor": 2}, "bf16", "none"),
    ("moe", {"pipeline": 2}, "bf16", "none"),
    ("moe", {"pipeline": 2}, "bf16", "full"),
    ("dense", {"tensor": 2}, "bf16", "none"),
    ("dense", {"context": 2}, "fp32", "none"),
]
"""Model, layout of two ranks ({}: data parallel, each holds all of it), dtype, recomputation."""


def case_config(directory: str, model: str, parallel: dict[str, Any], dtype: str, recompute: str) -> Config:
    trainer = {"dtype": dtype, "max_tokens_per_micro_batch": 1024}
    layout = parallel | {"num_ranks": 2}
    return tiny_config(Path(directory) / model, layout, trainer=trainer, model={"recompute": recompute})


def measure(rank: int, world_size: int, directory: str) -> list[int]:
    return [saved_bytes(case_config(directory, *case)) for case in CASES]


def test_activation_estimates_are_within_15_percent_of_what_is_saved(tmp_path: Path) -> None:
    for name, hf_config in MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config.to_dict()))
    ranks = run_ranks(2, measure, str(tmp_path))
    wrong = []
    for index, case in enumerate(CASES):
        config = case_config(str(tmp_path), *case)
        model, stages = read_model(config.model.hf_path), config.parallel.pipeline
        for stage in range(stages):
            mine = [saved[index] for rank, saved in enumerate(ranks) if rank * stages // 2 == stage]
            measured, planned = sum(mine) / len(mine), micro_batch_bytes(model, config, stage)
            if not 0.85 < planned / measured < 1.15:
                wrong.append(f"{case} stage {stage}: planned {planned:,}, measured {measured:,.0f}")
    assert wrong == []

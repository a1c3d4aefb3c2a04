"""MFU, memory by rank, and peaks by the names that drivers give GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config import load_config
from drpo_megatron.orchestration.gauges import Gauges, memory_metrics
from drpo_megatron.planner.hardware import PEAK_FLOPS, peak_flops

ROOT = Path(__file__).parents[2]


class FourH100s:
    """What four ranks would answer."""

    def __len__(self) -> int:
        return 4

    def call(self, method: str) -> list[Any]:
        return {"device_name": ["NVIDIA H100 80GB HBM3"] * 4, "peak_memory_mb": [1.0, 2.0, 3.0, 4.0]}[method]


def test_mfu_is_the_models_flops_over_the_peak_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    gauges = Gauges(load_config("examples/qwen3_4b_base.yaml"), FourH100s())
    metrics = gauges.read(num_tokens=2_000_000, num_sequences=500, train_s=50.0)
    # 6 FLOPs a parameter, the tied head included; 36 layers x 3 passes x 2 matmuls x 2 FLOPs x 2,000 tokens x 32 x 128.
    a_token = 6 * 4_022_468_096 + 36 * 3 * 2 * 2 * 2000 * 4096
    assert metrics["throughput/mfu"] == pytest.approx(a_token * 2_000_000 / (50 * 4 * 989e12))
    assert metrics["memory/trainer_mb/fullest_rank"] == 3


def test_memory_names_the_fullest_rank_and_lists_a_few() -> None:
    assert memory_metrics([10.0, 30.0, 20.0]) == {
        "memory/trainer_mb/max": 30.0,
        "memory/trainer_mb/min": 10.0,
        "memory/trainer_mb/fullest_rank": 1,
        "memory/trainer_mb/rank0": 10.0,
        "memory/trainer_mb/rank1": 30.0,
        "memory/trainer_mb/rank2": 20.0,
    }
    assert len(memory_metrics([1.0] * 1024)) == 3


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", PEAK_FLOPS),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_a_gpu_has_the_peak_of_its_data_sheet(name: str | None, flops: float | None) -> None:
    assert peak_flops(name) == flops

"""Memory by rank, and peaks by the names that drivers give GPUs."""

from __future__ import annotations

import pytest

from drpo_megatron.orchestration.gauges import memory_metrics
from drpo_megatron.planner.hardware import PEAK_FLOPS, peak_flops


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

"""Routed experts that are missing, misshapen or damaged are refused by the sample's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drpo_megatron.config.hf_config import ExpertRouting, read_expert_routing
from drpo_megatron.data.traces import check_traces
from drpo_megatron.types import RoutedExperts, Sample
from tests.tiny import tiny_dense_config, tiny_mixtral_config, tiny_moe_config, tiny_qwen3_5_config

ROUTING = ExpertRouting(num_layers=3, moe_layers=(0, 2), num_experts=8, experts_per_token=2)


def traced(name: str, ids: np.ndarray | None = None) -> Sample:
    """3 prompt and 2 response tokens; by default experts 1 and 7 everywhere."""
    ids = np.broadcast_to([1, 7], (4, 2, 2)) if ids is None else ids
    return Sample(name, (1, 2, 3), (4, 5), (-1.0, -1.0), 0.5, routed_experts=RoutedExperts.of(ids))


def damaged(value: int) -> np.ndarray:
    ids = np.tile([1, 7], (4, 2, 1))
    ids[3, 1, 0] = value
    return ids


def test_whole_traces_pass_and_so_do_none_at_all_where_none_is_asked_for() -> None:
    check_traces([traced("a"), traced("b")], ROUTING, required=True)
    check_traces([replace(traced("a"), routed_experts=None)], ROUTING, required=False)


@pytest.mark.parametrize("required", [True, False])
def test_a_missing_trace_is_refused_by_name(required: bool) -> None:
    samples = [traced("a"), replace(traced("b"), routed_experts=None)]
    with pytest.raises(ValueError, match="sample b has no routed experts, .* trainer.routing_replay=off"):
        check_traces(samples, ROUTING, required=required)


@pytest.mark.parametrize("shape", [(5, 2, 2), (4, 3, 2), (4, 2, 4)])
def test_a_trace_of_another_shape_is_refused_with_both_shapes(shape: tuple[int, int, int]) -> None:
    ids = np.arange(np.prod(shape)).reshape(shape) % 8
    with pytest.raises(ValueError) as raised:
        check_traces([traced("a"), traced("b", ids)], ROUTING, required=True)
    assert f"sample b: routed experts have shape {shape}, but its 3 + 2 tokens need (4, 2, 2)" in str(raised.value)


@pytest.mark.parametrize("value", [7, 8, 300])
def test_experts_that_are_not_there_or_twice_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"sample b: its routed experts are none: ids from 1 to {value}, 2 different"):
        check_traces([traced("a"), traced("b", damaged(value))], ROUTING, required=True)


def test_layers_with_experts_are_read_from_the_checkpoints_config(tmp_path: Path) -> None:
    expected = [
        (tiny_moe_config(), (0, 1, 2, 3)),
        (tiny_moe_config(mlp_only_layers=[1]), (0, 2, 3)),
        (tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[3]), (1,)),
        (tiny_mixtral_config(), (0, 1, 2, 3)),
        (tiny_qwen3_5_config(), (0, 1, 2, 3)),
    ]
    for index, (hf_config, layers) in enumerate(expected):
        hf_config.save_pretrained(tmp_path / str(index))
        assert read_expert_routing(tmp_path / str(index)) == ExpertRouting(4, layers, 4, 2)
    tiny_dense_config().save_pretrained(tmp_path / "dense")
    assert read_expert_routing(tmp_path / "dense") is None
    fields = json.loads((tmp_path / "0" / "config.json").read_text())
    (tmp_path / "0" / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 5}))
    with pytest.raises(ValueError, match="num_experts_per_tok=5 is not within 1 ... 4"):
        read_expert_routing(tmp_path / "0")

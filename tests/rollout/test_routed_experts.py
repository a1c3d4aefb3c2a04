"""The routed experts that engines report are what transformers' routers choose in one full forward pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.config.hf_config import read_expert_routing
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.data.traces import check_traces
from drpo_megatron.rollout.dump import group_from_dict, group_to_dict
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sampler import to_samples
from drpo_megatron.rollout.sglang_client import ServerError
from drpo_megatron.rollout.transformers_engine import TransformersEngine
from drpo_megatron.types import Completion, Prompt, RolloutGroup, RoutedExperts
from tests.rollout.conftest import Served
from tests.rollout.test_sglang_engine import publish, reference, weights
from tests.tiny import save_checkpoint, tiny_dense_config, tiny_moe_config, tiny_qwen3_5_text_config

PARAMS = SamplingParams(16, 1.5, routed_experts=True)


def requests(count: int) -> list[GenerationRequest]:
    """Groups of two with one prompt, of 1 to 10 tokens."""
    return [
        GenerationRequest(f"p{i // 2}/{i % 2}", tuple((7 * (i // 2) + j) % 40 for j in range(1 + 3 * (i // 2) % 10)), i)
        for i in range(count)
    ]


@torch.no_grad()
def chosen(model: torch.nn.Module, tokens: tuple[int, ...]) -> np.ndarray:
    """[tokens, layers with experts, k] by hooks on the routers."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: seen.append(output[2]))
        for module in model.modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen, dim=1).numpy()


def assert_reported(model: torch.nn.Module, asked: list[GenerationRequest], drawn: list[Completion]) -> None:
    assert len({len(completion.token_ids) for completion in drawn}) > 1  # Some left the batch early.
    for request, completion in zip(asked, drawn, strict=True):
        assert completion.routed_experts is not None
        expected = chosen(model, (*request.prompt_ids, *completion.token_ids[:-1]))
        assert completion.routed_experts.shape == expected.shape
        assert (np.sort(completion.routed_experts.ids(), -1) == np.sort(expected, -1)).all(), request.request_id


@pytest.mark.parametrize("hf_config", [tiny_moe_config(mlp_only_layers=[1]), tiny_qwen3_5_text_config()])
def test_the_embedded_engine_reports_what_the_routers_chose(hf_config: object, tmp_path: Path) -> None:
    hf_path = save_checkpoint(tmp_path, hf_config)
    engine, asked = TransformersEngine(str(hf_path), TransformersEngineSection(max_batch_tokens=200)), requests(12)
    drawn = engine.generate(asked, PARAMS)
    assert_reported(AutoModelForCausalLM.from_pretrained(hf_path), asked, drawn)
    unasked = engine.generate(asked, SamplingParams(16, 1.5))
    assert [c.token_ids for c in unasked] == [c.token_ids for c in drawn]
    assert all(completion.routed_experts is None for completion in unasked)
    # They are what the trainer of this checkpoint takes.
    groups = [
        RolloutGroup(Prompt(r.request_id, r.prompt_ids, ""), (c,), (0.0,)) for r, c in zip(asked, drawn, strict=True)
    ]
    check_traces(to_samples(groups, "group_mean"), read_expert_routing(hf_path), required=True)


def test_a_dense_model_can_report_none(tmp_path: Path) -> None:
    hf_path = save_checkpoint(tmp_path, tiny_dense_config(num_hidden_layers=1))
    engine = TransformersEngine(str(hf_path), TransformersEngineSection())
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no routers"):
        engine.generate(requests(1), PARAMS)


def test_sglang_reports_what_transformers_routers_chose(sglang: Served) -> None:
    """For weights that were sent, with prompts from its cache, and the tokens that the embedded engine would report."""
    engine, tensors, asked = sglang.engine(), weights(sglang, seed=5), requests(16)
    publish(engine, tensors)
    model = reference(sglang, tensors)
    try:
        assert_reported(model, asked, engine.generate(asked, PARAMS))
        assert engine.generate(asked[:1], SamplingParams(4))[0].routed_experts is None
    finally:
        engine.close()


def test_reports_of_another_shape_are_refused(sglang: Served, tmp_path: Path) -> None:
    """The engine believes in a model of four layers; the server has one of two."""
    engine = sglang.engine()
    publish(engine, weights(sglang, seed=6))
    engine.clients[0].routing = read_expert_routing(save_checkpoint(tmp_path, tiny_moe_config()))
    try:
        with pytest.raises(
            ServerError, match=r"p0/0 failed 4 times: .* routed experts, and \(\d+, 4, 2\) = \d+ are due"
        ):
            engine.generate(requests(1), PARAMS)
    finally:
        engine.close()


@pytest.mark.parametrize(("largest", "size"), [(255, 1), (256, 2)])
def test_reports_take_one_byte_an_expert_and_survive_json(largest: int, size: int) -> None:
    ids = np.random.default_rng(0).integers(0, largest + 1, (7, 3, 2))
    ids[0, 0, 0] = largest
    routed = RoutedExperts.of(ids)
    assert len(routed.data) == size * ids.size
    assert (routed.ids() == ids).all()
    completion = Completion((1, 2), (-0.5, -0.25), "stop", "a", 3, routed_experts=routed)
    group = RolloutGroup(Prompt("p", (1, 2, 3, 4, 5, 6), "7"), (completion,), (1.0,))
    assert group_from_dict(json.loads(json.dumps(group_to_dict(group))), "here") == group

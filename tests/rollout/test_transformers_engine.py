"""The embedded engine draws from the model's own distribution and says truthfully with which probability."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.checkpoint.hf import HFCheckpoint, tensor_checksum
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.models import get_family
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.model_slots import checkpoint_slots
from drpo_megatron.rollout.transformers_engine import TransformersEngine, draw, log_distribution
from tests.by_transformers import exact_logprobs
from tests.tiny import (
    VOCAB,
    plain_model,
    save_checkpoint,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

EOS = VOCAB - 2


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("engine"), tiny_moe_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def engine(hf_path: Path) -> TransformersEngine:
    return TransformersEngine(str(hf_path), TransformersEngineSection(max_batch_tokens=400))


def requests(count: int, first_seed: int = 0) -> list[GenerationRequest]:
    """Prompts of 1 to 11 tokens."""
    return [
        GenerationRequest(f"p{i}/0", tuple((7 * i + j) % 40 for j in range(1 + 3 * i % 11)), first_seed + i)
        for i in range(count)
    ]


class Answer(NamedTuple):
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def answers(asked: list[GenerationRequest], completions: list[Any]) -> list[Answer]:
    return [Answer(r.prompt_ids, c.token_ids) for r, c in zip(asked, completions, strict=True)]


def assert_logprobs_are_the_models(engine: TransformersEngine, hf_path: Path, temperature: float) -> None:
    asked = requests(24)
    completions = engine.generate(asked, SamplingParams(20, temperature))
    assert len({len(completion.token_ids) for completion in completions}) > 1  # Some leave the batch early.
    drawn = torch.tensor([x for completion in completions for x in completion.logprobs])[:, None]
    texts = answers(asked, completions)
    assert exact_logprobs(plain_model(hf_path), texts, temperature).outside({"drawn": drawn}) == {}
    assert exact_logprobs(plain_model(hf_path), texts, temperature * 1.001).outside({"drawn": drawn})


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_behavior_logprobs_are_those_of_one_full_forward_pass(
    engine: TransformersEngine, hf_path: Path, temperature: float
) -> None:
    assert_logprobs_are_the_models(engine, hf_path, temperature)


def test_states_of_gated_delta_nets_follow_their_rows(tmp_path: Path) -> None:
    """Prompts are padded on the left, and rows leave the batch: the recurrent states must know."""
    hf_path = save_checkpoint(tmp_path, tiny_qwen3_5_text_config())
    assert_logprobs_are_the_models(TransformersEngine(str(hf_path), TransformersEngineSection()), hf_path, 1.5)


def test_top_tokens_are_those_of_transformers_full_softmax(engine: TransformersEngine, hf_path: Path) -> None:
    asked, temperature = requests(12), 1.3
    completions = engine.generate(asked, SamplingParams(20, temperature, num_topk=6))
    assert completions[0].token_ids == engine.generate(asked, SamplingParams(20, temperature))[0].token_ids
    ids, logprobs = (
        torch.cat([torch.tensor(getattr(completion, name)) for completion in completions])
        for name in ("topk_ids", "topk_logprobs")
    )
    values, limits = exact_logprobs(plain_model(hf_path), answers(asked, completions), temperature)
    assert logprobs.shape == (sum(len(completion.token_ids) for completion in completions), 6)
    for expected in (values["all"].topk(6).values, values["all"].gather(1, ids)):
        assert ((logprobs - expected).abs() <= limits["all"]).all()


def test_eos_is_drawn_trained_and_last(engine: TransformersEngine) -> None:
    completions = engine.generate(requests(200), SamplingParams(30, 1.5))
    reasons = Counter(completion.finish_reason for completion in completions)
    assert reasons["stop"] > 20 and reasons["length"] > 20
    for completion in completions:
        assert (EOS in completion.token_ids) == (completion.finish_reason == "stop")
        assert EOS not in completion.token_ids[:-1]
        assert len(completion.logprobs) == len(completion.token_ids) <= 30
        assert "<eos>" not in completion.text


def test_draws_depend_on_the_request_and_not_on_its_neighbours(engine: TransformersEngine) -> None:
    together = engine.generate(requests(30), SamplingParams(12))
    alone = [engine.generate([request], SamplingParams(12))[0] for request in requests(30)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    others = engine.generate(requests(30, first_seed=1000), SamplingParams(12))
    assert sum(a.token_ids == b.token_ids for a, b in zip(together, others, strict=True)) < 5


def test_first_tokens_follow_the_softmax(engine: TransformersEngine, hf_path: Path) -> None:
    prompt, count = (3, 1, 4), 4000
    completions = engine.generate([GenerationRequest("p/0", prompt, seed) for seed in range(count)], SamplingParams(1))
    with torch.no_grad():
        probs = AutoModelForCausalLM.from_pretrained(hf_path)(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    seen = torch.zeros(VOCAB).index_add(0, torch.tensor([c.token_ids[0] for c in completions]), torch.ones(count))
    common = probs * count >= 5
    chi2 = ((seen - probs * count).square() / (probs * count))[common].sum().item()
    freedom = int(common.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5  # mean + 4 standard deviations


def test_top_k_and_top_p_report_the_renormalised_probability() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(1000, 1)
    uniforms = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    params = SamplingParams(1, top_k=2)
    tokens, logprobs = draw(log_distribution(logits, params), uniforms, params)
    kept = logits[0, :2].log_softmax(-1)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, kept[tokens])
    params = SamplingParams(1, top_p=0.7)  # p = .64, .24, ...: the first two
    tokens, logprobs = draw(log_distribution(logits, params), uniforms, params)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, kept[tokens])
    assert abs((tokens == 0).double().mean().item() - kept[0].exp().item()) < 2e-3


def test_greedy_equals_transformers(engine: TransformersEngine, hf_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf_path)
    for request, ours in zip(requests(8), engine.generate(requests(8), SamplingParams(10, 0.0)), strict=True):
        ids = torch.tensor([request.prompt_ids])
        theirs = model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=VOCAB - 3, eos_token_id=EOS)
        assert ours.token_ids == tuple(theirs[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    "config",
    [
        tiny_moe_config(num_hidden_layers=2),
        tiny_moe_config(num_hidden_layers=2, tie_word_embeddings=True),
        tiny_dense_config(num_hidden_layers=2),
        tiny_dense_config(num_hidden_layers=2, tie_word_embeddings=True),
        tiny_qwen2_config(num_hidden_layers=2),
        tiny_mixtral_config(num_hidden_layers=2),
        tiny_qwen3_5_config(num_hidden_layers=4),
        tiny_qwen3_5_text_config(num_hidden_layers=4),
    ],
    ids=lambda config: config.model_type + ("_tied" if config.tie_word_embeddings else ""),
)
def test_an_update_brings_exactly_the_new_weights(config: Any, tmp_path: Path) -> None:
    old, new = save_checkpoint(tmp_path / "old", config, seed=0), save_checkpoint(tmp_path / "new", config, seed=1)
    engine = TransformersEngine(str(old), TransformersEngineSection())
    family = get_family(config)
    tensors = {name: tensor for name, tensor in HFCheckpoint(new).iter_tensors() if not family.ignores(name)}
    engine.load_weights(tensors.items())
    engine.finish_update(5, {name: tensor_checksum(tensor) for name, tensor in tensors.items()})
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(new)(ids).logits
        assert torch.equal(engine.model(ids).logits, expected)
    assert engine.generate(requests(1), SamplingParams(2))[0].policy_version == 5


def test_wrong_weights_are_refused_by_name_and_not_published(hf_path: Path) -> None:
    engine = TransformersEngine(str(hf_path), TransformersEngineSection())
    tensors = dict(HFCheckpoint(hf_path).iter_tensors())
    right = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
    engine.load_weights([("model.norm.weight", tensors["model.norm.weight"] + 1)])
    with pytest.raises(ValueError, match="different: model.norm.weight"):
        engine.finish_update(1, right)
    with pytest.raises(ValueError, match="not sent: lm_head.weight"):
        engine.finish_update(1, {n: c for n, c in right.items() if n != "lm_head.weight"})
    with pytest.raises(ValueError, match="no tensor model.nothing"):
        engine.load_weights([("model.nothing", torch.zeros(1))])
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\)"):
        engine.load_weights([("model.norm.weight", torch.zeros(3))])
    assert engine.policy_version == 0


def test_a_checkpoint_that_lacks_parameters_of_the_model_is_refused(hf_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf_path)
    names = set(HFCheckpoint(hf_path).names()) - {"model.layers.1.mlp.experts.3.up_proj.weight"}
    with pytest.raises(ValueError, match=r"no tensors for 1 parameters .* model.layers.1.mlp.experts.gate_up_proj"):
        checkpoint_slots(model, names)


def test_a_prompt_that_leaves_no_room_is_refused_by_name(engine: TransformersEngine) -> None:
    with pytest.raises(ValueError, match=r"long/0: 250 prompt tokens \+ 10 response tokens exceed .* context of 256"):
        engine.generate([GenerationRequest("long/0", (1,) * 250, 0)], SamplingParams(10))

"""Rules alone, without Megatron: every HF tensor goes into shards and comes back bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drpo_megatron.models import get_family
from drpo_megatron.models.names import canonical_key
from drpo_megatron.models.rules import (
    GatedQKV,
    GateUp,
    GroupedQKV,
    HFTensor,
    Key,
    Rule,
    Sections,
    Slice,
    Vocabulary,
    stack_slices,
)
from tests.tiny import (
    VOCAB,
    save_checkpoint,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

CONFIGS = {
    "dense": tiny_dense_config(),
    "dense_tied": tiny_dense_config(tie_word_embeddings=True),
    "moe": tiny_moe_config(),
    "moe_some_dense": tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[1]),
    "qwen2": tiny_qwen2_config(),
    "mixtral": tiny_mixtral_config(),
    "qwen3_5_text": tiny_qwen3_5_text_config(),
}


def _shards(rule: Rule, tensors: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    if rule.layout.axis is None:
        return [rule.layout.shard(tensors, 0, 1, tuple(tensors[0].shape))]
    rows = -(-tensors[0].shape[0] // size)  # Only the vocabulary looks at it.
    return [rule.layout.shard(tensors, rank, size, (rows, *tensors[0].shape[1:])) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("config", [*CONFIGS.values(), tiny_qwen3_5_config()], ids=[*CONFIGS, "qwen3_5_stacked"])
def test_every_tensor_comes_back_bit_identical(config: Any, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rule in get_family(config).rules(config):
        tensors = [torch.randn(hf.shape, generator=generator) for hf in rule.hf]
        shards = _shards(rule, tensors, size)
        assert len({shard.shape for shard in shards}) == 1
        merged = rule.layout.merge(shards)
        assert all(torch.equal(a, b) for a, b in zip(merged, tensors, strict=True)), rule.key
        assert all(tensor.is_contiguous() for tensor in merged)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_rules_name_exactly_the_tensors_that_transformers_saves(config: Any, tmp_path: Any) -> None:
    from safetensors import safe_open

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    declared = [hf for rule in get_family(config).rules(config) for hf in rule.hf]
    assert {hf.name: hf.shape for hf in declared} == saved
    assert len(declared) == len(saved)


@pytest.mark.parametrize("saved_by_transformers", [False, True], ids=["published", "resaved"])
def test_rules_of_a_model_with_vision_follow_the_names_of_its_checkpoint(
    saved_by_transformers: bool, tmp_path: Path
) -> None:
    """transformers saves what it loads stacked half and half: gates and ups on their own, downs stacked."""
    config = tiny_qwen3_5_config()
    tensors = load_file(save_checkpoint(tmp_path, config) / "model.safetensors")
    if saved_by_transformers:
        AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        tensors = load_file(tmp_path / "again" / "model.safetensors")
        assert "model.language_model.layers.0.mlp.experts.0.up_proj.weight" in tensors
    family = get_family(config)
    declared = {hf.name: hf.stored_shape for rule in family.rules(config, tensors) for hf in rule.hf}
    assert declared == {name: tuple(tensor.shape) for name, tensor in tensors.items() if not family.ignores(name)}


def test_qkv_is_interleaved_by_query_group() -> None:
    # 2 groups, 2 query heads each, head_dim 1: rows are named by hand.
    q, k, v = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[10.0], [20.0]]), torch.tensor([[11.0], [21.0]])
    layout = GroupedQKV(num_groups=2, head_dim=1)
    assert layout.shard([q, k, v], 0, 1, (8, 1)).flatten().tolist() == [1, 2, 10, 11, 3, 4, 20, 21]
    assert layout.shard([q, k, v], 1, 2, (4, 1)).flatten().tolist() == [3, 4, 20, 21]


def test_qkv_biases_are_interleaved_like_their_rows() -> None:
    config = tiny_qwen2_config()
    rules = {rule.key.name: rule for rule in get_family(config).rules(config)}
    weight, bias = (rules[f"decoder.layers.0.self_attention.linear_qkv.{kind}"] for kind in ("weight", "bias"))
    rows = [torch.randn(hf.shape) for hf in bias.hf]
    as_columns = weight.layout.shard([x[:, None] for x in rows], 1, 2, (32, 1))
    assert torch.equal(bias.layout.shard(rows, 1, 2, (32,)), as_columns.squeeze(1))


def test_a_gated_head_has_its_gate_after_the_queries_of_its_group() -> None:
    # 2 groups, 2 query heads each, head_dim 1. q_proj holds query, gate, query, gate ...
    q = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0])[:, None]
    k, v = torch.tensor([[10.0], [20.0]]), torch.tensor([[11.0], [21.0]])
    layout = GatedQKV(num_groups=2, head_dim=1)
    assert layout.shard([q, k, v], 0, 1, (12, 1)).flatten().tolist() == [1, 2, -1, -2, 10, 11, 3, 4, -3, -4, 20, 21]
    assert layout.shard([q, k, v], 1, 2, (6, 1)).flatten().tolist() == [3, 4, -3, -4, 20, 21]


def test_sections_are_split_one_by_one() -> None:
    qkv, gate = torch.arange(8.0)[:, None], 10 + torch.arange(4.0)[:, None]
    layout = Sections(((2, 2, 4), (4,)))
    assert layout.shard([qkv, gate], 1, 2, (6, 1)).flatten().tolist() == [1, 3, 6, 7, 12, 13]


def test_slices_become_one_tensor_on_ranks_that_are_given_them() -> None:
    tensors = [HFTensor("a", (2,)), *(HFTensor("stack", (2,), Slice(i, 3)) for i in range(3)), HFTensor("b", (2,))]
    values = [torch.full((2,), float(i)) for i in range(5)]
    joined = dict(stack_slices(zip(tensors, values, strict=True)))
    assert list(joined) == ["a", "stack", "b"]
    assert torch.equal(joined["stack"], torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    assert list(stack_slices((hf, None) for hf in tensors)) == [("a", None), ("stack", None), ("b", None)]


def test_gate_and_up_are_stacked_on_every_rank() -> None:
    gate, up = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert GateUp().shard([gate, up], 1, 2, (4, 1)).flatten().tolist() == [2, 3, 12, 13]


def test_vocabulary_is_padded_with_zeros_and_trimmed() -> None:
    rows = torch.arange(1.0, 6.0)[:, None]
    layout = Vocabulary(vocab_size=5)
    shards = [layout.shard([rows], rank, 4, (2, 1)) for rank in range(4)]
    assert torch.cat(shards).flatten().tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert layout.merge(shards)[0].flatten().tolist() == [1, 2, 3, 4, 5]


def test_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=5 does not fit the model's 2 rows on each of 2 ranks"):
        Vocabulary(5).shard([torch.zeros(5, 1)], 0, 2, (2, 1))


def test_a_head_count_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be split over 3 ranks; use a tensor parallel size that divides 8"):
        GateUp().shard([torch.zeros(8, 2), torch.zeros(8, 2)], 0, 3, (4, 2))


@pytest.mark.parametrize(
    ("local", "transformer_engine"),
    [
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.weight"),
        ("input_layernorm.weight", "self_attention.in_proj.layer_norm_weight"),
        ("mlp.experts.local_experts.3.linear_fc1.weight", "mlp.experts.linear_fc1.weight3"),
        ("mlp.experts.local_experts.1.linear_fc2.weight", "mlp.experts.linear_fc2.weight1"),
    ],
)
def test_both_layer_specs_have_one_key_with_a_rule(local: str, transformer_engine: str) -> None:
    config = tiny_moe_config(num_experts=16, decoder_sparse_step=2)  # Layers 1 and 3 have experts, 2 is dense.
    layers = [2, 3]  # A second pipeline stage.
    layer = 0 if "pre_mlp" in local else 1
    keys = {
        canonical_key(f"decoder.layers.{layer}.{name}", layers, first_expert=8) for name in (local, transformer_engine)
    }
    assert len(keys) == 1
    assert keys <= {rule.key for rule in get_family(config).rules(config)}


def test_layer_and_expert_numbers_become_global() -> None:
    key = canonical_key("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", [6, 7], first_expert=8)
    assert key == Key("decoder.layers.7.mlp.experts.linear_fc1.weight", expert=11)


def test_a_dict_means_the_same_as_its_typed_config() -> None:
    typed, raw = tiny_moe_config(), tiny_moe_config().to_dict()
    family = get_family(raw)
    assert family is get_family(typed)
    assert family.rules(raw) == family.rules(typed)
    assert family.transformer_config_kwargs(raw) == family.transformer_config_kwargs(typed)
    assert family.gpt_model_kwargs(raw)["vocab_size"] == VOCAB


def test_an_old_config_json_gives_its_rotary_base() -> None:
    raw = {"model_type": "qwen3_moe", "rope_theta": 1e6, "num_experts": 16, "num_hidden_layers": 2}
    assert get_family(raw).gpt_model_kwargs(raw)["rotary_base"] == 1e6


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="model_type='llama' is not known; the known ones are mixtral, qwen2"):
        get_family({"model_type": "llama"})


def test_all_unsupported_settings_are_named_at_once() -> None:
    config = tiny_moe_config(hidden_act="gelu", attention_bias=True, mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="hidden_act=gelu.*attention_bias=true.*no layer has experts"):
        get_family(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_qwen2_config(use_sliding_window=True, sliding_window=64), "sliding_window=64: only full attention"),
        (tiny_mixtral_config(sliding_window=4096), "sliding_window=4096: only full attention"),
        (tiny_mixtral_config(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
        (tiny_qwen3_5_text_config(attention_bias=True), "attention_bias=true"),
        (tiny_mixtral_config(num_experts_per_tok=1), "num_experts_per_tok=1: the router's output is 1"),
        (tiny_dense_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}), "rope_type=yarn"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(config: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        get_family(config)

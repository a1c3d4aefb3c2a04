"""Real Megatron models on gloo ranks: a checkpoint goes in and comes out bit by bit, from every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drpo_megatron.config.sections import ParallelSection
from tests.distributed import run_ranks
from tests.tiny import save_checkpoint, tiny_config, tiny_dense_config, tiny_moe_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "TP2": {"tensor": 2, "sequence": True},
    "TP4": {"tensor": 4, "sequence": True},  # More ranks than query groups.
    "EP2": {"expert": 2},
    "TP2 EP2": {"tensor": 2, "expert": 2, "sequence": True},
    "EP4 TP2": {"tensor": 2, "expert": 4, "sequence": True},
    "ETP2": {"tensor": 2, "expert_tensor": 2, "sequence": True},
    "CP2": {"context": 2},
    "PP2": {"pipeline": 2},
    "VPP2 PP2": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2 PP2 EP2": {"tensor": 2, "pipeline": 2, "expert": 2, "sequence": True},
}
MODELS = {
    "moe": tiny_moe_config(),
    "moe_some_dense": tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False),
    "dense_tied": tiny_dense_config(tie_word_embeddings=True),
}
CASES = [("moe", layout) for layout in LAYOUTS] + [
    (model, layout) for model in ("moe_some_dense", "dense_tied") for layout in ("TP2", "VPP2 PP2", "TP2 PP2 EP2")
]


def _applied(model: str, layout: str) -> dict[str, Any]:
    parallel = {"num_ranks": 4} | LAYOUTS[layout]
    return parallel if "moe" in model else parallel | {"expert": 1}


def _build(directory: Path, parallel: dict[str, Any]) -> tuple[list[Any], Any, Any]:
    """(chunks, hf_config, layout) of a Megatron model whose weights are not yet loaded."""
    from transformers import AutoConfig

    from drpo_megatron.models import get_family
    from drpo_megatron.trainer import platform, setup

    active = platform.activate("cpu")
    config = tiny_config(directory, parallel)
    layout = setup.build_layout(ParallelSection(**parallel), seed=0)
    hf_config = AutoConfig.from_pretrained(directory)
    chunks = setup.build_model(config, get_family(hf_config), hf_config, layout, active)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))  # So that a parameter which is not loaded shows.
    return chunks, hf_config, layout


def _in_and_out(rank: int, world_size: int, root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    from drpo_megatron.trainer import platform

    platform.activate("cpu")
    from drpo_megatron.trainer.weights import export_hf_weights, load_hf_weights

    exported = {}
    for model, name in CASES:
        source = load_file(root / model / "model.safetensors")
        chunks, hf_config, layout = _build(root / model, _applied(model, name))
        load_hf_weights(chunks, hf_config, source.__getitem__, layout.groups, names=source.keys())
        on_rank_0 = dict(export_hf_weights(chunks, hf_config, layout.groups))
        everywhere = dict(export_hf_weights(chunks, hf_config, layout.groups, torch.bfloat16, everywhere=True))
        exported[model, name] = {
            "names": list(on_rank_0),
            "filled": not any(p.isnan().any() for chunk in chunks for p in chunk.parameters()),
            "held": sum(tensor is not None for tensor in on_rank_0.values()),
            "identical": rank != 0 or _same(on_rank_0, source),
            "identical_bf16": _same(everywhere, {key: value.bfloat16() for key, value in source.items()}),
        }
    return exported


def _same(mine: dict[str, Any], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in theirs
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each of 4 ranks saw in every case; all cases run in one start of the ranks."""
    root = tmp_path_factory.mktemp("models")
    for name, hf_config in MODELS.items():
        save_checkpoint(root / name, hf_config)
    return run_ranks(4, _in_and_out, root, timeout_s=240)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_parameter_of_every_rank_is_filled(exports: Any, model: str, layout: str) -> None:
    assert all(rank[model, layout]["filled"] for rank in exports)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_export_is_bit_identical_to_the_checkpoint(exports: Any, model: str, layout: str) -> None:
    seen = [rank[model, layout] for rank in exports]
    assert seen[0]["identical"]
    assert seen[0]["held"] == len(seen[0]["names"])
    assert [rank["held"] for rank in seen[1:]] == [0, 0, 0]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_export_everywhere_gives_all_ranks_the_tensors_in_the_dtype_asked_for(
    exports: Any, model: str, layout: str
) -> None:
    assert all(rank[model, layout]["identical_bf16"] for rank in exports)


@pytest.mark.parametrize("model", MODELS)
def test_the_order_is_the_same_on_all_ranks_and_in_all_layouts(exports: Any, model: str) -> None:
    orders = {tuple(case["names"]) for rank in exports for (name, _), case in rank.items() if name == model}
    assert len(orders) == 1


def _damaged(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]  # On the first stage.
    tensors["model.layers.3.mlp.gate.weight"] = torch.zeros(5, 32)  # On the last.
    tensors["model.layers.4.input_layernorm.weight"] = torch.zeros(32)


def _head_written_out(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _head_untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]


CHANGES: dict[str, tuple[Any, Callable[[dict[str, torch.Tensor]], None]]] = {
    "damaged": (tiny_moe_config(), _damaged),
    "head_written_out": (tiny_dense_config(tie_word_embeddings=True), _head_written_out),
    "head_untied": (tiny_dense_config(tie_word_embeddings=True), _head_untied),
}


def _load_outcomes(rank: int, world_size: int, root: Path) -> dict[str, str]:
    from drpo_megatron.trainer import platform

    platform.activate("cpu")
    from drpo_megatron.trainer.weights import load_hf_weights

    outcomes = {}
    for name in CHANGES:
        chunks, hf_config, layout = _build(root / name, {"num_ranks": 2, "pipeline": 2})
        source = load_file(root / name / "model.safetensors")
        try:
            load_hf_weights(chunks, hf_config, source.__getitem__, layout.groups, names=source.keys())
            outcomes[name] = "loaded"
        except ValueError as error:
            outcomes[name] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What loading changed checkpoints into two pipeline stages says, by rank."""
    root = tmp_path_factory.mktemp("changed")
    for name, (hf_config, change) in CHANGES.items():
        path = save_checkpoint(root / name, hf_config) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return run_ranks(2, _load_outcomes, root)


def test_missing_extra_and_misshapen_tensors_are_all_listed_on_every_rank(outcomes: Any) -> None:
    assert outcomes[0]["damaged"] == outcomes[1]["damaged"]
    assert outcomes[0]["damaged"].splitlines() == [
        "checkpoint and model differ in 3 points:",
        "  extra: model.layers.4.input_layernorm.weight belongs to no parameter of the model",
        "  misshapen: model.layers.3.mlp.gate.weight is [5, 32], the config says [4, 32]",
        "  missing: model.layers.0.mlp.experts.2.up_proj.weight [24, 32]",
    ]


def test_a_tied_head_in_the_checkpoint_must_be_the_embedding(outcomes: Any) -> None:
    for rank in outcomes:
        assert rank["head_written_out"] == "loaded"
        assert "untied: lm_head.weight differs from model.embed_tokens.weight" in rank["head_untied"]

"""Every family against transformers: the same logits and gradients, and the checkpoint back bit by bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.distributed import run_ranks
from tests.float64 import Exact, exact
from tests.tiny import (
    VOCAB,
    gradients,
    plain_model,
    save_checkpoint,
    tiny_config,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

MODELS: dict[str, Any] = {
    "qwen2": tiny_qwen2_config(rope_theta=1e6),
    "qwen2_tied": tiny_qwen2_config(tie_word_embeddings=True, num_key_value_heads=4),
    "qwen3": tiny_dense_config(),
    "qwen3_tied": tiny_dense_config(tie_word_embeddings=True, num_key_value_heads=1, head_dim=8),
    "qwen3_moe": tiny_moe_config(rope_theta=1e6),
    "qwen3_moe_unnormalised_topk": tiny_moe_config(norm_topk_prob=False, num_experts_per_tok=3),
    "qwen3_moe_some_dense": tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[3]),
    "mixtral": tiny_mixtral_config(head_dim=None, rms_norm_eps=1e-5),
    "qwen3_5_moe": tiny_qwen3_5_config(),
    "qwen3_5_moe_text": tiny_qwen3_5_text_config(layer_types=["linear_attention", "full_attention"] * 2),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"num_ranks": 1},
    "TP2 PP2 EP2": {"num_ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
}
LENGTHS = (7, 1, 71, 5)
"""Of the sequences in the packed micro-batch. One is longer than a chunk of the gated delta rule, 64."""


class Seen(NamedTuple):
    """What a rank saw of one model."""

    logits: torch.Tensor | None
    """[T, V/TP] on the last stage."""
    gradients: dict[str, torch.Tensor]
    """By the names that transformers saves, on rank 0."""
    identical: bool
    """Whether the export was the checkpoint, on rank 0."""


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]


def loss_weights() -> torch.Tensor:
    """[T, V]: the loss is the sum of the logits times these."""
    return torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(2))


def in_megatron(
    rank: int, world_size: int, root: Path, parallel: dict[str, Any], weights: dict[str, list[str]]
) -> dict[str, Seen]:
    from drpo_megatron.trainer import platform

    platform.activate("cpu")
    return {name: _one_model(root / name, parallel, weights[name]) for name in MODELS}


def _one_model(directory: Path, parallel: dict[str, Any], weights: list[str]) -> Seen:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from drpo_megatron.models import get_family
    from drpo_megatron.trainer import platform, setup
    from drpo_megatron.trainer.forward import run_micro_batches
    from drpo_megatron.trainer.weights import export_hf_weights, load_hf_weights

    hf_config = AutoConfig.from_pretrained(directory)
    family = get_family(hf_config)
    is_moe = "num_moe_experts" in family.transformer_config_kwargs(hf_config)
    config = tiny_config(directory, parallel | ({} if is_moe else {"expert": 1}))
    layout = setup.build_layout(config.parallel, seed=0)
    chunks = setup.build_model(config, family, hf_config, layout, platform.activate("cpu"))
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("nan"))  # So that a parameter which is not loaded shows.
    source = load_file(directory / "model.safetensors")
    parameters = {name: tensor for name, tensor in source.items() if not family.ignores(name)}
    load_hf_weights(chunks, hf_config, source.__getitem__, layout.groups, names=source.keys())
    exported = dict(export_hf_weights(chunks, hf_config, layout.groups, names=source.keys()))

    def loss(batch: Any, hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if config.parallel.sequence:
            hidden = gather_from_sequence_parallel_region(hidden, group=layout.tp)
        logits = hidden @ head.T
        padding = head.shape[0] * layout.tp.size() - VOCAB
        weights = torch.nn.functional.pad(loss_weights(), (0, padding)).chunk(layout.tp.size(), dim=1)
        return (logits * weights[layout.tp.rank()]).sum(), logits.detach()

    ids = torch.cat(sequences())
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    batch: Any = SimpleNamespace(input_ids=ids, position_ids=positions, cu_seqlens=ends, max_seqlen=max(LENGTHS))
    device = torch.device("cpu")
    collected = run_micro_batches(chunks, [batch], loss, length=len(ids), forward_only=False, device=device)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(parameter.main_grad)
    exported_gradients = export_hf_weights(chunks, hf_config, layout.groups, names=weights)
    identical = exported.keys() == parameters.keys() and all(
        tensor is None or (tensor.dtype == source[name].dtype and torch.equal(tensor, source[name]))
        for name, tensor in exported.items()
    )
    return Seen(
        collected[0] if collected else None, {n: t.clone() for n, t in exported_gradients if t is not None}, identical
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def reference(root: Path) -> dict[str, Exact]:
    """Of transformers' models, each sequence in a row of its own: `logits` [T, V], gradients by the names it saves."""
    return {name: _reference(root / name, hf_config) for name, hf_config in MODELS.items()}


def _reference(directory: Path, hf_config: Any) -> Exact:
    model = plain_model(save_checkpoint(directory, hf_config))
    return exact(model, lambda: _logits_and_gradients(model))


def _logits_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Rows of a batch know nothing of each other; and no token sees the padding after it.
    batch = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    rows = model(batch, use_cache=False).logits
    logits = torch.cat([row[:length] for row, length in zip(rows, LENGTHS, strict=True)])
    (logits * loss_weights().to(logits.dtype)).sum().backward()
    return {"logits": logits.detach(), **gradients(model)}


@pytest.fixture(scope="module", params=LAYOUTS)
def seen(root: Path, reference: Any, request: pytest.FixtureRequest) -> list[dict[str, Seen]]:
    """Of every rank of a layout; all models run in one start of the ranks."""
    parallel = LAYOUTS[request.param]
    weights = {name: sorted(of.values.keys() - {"logits"}) for name, of in reference.items()}
    return run_ranks(parallel["num_ranks"], in_megatron, root, parallel, weights, timeout_s=300)


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_packed_sequences_are_those_of_transformers(seen: Any, reference: Any, model: str) -> None:
    mine = torch.cat([rank[model].logits for rank in seen if rank[model].logits is not None], dim=1)[:, :VOCAB]
    assert reference[model].values["logits"].std() > 0.5  # Logits that hardly vary would agree by themselves.
    assert reference[model].outside({"logits": mine}) == {}


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_transformers(seen: Any, reference: Any, model: str) -> None:
    mine = seen[0][model].gradients
    assert mine.keys() == reference[model].values.keys() - {"logits"}
    assert reference[model].outside(mine) == {}


def _scaled_weight(model: Any) -> None:
    """Of one expert, or of the dense model's MLP: its output projection in the last layer."""
    mlp = model.model.layers[-1].mlp
    weight = mlp.experts.down_proj[0] if hasattr(mlp, "experts") else mlp.down_proj.weight
    weight.data.mul_(1.001)


def _rotary_base(model: Any) -> None:
    rotary = model.model.rotary_emb
    exponents = torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)
    rotary.inv_freq = rotary.inv_freq * 1.01**-exponents


def _norm_epsilon(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    setattr(norm, name, 10 * getattr(norm, name))


def _dropped_bias(model: Any) -> Any:
    bias = model.model.layers[-1].self_attn.v_proj.bias
    return NotImplemented if bias is None else bias.data.zero_()


def _swapped_experts(model: Any) -> Any:
    """The first two, in the output projection of one layer."""
    mlp = model.model.layers[1].mlp
    if not hasattr(mlp, "experts"):
        return NotImplemented
    down = mlp.experts.down_proj
    down.data = down.data[[1, 0, 2, 3]]


FAULTS: dict[str, Any] = {
    "a weight times 1.001": _scaled_weight,
    "a rotary base larger by 1 %": _rotary_base,
    "ten times the epsilon of one norm": _norm_epsilon,
    "a dropped bias": _dropped_bias,
    "swapped experts": _swapped_experts,
}


@pytest.mark.parametrize("model", MODELS)
def test_the_limits_pass_transformers_own_fp32_and_no_wrong_model(root: Path, reference: Any, model: str) -> None:
    right = _logits_and_gradients(plain_model(root / model))
    assert reference[model].outside(right) == {}
    for fault, make in FAULTS.items():
        wrong = plain_model(root / model)
        if make(wrong) is not NotImplemented:
            assert reference[model].outside(_logits_and_gradients(wrong)), fault


@pytest.mark.parametrize("model", MODELS)
def test_the_export_is_the_checkpoint_bit_by_bit(seen: Any, model: str) -> None:
    assert seen[0][model].identical

"""A padding token in a prompt or a response: gradients are transformers', whose embedding leaves its row out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from drpo_megatron.config.objective import SFTConfig
from drpo_megatron.types import Sample
from tests.distributed import run_ranks
from tests.tiny import VOCAB, random_samples, save_checkpoint, tiny_config, tiny_dense_config, tiny_moe_config

PAD = VOCAB - 3


def samples() -> list[Sample]:
    """The padding token is drawn in one, in the prompt of another, both in a third."""
    base = [
        replace(sample, prompt_ids=(i, 2, 3), response_ids=(4, i, 6, i, 8), advantage=1.0)
        for i, sample in enumerate(random_samples(4))
    ]
    base[0] = replace(base[0], response_ids=(4, PAD, 6, 7, PAD))
    base[1] = replace(base[1], prompt_ids=(1, PAD, 3))
    base[2] = replace(base[2], prompt_ids=(PAD, 2, 3), response_ids=(PAD, PAD, 6, 7, 8))
    return [replace(sample, behavior_logprobs=(-1.0,) * 5) for sample in base]


def gradients(rank: int, world_size: int, hf_path: str, parallel: dict[str, Any]) -> dict[str, torch.Tensor]:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    section = {
        "optimizer_steps_per_rollout": 1,
        "aggregation": "seq-mean-token-mean",
        "optimizer": {"lr": 1e-3, "distributed": False, "clip_grad": 1e9},
    }
    config = tiny_config(hf_path, parallel, trainer=section)
    trainer = Trainer(config.model_copy(update={"objective": SFTConfig()}))
    trainer.train_step(samples())
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}


@pytest.mark.parametrize(
    ("parallel", "make"),
    [
        ({}, tiny_dense_config),
        ({"num_ranks": 4, "tensor": 2, "sequence": True, "context": 2, "expert": 2}, tiny_moe_config),
    ],
    ids=["single-tied", "tp2cp2ep2"],
)
def test_the_padding_row_is_trained_as_transformers_trains_it(
    parallel: dict[str, Any], make: Any, tmp_path: Path
) -> None:
    hf_config: PreTrainedConfig = make(num_hidden_layers=2, pad_token_id=PAD, tie_word_embeddings=not parallel)
    hf_path = save_checkpoint(tmp_path, hf_config)
    model = AutoModelForCausalLM.from_pretrained(hf_path, experts_implementation="eager").double()
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids] for sample in samples()])
    logprobs = model(ids).logits.log_softmax(-1)[:, 2:-1].gather(-1, ids[:, 3:, None])
    (-logprobs.mean()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".experts." not in name}
    got = run_ranks(parallel.get("num_ranks", 1), gradients, str(hf_path), parallel, timeout_s=300)[0]
    for name, gradient in expected.items():
        # FP32 loses 1e-6 to 1e-5 of the largest in two layers. Measured: without one of the 20 targets some gradient is off
        # by 0.26 of its largest at least (float64).
        tolerance = 1e-4 * gradient.abs().max().item()
        assert (got[name] - gradient).abs().max() <= tolerance, name
    row = got["model.embed_tokens.weight"][PAD]
    assert row.any() == (not parallel)  # A tied row moves as an output.

"""Whether a converted model computes what the original does: logits of transformers and of Megatron on one prompt.

The models take turns: transformers' is freed before Megatron's is built, and only logits are kept.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from drpo_megatron.checkpoint.hf import HFCheckpoint, read_config
from drpo_megatron.checkpoint.model_check import require_servable
from drpo_megatron.checkpoint.torch_dist import TorchDistCheckpoint
from drpo_megatron.config.sections import ParallelSection
from drpo_megatron.conversion.model import ModelPlan, bare_config
from drpo_megatron.data.packing import pack
from drpo_megatron.data.tokenize import read_tokenizer
from drpo_megatron.models.names import canonical_key
from drpo_megatron.trainer import platform as platforms
from drpo_megatron.trainer import setup
from drpo_megatron.trainer.pieces import single_process
from drpo_megatron.types import Sample

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest difference relative to the largest logit. BF16 rounds every activation to 8 bits, in two orders."""


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    num_tokens: int
    relative_difference: float
    """max |difference| / max |logit|"""
    limit: float

    @property
    def is_same(self) -> bool:
        return self.relative_difference <= self.limit


def compare_logits(hf: Path, megatron: Path, prompt: str, dtype: torch.dtype = torch.float32) -> LogitsComparison:
    """Both models in `dtype` on the CPU. ValueError for a checkpoint without a tokenizer, or quantised."""
    if "quantization_config" in read_config(hf):
        raise ValueError(
            f"{hf} is quantised, and its kernels need a GPU; compare with the checkpoint that it came from"
        )
    require_servable(hf)
    tokenizer = read_tokenizer(hf)
    ids = tokenizer(prompt, return_tensors="pt").input_ids[0]
    if len(ids) < 2:
        raise ValueError(f"the prompt {prompt!r} is {len(ids)} tokens long to the tokenizer of {hf}; give at least 2")
    expected = _transformers_logits(hf, ids, dtype)
    found = _megatron_logits(hf, megatron, ids, dtype)
    difference = (found - expected).abs().max() / expected.abs().max()
    return LogitsComparison(len(ids), difference.item(), LIMITS[dtype])


def _transformers_logits(hf: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, V] FP32."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        hf, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
    )
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids[None]).logits[0].float()
    del model
    gc.collect()
    return logits


def _megatron_logits(hf: Path, megatron: Path, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, V] FP32, of one process."""
    platform = platforms.activate("cpu")
    from drpo_megatron.trainer.forward import hidden_states

    checkpoint = TorchDistCheckpoint(megatron)
    plan = ModelPlan.of(read_config(hf), HFCheckpoint(hf).names(), hf).fitted(checkpoint)
    plan.check(checkpoint)
    config = bare_config("bf16" if dtype == torch.bfloat16 else "fp32")
    sample = Sample("prompt", tuple(ids[:-1].tolist()), tuple(ids[-1:].tolist()), (0.0,), 0.0)
    batch = pack([sample], [1.0], pad_id=0, length_multiple=1, sequence_multiple=1)
    with single_process(), torch.inference_mode():
        layout = setup.build_layout(ParallelSection(), seed=0)
        (model,) = setup.build_policy_models(config, plan.family, plan.hf_config, layout, platform)
        parameters = {
            canonical_key(name, range(len(model.decoder.layers)), 0): tensor
            for name, tensor in model.named_parameters()
        }
        for rule in plan.rules:
            parameters[rule.key].copy_(plan.read_parameter(checkpoint, rule))
        hidden = hidden_states(model.eval(), batch, platform.device).squeeze(1)
        return (hidden @ model.head_weight().T)[:, : plan.hf_config.vocab_size].float()

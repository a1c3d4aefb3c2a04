"""Small models with random weights, samples for them, and what a training step on those gives by transformers alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.data.quickstart import make_tokenizer
from drpo_megatron.objectives.aggregation import token_weights
from drpo_megatron.rollout.model_slots import checkpoint_slots
from drpo_megatron.trainer.loss_methods import drpo_formula
from drpo_megatron.types import Sample

AGGREGATION = "seq-mean-token-sum-norm"


def small_moe(tiny: bool) -> PreTrainedConfig:
    """A Qwen3-MoE whose sizes all layouts can share out; the full one also has whole FP8 blocks of 128 under TP2."""
    shape: dict[str, Any] = dict(
        num_hidden_layers=4,
        max_position_embeddings=256,
        rope_theta=10000.0,
        norm_topk_prob=True,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    if tiny:
        return Qwen3MoeConfig(
            vocab_size=51,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=48,
            num_experts=4,
            moe_intermediate_size=32,
            initializer_range=0.2,
            **shape,
        )
    return Qwen3MoeConfig(
        vocab_size=4099,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=512,
        num_experts=8,
        moe_intermediate_size=256,
        initializer_range=0.05,
        **shape,
    )


def qwen3_06b(tiny: bool) -> PreTrainedConfig:
    """Of Qwen3-0.6B's sizes; random weights."""
    if tiny:
        return Qwen3Config(
            vocab_size=1000,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    )


def save_model(directory: Path, hf_config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of random weights, norms included, with a tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    # A padding token would have an embedding of zeros, whose gradient through a norm is a thousand times the others'.
    hf_config.pad_token_id, hf_config.eos_token_id, hf_config.bos_token_id = None, tokenizer.eos_token_id, None
    model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def random_samples(count: int, vocab: int, max_prompt: int, max_response: int, even: bool = False) -> list[Sample]:
    """Sequences of mixed lengths, `even`: all of the longest; every fourth has advantage 0."""
    rng = random.Random(0)

    def tokens(lowest: int, highest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(highest if even else rng.randint(lowest, highest)))

    samples = []
    for index in range(count):
        prompt, response = tokens(2, max_prompt), tokens(1, max_response)
        samples.append(
            Sample(
                sample_id=f"p{index // 4}/{index % 4}",
                prompt_ids=prompt,
                response_ids=response,
                behavior_logprobs=tuple(-rng.uniform(0.05, 6.0) for _ in response),
                advantage=0.0 if index % 4 == 3 else rng.uniform(-1.0, 1.0),
            )
        )
    return samples


@dataclass(frozen=True)
class Step:
    """What a training step on some samples comes to."""

    loss: float
    grad_norm: float
    logprobs: torch.Tensor
    """Of all response tokens, sample by sample."""
    gradients: dict[str, torch.Tensor]
    """By HF name."""

    def distances(self, exact: Step) -> dict[str, float]:
        """Relative errors; of log-probs the root of the mean square."""
        missing = self.gradients.keys() ^ exact.gradients.keys()
        if missing:
            raise ValueError(f"gradients only one side has: {', '.join(sorted(missing)[:5])}")
        square = sum((g.double() - exact.gradients[n].double()).square().sum() for n, g in self.gradients.items())
        whole = sum(g.double().square().sum() for g in exact.gradients.values())
        return {
            "loss": abs(self.loss - exact.loss) / abs(exact.loss),
            "gradient norm": abs(self.grad_norm - exact.grad_norm) / exact.grad_norm,
            "log-probs": (self.logprobs.double() - exact.logprobs.double()).square().mean().sqrt().item(),
            "gradients": float(square / whole) ** 0.5,
        }


def step_by_transformers(hf_path: Path, samples: list[Sample], horizon: int, dtype: torch.dtype) -> Step:
    """DRPO's step by autograd through transformers' own model on the CPU, sequence by sequence, without packing."""
    model = AutoModelForCausalLM.from_pretrained(hf_path, dtype=dtype, experts_implementation="eager")
    weights = token_weights([len(s.response_ids) for s in samples], AGGREGATION, horizon)
    found, loss = [], 0.0
    for sample, weight in zip(samples, weights, strict=True):
        logprobs = response_logprobs(model, sample.prompt_ids, sample.response_ids)
        mu = torch.tensor(sample.behavior_logprobs, dtype=logprobs.dtype)
        advantages = torch.full_like(mu, sample.advantage)
        share = (drpo_formula(logprobs, mu, advantages) * weight).sum()
        share.backward()
        loss += share.item()
        found.append(logprobs.detach())
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # So that gradients are found as weights are, by their names in a checkpoint.
            parameter.copy_(parameter.grad)
    slots = checkpoint_slots(model, HFCheckpoint(hf_path).names())
    gradients = {name: slot.detach().clone() for name, slot in slots.items()}
    norm = sum(g.double().square().sum() for g in gradients.values()) ** 0.5
    return Step(loss, float(norm), torch.cat(found), gradients)


def response_logprobs(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """[response] log p of its tokens at temperature 1, in float64 for a float64 model, else FP32."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)

"""Tiny real checkpoints, built from configs by transformers, and configs that train them."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from drpo_megatron.types import Sample

VOCAB = 51
"""Odd, so that tensor parallelism has to pad it."""

_SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    initializer_range=0.2,
    tie_word_embeddings=False,
)

_QWEN3_5: dict[str, Any] = {name: _SHAPE[name] for name in _SHAPE.keys() - {"intermediate_size", "rope_theta"}} | dict(
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    initializer_range=0.1,  # Its norms scale by 1 + weight: larger matrices would amplify rounding errors.
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
)

SAME_WEIGHTS = 1e-4
"""How far log-probs, and |pi - mu| all the more, of two programs with the same weights may be apart, in nats. FP32 leaves
2e-6 between SGLang and transformers on these models, measured on one machine: fifty times less. Weights
that are each off by one update of lr 1e-3 give 9e-3 or more, of lr 1e-4 7e-4 or more."""


def tiny_moe_config(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **(_SHAPE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True) | changes)
    )


def tiny_dense_config(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**(_SHAPE | changes))


def tiny_qwen2_config(**changes: Any) -> Qwen2Config:
    shape = {name: value for name, value in _SHAPE.items() if name != "head_dim"}
    return Qwen2Config(**(shape | changes))


def tiny_mixtral_config(**changes: Any) -> MixtralConfig:
    return MixtralConfig(**(_SHAPE | dict(num_local_experts=4, num_experts_per_tok=2) | changes))


def tiny_qwen3_5_text_config(**changes: Any) -> Qwen3_5MoeTextConfig:
    """Three gated delta nets of 2 key and 4 value heads, then gated attention that rotates a quarter of 16 channels."""
    return Qwen3_5MoeTextConfig(**(_QWEN3_5 | changes))


def tiny_qwen3_5_config(**changes: Any) -> Qwen3_5MoeConfig:
    """The same text model, and a vision tower beside it."""
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=2)
    return Qwen3_5MoeConfig(text_config=_QWEN3_5 | changes, vision_config=vision | {"num_position_embeddings": 16})


def save_checkpoint(directory: Path, hf_config: Any, seed: int = 0) -> Path:
    """A random model of `hf_config`, FP32, with a word-level tokenizer; norms and biases are random, too.

    A `qwen3_5_moe` is written as it is published: experts stacked, vision and multi-token prediction beside them.
    """
    torch.manual_seed(seed)
    is_published = hf_config.model_type == "qwen3_5_moe"
    model = (Qwen3_5MoeForConditionalGeneration if is_published else AutoModelForCausalLM.from_config)(hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(directory)
    if is_published:
        mtp = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.randn(24, 32)}
        save_file(model.state_dict() | mtp, Path(directory, "model.safetensors"), metadata={"format": "pt"})
    hf_config = hf_config.get_text_config()
    words = {f"t{i}": i for i in range(hf_config.vocab_size - 3)}
    words |= {"<pad>": hf_config.vocab_size - 3, "<eos>": hf_config.vocab_size - 2, "<unk>": hf_config.vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)
    return Path(directory)


def plain_model(directory: Path) -> Any:
    """transformers' model in FP32, of plain operations: what a fused one rounds inside, tests.float64 would not see."""
    return AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="eager", attn_implementation="eager", dtype=torch.float32
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of a transformers model, by the names under which it saves its weights (stacked experts are taken apart)."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, state_dict={name: weight.grad for name, weight in model.named_parameters()})
        return load_file(Path(directory, "model.safetensors"))


def tiny_config(hf_path: Path | str, parallel: dict[str, Any] | None = None, **sections: Any) -> Any:
    """A Config over the tiny checkpoint; `sections` are merged into the YAML's top-level sections."""
    from drpo_megatron.config.sections import Config

    raw: dict[str, Any] = {
        "run": {"name": "tiny", "num_steps": 8, "seed": 1},
        "model": {"hf_path": str(hf_path)},
        "parallel": parallel or {},
        "objective": {"name": "drpo", "delta": 0.15},
        "trainer": {
            "backend": "cpu",
            "optimizer_steps_per_rollout": 2,
            "max_tokens_per_micro_batch": 128,
            "optimizer": {"lr": 1e-3, "clip_grad": 1.0},
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 16},
        "data": {"train": "unused.jsonl"},
        "reward": {"name": "arithmetic"},
    }
    for name, changes in sections.items():
        raw[name] = _merged(raw.get(name, {}), changes)
    return Config.model_validate(raw)


def _merged(base: Any, changes: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return base | {key: _merged(base.get(key, {}), value) for key, value in changes.items()}


def random_samples(count: int, seed: int = 0, max_prompt: int = 12, max_response: int = 16) -> list[Sample]:
    """Sequences of mixed lengths with random mu and advantages; every fourth has advantage 0."""
    rng = random.Random(seed)
    samples = []
    for index in range(count):
        prompt = tuple(rng.randrange(VOCAB - 3) for _ in range(rng.randint(2, max_prompt)))
        response = tuple(rng.randrange(VOCAB - 3) for _ in range(rng.randint(1, max_response)))
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

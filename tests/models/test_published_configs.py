"""The configs in examples/models against a table of the published values; keys that not every reader heeds.

Where the table's values are from, none of the files having been downloaded here:

DeepSeek-R1-Distill-Qwen-1.5B  the Hub's file as listed by an issue; public code that prints it (bos and eos 151643)
Qwen3-4B-Base                  the Hub's file as listed by an issue; public copies of Qwen3-4B's, but for eos and context
Qwen3-30B-A3B-Base             public copies of Qwen3-30B-A3B's, but for eos (151643) and context (32768) of a Base model
Qwen3-235B-A22B                public copies of the file
Qwen3.5-35B-A3B-Base           Qwen3.5-35B-A3B's file as listed by an issue; the Base's own was not seen
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from drpo_megatron.models import get_family
from tests.tiny import (
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
    tiny_qwen3_5_text_config,
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = QWEN | {
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "transformers_version": "4.44.0",
        "use_mrope": False,
    },
    "Qwen3-4B-Base": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Qwen3-30B-A3B-Base": QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "Qwen3-235B-A22B": QWEN3_MOE
    | {
        "eos_token_id": 151645,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 94,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    "Qwen3.5-35B-A3B-Base": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5_moe",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "dtype": "bfloat16",
            "eos_token_id": 248044,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_value_head_dim": 128,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 512,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 512,
            "use_cache": True,
            "vocab_size": 248320,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4304,
            "model_type": "qwen3_5_moe",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    },
}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_every_example_has_its_row_in_the_table() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/config.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_examples_are_the_published_configs_key_by_key(name: str) -> None:
    ours, published = flat(json.loads((EXAMPLES / name / "config.json").read_text())), flat(PUBLISHED[name])
    differences = {
        key: (ours.get(key, "absent"), published.get(key, "absent")) for key in ours.keys() | published.keys()
    }
    assert {key: both for key, both in differences.items() if both[0] != both[1]} == {}
    config = deepcopy(PUBLISHED[name])
    get_family(config)
    assert config == PUBLISHED[name]  # Reading a config doesn't write into it, as transformers' from_dict does.


# --- what not every reader heeds --------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": tiny_qwen2_config().to_dict(),
    "qwen3": tiny_dense_config().to_dict(),
    "qwen3_moe": tiny_moe_config().to_dict(),
    "mixtral": tiny_mixtral_config().to_dict(),
    "qwen3_5_moe_text": tiny_qwen3_5_text_config().to_dict(),
    "qwen3_5_moe": tiny_qwen3_5_config().to_dict(),
}
FULLY_ROTATED = ("qwen2", "qwen3", "qwen3_moe", "mixtral")


def logits(config: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(config))).eval()
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


@pytest.mark.parametrize("name", FULLY_ROTATED)
@pytest.mark.parametrize("inside", [True, False])
def test_a_partial_rotation_that_transformers_ignores_is_refused(name: str, inside: bool) -> None:
    """Megatron would rotate a half of each head: pi and mu would be of different models."""
    rope = FAMILIES[name]["rope_parameters"] | ({"partial_rotary_factor": 0.5} if inside else {})
    changed = FAMILIES[name] | {"rope_parameters": rope} | ({} if inside else {"partial_rotary_factor": 0.5})
    assert torch.equal(logits(FAMILIES[name]), logits(changed))  # Else it would have to be honoured, not refused.
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.5: only 1"):
        get_family(changed)
    whole = changed | {"rope_parameters": FAMILIES[name]["rope_parameters"], "partial_rotary_factor": 1.0}
    assert get_family(whole).gpt_model_kwargs(whole)["rotary_percent"] == 1.0


def test_a_partial_rotation_that_transformers_knows_is_taken() -> None:
    config = FAMILIES["qwen3_5_moe_text"]
    changed = config | {"rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": 0.5}}
    assert not torch.equal(logits(config), logits(changed))
    assert get_family(changed).gpt_model_kwargs(changed)["rotary_percent"] == 0.5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_mrope": True}, "use_mrope=True: only False"),
        ("qwen3", {"is_causal": False}, "is_causal=False: only True"),
        ("qwen3", {"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config=.*: only None"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types=\['sliding_attention'\]: only full_attention",
        ),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type=yarn"),
        ("qwen3_moe", {"num_experts": 5}, "num_experts=5 but num_local_experts=4: they must be equal"),
        (
            "qwen3",
            {"rope_theta": 5e6},
            "rope_theta=5000000.0 but rope_parameters.rope_theta=10000.0: they must be equal",
        ),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate=False: only True"),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob=False: only True"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: only \[\]"),
        ("qwen3_5_moe_text", {"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid': only swish"),
        ("qwen3_5_moe_text", {"full_attention_interval": 2}, "full_attention_interval=2 contradicts layer_types"),
        (
            "qwen3_5_moe",
            {"tie_word_embeddings": True},
            "tie_word_embeddings=True but text_config.tie_word_embeddings=False",
        ),
    ],
)
def test_what_readers_take_differently_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    get_family(FAMILIES[name])
    with pytest.raises(ValueError, match=message):
        get_family(FAMILIES[name] | changes)


ODD = ("x", 0, -1, None, [1], {"a": 1}, 1.5, True, float("inf"), float("nan"))


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text"])
def test_whatever_a_key_holds_a_config_is_taken_or_refused_in_one_line(name: str) -> None:
    num_refused = 0
    for key in (*FAMILIES[name], "rope_scaling", "rope_theta", "full_attention_interval"):
        for value in ODD:
            config = deepcopy(FAMILIES[name]) | {key: value}
            try:
                family = get_family(config)
                family.rules(config)
                family.transformer_config_kwargs(config)
            except ValueError as error:
                assert "\n" not in str(error), (key, value)
                num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 is no positive integer"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 of 4 experts"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 is no positive number"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta=-1.0 is no positive number"),
        ({"vocab_size": "many"}, "config.json is none of a qwen3_moe, says transformers: .*vocab_size"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_family(FAMILIES["qwen3_moe"] | changes)

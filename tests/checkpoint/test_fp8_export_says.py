"""What an FP8 export says of itself, by the rules of those who read it: SGLang's and transformers' own code."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import FineGrainedFP8Config

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.conversion.fp8 import unquantised_modules
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.rollout.sglang_server import LAUNCHER
from tests.checkpoint.test_convert import MODELS, silent
from tests.rollout.conftest import PYTHON
from tests.tiny import save_checkpoint

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""The layers in which SGLang puts several matrices of a checkpoint."""

SGLANG_RULE = """
import json, runpy, sys
launch = runpy.run_path(sys.argv[1], run_name="__mp_main__")  # As a server on a CPU is started, up to SGLang's own part.
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"],
          "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj_ba": ["in_proj_b", "in_proj_a"]}
answers = []
for section, layers in json.load(sys.stdin):
    config = Fp8Config.from_config(section)
    answers.append({layer: is_layer_skipped(layer, config.ignored_layers, packed) for layer in layers})
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFCheckpoint]:
    found = {}
    for name, config in MODELS.items():
        root = tmp_path_factory.mktemp("says") / name
        source = save_checkpoint(root / "hf", config)
        hf_to_megatron(source, root / "megatron", say=silent)
        megatron_to_hf(root / "megatron", root / "fp8", fp8=True, say=silent)
        found[name] = HFCheckpoint(root / "fp8")
    return found


def fp8_modules(checkpoint: HFCheckpoint) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name in checkpoint.names()
        if checkpoint.info(name).dtype == torch.float8_e4m3fn
    }


def plain_modules(checkpoint: HFCheckpoint) -> set[str]:
    """Those with a matrix that is not FP8."""
    names = (name for name in checkpoint.names() if name.endswith(".weight") and len(checkpoint.info(name).shape) == 2)
    return {name.removesuffix(".weight") for name in names} - fp8_modules(checkpoint)


def section(checkpoint: HFCheckpoint) -> dict[str, Any]:
    return checkpoint.config["quantization_config"]


@pytest.mark.parametrize("name", MODELS)
def test_transformers_takes_every_module_for_what_it_is(exports: dict[str, HFCheckpoint], name: str) -> None:
    """Its quantizer, on its own model of the export's config without memory: which linear layers become FP8."""
    checkpoint = exports[name]
    listed = section(checkpoint)["modules_to_not_convert"]
    assert all(should_convert_module(module, listed) for module in fp8_modules(checkpoint))
    assert not any(should_convert_module(module, listed) for module in plain_modules(checkpoint))
    kind = AutoModelForImageTextToText if name == "qwen3_5_moe" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(MODELS[name])
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**section(checkpoint)), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    is_fp8 = {
        n.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else n: isinstance(m, FP8Linear)
        for n, m in model.named_modules()
        if isinstance(m, (FP8Linear, torch.nn.Linear))
    }
    assert is_fp8 and {n for n, fp8 in is_fp8.items() if fp8} == fp8_modules(checkpoint) & is_fp8.keys()
    assert any(is_fp8.values())


def sglang_layer(module: str) -> str:
    stem, _, last = module.rpartition(".")
    return (
        f"{stem}.{FUSED.get(last, last)}" if "experts." not in module else module.partition(".experts.")[0] + ".experts"
    )


@pytest.mark.skipif(not PYTHON.is_file(), reason="SGLang is not installed: make sglang-cpu")
def test_sglang_builds_fp8_layers_for_fp8_matrices_and_no_others(exports: dict[str, HFCheckpoint]) -> None:
    questions, expected = [], []
    for checkpoint in exports.values():
        answers = {sglang_layer(module): True for module in plain_modules(checkpoint)}
        answers |= {sglang_layer(module): False for module in fp8_modules(checkpoint)}
        questions.append((section(checkpoint), sorted(answers)))
        expected.append(answers)
    done = subprocess.run(
        [str(PYTHON), "-c", SGLANG_RULE, str(LAUNCHER), "cpu"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "ANSWERS" in done.stdout, done.stderr[-2000:]
    assert json.loads(done.stdout.partition("ANSWERS")[2]) == expected


def test_a_module_with_an_fp8_matrix_in_it_is_never_named() -> None:
    names = ["a.0.q.weight", "a.0.q.bias", "a.0.A_log", "a.0.norm.weight", "b.0.x.weight", "b.1.y.bias", "head.weight"]
    assert unquantised_modules(names, {"a.0.q.weight"}) == ["a.0.norm", "b", "head"]
    assert unquantised_modules(
        ["m.language_model.norm.weight", "model.language_model.n.weight", "model.q.weight"],
        {"model.q.weight", "model.language_model.q.weight"},
    ) == ["m", "model.language_model.n", "model.n"]

"""SGLang's own judgement of what we launch, send and expect on GPUs: its argument resolver, models and weight checker.

No GPU and no kernel: see sglang_judge.py for what is pretended.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config import load_config
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.config.precision import PrecisionSection
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.config.sglang_checks import _OWNED_FLAGS, _UNUSABLE_FLAGS, _whole_name
from drpo_megatron.conversion.fp8 import server_flags as fp8_flags
from drpo_megatron.models import get_family
from drpo_megatron.precision.rollout import RolloutPrecision
from drpo_megatron.rollout import sglang_layout
from drpo_megatron.rollout.sglang_hash import cpu_hash
from drpo_megatron.rollout.sglang_layout import ServerChecksums
from drpo_megatron.rollout.sglang_server import server_flags
from drpo_megatron.rollout.sglang_sync import _CACHE, _WEIGHTS, _compare
from tests.rollout.conftest import PYTHON, ROOT
from tests.tiny import (
    save_checkpoint,
    tiny_dense_config,
    tiny_mixtral_config,
    tiny_moe_config,
    tiny_qwen2_config,
    tiny_qwen3_5_config,
)

JUDGE = Path(__file__).with_name("sglang_judge.py")
HOPPER, BLACKWELL = 9, 10
PRECISIONS = ("bf16", "fp8-block128")
_SHAPE: dict[str, Any] = dict(
    vocab_size=259,  # Odd, so that it is padded.
    hidden_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
_QWEN3_5: dict[str, Any] = _SHAPE | dict(
    num_hidden_layers=4,  # Three gated delta nets, and attention.
    head_dim=128,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
)
_DENSE = _SHAPE | dict(head_dim=128, intermediate_size=512)
MODELS = {
    "dense": lambda: tiny_dense_config(**_DENSE),
    "qwen2": lambda: tiny_qwen2_config(**_SHAPE, intermediate_size=512),
    "moe": lambda: tiny_moe_config(**_DENSE, moe_intermediate_size=256),
    "mixtral": lambda: tiny_mixtral_config(**_DENSE | {"num_attention_heads": 2}),  # It ignores head_dim.
    "qwen3_5": lambda: tiny_qwen3_5_config(**_QWEN3_5),
}
NO_FP8 = {"qwen2": "its key heads are 64 wide, half a block"}


def sent(path: Path, precision: str) -> dict[str, torch.Tensor]:
    """What a BF16 or FP8 server is sent of a checkpoint."""
    checkpoint = HFCheckpoint(path)
    family = get_family(checkpoint.config)
    quantised = RolloutPrecision.of_checkpoint(section(precision), checkpoint.config, checkpoint.names())
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint.iter_tensors():
        if not family.ignores(name):
            tensors |= quantised.quantized(name, tensor.bfloat16()) if quantised else {name: tensor.bfloat16()}
    return tensors


def section(precision: str) -> PrecisionSection:
    return PrecisionSection.model_validate({"rollout": {"name": precision}})


def words(path: Path, precision: str, tensor_parallel: int) -> list[str]:
    engine = SGLangEngineSection(tensor_parallel=tensor_parallel)
    line = server_flags(str(path), engine, "bfloat16", "cuda:0", routed_experts=False, releases_memory=True)
    return line + (fp8_flags(path, section(precision)) if precision != "bf16" else [])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all families, and cases.json."""
    if not PYTHON.exists():
        pytest.skip("SGLang's environment is not there; `make sglang-cpu` sets it up")
    directory, cases = tmp_path_factory.mktemp("judged"), {}
    for model, make in MODELS.items():
        path = save_checkpoint(directory / model, make())
        if model == "qwen3_5":  # transformers writes every layer's type, and SGLang reads what published files have.
            file = path / "config.json"
            config = json.loads(file.read_text())
            config["text_config"]["full_attention_interval"] = 4
            file.write_text(json.dumps(config))
        for precision in PRECISIONS[: 1 if model in NO_FP8 else 2]:
            file = directory / f"{model}-{precision}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in sent(path, precision).items()}, file)
            for size in (1, 2):
                line = words(path, precision, size)
                cases[f"{model} {precision} {size}"] = {"words": line, "tensors": str(file)}
    for recipe in sorted((ROOT / "examples").glob("*.yaml")):
        config = load_config(recipe)
        if isinstance(engine := config.rollout.engine, SGLangEngineSection):
            replay = config.trainer.routing_replay != "off"
            line = server_flags(str(ROOT / config.model.hf_path), engine, "bfloat16", "cuda:0", routed_experts=replay)
            cases[recipe.stem] = {"words": line}
    theirs = [word for word in cases["moe bf16 1"]["words"] if word not in ("--moe-runner-backend", "triton")]
    cases["SGLang's choice of MoE kernels"] = cases["moe bf16 1"] | {
        "words": theirs[: theirs.index("--fp8-gemm-backend")]
    }
    deep_gemm = cases["dense fp8-block128 1"]
    asked = [*deep_gemm["words"], "--fp8-gemm-backend", "deep_gemm"]
    cases["DeepGEMM"] = deep_gemm | {"words": asked}
    (directory / "cases.json").write_text(json.dumps(cases))
    return directory


@pytest.fixture(scope="module", params=[HOPPER, BLACKWELL], ids=["sm_90", "sm_100"])
def judged(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    major = request.param
    answers = directory / f"answers-{major}.json"
    command = [str(PYTHON), "-P", str(JUDGE), str(major), str(directory / "cases.json"), str(answers)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SGLANG_USE_CPU_ENGINE")
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    yield major, json.loads(answers.read_text())


def test_what_a_server_would_hold_is_what_it_is_expected_to(
    judged: tuple[int, dict[str, Any]], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_layout, "gpu_hash", cpu_hash)  # The parameters of a GPU's server, hashed on a CPU.
    _, answers = judged
    names = [name for name in answers if len(name.split()) == 3 and name.split()[1] in PRECISIONS]
    assert len(names) == 2 * (2 * len(MODELS) - len(NO_FP8))
    for name in names:
        model, precision, size = name.split()
        answer = answers[name]
        assert "error" not in answer, f"{name}: {answer['error']}\n{answer['traceback']}"
        expected = ServerChecksums(read_hf_config(directory / model), int(size), on_gpu=True)
        expected.add(load_file(directory / f"{model}-{precision}.safetensors").items())
        assert len(answer["ranks"]) == int(size)
        for rank, checksums in enumerate(answer["ranks"]):
            # ValueError names what differs.
            _compare({"parallelism_info": [{"tp_rank": rank}], "checksums": checksums}, expected)
        if size == "2":
            assert answer["ranks"][0] != answer["ranks"][1]


def test_sglang_resolves_our_launch_lines_to_what_we_count_on(judged: tuple[int, dict[str, Any]]) -> None:
    _, answers = judged
    for name, answer in answers.items():
        if name in ("flags", "memory", "DeepGEMM", "SGLang's choice of MoE kernels"):
            continue
        found = answer["resolved"]
        is_fp8 = "fp8-block128" in name.split()
        assert (found["device"], found["dp_size"], found["moe_a2a_backend"]) == ("cuda", 1, "none"), name
        # Weights in the kernels' own order, or shared with another process, can't be compared or replaced.
        assert found["moe_runner_backend"] == found["fp8_gemm_runner_backend"] == "triton", name
        assert (found["weight_cache_mode"], found["speculative_algorithm"]) == ("off", None), name
        assert found["dtype"] == "bfloat16" and found["kv_cache_dtype"] in ("auto", "bfloat16"), name
        assert found["load_format"] == ("dummy" if is_fp8 else "auto"), name
        assert found["skip_tokenizer_init"] and found["skip_server_warmup"], name
        assert found["enable_memory_saver"] == (len(name.split()) == 3), name
        if len(name.split()) == 3:
            assert found["tp_size"] == int(name.split()[2])


def test_without_our_flag_a_blackwell_server_would_permute_the_experts(judged: tuple[int, dict[str, Any]]) -> None:
    major, answers = judged
    theirs = answers["SGLang's choice of MoE kernels"]
    if major == HOPPER:
        assert theirs["ranks"] == answers["moe bf16 1"]["ranks"]
        return
    assert theirs["resolved"]["moe_runner_backend"] == "flashinfer_trtllm"
    assert "error" in theirs or theirs["ranks"] != answers["moe bf16 1"]["ranks"]


def test_deepgemm_keeps_the_weights_on_hopper_and_rounds_them_again_on_blackwell(
    judged: tuple[int, dict[str, Any]],
) -> None:
    major, answers = judged
    if major == HOPPER:
        assert answers["DeepGEMM"]["ranks"] == answers["dense fp8-block128 1"]["ranks"]
    else:
        assert "requant_weight_ue8m0" in answers["DeepGEMM"]["traceback"]


def test_every_name_of_a_flag_that_is_ours_is_refused(judged: tuple[int, dict[str, Any]]) -> None:
    flags = judged[1]["flags"]
    ours = _OWNED_FLAGS.keys() | _UNUSABLE_FLAGS.keys()
    assert not [name for name in ours if f"--{name}" not in flags]
    targets = {flags[f"--{name}"] for name in ours}
    aliases = {option.removeprefix("--") for option, target in flags.items() if target in targets}
    assert aliases == ours
    # A beginning of one of these names is refused, too: it must not be another flag.
    assert not [
        name for name in flags if name.removeprefix("--") not in ours and _whole_name(name.removeprefix("--")) in ours
    ]


def test_a_server_releases_all_that_sglang_can_release(judged: tuple[int, dict[str, Any]]) -> None:
    assert sorted((_WEIGHTS, *_CACHE)) == sorted(judged[1]["memory"])

"""The stages of `doctor --accept` in their CPU form, by the command itself: what each proves is in its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SGLANG = ROOT / ".venv-sglang" / "bin" / "python"


def accept(
    directory: Path, *stages: str, device: str = "cpu", num_devices: int = 2, folders: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The report's stages, after the command passed. `folders` come first on every process's path."""
    command = [sys.executable, "-m", "drpo_megatron.cli", "doctor", "--accept", "--stages", ",".join(stages)]
    command += ["--device", device, "--size", "tiny", "--num-devices", str(num_devices), "--sglang-python", str(SGLANG)]
    command += ["--run-dir", str(directory / "runs"), "--patience", "4"]
    paths = [*map(str, folders), str(ROOT), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((directory / "gpu-report.json").read_text())["stages"]
    assert list(found) == list(stages)
    text = (directory / "gpu-report.md").read_text()
    assert all(f"\n## {stage}\n" in text for stage in stages)
    return found


def statuses(stage: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in stage["checks"]}


def test_kernel_layouts_recipes_and_throughput(tmp_path: Path) -> None:
    found = accept(tmp_path, "loss", "layouts", "recipes", "throughput")
    loss = statuses(found["loss"])
    for tp in ("tp1", "tp2"):
        assert loss[f"{tp}, ours: gradients in float32"] == loss[f"{tp}, ours: gradients in bfloat16"] == "pass"
        assert loss[f"{tp}: log-probs"] == "pass"
        assert {f"{tp}_{name}_ms" for name in ("plain", "megatron", "ours")} <= found["loss"]["figures"].keys()
    assert loss["tp2, liger"] == "skipped"

    layouts = statuses(found["layouts"])
    passed = {name.partition(",")[0] for name, status in layouts.items() if status == "pass"}
    assert passed == {"one rank", "dp2", "tp2", "ep2", "tp2 ep2", "etp2", "pp2", "pp2 vpp2", "cp2"}
    assert layouts["tp2 pp2 ep2"] == "skipped"

    recipes = found["recipes"]
    emulated = {name for name, status in statuses(recipes).items() if status == "pass"}
    assert "fp8-blockwise: training step, emulated" in emulated
    assert sum(name.endswith("emulation, from the exact product") for name in emulated) == len(emulated) - 1 == 7
    reasons = {check["found"] for check in recipes["checks"] if check["status"] == "skipped"}
    assert reasons == {"there is no CUDA device", "Transformer Engine has no such recipe"}

    figures = found["throughput"]["figures"]
    assert figures["trainer_tokens_per_s"] > 0 and figures["bare_megatron_tokens_per_s"] > 0


def test_a_layout_that_breaks_fails_by_name_and_the_others_are_run(tmp_path: Path) -> None:
    """More ranks than the model's experts can be shared out to: the ranks of that layout raise."""
    import torch

    from drpo_megatron.doctor.accept import layouts
    from drpo_megatron.doctor.accept.models import random_samples, save_model, small_moe, step_by_transformers
    from drpo_megatron.doctor.accept.stage import Results, Settings

    settings = Settings("cpu", 1, "tiny", str(tmp_path), "no-sglang", str(tmp_path / "runs"))
    config = small_moe(tiny=True)
    hf_path = save_model(tmp_path / "model", config)
    exact = step_by_transformers(hf_path, random_samples(12, config.vocab_size, 12, 16), 16, torch.float64)
    shifted = type(exact)(exact.loss, exact.grad_norm * 1.01, exact.logprobs, exact.gradients)
    variant = layouts.Variant("fp32", False, dict.fromkeys(exact.distances(exact), layouts.FP32_LIMIT))
    results = Results(tmp_path / "results.json")
    broken = {"num_ranks": 1, "pipeline": 3}
    layouts._compare(settings, results, variant, 1, {"broken": broken, "whole": {"num_ranks": 1}}, hf_path, shifted)
    first, second = results.checks
    assert (first.name, first.status) == (
        "broken, fp32, Megatron's layers",
        "fail",
    ) and "no step came out" in first.found
    assert second.status == "fail" and "too far from float64 in gradient norm:" in second.found


def pretended(directory: Path, *stages: str, num_devices: int) -> dict[str, Any]:
    """With `--device gpu`: every tensor of a rank says cuda, and what a GPU would refuse is an error."""
    if not (ROOT / "tests" / "pretended_gpu").is_dir():
        pytest.skip("tests/pretended_gpu is not there")
    folder = Path(__file__).parent / "pretended"
    found = accept(directory, *stages, device="gpu", num_devices=num_devices, folders=(folder,))
    assert "Pretended H100" in (directory / "gpu-report.md").read_text()
    return found


def test_the_code_of_two_gpus_runs_on_pretended_ones(tmp_path: Path) -> None:
    found = pretended(tmp_path, "collectives", "loss", "layouts", "recipes", "throughput", num_devices=2)
    loss = statuses(found["loss"])
    assert loss["tp1, ours: gradients in bfloat16"] == loss["tp2, ours: gradients in bfloat16"] == "pass"
    layouts = statuses(found["layouts"])
    for name in ("one rank", "dp2", "tp2", "ep2", "tp2 ep2", "etp2", "pp2", "pp2 vpp2", "cp2"):
        assert layouts[f"{name}, fp32, Megatron's layers"] == layouts[f"{name}, bf16, Megatron's layers"] == "pass"


@pytest.mark.skipif(not SGLANG.exists(), reason="SGLang's environment is not there; `make sglang-cpu` sets it up")
def test_a_server_of_sglang_and_a_whole_run(tmp_path: Path) -> None:
    found = accept(tmp_path, "sglang", "quickstart", num_devices=1)
    server = statuses(found["sglang"])
    for what in ("disk", "tensor", "broadcast-gloo", "memory released and resumed"):
        assert server[f"fp32: {what}: log-probs, from transformers'"] == "pass"
    assert server["fp8"] == server["fp32: broadcast-nccl"] == "skipped"
    assert statuses(found["quickstart"]) == {"fp8, emulated": "pass"}

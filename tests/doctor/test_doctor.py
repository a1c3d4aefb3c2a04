"""`drpo-megatron doctor`: this machine for real, other machines from what their tools print."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from drpo_megatron.cli import main
from drpo_megatron.doctor import gpus, machine, software
from drpo_megatron.doctor.finding import Finding, examine
from drpo_megatron.doctor.nodes import Report, odd_ones, read_reports

ROOT = Path(__file__).parents[2]
DOCTOR = [sys.executable, "-m", "drpo_megatron.cli", "doctor"]


def doctor(*arguments: str, python_path: str = "") -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{python_path}"}
    done = subprocess.run([*DOCTOR, *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_two_real_reports_are_compared_and_the_odd_things_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with the other apex, a run directory of its own and no SGLang; all three are said, and nothing else."""
    (tmp_path / "site" / "apex").mkdir(parents=True)
    (tmp_path / "site" / "apex" / "__init__.py").write_text("")
    good = ["--json", "--run-dir", str(tmp_path / "runs"), "--sglang-python", sys.executable]
    bad = ["--json", "--run-dir", str(tmp_path / "other"), "--sglang-python", "nowhere/python"]
    code, first, error = doctor(*good)
    code_of_bad, second, error_of_bad = doctor(*bad, python_path=str(tmp_path / "site"))
    # The interpreter given for SGLang's has none of it.
    assert code == 1 and error.startswith("error: 1 line(s) failed") and error.strip().endswith(": sglang")
    assert code_of_bad == 1 and error_of_bad.strip().endswith(": apex")

    monkeypatch.setattr("sys.stdin", io.StringIO(f"srun: job 7 queued\n{first}1: {second}"))
    assert main(["doctor", "--compare", "-"]) == 1
    error = capsys.readouterr().err
    node = json.loads(first)["node"]
    lines = error.strip().splitlines()
    assert lines[0] == "error: 2 nodes, and they are not fit to run together:"
    failed = [line for line in lines[1:] if " fails on " in line]
    differ = [line.split(" is ")[0] for line in lines[1:] if line not in failed]
    assert differ == ["apex", "run directory", "sglang"]
    assert any(f"apex fails on {node}#1" in line and "pip uninstall apex" in line for line in failed)

    (tmp_path / "reports.jsonl").write_text(second.replace('"fail"', '"ok"') * 3)
    assert main(["doctor", "--compare", str(tmp_path / "reports.jsonl")]) == 0
    assert capsys.readouterr().out == "3 nodes are alike, and nothing failed\n"


def test_this_machine_trains_on_its_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--run-dir", str(tmp_path), "--sglang-python", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    for text in (
        "ok    requirements",
        "ok    cpu platform",
        "warn  sglang",
        "-> make sglang-cpu",
        "ok    run directory",
    ):
        assert text in out, out


NVIDIA_SMI = """#!/bin/sh
[ "$1" = --list-gpus ] && echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000)"
"""


def put_on_path(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "nvidia-smi").write_text(script)
    (directory / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_public_torch_on_a_machine_without_a_gpu_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_on_path(tmp_path / "broken", monkeypatch, "#!/bin/sh\nexit 9\n")  # Its driver isn't loaded.
    found = by_name(list(software.check_torch()))
    assert found["cuda"] == Finding("cuda", "ok", "no device", detail="this machine has no GPU: trains on gloo ranks")
    assert found["cpu platform"].status == "ok"

    put_on_path(tmp_path / "driver", monkeypatch, NVIDIA_SMI)
    found = by_name(list(software.check_torch()))
    assert found["cuda"].status == "fail" and "trainer.backend=cpu" in found["cuda"].advice
    assert "cpu platform" not in found

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = by_name(list(software.check_torch()))
    assert (found["cuda"].status, found["cpu platform"].status) == ("ok", "ok")


def test_transformer_engine_counts_when_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata alone, which is what a wheel without its torch extension leaves, are not enough."""
    (tmp_path / "transformer_engine-2.20.2.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n"
    (tmp_path / "transformer_engine-2.20.2.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = software.check_transformer_engine()
    assert finding.status == ("fail" if torch.cuda.is_available() else "warn")
    assert finding.found.startswith("2.20.2, which does not import: ModuleNotFoundError")
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("")
    assert list(software.check_transformer_engine()) == [Finding("transformer engine", "ok", "2.20.2")]


def test_environments_whose_nccl_differs_share_no_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.status for f in software.check_communicators("2.30.7", "2.30.7")] == ["ok"]
    assert list(software.check_communicators(None, "2.30.7")) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    [finding] = software.check_communicators("2.29.7", "2.30.7")
    assert finding.status == "warn"
    assert finding.found == "trainer 2.29.7, SGLang 2.30.7" and "sync=broadcast" in finding.advice


def test_one_report_can_not_be_compared() -> None:
    with pytest.raises(ValueError, match=r"1 report\(s\) of nodes were given, and comparing takes 2"):
        read_reports([Report("a", ()).to_json(), "no JSON", '{"of": "something else"}'])


def test_of_four_nodes_the_odd_one_is_named() -> None:
    reports = [Report(f"n{i}", (Finding("torch", "ok", "2.13.0" if i != 2 else "2.12.1"),)) for i in range(4)]
    assert odd_ones(reports) == ["torch is 2.12.1 on n2, but 2.13.0 on the other 3"]


def test_nvidias_apex_is_told_from_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    [other] = software.check_apex()
    (tmp_path / "amp_C.py").write_text("")
    [nvidias] = software.check_apex()
    assert (other.status, nvidias.status) == ("fail", "ok")


GPUS = """\
NVIDIA H100 80GB HBM3, 81559, 4, 570.86.10, 0, Disabled
NVIDIA H100 80GB HBM3, 81559, 70211, 570.86.10, 2, Disabled
"""
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-47
GPU1\tNV18\t X \tPIX\t0-47
NIC0\tSYS\tPIX\t X \t

Legend:
"""


def test_gpus_that_are_busy_or_broken_are_named() -> None:
    found = by_name(list(gpus.read_gpus(GPUS)))
    assert found["gpus"] == Finding("gpus", "ok", "2 x NVIDIA H100 80GB HBM3 80 GiB")
    assert found["gpu memory"].found == "in use on GPU 1 (70211 MiB)"
    assert (found["gpu ecc"].status, found["gpu ecc"].found) == ("fail", "uncorrected errors on GPU 1 (2)")
    mixed = GPUS.splitlines()[0] + "\nNVIDIA A100-SXM4-80GB, 81920, 0, 570.86.10, [N/A], Enabled"
    found = by_name(list(gpus.read_gpus(mixed)))
    assert (found["gpus"].status, found["mig"].found) == ("warn", "enabled on GPU 1")
    assert "gpu ecc" not in found


def test_links_are_those_between_gpus_not_to_network_cards() -> None:
    [nvlink] = gpus.read_topology(TOPOLOGY)
    assert (nvlink.status, nvlink.found) == ("ok", "NV18")
    [mixed] = gpus.read_topology(TOPOLOGY.replace("GPU0\t X \tNV18", "GPU0\t X \tPHB"))
    assert (mixed.status, mixed.found) == ("warn", "NV18, PHB")


def test_network_ports_that_are_down_are_named() -> None:
    up = ("4: ACTIVE", "400 Gb/sec (4X NDR)")
    assert [f.found for f in gpus.read_ports({"mlx5_0/1": up, "mlx5_1/1": up})] == ["2 x 400 Gb/sec (4X NDR)"]
    [down] = gpus.read_ports({"mlx5_0/1": up, "mlx5_1/1": ("1: DOWN", "10 Gb/sec (1X SDR)")})
    assert (down.status, down.detail) == ("warn", "mlx5_1/1 (DOWN)")


def test_nodes_that_share_a_directory_read_one_identity(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: next(machine.check_run_directory(tmp_path)).found, range(16)))
    assert len(set(seen)) == 1
    assert next(machine.check_run_directory(tmp_path / "other")).found not in seen
    assert {path.name for path in tmp_path.iterdir()} == {".drpo-megatron-directory", "other"}


def test_a_run_directory_that_can_not_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [finding] = machine.check_run_directory(tmp_path / "file" / "runs")
    assert finding.status == "fail" and "run.output_dir" in finding.advice


def test_a_check_that_raises_is_a_failed_line() -> None:
    def broken() -> list[Finding]:
        raise OSError("no /proc here")

    assert [(f.name, f.status, f.found) for f in examine({"limits": broken})] == [
        ("limits", "fail", "OSError: no /proc here")
    ]

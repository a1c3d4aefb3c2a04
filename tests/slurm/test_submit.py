"""`slurm submit` without Slurm: the script, what is refused before anything is written, and what nodes say of each other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.cli import main
from drpo_megatron.config import load_config
from drpo_megatron.orchestration.run_directory import RunDirectory
from drpo_megatron.slurm.environment import compare, differences
from drpo_megatron.slurm.files import check_shared, mount_of, read_mounts
from drpo_megatron.slurm.layout import Nodes
from drpo_megatron.slurm.ray_node import address_of
from drpo_megatron.slurm.script import Job, sbatch_script
from tests.orchestration import command

EXAMPLE = Job(
    name="my-run",
    nodes=Nodes(count=8, gpus_each=8),
    run_dir="/shared/runs/my-run",
    working_dir="/shared/drpo_megatron",
    program=(".venv/bin/drpo-megatron",),
    time="24:00:00",
    partition="gpu",
    account="my-account",
)
_NO_SPLIT = ["parallel.sequence=false", "parallel.expert=1"]
MOUNTS = """\
24 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw
25 24 0:22 / /proc rw,nosuid - proc proc rw
30 24 0:30 / /shared/home\\040dirs rw - nfs4 10.0.0.1:/home rw
31 24 0:31 / /scratch rw shared:5 - lustre 10.0.0.2@tcp:/fs1 rw
32 31 0:32 / /scratch/local rw - xfs /dev/nvme0n1 rw
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parallel = {"num_ranks": 4, "tensor": 2, "sequence": True, "expert": 2}
    return command.prepare(tmp_path_factory.mktemp("submit"), parallel=parallel)


@pytest.fixture
def recipe(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared.parent)
    return prepared


def outcome(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of `slurm submit`."""
    code = main(["slurm", "submit", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_shipped_script_is_what_submit_writes() -> None:
    shipped = command.ROOT / "slurm" / "train.sbatch"
    assert shipped.read_text(encoding="utf-8") == sbatch_script(EXAMPLE)
    subprocess.run(["bash", "-n", str(shipped)], check=True)


def test_a_dry_run_prints_the_script_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(recipe.parent.iterdir())
    asked = ["--time", "1:00:00", "--partition", "long", "--account", "me", "--container", "image.sqsh"]
    code, script, _ = outcome(capsys, recipe, "--nodes", 2, "--assume-shared", "--dry-run", *asked)
    assert code == 0 and sorted(recipe.parent.iterdir()) == before
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --nodes=2", "#SBATCH --time=1:00:00", "#SBATCH --partition=long", "#SBATCH --account=me"} < set(
        lines
    )
    assert f"RUN={recipe.parent}/run" in lines and not any("gpus" in line for line in lines)
    [container] = [line for line in lines if line.startswith("CONTAINER=")]
    assert "--container-image=image.sqsh" in container and f"{recipe.parent}:{recipe.parent}" in container
    assert "DRPO=(python3 -m drpo_megatron.cli)" in lines  # The image's own.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", 3], "parallel.num_ranks=4 can't be shared evenly by --nodes 3; use 1, 2, 4 nodes"),
        (["--nodes", 2, "trainer.backend=gpu", "--gpus-per-node", 0], "trainer.backend=gpu; ask for GPUs"),
        (["--nodes", 1, "trainer.backend=gpu", "--gpus-per-node", 4], "--nodes 1 --gpus-per-node 4: "),
        (["--nodes", 1, "trainer.backend=gpu", "--gpus-per-node", 5, "--gpu-memory", "2GB"], "of a GPU's 2"),
        (["--nodes", 2, "parallel.expert=3"], "not divisible by"),
        (["--nodes", 2], "is on "),
        (["--nodes", 1], "sbatch is not on the PATH"),
    ],
    ids=["nodes", "no gpus", "gpus", "memory", "config", "file system", "sbatch"],
)
def test_bad_input_is_refused_before_anything_is_written(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[Any],
    said: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    before = sorted(recipe.parent.iterdir())
    code, out, error = outcome(capsys, recipe, *arguments)
    assert code == 2 and out == "" and said in error
    assert sorted(recipe.parent.iterdir()) == before


def test_a_run_may_continue_in_another_layout_but_not_as_another_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(load_config(recipe, [f"run.run_dir={tmp_path}/run"]))
    resumed = ["--resume", run.path, "--assume-shared", "--dry-run"]
    code, out, _ = outcome(capsys, *resumed, "--nodes", 1, "parallel.num_ranks=1", "parallel.tensor=1", *_NO_SPLIT)
    assert code == 0 and f"RUN={run.path}" in out
    code, _, error = outcome(capsys, *resumed, "--nodes", 2, "objective=grpo")
    assert code == 2 and f"{run.path} can't be resumed with objective" in error
    code, _, error = outcome(capsys, *resumed, "--nodes", 2, "parallel.pipeline=4")
    assert code == 2 and "not divisible by" in error


def test_paths_are_on_the_innermost_mount() -> None:
    mounts = read_mounts(MOUNTS)
    points = {path: str(mount_of(Path(path), mounts).point) for path in ("/x", "/scratch/a", "/scratch/local/b")}
    assert points == {"/x": "/", "/scratch/a": "/scratch", "/scratch/local/b": "/scratch/local"}
    assert mount_of(Path("/shared/home dirs/me"), mounts).source == "10.0.0.1:/home"
    check_shared(Path("/scratch/runs"), mounts)
    with pytest.raises(ValueError, match=r"on xfs \(/dev/nvme0n1 mounted on /scratch/local.*/scratch \(lustre\)"):
        check_shared(Path("/scratch/local/runs"), mounts)


def test_the_odd_node_out_is_named(tmp_path: Path) -> None:
    usual = {"torch": "2.9.0", "GPUs": "8 x H100"}
    assert differences({"a": usual, "b": usual}) == []
    reports = {"a": usual, "b": usual | {"torch": "2.8.0"}, "c": usual}
    [odd] = differences(reports)
    assert odd == "torch is 2.8.0 on b, but 2.9.0 on the other 2"
    (tmp_path / "reports").mkdir()
    for node, report in reports.items():
        (tmp_path / "reports" / f"{node}.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="nodes differ: torch is 2.8.0 on b"):
        compare(tmp_path, num_nodes=3, timeout_s=60)
    with pytest.raises(ValueError, match="3 of 4 nodes reported within 0 s: a, b, c"):
        compare(tmp_path, num_nodes=4, timeout_s=0)


def test_addresses_are_slurms(tmp_path: Path) -> None:
    nodes = "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.2 OS=Linux 6.1\nNodeName=n2 NodeAddr=127.0.0.3\n"
    (tmp_path / "nodes").write_text(nodes)
    assert [address_of(tmp_path, node) for node in ("n1", "n2")] == ["127.0.0.2", "127.0.0.3"]
    with pytest.raises(ValueError, match="doesn't list this node, n3"):
        address_of(tmp_path, "n3")

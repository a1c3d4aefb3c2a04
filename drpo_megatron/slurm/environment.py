"""Run by the job on every node before any rank: the same packages and GPUs everywhere, and the same files in sight.

Each node writes what it found to `reports/<node>.json` in the directory of the job's start; the first node waits for all
of them and compares.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from drpo_megatron.config import Config, load_resolved
from drpo_megatron.files import write_text
from drpo_megatron.orchestration.run_directory import RunDirectory, versions
from drpo_megatron.reading import read_json_as

_REPORTS = "reports"
_IMPORTED = ("drpo_megatron.orchestration.run", "megatron.core")
"""What the driver and the ranks start with: a package that is installed but broken shows here."""


def look(job_dir: Path, node: str) -> None:
    """Report what this node has. ValueError that names the node when it can't take part in the run.

    Args:
        job_dir: RUN_DIR/slurm/<job>.<start>, made by the job's script on its first node.
    """
    if not (job_dir / "nodes").is_file():
        raise ValueError(
            f"node {node} doesn't see {job_dir}, which the first node of the job has just made: the run directory is "
            f"not on a file system that all nodes share; set run.output_dir to one"
        )
    config = load_resolved(RunDirectory(job_dir.parents[1]).config_file)
    if missing := [f"{key} = {path}" for key, path in _needed(config).items() if not path.exists()]:
        raise ValueError(f"node {node} doesn't see {', '.join(missing)}; put it where all nodes see it")
    warnings.simplefilter("ignore")  # Every rank says it again, in its own log.
    for module in _IMPORTED:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"node {node} can't import {module} with {sys.executable}: {error}") from error
    report = job_dir / _REPORTS / f"{node}.json"
    report.parent.mkdir(exist_ok=True)
    write_text(report, json.dumps(versions() | _hardware()))


def compare(job_dir: Path, num_nodes: int, timeout_s: float) -> None:
    """Wait for the reports of all nodes. ValueError names the odd ones out, with what they and the others have."""
    deadline = time.monotonic() + timeout_s
    while len(found := sorted((job_dir / _REPORTS).glob("*.json"))) < num_nodes:
        if time.monotonic() > deadline:
            names = ", ".join(path.stem for path in found)
            raise ValueError(f"{len(found)} of {num_nodes} nodes reported within {timeout_s:g} s: {names}")
        time.sleep(0.5)
    if odd := differences({path.stem: read_json_as(path, dict[str, str]) for path in found}):
        raise ValueError(f"nodes differ: {'; '.join(odd)}; install the same everywhere")


def differences(reports: dict[str, dict[str, str]]) -> list[str]:
    """For each thing that isn't the same everywhere: what most nodes have, and who has something else."""
    odd = []
    for key in sorted({key for report in reports.values() for key in report}):
        values = {node: report.get(key, "missing") for node, report in reports.items()}
        [(usual, count)] = Counter(values.values()).most_common(1)
        if others := [f"{value} on {node}" for node, value in values.items() if value != usual]:
            odd.append(f"{key} is {', '.join(others)}, but {usual} on the other {count}")
    return odd


def _needed(config: Config) -> dict[str, Path]:
    """What ranks and engines read. The data is read by the driver, on the first node, which says itself what it lacks."""
    paths = {"model.hf_path": config.model.hf_path, "model.megatron_path": config.model.megatron_path}
    return {key: Path(path) for key, path in paths.items() if path is not None}


def _hardware() -> dict[str, str]:
    import torch

    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    gpus = ", ".join(f"{count} x {name}" for name, count in sorted(names.items()))
    return {"CUDA": str(torch.version.cuda), "GPUs": gpus or "none"}

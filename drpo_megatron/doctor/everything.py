"""All that the doctor looks at on this machine, in the order of its report."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from drpo_megatron.doctor import gpus, machine, software
from drpo_megatron.doctor.finding import Finding, examine


def examine_everything(run_dir: Path, sglang_python: Path) -> list[Finding]:
    return examine(
        {
            "requirements": software.check_requirements,
            "torch": software.check_torch,
            "transformer engine": software.check_transformer_engine,
            "apex": software.check_apex,
            "sglang": partial(software.check_sglang, sglang_python),
            "gpus": gpus.check_gpus,
            "network": gpus.check_network,
            "run directory": partial(machine.check_run_directory, run_dir),
            "shared memory": machine.check_shared_memory,
            "ports": machine.check_ports,
            "limits": machine.check_limits,
        }
    )

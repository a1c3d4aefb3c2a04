"""Limits of comparisons hold on other processors, too: the tests with the tightest ones, run with other instructions.

torch, oneDNN and MKL choose their kernels, and with them the order of sums, by the processor. They can be told to choose
as on an older one.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SETTINGS: dict[str, dict[str, str]] = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL as on any x86-64": {"MKL_CBWR": "COMPATIBLE"},
}
"""By the name that torch has for the instructions, where it is told which. A processor that is not Intel's gets from MKL
what the third asks for."""
SELECTION = (
    "tests/loss/test_policy_loss.py",
    "tests/objectives",
    "tests/trainer/test_parity.py::test_one_process_steps_like_transformers",
    "--deselect=tests/loss/test_policy_loss.py::test_nothing_as_large_as_the_logits_is_ever_made",  # Counts bytes.
)
RUN = "import sys, torch, pytest; print(torch.backends.cpu.get_cpu_capability()); sys.exit(pytest.main(sys.argv[1:]))"


def why_not(setting: str) -> str | None:
    """Why this machine can't calculate like that."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the settings are of x86-64; this is {platform.machine()}"
    if setting == "AVX2" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "this processor has no AVX2"
    if "MKL_CBWR" in SETTINGS[setting] and not torch.backends.mkl.is_available():
        return "this torch was built without MKL"
    return None


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_limits_hold_with_the_instructions_of_other_processors(setting: str) -> None:
    if reason := why_not(setting):
        pytest.skip(reason)
    told = {name for settings in SETTINGS.values() for name in settings}
    env = {name: value for name, value in os.environ.items() if name not in told and not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "-q", "-p", "no:cacheprovider", *SELECTION],
        env={**env, "OMP_NUM_THREADS": "1", **SETTINGS[setting]},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    capability, *_, summary = done.stdout.splitlines()
    assert capability == setting or "ATEN_CPU_CAPABILITY" not in SETTINGS[setting]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) > 100, summary

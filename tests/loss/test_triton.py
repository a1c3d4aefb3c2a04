"""The Triton kernels against torch and the float64 reference, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_triton_kernels_agree_with_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed; torch does its work")
    done = subprocess.run(
        [sys.executable, "-m", "tests.loss.triton_check"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "triton kernels agree" in done.stdout

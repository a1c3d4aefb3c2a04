"""How a server is started: on the GPUs that it was given, ready to give their memory back if it shares them."""

from __future__ import annotations

import os
import subprocess
import sys

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_server import LAUNCHER, server_flags

_SHOW = "import os, runpy, sys; runpy.run_path(sys.argv.pop(1)); print(os.environ['CUDA_VISIBLE_DEVICES'])"


def test_a_server_sees_its_gpus_and_no_other() -> None:
    command = [sys.executable, "-c", _SHOW, str(LAUNCHER), str(os.getpid()), "cuda:2,3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "2,3\n"


def test_only_a_server_that_shares_gpus_saves_memory() -> None:
    section = SGLangEngineSection()
    flag = "--enable-memory-saver"
    assert flag in server_flags("model", section, "bfloat16", "cuda:0", releases_memory=True)
    assert flag not in server_flags("model", section, "bfloat16", "cuda:0")
    assert flag not in server_flags("model", section, "float32", "cpu", releases_memory=True)

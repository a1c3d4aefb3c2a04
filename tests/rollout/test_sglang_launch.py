"""How a server is started: on the GPUs that it was given, ready to give their memory back if it shares them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_server import LAUNCHER, answers, server_flags
from tests.orchestration.test_listening import is_loopback, listening
from tests.rollout.conftest import Served

_SHOW = "import os, runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__mp_main__'); print(os.environ.get({!r}))"
"""As a process that SGLang spawns runs it."""


def test_a_server_sees_its_gpus_and_no_other() -> None:
    command = [sys.executable, "-c", _SHOW.format("CUDA_VISIBLE_DEVICES"), str(LAUNCHER), str(os.getpid()), "cuda:2,3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "2,3\n"


def test_only_a_server_that_shares_gpus_saves_memory() -> None:
    section = SGLangEngineSection()
    flag = "--enable-memory-saver"
    assert flag in server_flags("model", section, "bfloat16", "cuda:0", releases_memory=True)
    assert flag not in server_flags("model", section, "bfloat16", "cuda:0")
    assert flag not in server_flags("model", section, "float32", "cpu", releases_memory=True)


def test_the_key_of_a_server_is_shown_nowhere_and_it_listens_on_loopback_only(sglang: Served) -> None:
    server = sglang.keepers[0].server
    key = server.endpoint.api_key
    assert server.process is not None
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    log = server.log_file.read_text()
    assert "'(not shown)'" in log  # SGLang does log its settings.
    for process in family:
        for of_process in ("cmdline", "environ"):
            assert key.encode() not in Path("/proc", str(process.pid), of_process).read_bytes()
    for file in server.log_file.parent.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes()
    assert answers(server.endpoint, "/server_info", 60.0)
    assert not answers(type(server.endpoint)(server.endpoint.url, "another key"), "/server_info", 60.0)
    found = listening(family)
    assert len(found) >= 2  # HTTP and the store of its ranks.
    assert {place: who for place, who in found.items() if not is_loopback(place.split()[0])} == {}


def test_cuda_graphs_take_part_in_the_release_of_memory() -> None:
    show = _SHOW.format("SGLANG_MEMORY_SAVER_CUDA_GRAPH")
    environment = {name: value for name, value in os.environ.items() if name != "SGLANG_MEMORY_SAVER_CUDA_GRAPH"}
    for flags, expected in ((["--enable-memory-saver"], "1\n"), ([], "None\n")):
        command = [sys.executable, "-c", show, str(LAUNCHER), str(os.getpid()), "cuda:0", *flags]
        assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == expected


def test_kernels_that_leave_weights_alone_are_the_default_and_the_users_flag_wins() -> None:
    def value(flag: str, device: str, **flags: str) -> str | None:
        words = server_flags("model", SGLangEngineSection(flags=flags), "bfloat16", device)
        return words[words.index(flag) + 1] if flag in words else None

    assert value("--moe-runner-backend", "cuda:0") == value("--fp8-gemm-backend", "cuda:0") == "triton"
    assert value("--fp8-gemm-backend", "cuda:0", **{"fp8-gemm-backend": "deep_gemm"}) == "deep_gemm"
    assert value("--moe-runner-backend", "cpu") is None

"""One SGLang server as a process of ours: started, watched, started again, and never left behind.

    ServerKeeper (a thread) --starts--> sglang_launch.py (own session) --spawns--> scheduler, detokenizer
         |  every few seconds: is the process there, does /health or /server_info answer?
         '--> dead or silent: kill what is left, wait (1, 2, 4, ... s), start again on the same port

A restarted server holds the weights it was launched with. It doesn't know the label of the published ones, so nobody
takes a sample from it until the next publication (see sglang_sync.py).
"""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.reading import read_json_object

LAUNCHER = Path(__file__).with_name("sglang_launch.py")
_LOG_LINES = 15
_STEADY_S = 60.0
"""A server that was up this long starts again without waiting, and its restarts count from 0."""
_MAX_BACK_OFF_S = 60.0

_CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-overlap-schedule", "--grammar-backend", "none"),
    "--sleep-on-idle",  # An idle scheduler would keep a core busy.
)

_CPU_DEFAULTS = {"max-total-tokens": 32768}
"""Tokens of KV cache. By default it takes most of the machine's memory, which the trainer needs, too."""

_GPU_DEFAULTS = {
    # On Blackwell SGLang would take flashinfer_trtllm, which permutes the experts' weights and hashes them so.
    "moe-runner-backend": "triton",
    # On Blackwell it would take DeepGEMM, which rounds block-FP8 weights again, to scales that are powers of two, into
    # other shapes: a second update finds no room for the scales. On Hopper that isn't so; deep_gemm is faster there.
    "fp8-gemm-backend": "triton",
}
"""Kernels that leave weights as they were sent, whichever GPU it is."""


class ServerFailure(RuntimeError):
    """A server did not start, or died too often. The message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens, and the key it wants to see."""

    url: str
    api_key: str = field(repr=False)


def outside_endpoints(section: SGLangEngineSection) -> list[Endpoint]:
    """The servers that somebody else runs, with their key."""
    file = section.api_key_file
    key = Path(file).read_text(encoding="utf-8").split()[0] if file is not None else ""
    return [Endpoint(url.rstrip("/"), key) for url in section.servers]


def server_flags(
    model_path: str,
    section: SGLangEngineSection,
    dtype: str,
    device: str,
    routed_experts: bool = False,
    releases_memory: bool = False,
) -> list[str]:
    """SGLang's command line but address and key. `section.flags` comes last, so that it wins.

    routed_experts: the server will be asked for them. It then keeps them for every token in its cache.
    releases_memory: it will be asked to release its GPUs' memory. On a CPU it goes through the motions without the flag.
    """
    flags: dict[str, Any] = {
        **(_CPU_DEFAULTS if device == "cpu" else _GPU_DEFAULTS),
        "tp-size": section.tensor_parallel,
        "dp-size": section.data_parallel,
        "enable-return-routed-experts": routed_experts,
        "enable-memory-saver": releases_memory and device != "cpu",
        **section.flags,
    }
    words = ["--model-path", model_path, "--dtype", dtype, "--skip-server-warmup", "--skip-tokenizer-init"]
    words += _CPU_FLAGS if device == "cpu" else ()
    for name, value in flags.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def server_dtype(section: SGLangEngineSection, hf_path: str) -> str:
    """`float32` or `bfloat16`: of the server's weights, and so of what is sent to it. ValueError for another one."""
    if section.dtype != "auto":
        return section.dtype
    fields = read_json_object(Path(hf_path, "config.json"))
    found = fields.get("dtype") or fields.get("torch_dtype") or "float32"
    if found not in get_args(SGLangEngineSection.model_fields["dtype"].annotation):
        raise ValueError(f"{hf_path} is in {found}; set rollout.engine.dtype to float32 or bfloat16")
    return str(found)


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class SGLangServer:
    """The process. All methods belong to the thread that calls `start`: when that thread ends, the kernel ends it.

    device: `cpu`, or `cuda:4,5` for these GPUs of the machine.
    """

    def __init__(self, flags: Sequence[str], python: str, device: str, log_file: Path, host: str = "127.0.0.1") -> None:
        # Hexadecimal: a key that began with a dash would be taken for a flag.
        self.endpoint = Endpoint(f"http://{host}:{free_port(host)}", secrets.token_hex(24))
        self.flags, self.python, self.device, self.log_file, self.host = flags, python, device, log_file, host
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        return int(self.endpoint.url.rsplit(":", 1)[1])

    def start(self) -> None:
        """Launch it; `wait_until_ready` tells whether it came up."""
        command = [self.python, "-P", str(LAUNCHER), str(os.getpid()), self.device, *self.flags]
        command += ["--host", self.host, "--port", str(self.port)]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # It died at once; its exit says more.
            self.process.stdin.write(f"{self.endpoint.api_key}\n".encode())
            self.process.stdin.close()

    def wait_until_ready(self, timeout_s: float, stop: threading.Event | None = None) -> None:
        """Raises ServerFailure when the process ends, and when it isn't healthy within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy(timeout_s=5.0):
            if not self.is_running():
                assert self.process is not None
                raise ServerFailure(self.describe(f"ended with exit code {self.process.returncode} while it started"))
            if time.monotonic() > deadline:
                raise ServerFailure(self.describe(f"was not ready after {timeout_s:g} s"))
            if stop is not None and stop.wait(0.2):
                return
            time.sleep(0.3)

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def is_healthy(self, timeout_s: float) -> bool:
        """Whether it generates a token, or is busy with others' requests."""
        return self.is_running() and answers(self.endpoint, "/health", timeout_s)

    def is_alive(self, timeout_s: float) -> bool:
        """Healthy, or paused for new weights: then its scheduler answers, but no token comes."""
        return self.is_healthy(timeout_s) or (self.is_running() and answers(self.endpoint, "/server_info", timeout_s))

    def stop(self, patience_s: float = 10.0) -> None:
        """Ask it to end, then make it: the whole session, stopped processes included."""
        if self.process is None:
            return
        if patience_s and self.is_running():
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def describe(self, what: str) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(
            [f"SGLang server {self.endpoint.url} {what}", f"  log: {self.log_file}", *(f"  | {x}" for x in lines)]
        )


def answers(endpoint: Endpoint, path: str, timeout_s: float) -> bool:
    """Whether a GET of `path` gives a 200 within `timeout_s`."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {endpoint.api_key}"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class ServerKeeper:
    """Keeps one server up, from a thread of its own that lives as long as the server may.

    Raises nothing from the thread: `failure` says why it gave up.
    """

    def __init__(self, server: SGLangServer, section: SGLangEngineSection, startup_timeout_s: float) -> None:
        self.server, self.section, self.startup_timeout_s = server, section, startup_timeout_s
        self.num_restarts = 0
        self.failure: str | None = None
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._may_start = threading.Lock()
        """Held by who starts the server, and by who wants it not to start."""
        self._is_held = False
        self._thread = threading.Thread(target=self._run, name="server-keeper", daemon=True)

    def start(self) -> None:
        """Returns when the server is ready. Raises ServerFailure when its first start fails."""
        self._thread.start()
        self._ready.wait()
        if self.failure:
            raise ServerFailure(self.failure)

    def check(self) -> None:
        """Raises ServerFailure when the server is down for good."""
        if self.failure:
            raise ServerFailure(self.failure)

    def hold(self) -> None:
        """From now on a server that ended is not started again. Returns after a start that is underway; see `check`."""
        if not self._is_held:
            self._may_start.acquire()
            self._is_held = True
        self.check()

    def let_go(self) -> None:
        """Undo `hold`."""
        if self._is_held:
            self._is_held = False
            self._may_start.release()

    def close(self) -> None:
        self._stop.set()
        self.let_go()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        num_quick_deaths = 0
        try:
            while not self._stop.is_set():
                with self._may_start:
                    if self._stop.is_set():
                        return
                    self.server.start()
                    self.server.wait_until_ready(self.startup_timeout_s, self._stop)
                self._ready.set()
                started = time.monotonic()
                self._watch()
                if self._stop.is_set():
                    return
                self.server.stop(patience_s=0)
                self.num_restarts += 1
                num_quick_deaths = 0 if time.monotonic() - started > _STEADY_S else num_quick_deaths + 1
                if num_quick_deaths > self.section.max_restarts:
                    raise ServerFailure(self.server.describe(f"died {num_quick_deaths} times in a row"))
                self._stop.wait(min(_MAX_BACK_OFF_S, 2.0**num_quick_deaths / 2))
        except ServerFailure as failure:
            self.failure = str(failure)
        finally:
            self.server.stop(patience_s=10.0 if self._stop.is_set() else 0)
            self._ready.set()

    def _watch(self) -> None:
        """Returns when the process is gone, or silent for longer than `hang_timeout_s`."""
        last_answer = time.monotonic()
        while not self._stop.wait(0.2) and self.server.is_running():
            silent_s = time.monotonic() - last_answer
            if silent_s > self.section.hang_timeout_s:
                return
            if silent_s > self.section.health_interval_s and self.server.is_alive(self.section.health_interval_s):
                last_answer = time.monotonic()

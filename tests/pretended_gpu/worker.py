"""Long-lived ranks of one environment, and what runs in them.

    with Ranks(Environment("te", (folder, ...), engine=True)) as ranks:
        results = ranks.run(2, train_case, case)

Every rank is a process with the environment's folders first on its PYTHONPATH; it imports once, and joins a process group
of the team's size for every call.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Environment:
    name: str
    folders: tuple[Path, ...] = ()
    """Before everything else on PYTHONPATH."""
    gpu: bool = True
    """Pretended; else the CPU platform."""
    capability: tuple[int, int] = (9, 0)
    engine: bool = False
    """Transformer Engine, of one of the folders."""


class Ranks:
    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self._scratch = tempfile.TemporaryDirectory(prefix=f"pretended-{environment.name}-")
        self._calls = 0
        self._ranks: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.wait()
        self._scratch.cleanup()

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 600.0) -> list[Any]:
        """`function(rank, num_ranks, *args)` on so many ranks; what each returned.

        Raises: RuntimeError with the traceback of the first rank that failed; TimeoutError. New ranks take their place.
        """
        self._calls += 1
        self._ranks += [self._start(rank) for rank in range(len(self._ranks), num_ranks)]
        store = os.path.join(self._scratch.name, f"store-{self._calls}")
        for rank, (_, connection) in enumerate(self._ranks[:num_ranks]):
            connection.send_bytes(pickle.dumps((function, rank, num_ranks, store, args)))
        try:
            return self._collect(num_ranks, time.monotonic() + timeout_s)
        except (RuntimeError, TimeoutError):
            for rank in range(num_ranks):
                self._ranks[rank][0].kill()
                self._ranks[rank][0].wait()
                self._ranks[rank] = self._start(rank)
            raise

    def _collect(self, num_ranks: int, deadline: float) -> list[Any]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks[:num_ranks])}
        results: list[Any] = [None] * num_ranks
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {self.environment.name} took too long")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    is_error, results[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    is_error, results[rank] = True, f"ended by itself:\n{self._log(rank).read_text()[-3000:]}"
                if is_error:
                    raise RuntimeError(f"rank {rank} of {num_ranks}, {self.environment.name}: {results[rank]}")
        return results

    def _log(self, rank: int) -> Path:
        return Path(self._scratch.name, f"rank-{rank}.log")

    def _start(self, rank: int) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        paths = [*map(str, self.environment.folders), str(ROOT)]
        variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with open(self._log(rank), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=os.environ | variables,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(self.environment))
        process.stdin.close()
        theirs.close()
        return process, ours


def main() -> None:
    environment = pickle.load(sys.stdin.buffer)
    connection = Connection(int(sys.argv[1]))
    warnings.filterwarnings("ignore")
    _prepare(environment)
    with contextlib.suppress(EOFError):
        while True:
            function, rank, num_ranks, store, args = pickle.loads(connection.recv_bytes())
            try:
                answer = False, _call(environment, function, rank, num_ranks, store, args)
            except BaseException:
                answer = True, traceback.format_exc()
            connection.send_bytes(pickle.dumps(answer))  # Not send: torch would share memory by it.
            if answer[0]:
                return


def _prepare(environment: Environment) -> None:
    import torch

    from tests.gloo import share_device

    torch.set_num_threads(1)
    share_device()
    sys.modules["torchao"] = None  # type: ignore[assignment]  # transformers would load it, with its CUDA libraries.
    if not environment.engine:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    if environment.gpu:
        from tests.pretended_gpu import cuda, engine

        cuda.pretend(environment.capability)
        if environment.engine:
            engine.pretend()
    from drpo_megatron.trainer import platform

    platform.activate("gpu" if environment.gpu else "cpu")
    import drpo_megatron.trainer.forward
    import drpo_megatron.trainer.trainer
    import drpo_megatron.trainer.weights  # noqa: F401

    if environment.gpu:
        from tests.pretended_gpu import cuda, engine

        cuda.after_megatron()
        if environment.engine:
            engine.after_megatron()


def _call(environment: Environment, function: Any, rank: int, num_ranks: int, store: str, args: Any) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if environment.gpu else "gloo",
        store=dist.FileStore(store, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=500),
    )
    result = function(rank, num_ranks, environment, *args)
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()
    return result


if __name__ == "__main__":
    main()

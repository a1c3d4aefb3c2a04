"""What carries a bucket of weights to SGLang servers.

    disk          a safetensors file a bucket, loaded at the end      servers that share a file system
    distributed   one broadcast a bucket (sglang_broadcast.py)        any servers
    tensor        one block of shared memory a bucket                 servers on this machine

Each returns the servers that it could not reach, with the reason.
"""

from __future__ import annotations

import base64
import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.multiprocessing
from safetensors import SafetensorError
from safetensors.torch import save_file

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_client import LoopThread, ServerError, ServerLost, SGLangClient

Failed = dict[SGLangClient, BaseException]
NamedTensors = Sequence[tuple[str, torch.Tensor]]

FLATTENED = "flattened_bucket"


class SyncFailed(RuntimeError):
    """No server holds the new weights. The message has a line for each, or says why none could be sent."""


class BroadcastFailed(RuntimeError):
    """A broadcast to several servers broke off; none of them has the bucket for sure."""


class Transport(Protocol):
    def open(self, clients: Sequence[SGLangClient], some_are_new: bool) -> None:
        """Begin an update of `clients`; `some_are_new`: since the last update a server was started (again)."""
        ...

    def send(self, bucket: NamedTensors, clients: Sequence[SGLangClient]) -> Failed: ...

    def finish(self, clients: Sequence[SGLangClient]) -> Failed: ...

    def close(self) -> None: ...


class DiskTransport:
    """Files of one update in a directory of its own, gone when the servers have read them."""

    def __init__(self, section: SGLangEngineSection, loop: LoopThread, hf_path: Path) -> None:
        self.section, self.loop, self.hf_path = section, loop, hf_path
        self._directory: Path | None = None
        self._num_files = 0

    def open(self, clients: Sequence[SGLangClient], some_are_new: bool) -> None:
        """Raises SyncFailed, as `send` does, when the directory can't be written."""
        self.close()
        self._num_files = 0
        config = self.hf_path / "config.json"
        with self._writing(config.name, config.stat().st_size):
            self._directory = Path(tempfile.mkdtemp(prefix="weights-", dir=self.section.sync_dir))
            shutil.copy(config, self._directory)

    def send(self, bucket: NamedTensors, clients: Sequence[SGLangClient]) -> Failed:
        """Raises SyncFailed when the file can't be written; what was written of this update is removed then."""
        assert self._directory is not None
        name = f"model-{self._num_files:05d}.safetensors"
        with self._writing(name, sum(tensor.nbytes for _, tensor in bucket)):
            save_file(dict(bucket), self._directory / name)
        self._num_files += 1
        return {}

    @contextmanager
    def _writing(self, name: str, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            parent = Path(self.section.sync_dir or tempfile.gettempdir())
            free = shutil.disk_usage(parent).free
            self.close()
            raise SyncFailed(
                f"rollout.engine.sync=disk: {name} of {num_bytes:,} bytes could not be written to {parent}, with {free:,} "
                f"bytes free: {error}; make room, or set rollout.engine.sync_dir to a larger disk"
            ) from None

    def finish(self, clients: Sequence[SGLangClient]) -> Failed:
        try:
            return _post_everywhere(
                self.loop,
                clients,
                "/update_weights_from_disk",
                self.section.sync_timeout_s,
                model_path=str(self._directory),
            )
        finally:
            self.close()

    def close(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None


class TensorTransport:
    """A bucket as one flat tensor in shared memory; HTTP carries its name and the places of the tensors in it."""

    def __init__(self, section: SGLangEngineSection, loop: LoopThread) -> None:
        self.section, self.loop = section, loop

    def open(self, clients: Sequence[SGLangClient], some_are_new: bool) -> None:
        pass

    def send(self, bucket: NamedTensors, clients: Sequence[SGLangClient]) -> Failed:
        metadata, start = [], 0
        for name, tensor in bucket:
            # Built-in types only: SGLang unpickles no others.
            metadata.append(
                SimpleNamespace(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    start_idx=start,
                    end_idx=start + tensor.nbytes,
                    numel=tensor.nbytes,
                )
            )
            start += tensor.nbytes
        with _shared_by_file_system():
            content = {"flattened_tensor": flattened(bucket).share_memory_(), "metadata": metadata}
            buffer = io.BytesIO()
            ForkingPickler(buffer).dump(content)
        serialized = base64.b64encode(buffer.getvalue()).decode()
        return _post_everywhere(
            self.loop,
            clients,
            "/update_weights_from_tensor",
            self.section.sync_timeout_s,
            serialized_named_tensors=[serialized] * self.section.tensor_parallel,
            load_format=FLATTENED,
            flush_cache=False,
        )

    def finish(self, clients: Sequence[SGLangClient]) -> Failed:
        return {}

    def close(self) -> None:
        pass


def _post_everywhere(
    loop: LoopThread, clients: Sequence[SGLangClient], path: str, timeout_s: float, **fields: Any
) -> Failed:
    calls = [(client, loop.submit(client.call(path, timeout_s, **fields))) for client in clients]
    failed: Failed = {}
    for client, call in calls:
        try:
            call.result()
        except (ServerError, ServerLost) as error:
            failed[client] = error
    return failed


def flattened(bucket: NamedTensors) -> torch.Tensor:
    """All tensors' bytes end to end, [num_bytes] uint8."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])


@contextmanager
def _shared_by_file_system() -> Iterator[None]:
    """Shared memory by name: the default hands a file descriptor over, which kills a server that is no child of ours."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)

"""What carries a bucket of weights to SGLang servers.

    disk          a safetensors file a bucket, loaded at the end      servers that share a file system
    distributed   one broadcast a bucket over a process group         any servers; rank 0 is this process
    tensor        one block of shared memory a bucket                 servers on this machine

Each returns the servers that it could not reach, with the reason.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import SafetensorError
from safetensors.torch import save_file

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_client import LoopThread, ServerError, ServerLost, SGLangClient

Failed = dict[SGLangClient, BaseException]
NamedTensors = Sequence[tuple[str, torch.Tensor]]

_FLATTENED = "flattened_bucket"


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


def make_transport(section: SGLangEngineSection, loop: LoopThread, hf_path: Path) -> Transport:
    if section.sync == "disk":
        return DiskTransport(section, loop, hf_path)
    if section.sync == "tensor":
        return TensorTransport(section, loop)
    return NCCLBroadcastTransport(section, loop) if section.uses_nccl else BroadcastTransport(section, loop)


class DiskTransport:
    """Files of one update in a directory of its own, gone when the servers have read them."""

    def __init__(self, section: SGLangEngineSection, loop: LoopThread, hf_path: Path) -> None:
        self.section, self.loop, self.hf_path = section, loop, hf_path
        self._directory: Path | None = None
        self._num_files = 0

    def open(self, clients: Sequence[SGLangClient], some_are_new: bool) -> None:
        self.close()
        self._directory = Path(tempfile.mkdtemp(prefix="weights-", dir=self.section.sync_dir))
        self._num_files = 0
        shutil.copy(self.hf_path / "config.json", self._directory)

    def send(self, bucket: NamedTensors, clients: Sequence[SGLangClient]) -> Failed:
        """Raises SyncFailed when the file can't be written; what was written of this update is removed then."""
        assert self._directory is not None
        file = self._directory / f"model-{self._num_files:05d}.safetensors"
        try:
            save_file(dict(bucket), file)
        except (OSError, SafetensorError) as error:
            num_bytes, free = sum(tensor.nbytes for _, tensor in bucket), shutil.disk_usage(self._directory).free
            self.close()
            raise SyncFailed(
                f"rollout.engine.sync=disk: {file} of {num_bytes:,} bytes could not be written, with {free:,} bytes free: "
                f"{error}; make room, or set rollout.engine.sync_dir to a larger disk"
            ) from None
        self._num_files += 1
        return {}

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
            content = {"flattened_tensor": _flat(bucket).share_memory_(), "metadata": metadata}
            buffer = io.BytesIO()
            ForkingPickler(buffer).dump(content)
        serialized = base64.b64encode(buffer.getvalue()).decode()
        return _post_everywhere(
            self.loop,
            clients,
            "/update_weights_from_tensor",
            self.section.sync_timeout_s,
            serialized_named_tensors=[serialized] * self.section.tensor_parallel,
            load_format=_FLATTENED,
            flush_cache=False,
        )

    def finish(self, clients: Sequence[SGLangClient]) -> Failed:
        return {}

    def close(self) -> None:
        pass


class BroadcastTransport:
    """A process group of this process and all ranks of the servers, made anew when the servers change.

    By gloo, from this process's memory. `_prefix`: what the servers' torch puts before the keys of such a group.
    """

    _backend, _prefix = "gloo", "cpu/"

    def __init__(self, section: SGLangEngineSection, loop: LoopThread) -> None:
        self.section, self.loop = section, loop
        self._group: Any = None
        self._store: Any = None
        self._name = ""
        self._members: list[SGLangClient] = []

    def open(self, clients: Sequence[SGLangClient], some_are_new: bool) -> None:
        """Raises BroadcastFailed when a server does not come into the group."""
        if self._group is not None and list(clients) == self._members and not some_are_new:
            return
        self.close()
        ranks_each = self.section.gpus_a_server
        world_size = 1 + ranks_each * len(clients)
        host = _own_address(clients[0])
        patience = timedelta(seconds=self.section.sync_timeout_s)
        name = f"weights-{uuid.uuid4().hex}"
        self._store = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False, timeout=patience)
        joining = [
            self.loop.submit(
                client.call(
                    "/init_weights_update_group",
                    self.section.sync_timeout_s,
                    master_address=host,
                    master_port=self._store.port,
                    rank_offset=1 + ranks_each * index,
                    world_size=world_size,
                    group_name=name,
                    backend=self._backend,
                )
            )
            for index, client in enumerate(clients)
        ]
        store = dist.PrefixStore(self._prefix, dist.PrefixStore(f"{name}/", dist.PrefixStore(name, self._store)))
        self._name, self._members = name, list(clients)
        try:
            self._group = self._join(store, world_size, host, patience)
            for reply in joining:
                reply.result()
        except RuntimeError as error:
            self.close()
            raise BroadcastFailed(f"the servers and this process did not come together: {error}") from None

    def send(self, bucket: NamedTensors, clients: Sequence[SGLangClient]) -> Failed:
        """Raises BroadcastFailed when any server refuses the bucket or is lost; the others are freed of waiting."""
        replies = [
            self.loop.submit(
                client.call(
                    "/update_weights_from_distributed",
                    self.section.sync_timeout_s,
                    names=[name for name, _ in bucket],
                    dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                    shapes=[list(tensor.shape) for _, tensor in bucket],
                    group_name=self._name,
                    load_format=_FLATTENED,
                    flush_cache=False,
                )
            )
            for client in clients
        ]
        work = self._broadcast(_flat(bucket))
        try:
            while not (work.is_completed() and all(reply.done() for reply in replies)):
                _raise_first_error(replies, clients)
                time.sleep(0.001)
            work.wait()
            _raise_first_error(replies, clients)
        except (BroadcastFailed, RuntimeError) as error:
            self.close()
            raise BroadcastFailed(f"the broadcast of a bucket of weights broke off: {error}") from None
        return {}

    def finish(self, clients: Sequence[SGLangClient]) -> Failed:
        return {}

    def _join(self, store: dist.Store, world_size: int, host: str, patience: timedelta) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = patience
        return dist.ProcessGroupGloo(store, 0, world_size, options)

    def _broadcast(self, flat: torch.Tensor) -> Any:
        """Begin to send. The result has `is_completed` and `wait` of a torch.distributed.Work."""
        return self._group.broadcast([flat], dist.BroadcastOptions())

    def _leave(self) -> None:
        self._group = None

    def close(self) -> None:
        """Leave the group; whoever waits for us in it gets an error."""
        if self._group is not None:
            self._leave()
        self._store = None
        for client in self._members:
            self.loop.submit(_quietly(client.call("/destroy_weights_update_group", group_name=self._name)))
        self._members = []


class NCCLBroadcastTransport(BroadcastTransport):
    """The same by NCCL, from this process's GPU. Has not run: there was no GPU.

    NCCL blocks where gloo waits in the background: when its communicator comes into being, with the first bucket, and
    when a peer is lost. So it sends in a thread, and whoever waits for the thread ends it by aborting the communicator.
    """

    _backend, _prefix = "nccl", "cuda/"

    def _join(self, store: dist.Store, world_size: int, host: str, patience: timedelta) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = 2 * patience  # The servers' answers are given up before, and with them the group.
        options.config.blocking = 0  # A communicator that waits for its peers can be aborted only if it doesn't block.
        return dist.ProcessGroupNCCL(store, 0, world_size, options)

    def _broadcast(self, flat: torch.Tensor) -> _Sending:
        group = self._group

        def send() -> None:
            group.broadcast([flat.cuda()], dist.BroadcastOptions()).wait()
            torch.cuda.current_stream().synchronize()  # `wait` is the stream's alone.

        return _Sending(self.loop.submit(asyncio.to_thread(send)))

    def _leave(self) -> None:
        self._group.abort()
        self._group = None


@dataclass(frozen=True, slots=True)
class _Sending:
    """A broadcast in a thread, as a torch.distributed.Work."""

    future: Future[None]

    def is_completed(self) -> bool:
        return self.future.done()

    def wait(self) -> None:
        self.future.result()


def _raise_first_error(replies: Sequence[Future[Any]], clients: Sequence[SGLangClient]) -> None:
    for reply, client in zip(replies, clients, strict=True):
        if reply.done() and (error := reply.exception()):
            raise BroadcastFailed(f"{client.endpoint.url}: {error}")


async def _quietly(call: Any) -> None:
    with suppress(ServerError, ServerLost):
        await call


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


def _flat(bucket: NamedTensors) -> torch.Tensor:
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


def _own_address(client: SGLangClient) -> str:
    """The address of this machine that the server can reach."""
    parts = urlsplit(client.endpoint.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])

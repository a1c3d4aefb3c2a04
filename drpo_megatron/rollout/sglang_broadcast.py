"""Weights to SGLang servers by one broadcast a bucket: this process is rank 0, the servers' ranks come after it."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_client import LoopThread, ServerError, ServerLost, SGLangClient
from drpo_megatron.rollout.sglang_transport import FLATTENED, BroadcastFailed, Failed, NamedTensors, flattened


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
        listener = socket.create_server((host, 0))  # torch's own would listen on all interfaces.
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            wait_for_workers=False,
            timeout=patience,
            master_listen_fd=listener.detach(),
        )
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
                    load_format=FLATTENED,
                    flush_cache=False,
                )
            )
            for client in clients
        ]
        work = self._broadcast(flattened(bucket))
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


def _own_address(client: SGLangClient) -> str:
    """The address of this machine that the server can reach."""
    parts = urlsplit(client.endpoint.url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        return str(probe.getsockname()[0])

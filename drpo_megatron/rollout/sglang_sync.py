"""Weights to SGLang servers, in buckets, three ways; published when a server's own checksums are the expected ones.

    open    the servers that answer: pause (requests are put back), flush, label `updating`, begin_weight_update
    send    bucket by bucket: a file each (disk), a broadcast (distributed), shared memory (tensor)
    finish  end_weight_update, checksums of every parameter, the new label, continue

Servers on the trainer's GPUs release their memory in between: `release` pauses them, and they stay so. The next `open`
brings the weights' memory back before it begins, `finish` that of cache and CUDA graphs before it continues. A server
bears a label of what it lacks, so that one that was started again, or left out, is asked for nothing that it doesn't
have to give.

From `open` to the end of `finish` a server bears a label that was never published, so whatever goes wrong in between,
no sample that it draws is taken. A server that fails is left out until the next update; with none left the update
fails. A broadcast can't go on without one of its ranks: there the failure of one server fails the update.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_broadcast import BroadcastTransport, NCCLBroadcastTransport
from drpo_megatron.rollout.sglang_client import LoopThread, ServerError, ServerLost, SGLangClient
from drpo_megatron.rollout.sglang_layout import ServerChecksums
from drpo_megatron.rollout.sglang_transport import DiskTransport, SyncFailed, TensorTransport, Transport

UPDATING = "updating"
"""The label of weights that nobody may use."""
WITHOUT_CACHE = "updating-without-cache"
"""The same, and the memory of KV cache and CUDA graphs is released."""
RELEASED = "released"
"""Neither weights nor cache and graphs have memory."""
LAUNCHED = "default"
"""SGLang's own label of the weights that a server was launched with."""
_WEIGHTS, _CACHE = "weights", ("kv_cache", "cuda_graph")
"""SGLang's tags of what can be released: for an update, and for drawing. sglang_launch.py has graphs take part."""


class WeightSender:
    """Sends to `clients`; one update after the other. Its calls block; the clients live in `loop`."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        loop: LoopThread,
        section: SGLangEngineSection,
        hf_path: str,
        wait_for_server_s: float,
    ) -> None:
        self.clients, self.loop, self.section, self.wait_for_server_s = clients, loop, section, wait_for_server_s
        self.model = read_hf_config(hf_path)
        self.transport: Transport = _transport(section, loop, Path(hf_path))
        self.failures: list[str] = []
        """Why servers were left out of the present or the last update."""
        self._open: list[SGLangClient] = []
        self._without_cache: set[SGLangClient] = set()
        self._some_are_new = False
        """Servers were started (again) since the last update."""
        self._expected: ServerChecksums | None = None

    @property
    def is_open(self) -> bool:
        return self._expected is not None

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
        """One bucket to all servers; the first one opens the update. Raises SyncFailed when it reaches none."""
        if self._expected is None:
            self._begin()
        assert self._expected is not None
        self._expected.add(bucket)
        try:
            failed = self.transport.send(bucket, self._open)
        except BaseException:
            self._expected = None
            raise
        self._leave_out(failed)

    def finish(self, label: str) -> list[SGLangClient]:
        """Verify what was sent and publish it under `label`. Returns the servers that hold it; SyncFailed if none does."""
        expected, self._expected = self._expected, None
        if expected is None:
            raise ValueError(f"weights {label} can't be published: none were sent")
        self._leave_out(self.transport.finish(self._open))
        timeout_s = self.section.sync_timeout_s

        async def complete(client: SGLangClient) -> None:
            await client.call("/end_weight_update", timeout_s)
            for rank in await client.checksums(timeout_s):
                _compare(rank, expected)
            if client in self._without_cache:
                await client.resume_memory(_CACHE, timeout_s)
            await client.set_weight_version(label)
            await client.resume()

        self._everywhere(complete)
        return self._open

    def release_memory(self) -> None:
        """Of all servers that answer. One that doesn't is taken for dead or dying: then it has none."""
        timeout_s = self.section.sync_timeout_s

        async def release(client: SGLangClient) -> None:
            label = (await client.info())["weight_version"]
            self._some_are_new |= label == LAUNCHED
            if label == RELEASED:
                return
            await client.pause(timeout_s)
            await client.set_weight_version(RELEASED)
            await client.release_memory([_WEIGHTS] if label == WITHOUT_CACHE else [*_CACHE, _WEIGHTS], timeout_s)

        for client, error in zip(self.clients, self.loop.run(_gather(self.clients, release)), strict=True):
            if error is not None:
                print(f"releases no memory: {client.endpoint.url}: {error}", flush=True)

    def close(self) -> None:
        self.transport.close()

    def _begin(self) -> None:
        self.failures = []
        answers = self._answers()
        self._open = list(answers)
        labels = {client: answer["weight_version"] for client, answer in answers.items()}
        self._some_are_new |= LAUNCHED in labels.values()
        self._without_cache = {client for client, label in labels.items() if label in (RELEASED, WITHOUT_CACHE)}
        on_gpu = any(answer["device"] != "cpu" for answer in answers.values())
        timeout_s = self.section.sync_timeout_s

        async def begin(client: SGLangClient) -> None:
            await client.pause(timeout_s)
            if labels[client] == RELEASED:
                await client.resume_memory([_WEIGHTS], timeout_s)
            await client.flush_cache(timeout_s)
            await client.set_weight_version(WITHOUT_CACHE if client in self._without_cache else UPDATING)
            try:
                await client.call("/begin_weight_update", timeout_s)
            except ServerError:  # An update that failed before left it open.
                await client.call("/end_weight_update", timeout_s)
                await client.call("/begin_weight_update", timeout_s)

        self._everywhere(begin)
        self._expected = ServerChecksums(self.model, self.section.tensor_parallel, on_gpu)
        try:
            self.transport.open(self._open, self._some_are_new)
        except BaseException:
            self._expected = None
            raise
        self._some_are_new = False

    def _answers(self) -> dict[SGLangClient, dict[str, Any]]:
        """What the servers that are up say of themselves; waits for the first if none is up."""
        deadline = time.monotonic() + self.wait_for_server_s
        while True:
            answers = self.loop.run(_gather(self.clients, SGLangClient.info))
            up = {c: answer for c, answer in zip(self.clients, answers, strict=True) if isinstance(answer, dict)}
            if up:
                return up
            if time.monotonic() > deadline:
                lines = "\n  ".join(str(answer) for answer in answers)
                raise SyncFailed(f"no SGLang server answered within {self.wait_for_server_s:g} s:\n  {lines}")
            time.sleep(1.0)

    def _everywhere(self, work: Callable[[SGLangClient], Awaitable[None]]) -> None:
        answers = self.loop.run(_gather(self._open, work))
        self._leave_out(
            {client: answer for client, answer in zip(self._open, answers, strict=True) if answer is not None}
        )

    def _leave_out(self, failed: dict[SGLangClient, BaseException]) -> None:
        for client, error in failed.items():
            self.failures.append(f"{client.endpoint.url}: {error}")
            print(f"left out of the weight update: {self.failures[-1]}", flush=True)
        self._open = [client for client in self._open if client not in failed]
        if not self._open:
            self._expected = None
            raise SyncFailed("no SGLang server took the weights:\n  " + "\n  ".join(self.failures))


def _transport(section: SGLangEngineSection, loop: LoopThread, hf_path: Path) -> Transport:
    if section.sync == "disk":
        return DiskTransport(section, loop, hf_path)
    if section.sync == "tensor":
        return TensorTransport(section, loop)
    return NCCLBroadcastTransport(section, loop) if section.uses_nccl else BroadcastTransport(section, loop)


def _compare(rank: dict[str, Any], expected: ServerChecksums) -> None:
    """ValueError that names the parameters that are not what was sent."""
    want = expected.of_rank(rank["parallelism_info"][0]["tp_rank"])
    have = rank["checksums"]
    problems = [
        f"{what} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for what, names in (
            ("not sent:", sorted(name for name in have.keys() - want.keys() if not expected.ignores(name))),
            ("not there:", sorted(want.keys() - have.keys())),
            ("different:", sorted(name for name in have.keys() & want.keys() if have[name] != want[name])),
        )
        if names
    ]
    if problems:
        raise ValueError(f"it does not hold the weights that were sent; {'; '.join(problems)}")


async def _gather(clients: Iterable[SGLangClient], work: Callable[[SGLangClient], Awaitable[Any]]) -> list[Any]:
    """Of each client what `work` returns, or its error where the server refused, was lost or holds wrong weights."""

    async def one(client: SGLangClient) -> Any:
        try:
            return await work(client)
        except (ServerError, ServerLost, ValueError) as error:
            return error

    return await asyncio.gather(*map(one, clients))

"""Requests over several SGLang servers: groups stay together, the least loaded server first, none drawn twice.

    groups --admitted where there is room--> server --finished groups, as they finish--> caller
                                               |
                                       lost? its requests go elsewhere; nothing they drew before is used

A request has one attempt at a time, and one answer: a retry begins when the attempt before it has failed and was
aborted. A server takes part while it holds published weights, which `publish` says of it. One that is lost, or answers
with weights that were not published, takes no further part until the next `publish`.

Weights may change while requests run: these go on with the new ones, and say which tokens are whose. Requests that have
no server yet wait for the end of the update.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_client import Generated, ServerError, ServerLost, SGLangClient


class NoServerLeft(RuntimeError):
    """No server holds the published weights. What had finished before has been handed out."""


@dataclass(eq=False, slots=True)
class _Server:
    client: SGLangClient
    load: int = 0
    """Requests that it has been given and not answered."""
    is_serving: bool = False
    attempts: set[asyncio.Task[Generated]] = field(default_factory=set)


class SGLangRouter:
    def __init__(
        self, clients: Sequence[SGLangClient], max_concurrent: int, max_attempts: int, request_timeout_s: float
    ) -> None:
        self.max_concurrent, self.max_attempts, self.timeout_s = max_concurrent, max_attempts, request_timeout_s
        self.num_lost = 0
        """Servers that were lost while they served, since the start."""
        self.num_resent = 0
        """Attempts beyond the first ones, since the start."""
        self._servers = [_Server(client) for client in clients]
        self._changed = asyncio.Condition()
        self._versions: dict[str, int] = {}
        self._version = -1
        self._is_updating = False

    @property
    def num_serving(self) -> int:
        return sum(server.is_serving for server in self._servers)

    async def publish(self, label: str, policy_version: int, clients: Sequence[SGLangClient]) -> None:
        """From now on `clients`, and only they, serve, with the weights of `label`.

        What the others were drawing is given up, and drawn again by these.
        """
        self.expect(label, policy_version)
        self._version = policy_version
        await self._let_serve(clients, is_updating=False)
        for server in self._servers:
            if not server.is_serving:
                for attempt in server.attempts:
                    attempt.cancel()

    def expect(self, label: str, policy_version: int) -> None:
        """Servers are about to get the weights of `label`: running requests may be answered with them from now on."""
        self._versions[label] = policy_version

    async def withdraw(self, is_updating: bool) -> None:
        """No server gets a request until the next `publish`, for which requests wait if it is on its way."""
        await self._let_serve((), is_updating)

    async def _let_serve(self, clients: Sequence[SGLangClient], is_updating: bool) -> None:
        async with self._changed:
            self._is_updating = is_updating
            for server in self._servers:
                server.is_serving = server.client in clients
            self._changed.notify_all()

    def policy_versions(self, generated: Generated) -> tuple[tuple[int, int], ...]:
        """(policy version, number of tokens) of each span."""
        return tuple((self._versions[label], length) for label, length in generated.spans)

    async def stream(
        self, groups: Sequence[Sequence[GenerationRequest]], params: SamplingParams
    ) -> AsyncIterator[tuple[int, list[Generated]]]:
        """(index of the group, an answer to each of its requests), in the order in which groups finish.

        Raises: NoServerLeft after every group that could finish; ServerError when a request is refused, or fails
            `max_attempts` times. What is still running then is aborted.
        """
        tasks = {asyncio.create_task(self._run_group(group, params)): i for i, group in enumerate(groups)}
        pending = set(tasks)
        no_server_left: NoServerLeft | None = None
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        yield tasks[task], task.result()
                    except NoServerLeft as error:
                        no_server_left = error
            if no_server_left:
                raise no_server_left
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _run_group(self, group: Sequence[GenerationRequest], params: SamplingParams) -> list[Generated]:
        server = await self._admit(len(group))
        results = await asyncio.gather(
            *(self._run(request, params, server) for request in group), return_exceptions=True
        )
        if failures := [result for result in results if isinstance(result, BaseException)]:
            raise next((f for f in failures if not isinstance(f, NoServerLeft)), failures[0])
        return [result for result in results if isinstance(result, Generated)]

    async def _run(self, request: GenerationRequest, params: SamplingParams, server: _Server) -> Generated:
        """One request until it is answered, first by `server`, which has admitted it."""
        num_failures = 0
        while True:
            sent_at = self._version
            attempt = asyncio.create_task(server.client.generate(request, params, self.timeout_s))
            server.attempts.add(attempt)
            try:
                generated = await attempt
                self._check_versions(generated, sent_at, server)
                return generated
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
            except ServerLost:
                # A hung request is not yet a hung server.
                if await self._answers(server):
                    num_failures += 1
                else:
                    self._lose(server)
            except ServerError as error:
                if error.status < 500:
                    raise
                num_failures += 1
                if num_failures == self.max_attempts:
                    raise ServerError(
                        error.status, f"{request.request_id} failed {num_failures} times: {error}"
                    ) from error
            finally:
                server.attempts.discard(attempt)
                await self._release(server)
            if num_failures == self.max_attempts:
                raise ServerError(
                    504, f"{request.request_id} took longer than {self.timeout_s:g} s, {num_failures} times"
                )
            self.num_resent += 1
            server = await self._admit(1)

    def _check_versions(self, generated: Generated, sent_at: int, server: _Server) -> None:
        """Only published weights may have drawn it, and none older than those published when it was sent."""
        for label, _ in generated.spans:
            if self._versions.get(label, -1) < sent_at:
                self._lose(server)
                raise ServerError(
                    500, f"{server.client.endpoint.url} drew with weights {label!r}, not the published ones"
                )
        if generated.finish_reason == "abort":
            raise ServerError(503, f"{server.client.endpoint.url} aborted the request")

    async def _admit(self, count: int) -> _Server:
        """A place for `count` requests at the least loaded server, as soon as one has room for all of them."""
        async with self._changed:
            while True:
                serving = [server for server in self._servers if server.is_serving]
                if not serving and not self._is_updating:
                    raise NoServerLeft("no SGLang server holds the published weights")
                server = min(serving, key=lambda server: server.load, default=None)
                if server and (server.load == 0 or server.load + count <= self.max_concurrent):
                    server.load += count
                    return server
                await self._changed.wait()

    async def _release(self, server: _Server) -> None:
        async with self._changed:
            server.load -= 1
            self._changed.notify_all()

    async def _answers(self, server: _Server) -> bool:
        try:
            await server.client.call("/abort_request", rid="nobody")
        except (ServerLost, ServerError):
            return False
        return True

    def _lose(self, server: _Server) -> None:
        self.num_lost += server.is_serving
        server.is_serving = False

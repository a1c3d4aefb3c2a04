"""The HTTP calls of one SGLang server, and what its answers mean. Written against SGLang 0.5.23.

A server answers, refuses (`ServerError`: 4xx and 5xx, with its words) or is gone (`ServerLost`: no connection, a reset
connection, no answer in time). `LoopThread` lets code that isn't asynchronous make these calls.
"""

from __future__ import annotations

import asyncio
import base64
import math
import threading
import uuid
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import aiohttp
import numpy as np

from drpo_megatron.config.hf_config import ExpertRouting
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_server import Endpoint
from drpo_megatron.types import FinishReason, RoutedExperts

T = TypeVar("T")

_CONTROL_TIMEOUT_S = 30.0
"""For calls that ask for no work."""


class ServerError(RuntimeError):
    """The server answered that it won't. `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})")
        self.status = status


class ServerLost(RuntimeError):
    """There is no server at the other end, or none that answers."""


@dataclass(frozen=True, slots=True)
class Generated:
    """What a server drew for one request, perhaps across a change of weights.

    Example:
        Generated(token_ids=(6, 4, 2), logprobs=(-0.1, -0.7, -0.01), finish_reason="stop", spans=(("3-5f0c", 3),))
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log mu at the sampling temperature (greedy: at T = 1), before top-p and top-k."""
    finish_reason: FinishReason
    spans: tuple[tuple[str, int], ...]
    """(label of the weights, number of tokens that they drew), in order; together all tokens."""
    topk_ids: tuple[tuple[int, ...], ...] | None = None
    topk_logprobs: tuple[tuple[float, ...], ...] | None = None
    routed_experts: RoutedExperts | None = None


class SGLangClient:
    """One server. Make it inside a running event loop and close it there."""

    def __init__(
        self, endpoint: Endpoint, stop_token_ids: tuple[int, ...], routing: ExpertRouting | None = None
    ) -> None:
        """routing: of the served model, whose routed experts can be asked for. None: a dense model."""
        self.endpoint = endpoint
        self.stop_token_ids = stop_token_ids
        self.routing = routing
        self._session = aiohttp.ClientSession(
            # A connection each: on a busy machine the server closes an idle one just when it is given a request.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            headers={"Authorization": f"Bearer {endpoint.api_key}"},
        )

    async def close(self) -> None:
        await self._session.close()

    async def call(self, path: str, timeout_s: float = _CONTROL_TIMEOUT_S, **fields: Any) -> Any:
        """POST of a JSON object. Returns the JSON of the answer, None if it has no body."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, _CONTROL_TIMEOUT_S))
        try:
            async with self._session.post(f"{self.endpoint.url}{path}", json=fields, timeout=timeout) as response:
                if response.status >= 400:
                    raise ServerError(response.status, f"{self.endpoint.url}{path}: {_words(await response.text())}")
                is_json = response.content_type == "application/json"
                return await response.json() if is_json else None
        except ValueError as error:
            raise ServerError(502, f"{self.endpoint.url}{path} answers with what is no JSON: {error}") from None
        except TimeoutError:
            raise ServerLost(f"{self.endpoint.url}{path} gave no answer within {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerLost(f"{self.endpoint.url}{path}: {type(error).__name__}: {error}") from None

    async def info(self) -> dict[str, Any]:
        """Its flags as it was launched, from its scheduler, and `weight_version`, the present label of its weights."""
        launched = await self._get("/server_info")
        return launched | {"weight_version": (await self._get("/model_info"))["weight_version"]}

    async def _get(self, path: str) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_CONTROL_TIMEOUT_S)
        try:
            async with self._session.get(f"{self.endpoint.url}{path}", timeout=timeout) as response:
                if response.status >= 400:
                    raise ServerError(response.status, f"{self.endpoint.url}{path}: {_words(await response.text())}")
                return await response.json()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise ServerLost(f"{self.endpoint.url}{path}: {type(error).__name__}: {error}") from None

    async def generate(self, request: GenerationRequest, params: SamplingParams, timeout_s: float) -> Generated:
        """One attempt under an id of its own. An attempt that is given up is aborted at the server."""
        rid = f"{request.request_id}#{uuid.uuid4().hex}"
        sampling = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": params.max_response_tokens,
            "stop_token_ids": self.stop_token_ids,
        }
        try:
            answer = await self.call(
                "/generate",
                timeout_s,
                rid=rid,
                input_ids=request.prompt_ids,
                sampling_params=sampling,
                return_logprob=True,
                top_logprobs_num=params.num_topk,
                return_routed_experts=params.routed_experts,
            )
        except (ServerLost, asyncio.CancelledError):
            await self._abort_quietly(rid)
            raise
        try:
            generated = _parsed(answer, self.endpoint.url)
            if not params.routed_experts:
                return generated
            num_tokens = len(request.prompt_ids) + len(generated.token_ids) - 1
            return replace(generated, routed_experts=self._routed_experts(answer["meta_info"], num_tokens))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ServerError(500, f"{self.endpoint.url} answered a request with nonsense: {what}") from None

    def _routed_experts(self, meta: dict[str, Any], num_tokens: int) -> RoutedExperts:
        """Of the layers with experts: SGLang reports all layers, and for dense ones what happens to be there."""
        url, routing = self.endpoint.url, self.routing
        if routing is None:
            raise ServerError(400, f"{url} serves a dense model, and was asked for routed experts")
        if meta.get("routed_experts") is None:
            raise ServerError(400, f"{url} reports no routed experts; start it with --enable-return-routed-experts")
        ids = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4")
        shape = (num_tokens, routing.num_layers, routing.experts_per_token)
        if ids.size != math.prod(shape):
            raise ServerError(500, f"{url} reports {ids.size} routed experts, and {shape} = {math.prod(shape)} are due")
        return RoutedExperts.of(ids.reshape(shape)[:, list(routing.moe_layers)])

    async def abort_all(self) -> None:
        """End all running requests; their `generate` calls return what was drawn so far, finish_reason `abort`."""
        await self.call("/abort_request", abort_all=True)

    async def pause(self, timeout_s: float) -> None:
        """Stop generating. Running requests are put back, and will go on after a change of weights."""
        await self.call("/pause_generation", timeout_s, mode="retract")

    async def resume(self) -> None:
        await self.call("/continue_generation")

    async def flush_cache(self, timeout_s: float) -> None:
        """Forget the KV of earlier prompts, on a paused server.

        The server is given no time-out of its own: with one it waits for an empty queue first, and the requests that
        `pause` put back stand in it until `resume` (managers/scheduler_components/flush_wrapper.py:31 of 0.5.23).
        """
        await self.call("/flush_cache", timeout_s)

    async def release_memory(self, tags: Sequence[str], timeout_s: float) -> None:
        """On a paused server: it refuses to live on if it is busy (SGLang asserts that it isn't)."""
        await self.call("/release_memory_occupation", timeout_s, tags=tags)

    async def resume_memory(self, tags: Sequence[str], timeout_s: float) -> None:
        """What was released, and only that: SGLang does not survive another tag. The content is not what it was."""
        await self.call("/resume_memory_occupation", timeout_s, tags=tags)

    async def set_weight_version(self, label: str) -> None:
        await self.call("/update_weight_version", new_version=label, abort_all_requests=False)

    async def checksums(self, timeout_s: float) -> list[dict[str, Any]]:
        """One entry a rank of the server: `checksums` by tensor, and `parallelism_info`."""
        return (await self.call("/weights_checker", timeout_s, action="checksum"))["ranks"]

    async def _abort_quietly(self, rid: str) -> None:
        # A server that can't be told has nothing left to abort, or is ended by its keeper.
        with suppress(ServerError, ServerLost):
            await asyncio.shield(self.call("/abort_request", 5.0, rid=rid))


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.submit(coroutine).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _parsed(answer: dict[str, Any], url: str) -> Generated:
    """Raises ServerError(500) for an answer that contradicts itself: nothing of it may be trained on."""
    meta = answer["meta_info"]
    token_ids = tuple(answer["output_ids"])
    logprobs = tuple(entry[0] for entry in meta["output_token_logprobs"])
    spans = tuple((span["version"], span["end"] - span["start"]) for span in meta["weight_versions"])
    finish = meta["finish_reason"]["type"]
    problem = None
    if tuple(entry[1] for entry in meta["output_token_logprobs"]) != token_ids:
        problem = "its log-probs are not of its tokens"
    elif sum(length for _, length in spans) != len(token_ids):
        problem = f"its weight versions speak of {sum(n for _, n in spans)} of {len(token_ids)} tokens"
    elif not all(math.isfinite(logprob) and logprob <= 1e-5 for logprob in logprobs):
        problem = "it reports log-probs that are none"
    elif finish not in get_args(FinishReason):
        problem = f"its finish reason is {finish!r}"
    if problem:
        raise ServerError(500, f"{url} answered a request with nonsense: {problem}")
    generated = Generated(token_ids, tuple(min(x, 0.0) for x in logprobs), finish, spans)
    if not meta.get("output_top_logprobs"):
        return generated
    top = meta["output_top_logprobs"]
    ids, values = ([tuple(entry[i] for entry in position) for position in top] for i in (1, 0))
    return replace(generated, topk_ids=tuple(ids), topk_logprobs=tuple(values))


def _words(body: str) -> str:
    return " ".join(body.split())[:500]

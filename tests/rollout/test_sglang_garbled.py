"""A real server behind a line that spoils its answers: nothing spoilt becomes a sample, and what was asked for comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.sglang_client import LoopThread, ServerError
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_server import Endpoint
from tests.rollout.conftest import Served
from tests.rollout.test_sglang_engine import logprobs, publish, reference, requests, weights
from tests.tiny import SAME_WEIGHTS

Spoil = Callable[[dict[str, Any]], str]


def without_logprobs(answer: dict[str, Any]) -> str:
    del answer["meta_info"]["output_token_logprobs"]
    return json.dumps(answer)


def another_token(answer: dict[str, Any]) -> str:
    answer["output_ids"][0] = (answer["output_ids"][0] + 1) % 48
    return json.dumps(answer)


def a_token_less(answer: dict[str, Any]) -> str:
    answer["output_ids"].pop()
    answer["meta_info"]["output_token_logprobs"].pop()
    return json.dumps(answer)


def other_weights(answer: dict[str, Any]) -> str:
    answer["meta_info"]["weight_versions"][0]["version"] = "nobody's"
    return json.dumps(answer)


SPOILERS: dict[str, Spoil] = {
    "half": lambda answer: json.dumps(answer)[: len(json.dumps(answer)) // 2],
    "a list": lambda answer: "[1, 2]",
    "without log-probs": without_logprobs,
    "another token": another_token,
    "a token less": a_token_less,
    "other weights": other_weights,
}


@contextmanager
def spoilt(endpoint: Endpoint, spoilers: Iterator[Spoil]) -> Iterator[Endpoint]:
    """The server behind a proxy that spoils its first answers to /generate, one a spoiler."""
    loop = LoopThread()

    async def forward(request: web.Request) -> web.Response:
        headers = {"Authorization": f"Bearer {endpoint.api_key}", "Content-Type": request.content_type}
        url, body = f"{endpoint.url}{request.path_qs}", await request.read()
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(request.method, url, data=body) as answer,
        ):
            body, kind = await answer.read(), answer.content_type
        if request.path == "/generate" and (spoiler := next(spoilers, None)):
            body = spoiler(json.loads(body)).encode()
        return web.Response(body=body, status=answer.status, content_type=kind)

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    runner, port = loop.run(start())
    try:
        yield Endpoint(f"http://127.0.0.1:{port}", endpoint.api_key)
    finally:
        loop.run(runner.cleanup())
        loop.close()


def test_spoilt_answers_are_asked_for_again(sglang: Served) -> None:
    with spoilt(sglang.keepers[0].server.endpoint, iter(SPOILERS.values())) as endpoint:
        engine = SGLangEngine([endpoint], SGLangEngineSection(sync="tensor"), str(sglang.hf_path), 600.0)
        tensors = weights(sglang, 31)
        version = publish(engine, tensors)
        wanted = requests(16)
        drawn = engine.generate(wanted, SamplingParams(12))
        assert engine.router.num_resent == len(SPOILERS)
        engine.close()
    model = reference(sglang, tensors)
    for request, completion in zip(wanted, drawn, strict=True):
        assert completion.policy_version == version
        expected = logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=SAME_WEIGHTS)


def test_a_server_that_only_talks_nonsense_ends_the_rollout_by_name(sglang: Served) -> None:
    with spoilt(sglang.keepers[0].server.endpoint, iter([SPOILERS["without log-probs"]] * 100)) as endpoint:
        section = SGLangEngineSection(sync="tensor", max_attempts=2)
        engine = SGLangEngine([endpoint], section, str(sglang.hf_path), 600.0)
        publish(engine, weights(sglang, 32))
        with pytest.raises(
            ServerError, match=r"p0/\d failed 2 times: http://127.* nonsense: KeyError: 'output_token_logprobs'"
        ):
            engine.generate(requests(4), SamplingParams(4))
        engine.close()

"""The SGLang engine against a real server: what it reports is what transformers computes for the weights it was sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.checkpoint.hf import HFCheckpoint, tensor_checksum
from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.model_slots import checkpoint_slots
from drpo_megatron.rollout.sglang_client import Generated, ServerError, SGLangClient
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_router import NoServerLeft
from drpo_megatron.rollout.sglang_server import Endpoint
from drpo_megatron.rollout.sglang_transport import SyncFailed
from tests.rollout.conftest import Served
from tests.tiny import SAME_WEIGHTS

Weights = dict[str, torch.Tensor]
_version = itertools.count(1)


def weights(served: Served, seed: int) -> Weights:
    """The checkpoint's tensors with noise on them: never what the server was launched with."""
    generator = torch.Generator().manual_seed(seed)
    checkpoint = HFCheckpoint(served.hf_path)
    tensors = {name: checkpoint.get(name) for name in checkpoint.names()}
    return {name: x + 0.02 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}


def publish(engine: SGLangEngine, tensors: Weights, after_first_bucket: Callable[[], None] = lambda: None) -> int:
    """In buckets of five tensors, so that fused parameters are torn apart."""
    version = next(_version)
    named = list(tensors.items())
    for start in range(0, len(named), 5):
        engine.load_weights(named[start : start + 5])
        if not start:
            after_first_bucket()
    engine.finish_update(version, {name: tensor_checksum(tensor) for name, tensor in named})
    return version


def requests(count: int, group_size: int = 4, length: int = 5) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"p{i // group_size}/{i % group_size}", tuple((i // group_size + j) % 48 for j in range(length)), i
        )
        for i in range(count)
    ]


def reference(served: Served, tensors: Weights) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(served.hf_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, slot in checkpoint_slots(model, tensors).items():
            slot.copy_(tensors[name])
    return model


@torch.no_grad()
def logprobs(model: torch.nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float) -> list[float]:
    tokens = torch.tensor([[*prompt, *response]])
    logits = model(tokens).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(1).gather(1, torch.tensor(response)[:, None]).squeeze(1).tolist()


def running(engine: SGLangEngine, client: SGLangClient, wanted: list[GenerationRequest]) -> list[Future[Generated]]:
    """Requests of up to 200 tokens, the first of which has just ended: most of the others still run."""
    calls = [engine._loop.submit(client.generate(request, SamplingParams(200), 600.0)) for request in wanted]
    wait(calls, timeout=600.0, return_when=FIRST_COMPLETED)
    return calls


@pytest.fixture
def engine(sglang: Served) -> Iterator[SGLangEngine]:
    engine = sglang.engine()
    yield engine
    engine.close()


@pytest.mark.parametrize(("sync", "temperature"), [("disk", 1.0), ("tensor", 0.7), ("distributed", 1.5)])
def test_its_logprobs_are_those_of_the_weights_that_were_sent(sglang: Served, sync: str, temperature: float) -> None:
    """The canary of every SGLang version, in FP32, whichever way the weights took."""
    engine = sglang.engine(sync)
    tensors = weights(sglang, seed=int(10 * temperature))
    version = publish(engine, tensors)
    drawn = engine.generate(requests(16), SamplingParams(12, temperature))
    engine.close()
    model = reference(sglang, tensors)
    for request, completion in zip(requests(16), drawn, strict=True):
        assert completion.policy_version == version
        expected = logprobs(model, request.prompt_ids, completion.token_ids, temperature)
        assert completion.logprobs == pytest.approx(expected, abs=SAME_WEIGHTS)
        ended = completion.token_ids[-1] in engine.stop_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & set(engine.stop_ids)
        assert ended or len(completion.token_ids) == 12


def test_a_prompt_that_leaves_no_room_is_refused_by_name_before_anything_is_sent(
    engine: SGLangEngine, sglang: Served
) -> None:
    publish(engine, weights(sglang, 1))
    long = GenerationRequest("long/0", tuple(range(40)) * 6, 0)
    with pytest.raises(ValueError, match="long/0: 240 prompt tokens .* exceed the model's context of 256"):
        engine.generate([*requests(4), long], SamplingParams(17))
    assert engine.router.num_resent == 0


def test_groups_come_out_as_they_finish(sglang: Served) -> None:
    engine = sglang.engine(max_concurrent_requests=4)
    publish(engine, weights(sglang, 2))
    groups = [list(group) for group in zip(*[iter(requests(12))] * 4, strict=True)]

    async def collect() -> list[tuple[int, int]]:
        seen = []
        async for index, answers in engine.router.stream(groups, SamplingParams(8)):
            assert len(answers) == 4
            seen.append((index, engine.router._servers[0].load))
        return seen

    seen = engine._loop.run(collect())
    engine.close()
    assert sorted(index for index, _ in seen) == [0, 1, 2]
    # With room for one group at a time, the next ones were still running, or waiting, when the first came out.
    assert seen[0][1] > 0 and seen[-1][1] == 0


def test_abort_returns_what_was_drawn_so_far_with_its_logprobs(engine: SGLangEngine, sglang: Served) -> None:
    tensors = weights(sglang, 3)
    publish(engine, tensors)
    [client] = engine.clients
    pending = running(engine, client, requests(16))
    engine._loop.run(client.abort_all())
    answers = [call.result() for call in pending]
    aborted = [(r, a) for r, a in zip(requests(16), answers, strict=True) if a.finish_reason == "abort"]
    assert aborted
    model = reference(sglang, tensors)
    for request, answer in aborted:
        assert len(answer.token_ids) < 200
        if answer.token_ids:
            expected = logprobs(model, request.prompt_ids, answer.token_ids, 1.0)
            assert answer.logprobs == pytest.approx(expected, abs=SAME_WEIGHTS)


def test_a_request_that_sees_new_weights_says_which_tokens_are_whose(engine: SGLangEngine, sglang: Served) -> None:
    """The update comes while they run: the first span's mu is the old weights', the second's the new ones'."""
    old, new = weights(sglang, 4), weights(sglang, 5)
    before = publish(engine, old)
    [client] = engine.clients
    pending = running(engine, client, requests(32))
    after = publish(engine, new)
    models = {before: reference(sglang, old), after: reference(sglang, new)}
    crossed = 0
    for request, call in zip(requests(32), pending, strict=True):
        answer = call.result()
        spans = engine.router.policy_versions(answer)
        crossed += len(spans) == 2
        start = 0
        for version, length in spans:
            expected = logprobs(models[version], request.prompt_ids, answer.token_ids, 1.0)
            part = slice(start, start + length)
            assert answer.logprobs[part] == pytest.approx(expected[part], abs=SAME_WEIGHTS)
            start += length
    assert crossed


def test_a_server_with_other_weights_than_were_sent_is_named_and_draws_nothing(
    engine: SGLangEngine, sglang: Served
) -> None:
    tensors = weights(sglang, 6)
    engine.load_weights(list(tensors.items()))
    engine.sender.transport.send([("model.norm.weight", tensors["model.norm.weight"] + 1e-6)], engine.clients)
    with pytest.raises(SyncFailed, match="does not hold the weights that were sent; different: model.norm.weight$"):
        engine.finish_update(99, {name: tensor_checksum(tensor) for name, tensor in tensors.items()})
    with pytest.raises(NoServerLeft):
        engine.generate(requests(4), SamplingParams(4))
    publish(engine, tensors)
    assert len(engine.generate(requests(4), SamplingParams(4))) == 4


def test_a_wrong_key_opens_nothing(engine: SGLangEngine) -> None:
    endpoint = Endpoint(engine.clients[0].endpoint.url, "guessed")

    async def generate() -> None:
        client = SGLangClient(endpoint, ())
        try:
            await client.generate(requests(1)[0], SamplingParams(1), 300.0)
        finally:
            await client.close()

    with pytest.raises(ServerError, match="401"):
        engine._loop.run(generate())


def test_topk_logprobs_come_with_every_token(engine: SGLangEngine, sglang: Served) -> None:
    publish(engine, weights(sglang, 7))
    [completion] = engine.generate(requests(1), SamplingParams(6, temperature=0.8, num_topk=51))
    assert completion.topk_ids is not None and completion.topk_logprobs is not None
    for token, logprob, ids, values in zip(
        completion.token_ids, completion.logprobs, completion.topk_ids, completion.topk_logprobs, strict=True
    ):
        assert torch.tensor(values).exp().sum().item() == pytest.approx(1.0, abs=1e-4)
        assert values[ids.index(token)] == pytest.approx(logprob, abs=1e-6)

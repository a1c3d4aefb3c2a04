"""A server that gives its memory back between a rollout and the next weights: nothing that it owes is lost.

On a CPU SGLang's memory saver moves nothing, but the calls, their order and what they refuse are those of a GPU.
"""

from __future__ import annotations

import threading

from drpo_megatron.rollout.engine import SamplingParams
from drpo_megatron.rollout.sglang_sync import RELEASED
from drpo_megatron.types import Completion
from tests.rollout.conftest import Served
from tests.rollout.test_sglang_engine import publish, reference, requests, weights
from tests.rollout.test_sglang_update import assert_mu_is_of_the_versions_that_drew


def test_requests_wait_while_memory_is_released_and_go_on_with_the_next_weights(sglang: Served) -> None:
    engine = sglang.engine("distributed", max_concurrent_requests=4)
    [client] = engine.clients
    old, new = weights(sglang, 31), weights(sglang, 32)
    before = publish(engine, old)
    wanted = requests(64)
    drawn: dict[int, Completion] = {}
    first_is_there = threading.Event()

    def draw() -> None:
        for group in engine.stream(wanted, SamplingParams(50)):
            drawn.update(group)
            first_is_there.set()

    thread = threading.Thread(target=draw)
    thread.start()
    assert first_is_there.wait(600.0)
    engine.release_memory()
    engine.release_memory()  # Of one that has none.
    assert engine._loop.run(client.info())["weight_version"] == RELEASED
    assert len(drawn) < 64 and thread.is_alive()
    assert sglang.keepers[0].server.is_alive(timeout_s=5.0)  # Its keeper does not take it for a hung one.
    after = publish(engine, new)
    thread.join(600.0)
    models = {before: reference(sglang, old), after: reference(sglang, new)}
    assert sorted(drawn) == list(range(64))
    for index, completion in drawn.items():
        assert_mu_is_of_the_versions_that_drew(models, wanted[index], completion)
    assert {before, after} == {completion.policy_version for completion in drawn.values()}
    assert engine.router.num_lost == 0

    engine.release_memory()
    last = publish(engine, old)
    [completion] = engine.generate(requests(1), SamplingParams(8))
    assert completion.policy_version == last
    assert_mu_is_of_the_versions_that_drew({last: models[before]}, requests(1)[0], completion)
    engine.close()

"""Two real SGLang servers, and everything that can happen to them: no sample is lost, doubled, or has another's mu."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_server import SGLangServer
from drpo_megatron.rollout.sglang_transport import SyncFailed
from drpo_megatron.types import Completion
from tests.rollout.conftest import Served, launch
from tests.rollout.test_sglang_engine import Weights, logprobs, publish, reference, requests, weights
from tests.rollout.test_sglang_update import assert_mu_is_of_the_versions_that_drew
from tests.tiny import SAME_WEIGHTS

pytestmark = pytest.mark.slow

PATIENCE_S = 900.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from launch(tmp_path_factory.mktemp("pair"), 2, health_interval_s=5.0, hang_timeout_s=60.0)


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def all_up(pair: Served) -> None:
    """As every test finds and leaves them, so that their order doesn't matter."""
    wait_for(lambda: all(keeper.server.is_alive(5.0) for keeper in pair.keepers))


def end(server: SGLangServer, number: signal.Signals) -> None:
    assert server.process is not None
    os.killpg(server.process.pid, number)


def draw(engine: SGLangEngine, wanted: list[GenerationRequest], on_first: Callable[[], None]) -> list[Completion]:
    """As `generate`; `on_first` is called when the first group is there and both servers still draw others.

    On a busy machine one of them may have drawn all of its own by then: that is drawn again.
    """
    for _ in range(5):
        done: dict[int, Completion] = {}
        both_draw = False
        for group in engine.stream(wanted, SamplingParams(150)):
            if not done and all(server.load for server in engine.router._servers):
                both_draw = True
                on_first()
            for index, completion in group:
                assert index not in done
                done[index] = completion
        if both_draw:
            return [done[i] for i in range(len(wanted))]
    raise AssertionError("one of two servers had drawn all of its own before the first group was there, five times")


def assert_drawn_by(pair: Served, tensors: Weights, version: int, drawn: list[Completion], count: int) -> None:
    model = reference(pair, tensors)
    assert len(drawn) == count
    for request, completion in zip(requests(count), drawn, strict=True):
        assert completion.policy_version == version
        assert completion.finish_reason in ("stop", "length")
        expected = logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=SAME_WEIGHTS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_loses_its_requests_to_the_other_and_comes_back(
    pair: Served, number: signal.Signals
) -> None:
    all_up(pair)
    engine = pair.engine()
    victim = pair.keepers[0]
    num_restarts = victim.num_restarts
    tensors = weights(pair, 11)
    version = publish(engine, tensors)
    drawn = draw(engine, requests(64), lambda: end(victim.server, number))
    assert_drawn_by(pair, tensors, version, drawn, 64)
    assert engine.router.num_lost == 1 and engine.router.num_resent > 0 and engine.router.num_serving == 1
    wait_for(lambda: victim.num_restarts > num_restarts)
    all_up(pair)
    after = weights(pair, 12)
    version = publish(engine, after)
    assert engine.router.num_serving == 2
    assert_drawn_by(pair, after, version, engine.generate(requests(64), SamplingParams(20)), 64)
    engine.close()


def test_when_all_servers_die_the_first_to_come_back_gets_the_weights_and_the_requests(pair: Served) -> None:
    all_up(pair)
    engine = pair.engine()
    tensors = weights(pair, 13)
    version = publish(engine, tensors)

    def kill_all() -> None:
        for keeper in pair.keepers:
            end(keeper.server, signal.SIGKILL)

    assert_drawn_by(pair, tensors, version, draw(engine, requests(64), kill_all), 64)
    assert engine.router.num_lost == 2
    engine.close()
    all_up(pair)


def test_a_server_whose_update_fails_half_way_draws_nothing_until_the_next_one(
    pair: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    all_up(pair)
    engine = pair.engine()
    publish(engine, weights(pair, 14))
    client, tensors = engine.clients[0], weights(pair, 15)

    def end_update_of_one() -> None:
        """From now on this server refuses the rest."""
        engine._loop.run(client.call("/end_weight_update", 300.0))

    version = publish(engine, tensors, after_first_bucket=end_update_of_one)
    assert engine.router.num_serving == 1
    assert client.endpoint.url in capfd.readouterr().out
    assert_drawn_by(pair, tensors, version, engine.generate(requests(32), SamplingParams(20)), 32)
    after = weights(pair, 16)
    version = publish(engine, after)
    assert engine.router.num_serving == 2
    assert_drawn_by(pair, after, version, engine.generate(requests(32), SamplingParams(20)), 32)
    engine.close()


def test_a_rollout_goes_on_without_the_server_whose_update_fails_meanwhile(pair: Served) -> None:
    all_up(pair)
    engine = pair.engine()
    old, new = weights(pair, 21), weights(pair, 22)
    before = publish(engine, old)
    after = 0

    def update_one_of_two() -> None:
        nonlocal after
        refusing = engine.clients[0]
        after = publish(engine, new, lambda: engine._loop.run(refusing.call("/end_weight_update", 300.0)))

    drawn = draw(engine, requests(64), update_one_of_two)
    assert engine.router.num_serving == 1 and engine.router.num_resent > 0
    models = {before: reference(pair, old), after: reference(pair, new)}
    for request, completion in zip(requests(64), drawn, strict=True):
        assert completion.finish_reason in ("stop", "length")
        assert_mu_is_of_the_versions_that_drew(models, request, completion)
    publish(engine, old)
    assert engine.router.num_serving == 2
    engine.close()


@pytest.mark.parametrize("fault", ["server killed", "connections cut"])
def test_a_broadcast_that_breaks_off_begins_anew(pair: Served, fault: str) -> None:
    all_up(pair)
    engine = pair.engine("distributed", sync_timeout_s=300.0)
    publish(engine, weights(pair, 17))
    tensors = weights(pair, 18)

    def cut() -> None:
        """Every connection of this process with the servers' process group; HTTP stays."""
        http = {int(client.endpoint.url.rsplit(":", 1)[1]) for client in engine.clients}
        num_cut = 0
        for connection in psutil.Process().net_connections("tcp"):
            if connection.raddr and connection.raddr.port not in http:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as copy:
                    copy.shutdown(socket.SHUT_RDWR)
                    num_cut += 1  # An earlier test's may close while we look.
        assert num_cut

    faults = {"server killed": lambda: end(pair.keepers[1].server, signal.SIGKILL), "connections cut": cut}
    version = publish(engine, tensors, after_first_bucket=faults[fault])
    assert engine.router.num_serving == (1 if fault == "server killed" else 2)
    assert_drawn_by(pair, tensors, version, engine.generate(requests(32), SamplingParams(20)), 32)
    engine.close()
    all_up(pair)


def test_a_full_disk_fails_the_update_by_name_and_leaves_nothing_on_it(pair: Served, tmp_path: Path) -> None:
    all_up(pair)
    engine = pair.engine("disk", sync_dir=str(tmp_path))
    tensors = weights(pair, 19)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SyncFailed, match="could not be written to .* set rollout.engine.sync_dir to a larger disk"):
            publish(engine, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())
    version = publish(engine, tensors)
    assert not any(tmp_path.iterdir())
    assert_drawn_by(pair, tensors, version, engine.generate(requests(32), SamplingParams(20)), 32)
    engine.close()


def test_released_servers_that_are_lost_or_left_out_come_back(pair: Served) -> None:
    all_up(pair)
    engine = pair.engine("distributed")
    victim = pair.keepers[0]
    publish(engine, weights(pair, 23))
    engine.release_memory()

    # One dies. While the trainer has its GPU it is not started again; the other takes the weights alone.
    victim.hold()
    num_restarts = victim.num_restarts
    end(victim.server, signal.SIGKILL)
    wait_for(lambda: victim.num_restarts > num_restarts)
    tensors = weights(pair, 24)
    version = publish(engine, tensors)
    assert engine.router.num_serving == 1 and not victim.server.is_running()
    assert_drawn_by(pair, tensors, version, engine.generate(requests(16), SamplingParams(20)), 16)
    victim.let_go()
    all_up(pair)

    # It holds memory and was sent nothing. It gives that back, and takes part again.
    engine.release_memory()
    publish(engine, weights(pair, 25))
    assert engine.router.num_serving == 2
    engine.close()

    # An update fails half-way on the other: it has weights, but no cache, when it is asked for its memory again.
    engine = pair.engine()
    engine.release_memory()
    client = engine.clients[1]
    publish(engine, weights(pair, 26), lambda: engine._loop.run(client.call("/end_weight_update", 300.0)))
    assert engine.router.num_serving == 1
    engine.release_memory()
    tensors = weights(pair, 27)
    version = publish(engine, tensors)
    assert engine.router.num_serving == 2
    assert_drawn_by(pair, tensors, version, engine.generate(requests(32), SamplingParams(20)), 32)
    engine.close()

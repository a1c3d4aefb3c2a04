"""Who is named when a process of a run is stopped or silent, and when it is Ray that ends; with real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from drpo_megatron.orchestration.actors import ProcessActor
from drpo_megatron.orchestration.cluster import _start_ray
from drpo_megatron.orchestration.workers import Process, ProcessFailure, Supervisor

SILENCE_S = 4.0


class Worker(ProcessActor):
    """What a process of a run does, as seen from the driver: it answers, works on, or loses a peer that it waits for."""

    def answer(self) -> int:
        return os.getpid()

    def works_on(self, seconds: float) -> None:
        time.sleep(seconds)

    def gives_up_waiting(self, seconds: float) -> None:
        time.sleep(seconds)
        raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")

    def streams(self, count: int, seconds: float) -> Iterator[int]:
        for number in range(count):
            time.sleep(seconds)
            yield number


@pytest.fixture(scope="module")
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _start_ray(8, None)
    yield
    ray.shutdown()


@pytest.fixture
def two(own_ray: None, tmp_path: Path) -> Iterator[Supervisor]:
    """A supervisor of `trainer rank 0` and `trainer rank 1`."""
    supervisor = Supervisor(silence_s=SILENCE_S)
    for rank in range(2):
        actor = ray.remote(Worker).options(num_cpus=0).remote(os.getcwd())
        supervisor.processes.append(Process(f"trainer rank {rank}", actor, tmp_path / f"trainer-rank{rank}.log"))
    for process in supervisor.processes:
        process.place = ray.get(process.actor.place.remote())
        ray.get(process.actor.open_log.remote(process.log_file))
    yield supervisor
    for process in supervisor.processes:
        ray.kill(process.actor)


def stop(process: Process) -> int:
    assert process.place is not None
    os.kill(process.place.pid, signal.SIGSTOP)
    return process.place.pid


def test_a_stopped_process_is_named_and_not_the_one_that_waited_for_it(two: Supervisor) -> None:
    first, second = two.processes
    pid = stop(second)
    calls = [(first, first.actor.gives_up_waiting.remote(SILENCE_S / 2)), (second, second.actor.answer.remote())]
    with pytest.raises(ProcessFailure) as caught:
        two.wait(calls)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("trainer rank 1 (host ") and f"pid {pid}) was stopped (SIGSTOP" in lines[0]
    assert any(line.startswith("  seen as: trainer rank 0 ") and "Timed out waiting" in line for line in lines)
    assert lines[-1].startswith(f"  the limit is cluster.step_timeout_s={SILENCE_S:g} ")
    for process in two.processes:  # The stopped one, too.
        assert "Current thread" in process.log_file.read_text() or "Thread 0x" in process.log_file.read_text()


def test_when_nobody_answers_the_stopped_one_is_named_though_it_was_asked_nothing(two: Supervisor) -> None:
    first, second = two.processes
    stop(second)
    started = time.monotonic()
    with pytest.raises(
        ProcessFailure, match=r"^trainer rank 1 .* was stopped (.|\n)*seen as: trainer rank 0 gave no answer"
    ):
        two.wait([(first, first.actor.works_on.remote(600))])
    assert time.monotonic() - started >= SILENCE_S
    assert "works_on" in first.log_file.read_text(), "the stack says what it was at"


def test_one_that_hangs_is_named_with_its_stack(two: Supervisor) -> None:
    first, second = two.processes
    with pytest.raises(ProcessFailure, match=r"^trainer rank 0 .* gave no answer for \d+ s"):
        two.wait([(first, first.actor.works_on.remote(600)), (second, second.actor.answer.remote())])
    assert "works_on" in first.log_file.read_text()


def test_work_that_takes_longer_than_the_limit_goes_on_while_answers_come(two: Supervisor) -> None:
    first, _ = two.processes
    seen: list[int] = []
    answers = first.actor.streams.options(num_returns="streaming").remote(4, SILENCE_S / 2)
    two.watch(first, answers, seen.append)
    two.wait_until(lambda: len(seen) == 4)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_the_end_of_rays_own_process_is_blamed_on_no_process_of_the_run(part: str, tmp_path: Path) -> None:
    """Each ends a Ray of its own. Left alone, Ray would end the driver a minute after its GCS, without a word."""
    ray.shutdown()
    _start_ray(2, None)
    try:
        actor = ray.remote(Worker).options(num_cpus=0).remote(os.getcwd())
        process = Process("trainer rank 0", actor, tmp_path / "trainer-rank0.log", ray.get(actor.place.remote()))
        call = (process, actor.works_on.remote(600))
        [ended] = ray._private.worker._global_node.all_processes[part]
        os.kill(ended.process.pid, signal.SIGKILL)
        with pytest.raises(ProcessFailure) as caught:
            Supervisor([process]).wait([call])
    finally:
        ray.shutdown()
    assert str(caught.value).startswith(f"Ray's {part} (pid {ended.process.pid}) ended: killed from outside")
    assert "trainer rank" not in str(caught.value)

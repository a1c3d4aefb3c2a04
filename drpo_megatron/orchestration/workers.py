"""Calls to the processes of a run, and what happens when one of them fails.

Every call waits for all its answers and fails at once when any process of the run raises or dies, busy or idle. A
rank that dies makes its peers raise connection errors, often before its own death is known, so an error that may be
another's fault waits a few seconds for a death to take the blame. The death of a machine takes Ray longer to notice.

A process that was stopped doesn't die: its peers wait in a collective until that raises, or nobody answers any more. Both
take `silence_s`. Then the processes are looked at one by one (`examine.py`), and write their stacks into their logs.

Work in the background (rollouts while the ranks train) has no wait of its own: every wait hands on its answers, too,
and meets its failures. There is one thread, so nothing has to be locked, and Ctrl-C ends whatever is waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from drpo_megatron.orchestration import signals
from drpo_megatron.orchestration.actors import Place
from drpo_megatron.orchestration.examine import examine
from drpo_megatron.rewards.base import Response
from drpo_megatron.types import Completion, Prompt

if TYPE_CHECKING:
    from drpo_megatron.rewards.scorer import Scored
    from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams

_POLL_S = 1.0
_GRACE_S = 8.0
"""How long a connection error waits for the news that another process died."""
_MACHINE_GRACE_S = 60.0
"""The same for the news that a machine is gone, when there are several. Ray asks 5 times in at least 15 s."""
_LOG_LINES = 15
_PARTS_OF_RAY = ("raylet", "gcs_server")
"""Without which it doesn't work."""


class ProcessFailure(RuntimeError):
    """A process of the run raised, died or did not answer. The message is for the user, log included."""


class LostMachine(ProcessFailure):
    """A machine left the Ray cluster with all its processes. The run can continue on another."""


@dataclass(eq=False)
class Process:
    """One actor, and what an error has to say of it."""

    name: str
    """`trainer rank 0`, `engine 1`, `rewards`."""
    actor: Any
    log_file: Path
    place: Place | None = None
    ping: Any = None
    """The answer awaited to the last question whether it lives. Comes as an error when the process dies."""

    @property
    def gpus(self) -> tuple[int | str, ...]:
        """Of its machine; none on a CPU."""
        return self.place.gpus if self.place else ()

    def stand_on(self, others: Sequence[Process]) -> None:
        """On the GPUs of others, which are on its machine: Ray knows of the first one only."""
        assert self.place is not None
        self.place = replace(self.place, gpus=tuple(gpu for other in others for gpu in other.gpus))

    def describe(self, what: str) -> str:
        where = f" (host {self.place.host}, pid {self.place.pid})" if self.place else ""
        lines = [f"{self.name}{where} {what}", f"  log: {self.log_file}"]
        lines += [f"  | {line}" for line in _tail(self.log_file)]
        return "\n".join(lines)


Call = tuple[Process, Any]
"""A process and the ray.ObjectRef of its answer."""


@dataclass
class Supervisor:
    """Knows every process of the run, so that no wait outlives any of them."""

    processes: list[Process] = field(default_factory=list)
    silence_s: float = float("inf")
    """How long nobody may answer while something is asked for."""
    _background: dict[Any, tuple[Process, Callable[[Any], None]]] = field(default_factory=dict)
    """Who works on it and who takes the answers, by what to wait for: a ray.ObjectRef or a stream of them."""

    def wait(self, calls: Sequence[Call], timeout_s: float | None = None) -> list[Any]:
        """The answers in order. Raises ProcessFailure that names the process at fault."""
        pending = {ref: process for process, ref in calls}
        self._serve(pending, lambda: not pending, timeout_s)
        return ray.get([ref for _, ref in calls])

    def wait_until(self, is_done: Callable[[], bool]) -> None:
        """Hand on answers of the background until `is_done()`. Raises as `wait`."""
        self._serve({}, is_done)

    def watch(self, process: Process, answer: Any, receive: Callable[[Any], None]) -> None:
        """From now on every wait hands the answer (each answer of a ray.ObjectRefGenerator) to `receive`."""
        self._background[answer] = (process, receive)

    def _serve(self, pending: dict[Any, Process], is_done: Callable[[], bool], timeout_s: float | None = None) -> None:
        patience_s = self.silence_s if timeout_s is None else timeout_s
        heard = started = time.monotonic()
        while not is_done():
            signals.raise_if_due()
            waiting = [*pending, *self._background]
            assert waiting, "every answer came, and yet something is awaited"
            done, _ = ray.wait(waiting, timeout=_POLL_S)
            if not done and (ended := _ended_parts_of_ray()):  # Ray would end this process, too, a minute later.
                raise ProcessFailure(ended)
            failures = self._take(done, pending) if done else self._failed_meanwhile(pending)
            if failures:
                raise self._blame(failures, pending)
            if done and timeout_s is None:
                heard = time.monotonic()
            if time.monotonic() > heard + patience_s:
                asked = [*pending.values(), *(process for process, _ in self._background.values())]
                raise self._silence(list(dict.fromkeys(asked)), time.monotonic() - started)

    def _take(self, done: Sequence[Any], pending: dict[Any, Process]) -> list[Failure]:
        """What has been answered is no longer pending, or is handed on."""
        failures = []
        for answer in done:
            failure = _failure(pending.pop(answer), answer) if answer in pending else self._hand_on(answer)
            failures += [failure] if failure else []
        return failures

    def _hand_on(self, answer: Any) -> Failure | None:
        process, receive = self._background[answer]
        is_stream = isinstance(answer, ray.ObjectRefGenerator)
        ref = next(answer, None) if is_stream else answer
        failure = _failure(process, ref) if ref is not None else None
        if failure or ref is None or not is_stream:
            del self._background[answer]
        if ref is not None and not failure:
            receive(ray.get(ref))
        return failure

    def _failed_meanwhile(self, pending: dict[Any, Process]) -> list[Failure]:
        """Failures among the other processes of the run, by pinging those that are idle."""
        failures = []
        for process in self.processes:
            if process.ping is not None and ray.wait([process.ping], timeout=0)[0]:
                if failure := _failure(process, process.ping):
                    failures.append(failure)
                process.ping = None
            if process.ping is None:
                process.ping = process.actor.is_alive.remote()
        return failures

    def _blame(self, failures: list[Failure], pending: dict[Any, Process]) -> ProcessFailure:
        places = [process.place for process in self.processes if process.place]
        num_machines = len({place.node_id for place in places})
        deadline = time.monotonic() + (_MACHINE_GRACE_S if num_machines > 1 else _GRACE_S)
        while all(failure.may_be_anothers for failure in failures) and time.monotonic() < deadline:
            waiting = [*pending, *self._background]
            done, _ = ray.wait(waiting, timeout=0.2) if waiting else (time.sleep(0.2), None)
            failures += self._take(done or (), pending)
            failures += self._failed_meanwhile(pending)
            if num_machines > 1 and self._lost_machines():
                break
        for failure in failures:
            failure.write_traceback()
        if num_machines > 1 and (lost := self._lost_machines()):
            return LostMachine("\n".join(lost))
        if ended := _ended_parts_of_ray():
            return ProcessFailure(ended)
        if stopped := self._stopped():
            first = failures[0].text.splitlines()[0]
            return ProcessFailure("\n".join([*(_stopped(p) for p in stopped), f"  seen as: {first}", self._stacks]))
        culprits = [f for f in failures if f.is_death] or [f for f in failures if not f.may_be_anothers] or failures
        return ProcessFailure(culprits[0].text)

    def _silence(self, asked: list[Process], seconds: float) -> ProcessFailure:
        """Nobody answers: of those that are stopped, or else of those that were asked, with all stacks in the logs."""
        if ended := _ended_parts_of_ray():
            return ProcessFailure(ended)
        what = f"gave no answer for {seconds:.0f} s"
        if stopped := self._stopped():
            texts = [_stopped(process) for process in stopped]
            texts.append(f"  seen as: {', '.join(process.name for process in asked)} {what}")
        else:
            texts = [process.describe(what) for process in asked]
        return ProcessFailure("\n".join([*texts, self._stacks]))

    def _stopped(self) -> list[Process]:
        """Those that were stopped from outside. All processes write their stacks, for there was a fault."""
        states = examine(self.processes, write_stacks=True)
        return [process for process, state in states.items() if state == "stopped"]

    @property
    def _stacks(self) -> str:
        directory = self.processes[0].log_file.parent
        return (
            f"  the limit is cluster.step_timeout_s={self.silence_s:g} (cluster.startup_timeout_s at the start); what every "
            f"process was at stands at the end of its log in {directory}"
        )

    def _lost_machines(self) -> list[str]:
        """A sentence for each machine that held processes of the run and has left the Ray cluster."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost: dict[str, list[str]] = {}
        for process in self.processes:
            if (place := process.place) and place.node_id not in alive:
                lost.setdefault(f"machine {place.host} ({place.address})", []).append(process.name)
        return [f"{machine} left the Ray cluster, and with it {', '.join(who)}" for machine, who in lost.items()]


@dataclass(frozen=True, slots=True)
class Failure:
    process: Process
    error: RayError

    @property
    def is_death(self) -> bool:
        """Its own. One that met another's death (a rank that was sending to an engine) raises both kinds in one."""
        is_death = isinstance(self.error, RayActorError | OutOfMemoryError)
        return is_death and not isinstance(self.error, RayTaskError)

    @property
    def may_be_anothers(self) -> bool:
        """torch.distributed raises RuntimeErrors for a lost peer; Ray's own come when the actor called is gone.

        An actor is unavailable, not dead, while Ray doesn't know whether its machine is gone.
        """
        if isinstance(self.error, ActorUnavailableError):
            return True
        return isinstance(self.error, RayTaskError) and isinstance(self.error.cause, RuntimeError | RayError)

    def write_traceback(self) -> None:
        """Into the process's own log: Ray brings it to the driver only."""
        if isinstance(self.error, RayTaskError):
            with suppress(OSError), self.process.log_file.open("a") as log:
                log.write(f"{str(self.error).rstrip()}\n")

    @property
    def text(self) -> str:
        if self.is_death:
            return self.process.describe(f"died: {_death_cause(str(self.error))}")
        cause = self.error.cause if isinstance(self.error, RayTaskError) else self.error
        return self.process.describe(f"failed: {type(cause).__name__}: {_cut(str(cause), 1000)}")


@dataclass
class ActorGroup:
    """Processes that do the same kind of work."""

    processes: list[Process]
    supervisor: Supervisor

    def __len__(self) -> int:
        return len(self.processes)

    @property
    def actors(self) -> list[Any]:
        return [process.actor for process in self.processes]

    def call(self, method: str, *args: Any) -> list[Any]:
        """`method(*args)` on all of them at once. Large arguments travel once, through the object store."""
        shared = [ray.put(arg) if isinstance(arg, list | tuple | dict) else arg for arg in args]
        return self.each(method, [tuple(shared)] * len(self.processes))

    def each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`method(*args[i])` on the i-th process."""
        calls = [(p, getattr(p.actor, method).remote(*a)) for p, a in zip(self.processes, args, strict=True)]
        return self.supervisor.wait(calls)


class EngineGroup(ActorGroup):
    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        """Completions in the order of the requests. Every engine gets each n-th: equal shares of every prompt.

        May take longer than `Supervisor.silence_s`, for each completion is a sign of life.
        """
        completions: dict[int, Completion] = {}
        self.stream(requests, params, completions.update)
        self.supervisor.wait_until(lambda: len(completions) == len(requests))
        return [completions[index] for index in range(len(requests))]

    def stream(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        receive: Callable[[list[tuple[int, Completion]]], None],
    ) -> None:
        """`generate` in the background: (index of the request, completion) pairs, as they are drawn."""
        n = len(self)
        for i, process in enumerate(self.processes):
            if share := requests[i::n]:
                answers = process.actor.stream.options(num_returns="streaming").remote(share, params)
                self.supervisor.watch(process, answers, lambda b, i=i: receive([(i + n * j, c) for j, c in b]))


class RewardGroup(ActorGroup):
    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> Scored:
        return self.call("score", _responses(pairs))[0]

    def submit(self, pairs: Sequence[tuple[Prompt, Completion]], receive: Callable[[Scored], None]) -> None:
        """`score` in the background, beside what else is being scored."""
        [process] = self.processes
        self.supervisor.watch(process, process.actor.score.remote(_responses(pairs)), receive)


def _responses(pairs: Sequence[tuple[Prompt, Completion]]) -> list[Response]:
    """What rewards may see: no log-probs, no routed experts."""
    return [Response.of(prompt, completion) for prompt, completion in pairs]


@dataclass(frozen=True, slots=True)
class Workers:
    """All processes of a run but the driver."""

    ranks: ActorGroup
    engines: EngineGroup
    rewards: RewardGroup
    servers: ActorGroup
    take_turns: bool
    """Servers and ranks share GPUs: only one of them has the memory at a time."""

    def give_memory_to_ranks(self) -> None:
        """No effect unless they take turns. Nothing is drawn from here on to the next publication of weights."""
        if self.take_turns:
            self.servers.call("hold_restarts")
            self.engines.call("release_memory")

    def give_memory_to_servers(self) -> None:
        """Before weights are published, which the servers' memory comes back with. No effect unless they take turns."""
        if self.take_turns:
            self.ranks.call("release_cached_memory")
            self.servers.call("allow_restarts")

    def peak_rss_mb(self) -> dict[str, float]:
        groups = (self.ranks, self.engines, self.rewards)
        return {
            process.log_file.stem: megabytes
            for group in groups
            for process, megabytes in zip(group.processes, group.call("peak_rss_mb"), strict=True)
        }


def _failure(process: Process, ref: Any) -> Failure | None:
    try:
        ray.get(ref)
    except RayError as error:
        return Failure(process, error)
    return None


def _stopped(process: Process) -> str:
    return process.describe("was stopped (SIGSTOP, a debugger, a frozen container)")


def _ended_parts_of_ray() -> str:
    """Of the Ray that this run started: which of its own processes are no longer there."""
    node = ray._private.worker._global_node
    parts = node.dead_processes() if node is not None else []
    dead = [(name, process.pid) for name, process in parts if name in _PARTS_OF_RAY]
    if not dead:
        return ""
    who = ", ".join(f"{name} (pid {pid})" for name, pid in dead)
    return (
        f"Ray's {who} ended: killed from outside (SIGKILL, out of memory), or crashed. It manages the processes of this "
        "machine, which end with it; none of the run's own is at fault"
    )


def _death_cause(text: str) -> str:
    """Ray's report of a death, in one sentence."""
    if "running low on memory" in text or "OutOfMemory" in text:
        used = re.search(r"was ([\d.]+\wB)(?: used)? / ([\d.]+\wB)", text)
        numbers = f" ({used[1]} of {used[2]} used)" if used else ""
        return (
            f"Ray ended it because its machine runs out of memory{numbers}; put fewer processes on it, or a larger one "
            "(RAY_memory_usage_threshold says from which share on)"
        )
    if "node has died" in text or "node was terminated" in text:
        return "its machine left the Ray cluster"
    return "the process ended without a Python exception: killed (SIGKILL, out of memory) or crashed in native code"


def _tail(log_file: Path) -> list[str]:
    try:
        return [_cut(line, 200) for line in log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]]
    except OSError:
        return ["(no log file yet)"]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."

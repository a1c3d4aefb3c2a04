"""Start the processes of a run and end them, on this machine or on a Ray cluster that runs already.

    with cluster(config, logs, clock, say) as workers: ...

Beside the command line the only module that touches environment variables.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import AuthenticationTokenLoader
from ray._raylet import Config as RayConfig

from drpo_megatron.config import Config
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.orchestration.actors import EngineActor, RewardActor, ServerActor, TrainerRank
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.placement import (
    Numbers,
    Spot,
    engine_spot,
    gpus_a_server,
    is_colocated,
    rank_spots,
    ranks_have_gpus,
)
from drpo_megatron.orchestration.scratch import ray_directory
from drpo_megatron.orchestration.signals import STOP_SIGNALS, held
from drpo_megatron.orchestration.workers import (
    ActorGroup,
    Call,
    EngineGroup,
    Process,
    RewardGroup,
    Supervisor,
    Workers,
)
from drpo_megatron.precision.recipes import environment as precision_environment

_CONSOLE_POPEN: Any = ray._private.services.ConsolePopen
LOOPBACK = "127.0.0.1"
_ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_CALLS_AT_ONCE = 16
"""Of the engine in front of SGLang servers: rollouts of several steps, new weights in between, pings."""
_SCORINGS_AT_ONCE = 2**16
"""More than a run has groups underway: one that hangs must not keep others from the workers."""
_RAY_ATTEMPTS = 4
_OBJECT_STORE_BYTES = 512 * 2**20
"""Of our own Ray: holds a weight bucket, a rollout and little else; more than that spills to the disk."""


@contextmanager
def cluster(
    config: Config, logs: Path, clock: Clock, say: Callable[[str], None], *, trains: bool = True
) -> Iterator[Workers]:
    """All processes of the run, started and ready. They end with the block, however it ends.

    trains=False starts no trainer ranks; with rollout.from_dump there are neither engines nor rewards.

    Raises: ValueError when the cluster is too small; ProcessFailure when a process fails to start in time.
    """
    with ExitStack() as stack:
        with clock.phase("startup"):
            numbers = Numbers.of(config, trains)
            stack.enter_context(_ray(config, numbers))
            workers = _start(config, numbers, logs, say)
        yield workers


@contextmanager
def _ray(config: Config, numbers: Numbers) -> Iterator[None]:
    address, of_ray = config.cluster.ray_address, ExitStack()
    # ray/_private/worker.py:439,2774 would tell every death and lost peer on its own; our one error names the culprit.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    ray._private.worker.listen_error_messages = lambda worker, stopped: None
    # ray/_private/node.py:667 and worker.py:1679 would take SIGTERM: ours saves, or says how to continue.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    # ray/_private/services.py:1071: signals to the driver's process group (`timeout`, a closed terminal) would end Ray.
    ray._private.services.ConsolePopen = _OwnGroup
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # The default says at length that it will change.
    try:
        with _stop_signals_wait():
            if address:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            else:
                temporary = of_ray.enter_context(ray_directory())
                _let_in_who_has_the_token(temporary)
                _start_ray(max(os.cpu_count() or 1, sum(numbers)), str(temporary))
        if address:
            _wait_for_machines(config.cluster.num_machines, config.cluster.startup_timeout_s)
        yield
    finally:
        with held():  # A second Ctrl-C must not leave processes behind.
            ray.shutdown()
        of_ray.close()


class _OwnGroup(_CONSOLE_POPEN):
    """A process of Ray's, with no signal blocked, and out of reach of those to the driver's process group."""

    def __init__(self, *args: Any, preexec_fn: Callable[[], None], **options: Any) -> None:
        def prepare() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            preexec_fn()

        super().__init__(*args, preexec_fn=prepare, process_group=0, **options)


@contextmanager
def _stop_signals_wait() -> Iterator[None]:
    """Until Ray has started: it puts a handler of its own in place of that for SIGTERM, which ends the process."""
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _let_in_who_has_the_token(directory: Path) -> None:
    """Into our Ray. By itself it would keep a token in HOME, which may not be writable."""
    token = directory / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    RayConfig.initialize("")  # Both are read once, and may have been for another Ray.
    AuthenticationTokenLoader.instance().reset_cache()


def _start_ray(num_cpus: int, temporary: str) -> None:
    """A Ray of our own, which listens on the loopback interface alone.

    It allows itself 30 s to start (ray/_private/node.py:428), too few for a machine that is busy. What a start that
    failed leaves running is ended before the next, which would only find the machine busier.
    """
    # ray/_private/services.py:801,815 would turn 127.0.0.1 into an address that others reach, unless Ray has no clusters.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    for attempt in range(1, _RAY_ATTEMPTS + 1):
        try:
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=temporary,
            )
            return
        except Exception as error:
            ray.shutdown()
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if any(temporary in part for part in process.cmdline()):
                        process.kill()
            if "timed out during startup" not in str(error) or attempt == _RAY_ATTEMPTS:
                raise


def _wait_for_machines(wanted: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while len(names := sorted(node["NodeName"] for node in ray.nodes() if node["Alive"])) < wanted:
        if time.monotonic() > deadline:
            raise ValueError(
                f"cluster.num_machines={wanted}, but after cluster.startup_timeout_s={timeout_s:g} the Ray cluster has "
                f"{len(names)}: {', '.join(names)}; look at why Ray did not start on the others"
            )
        time.sleep(1)


def _start(config: Config, numbers: Numbers, logs: Path, say: Callable[[str], None]) -> Workers:
    nouns = ("trainer rank", "engine", "reward process", "SGLang server")
    say(f"starting {', '.join(_count(n, noun) for n, noun in zip(numbers, nouns, strict=True) if n)} ...")
    started, timeout_s = time.monotonic(), config.cluster.startup_timeout_s
    workers = launch(config, numbers, logs)
    ranks, supervisor = workers.ranks.processes, workers.ranks.supervisor
    for process in supervisor.processes:
        process.actor.open_log.remote(process.log_file)
    for rank in ranks:
        rank.actor.import_trainer.remote()

    starting = [(p, p.actor.start.remote(config, p.log_file, p.gpus)) for p in workers.servers.processes]
    endpoints = [ref for _, ref in starting]  # Ray starts the engine when they are there.
    starting += [(p, p.actor.start.remote(config, *endpoints)) for p in workers.engines.processes]
    starting += [(p, p.actor.start.remote(config)) for p in workers.rewards.processes]
    if workers.take_turns:  # A server takes its share of the memory that is free at its start: ranks come after it.
        supervisor.wait(starting, timeout_s)
        workers.give_memory_to_ranks()
        starting = []
    if ranks:
        starting += _start_ranks(config, ranks, supervisor)
    supervisor.wait(starting, timeout_s)
    say(f"all processes are up after {time.monotonic() - started:.0f} s; their output is in {logs}")
    return workers


def _python() -> dict[str, str]:
    """Ray hands a worker's Python to a shell as it stands (runtime_env/context.py:48 of 2.60): a path with a space in it
    needs quoting. Any other is left to Ray, which takes that of the node."""
    quoted = shlex.quote(sys.executable)
    return {"py_executable": quoted} if quoted != sys.executable else {}


def launch(config: Config, numbers: Numbers, logs: Path) -> Workers:
    """All processes of the run in their places, none of them started.

    Raises: ValueError when the cluster is too small; ProcessFailure when a process isn't there in time.
    """
    timeout_s = config.cluster.startup_timeout_s
    supervisor = Supervisor(silence_s=config.cluster.step_timeout_s)
    on_gpu, takes_turns = ranks_have_gpus(config, numbers), is_colocated(config, numbers)

    def add(
        actor_class: type, name: str, log: str, environment: dict[str, str], spot: Spot, num_threads: int = 1
    ) -> Process:
        actor = ray.remote(actor_class).options(
            num_cpus=spot.num_cpus,
            num_gpus=spot.num_gpus,
            max_restarts=0,
            max_concurrency=num_threads,
            runtime_env={"env_vars": environment, **_python()},
            scheduling_strategy=spot.strategy,
        )
        process = Process(name, actor.remote(os.getcwd()), (logs / f"{log}.log").absolute())
        supervisor.processes.append(process)
        return process

    def find(processes: list[Process]) -> None:
        places = supervisor.wait([(p, p.actor.place.remote()) for p in processes], timeout_s)
        for process, place in zip(processes, places, strict=True):
            process.place = place

    rank_environment = _rank_environment(config, on_gpu)
    spots = rank_spots(config, numbers, on_gpu)
    ranks = [
        add(TrainerRank, f"trainer rank {r}", f"trainer-rank{r}", rank_environment, spot)
        for r, spot in enumerate(spots)
    ]
    if on_gpu or takes_turns:  # Others get what the ranks leave, or stand beside them.
        find(ranks)
        spots = _number_by_machine(ranks, spots)

    engine_environment = _engine_environment(config)
    calls_at_once = _CALLS_AT_ONCE if isinstance(config.rollout.engine, SGLangEngineSection) else 1
    spot = engine_spot(config, numbers, on_gpu, spots)
    engines = [
        add(EngineActor, f"engine {i}", f"engine-{i}", engine_environment, spot, calls_at_once)
        for i in range(numbers.engines)
    ]
    rewards = [
        add(RewardActor, "rewards", "rewards", _environment(config, 1), Spot(), _SCORINGS_AT_ONCE)
        for _ in range(numbers.rewards)
    ]
    each = gpus_a_server(config)
    servers = [
        add(
            ServerActor,
            f"server {i}",
            f"server-{i}",
            engine_environment,
            spots[i * each].beside() if takes_turns else Spot(num_gpus=each if on_gpu else 0),
        )
        for i in range(numbers.servers)
    ]
    find(supervisor.processes)
    _number_by_machine(ranks, spots)
    if takes_turns:
        for i, server in enumerate(servers):
            server.stand_on(ranks[i * each : (i + 1) * each])
    return Workers(
        ActorGroup(ranks, supervisor),
        EngineGroup(engines, supervisor),
        RewardGroup(rewards, supervisor),
        ActorGroup(servers, supervisor),
        takes_turns,
    )


def _start_ranks(config: Config, ranks: list[Process], supervisor: Supervisor) -> list[Call]:
    host = ranks[0].place.address if config.cluster.ray_address and ranks[0].place else LOOPBACK
    opened = ranks[0].actor.open_store.remote(host, len(ranks))
    [port] = supervisor.wait([(ranks[0], opened)], config.cluster.startup_timeout_s)
    return [(p, p.actor.start.remote(config, r, host, port)) for r, p in enumerate(ranks)]


def _number_by_machine(ranks: list[Process], spots: list[Spot]) -> list[Spot]:
    """Neighbouring ranks (tensor and expert parallel groups) by machine and GPU: Ray hands out GPUs anyhow.

    Returns the spots in the new order.
    """
    placed = [(p.actor, p.place, spot) for p, spot in zip(ranks, spots, strict=True)]
    placed.sort(key=lambda item: (item[1].address, item[1].gpus))
    for process, (actor, place, _) in zip(ranks, placed, strict=True):
        process.actor, process.place = actor, place
    return [spot for _, _, spot in placed]


def _environment(config: Config, num_threads: int) -> dict[str, str]:
    """Set before the process imports torch, which reads the thread counts once."""
    # On one machine its ranks and servers meet where nobody else listens; a container's host name may mean nothing, too.
    is_alone = config.cluster.ray_address is None and sys.platform == "linux"
    return (_ON_LOOPBACK if is_alone else {}) | {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _engine_environment(config: Config) -> dict[str, str]:
    environment, engine = _environment(config, config.rollout.engine.num_threads), config.rollout.engine
    if isinstance(engine, SGLangEngineSection) and engine.uses_nccl:
        environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # A broken broadcast must not end the engine process.
    return environment


def _rank_environment(config: Config, on_gpu: bool) -> dict[str, str]:
    environment = _environment(config, config.cluster.rank_threads) | precision_environment(config.precision)
    if on_gpu:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Orders Megatron's communication before the kernels it feeds.
    else:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's compiled helpers cost minutes on a CPU and gain nothing.
    return environment


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Start the processes of a run and end them, on this machine or on a Ray cluster that runs already.

    with cluster(config, logs, clock, say) as workers: ...

Beside the command line the only module that touches environment variables.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from drpo_megatron.config import Config
from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.orchestration.actors import EngineActor, RewardActor, ServerActor, TrainerRank
from drpo_megatron.orchestration.clock import Clock
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

_CALLS_AT_ONCE = 16
"""Of the engine in front of SGLang servers: rollouts of several steps, new weights in between, pings."""
_RAY_ATTEMPTS = 4
_OBJECT_STORE_BYTES = 512 * 2**20
"""Of our own Ray: holds a weight bucket, a rollout and little else; more than that spills to the disk."""


class Numbers(NamedTuple):
    """How many processes of each kind a run has."""

    ranks: int
    engines: int
    rewards: int
    servers: int

    @classmethod
    def of(cls, config: Config, trains: bool) -> Numbers:
        ranks, engine = config.parallel.num_ranks if trains else 0, config.rollout.engine
        if config.rollout.from_dump is not None:
            return cls(ranks, 0, 0, 0)
        if isinstance(engine, SGLangEngineSection):  # One process speaks to all servers.
            return cls(ranks, 1, 1, 0 if engine.servers else engine.num_engines)
        return cls(ranks, engine.num_engines, 1, 0)


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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = config.cluster.ray_address
    temporary = None if address else tempfile.mkdtemp(prefix="ray-", dir=_short_temporary_directory())
    # ray/_private/worker.py:439,2774 would tell every death and lost peer on its own; our one error names the culprit.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    ray._private.worker.listen_error_messages = lambda worker, stopped: None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # The default says at length that it will change.
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            _wait_for_machines(config.cluster.num_machines, config.cluster.startup_timeout_s)
        else:
            _start_ray(max(os.cpu_count() or 1, sum(numbers)), temporary)
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init takes it for itself.
        yield
    finally:
        on_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)  # A second Ctrl-C must not leave processes behind.
        ray.shutdown()
        signal.signal(signal.SIGINT, on_sigint)
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _start_ray(num_cpus: int, temporary: str | None) -> None:
    """A Ray of our own. It allows itself 30 s to start (ray/_private/node.py:428), too few for a machine that is busy."""
    for attempt in range(1, _RAY_ATTEMPTS + 1):
        try:
            ray.init(
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=temporary,
            )
            return
        except Exception as error:
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
    num_ranks, num_engines, num_rewards, num_servers = numbers
    nouns = ("trainer rank", "engine", "reward process", "SGLang server")
    say(f"starting {', '.join(_count(n, noun) for n, noun in zip(numbers, nouns, strict=True) if n)} ...")
    started, timeout_s = time.monotonic(), config.cluster.startup_timeout_s
    on_gpu = _ranks_have_gpus(config, numbers)
    spare_gpus = int(ray.cluster_resources().get("GPU", 0)) - num_ranks
    engines_on_gpu = on_gpu and not num_servers and spare_gpus >= num_engines
    supervisor = Supervisor()

    def launch(
        actor_class: type,
        name: str,
        log: str,
        environment: dict[str, str],
        num_gpus: int = 0,
        machine: str | None = None,
        num_threads: int = 1,
    ) -> Process:
        actor = ray.remote(actor_class).options(
            num_cpus=1,
            num_gpus=num_gpus,
            max_restarts=0,
            max_concurrency=num_threads,
            runtime_env={"env_vars": environment},
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False) if machine else "SPREAD",
        )
        process = Process(name, actor.remote(os.getcwd()), (logs / f"{log}.log").absolute())
        supervisor.processes.append(process)
        return process

    rank_environment = _rank_environment(config, on_gpu)
    ranks = [
        launch(TrainerRank, f"trainer rank {r}", f"trainer-rank{r}", rank_environment, int(on_gpu), machine)
        for r, machine in enumerate(_machines_of_ranks(num_ranks, on_gpu))
    ]
    if on_gpu:  # Only then may engines have GPUs: of what the ranks left.
        supervisor.wait([(p, p.actor.place.remote()) for p in ranks], timeout_s)
    engine_environment = _environment(config.rollout.engine.num_threads)
    calls_at_once = _CALLS_AT_ONCE if isinstance(config.rollout.engine, SGLangEngineSection) else 1
    engines = [
        launch(
            EngineActor,
            f"engine {i}",
            f"engine-{i}",
            engine_environment,
            int(engines_on_gpu),
            num_threads=calls_at_once,
        )
        for i in range(num_engines)
    ]
    rewards = [launch(RewardActor, "rewards", "rewards", _environment(1)) for _ in range(num_rewards)]

    gpus_each = _gpus_a_server(config) if on_gpu else 0
    servers = [
        launch(ServerActor, f"server {i}", f"server-{i}", engine_environment, gpus_each) for i in range(num_servers)
    ]

    processes = [*ranks, *engines, *rewards, *servers]
    places = supervisor.wait([(p, p.actor.place.remote()) for p in processes], timeout_s)
    for process, place in zip(processes, places, strict=True):
        process.place = place
    _number_by_machine(ranks)
    for process in processes:
        process.actor.open_log.remote(process.log_file)

    starting = [(p, p.actor.start.remote(config, p.log_file)) for p in servers]
    endpoints = [ref for _, ref in starting]  # Ray starts the engine when they are there.
    starting += [(p, p.actor.start.remote(config, *endpoints)) for p in engines]
    starting += [(p, p.actor.start.remote(config)) for p in rewards]
    if ranks:
        starting += _start_ranks(config, ranks, supervisor)
    supervisor.wait(starting, timeout_s)
    say(f"all processes are up after {time.monotonic() - started:.0f} s; their output is in {logs}")
    return Workers(ActorGroup(ranks, supervisor), EngineGroup(engines, supervisor), RewardGroup(rewards, supervisor))


def _start_ranks(config: Config, ranks: list[Process], supervisor: Supervisor) -> list[Call]:
    for rank in ranks:
        rank.actor.import_trainer.remote()
    host = ranks[0].place.address if config.cluster.ray_address and ranks[0].place else "127.0.0.1"
    opened = ranks[0].actor.open_store.remote(host, len(ranks))
    [port] = supervisor.wait([(ranks[0], opened)], config.cluster.startup_timeout_s)
    return [(p, p.actor.start.remote(config, r, host, port)) for r, p in enumerate(ranks)]


def _machines_of_ranks(num_ranks: int, on_gpu: bool) -> list[str]:
    """Ray's name of the machine of each rank. On GPUs they fill one machine after the other, so that whole machines are
    left for engines of several GPUs; on CPUs every machine gets the same share.
    """
    machines = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeName"])
    if not on_gpu:
        return [machines[r * len(machines) // num_ranks]["NodeID"] for r in range(num_ranks)]
    slots = [node["NodeID"] for node in machines for _ in range(int(node["Resources"].get("GPU", 0)))]
    return slots[:num_ranks]


def _number_by_machine(ranks: list[Process]) -> None:
    """Neighbouring ranks (tensor and expert parallel groups) by machine and GPU: Ray hands out GPUs anyhow."""
    placed = sorted(((p.actor, p.place) for p in ranks), key=lambda item: (item[1].address, item[1].gpus))
    for process, (actor, place) in zip(ranks, placed, strict=True):
        process.actor, process.place = actor, place


def _ranks_have_gpus(config: Config, numbers: Numbers) -> bool:
    """Whether ranks get a GPU each. Raises ValueError when the cluster can't hold the run."""
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    num_ranks, backend = numbers.ranks, config.trainer.backend
    if num_cpus < (needed := sum(numbers)):
        raise ValueError(f"the Ray cluster has {num_cpus} CPUs, but the run needs {needed}, one a process")
    if backend == "cpu" or (backend == "auto" and num_gpus == 0):
        return False
    if (needed := num_ranks + numbers.servers * _gpus_a_server(config)) > num_gpus >= num_ranks:
        raise ValueError(
            f"parallel.num_ranks={num_ranks} and rollout.engine.num_engines={numbers.servers} servers of "
            f"{_gpus_a_server(config)} GPUs need {needed}, but Ray sees {num_gpus}; use fewer, or more nodes"
        )
    if num_gpus < num_ranks:
        raise ValueError(
            f"parallel.num_ranks={num_ranks} needs as many GPUs, but Ray sees {num_gpus}; "
            f"use fewer ranks, more nodes, or trainer.backend=cpu"
        )
    return True


def _gpus_a_server(config: Config) -> int:
    engine = config.rollout.engine
    return engine.tensor_parallel * engine.data_parallel if isinstance(engine, SGLangEngineSection) else 0


def _environment(num_threads: int) -> dict[str, str]:
    """Set before the process imports torch, which reads the thread counts once."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _rank_environment(config: Config, on_gpu: bool) -> dict[str, str]:
    environment = _environment(config.cluster.rank_threads) | precision_environment(config.precision)
    if on_gpu:
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Orders Megatron's communication before the kernels it feeds.
    else:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's compiled helpers cost minutes on a CPU and gain nothing.
    if config.cluster.ray_address is None and sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # The host name of a container often resolves to nothing.
    return environment


def _short_temporary_directory() -> str:
    """Ray's socket paths have to stay within 107 characters."""
    directory = tempfile.gettempdir()
    return directory if len(directory) <= 25 else "/tmp"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

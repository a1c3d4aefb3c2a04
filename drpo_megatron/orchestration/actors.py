"""The processes of a run, as thin Ray actors: each holds one object of a lower layer and hands calls through.

    TrainerRank   one Megatron rank          logs/trainer-rank<r>.log
    EngineActor   one rollout engine         logs/engine-<i>.log
    ServerActor   one SGLang server          logs/server-<i>.log
    RewardActor   the reward function        logs/rewards.log

Modules that import torch are imported inside `start`, so that their output and errors are already in the log file.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from drpo_megatron.config import Config
from drpo_megatron.console import LastingStream
from drpo_megatron.types import Completion, Sample, StepReport

if TYPE_CHECKING:
    import torch

    from drpo_megatron.precision.rollout import RolloutPrecision
    from drpo_megatron.rewards.base import Response
    from drpo_megatron.rewards.scorer import Scored
    from drpo_megatron.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
    from drpo_megatron.rollout.sglang_server import Endpoint, ServerKeeper
    from drpo_megatron.weight_sync import Bucket, Encode, PublishReport


STACK_SIGNAL = signal.SIGUSR2
"""A process of a run writes the stacks of its threads into its log when it gets it, whatever it is at."""


@dataclass(frozen=True, slots=True)
class Place:
    host: str
    """The name its Ray node was given, such as Slurm's; the machine's own where it has none."""
    address: str
    node_id: str
    """Ray's, of the machine."""
    pid: int
    gpus: tuple[int | str, ...]


class ProcessActor:
    """What every process of a run can do: say where it runs, and write all its output into its log file."""

    def __init__(self, working_dir: str) -> None:
        os.chdir(working_dir)  # Relative paths mean the same in every process.
        if working_dir not in sys.path:
            sys.path.insert(0, working_dir)

    def place(self) -> Place:
        # Numbers, or UUIDs where CUDA_VISIBLE_DEVICES has them (MIG).
        gpus = tuple(int(gpu) if str(gpu).isdigit() else str(gpu) for gpu in ray.get_gpu_ids())
        address, node_id = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
        name = next(node["NodeName"] for node in ray.nodes() if node["NodeID"] == node_id)
        return Place(socket.gethostname() if name == address else name, address, node_id, os.getpid(), gpus)

    def open_log(self, log_file: Path) -> None:
        """Send file descriptors 1 and 2 to the file: also what native libraries and child processes print."""
        file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        sys.stdout, sys.stderr = LastingStream(1), LastingStream(2)  # A full disk ends no rank by what it prints.
        faulthandler.enable(file=2)
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        print(f"--- pid {os.getpid()} on {socket.gethostname()}")

    def is_alive(self) -> bool:
        return True

    def peak_rss_mb(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class TrainerRank(ProcessActor):
    """One rank of `drpo_megatron.trainer.trainer.Trainer`. Every method is called on all ranks at once."""

    def import_trainer(self) -> None:
        """The slow part of the start, which all ranks do at once before they wait for the store."""
        import drpo_megatron.trainer.trainer  # noqa: F401

    def open_store(self, host: str, world_size: int) -> int:
        """On rank 0: the store at which the ranks meet, at `host` alone. Returns its port, chosen by the system."""
        from torch.distributed import TCPStore

        listener = socket.create_server((host, 0))  # torch's own would listen on all interfaces.
        port: int = listener.getsockname()[1]
        self.store = TCPStore(
            host, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return port

    def start(self, config: Config, rank: int, host: str, port: int) -> None:
        from datetime import timedelta

        from torch.distributed import TCPStore

        from drpo_megatron.trainer.setup import initialize_distributed
        from drpo_megatron.trainer.trainer import Trainer

        world_size, cluster = config.parallel.num_ranks, config.cluster
        if cluster.ray_address is not None:
            _stay_on_the_network_of(ray.util.get_node_ip_address())
        patience = timedelta(seconds=cluster.startup_timeout_s)
        store = self.store if rank == 0 else TCPStore(host, port, world_size, timeout=patience)
        initialize_distributed(config, rank, world_size, store, cluster.step_timeout_s)
        self.rank = rank
        self.trainer = Trainer(config)

    def device_name(self) -> str | None:
        """Of its GPU. None on a CPU."""
        import torch

        return torch.cuda.get_device_name() if self.trainer.platform.name == "gpu" else None

    def peak_memory_mb(self) -> float:
        """What torch allocated at most on the GPU since the last call. On a CPU the process's peak in all its life."""
        import torch

        if self.trainer.platform.name != "gpu":
            return self.peak_rss_mb()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**20

    def release_cached_memory(self) -> None:
        """Of the GPU: what torch has allocated and nothing uses now."""
        import torch

        if self.trainer.platform.name == "gpu":
            torch.cuda.empty_cache()

    def start_profile(self) -> None:
        from drpo_megatron.trainer.profile import Profiler

        if self.rank == 0:
            self.profiler = Profiler()
            self.profiler.start()

    def stop_profile(self, file: Path) -> None:
        if self.rank == 0:
            self.profiler.stop(file)

    def policy_version(self) -> int:
        return self.trainer.policy_version

    def supervised_step(self, samples: Sequence[Sample]) -> StepReport:
        return self.trainer.supervised_step(samples)

    def start_rl(self) -> None:
        self.trainer.start_rl()

    def train_step(self, samples: Sequence[Sample]) -> StepReport:
        return self.trainer.train_step(samples)

    def compute_logprobs(self, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
        return self.trainer.compute_logprobs(samples)

    def compute_reference_logprobs(self, samples: Sequence[Sample]) -> dict[str, tuple[float, ...]]:
        return self.trainer.compute_reference_logprobs(samples)

    def load_reference(self, directory: Path) -> None:
        self.trainer.load_reference(directory)

    def save_checkpoint(self, directory: Path) -> str | None:
        return self.trainer.save_checkpoint(directory)

    def verify_checkpoint(self, directory: Path) -> list[str]:
        return self.trainer.verify_checkpoint(directory)

    def load_checkpoint(self, directory: Path) -> None:
        self.trainer.load_checkpoint(directory)

    def publish_weights(self, engines: Sequence[Any], quantized: bool) -> PublishReport:
        """Rank 0 puts buckets into the object store for all engines to load; the others take part in the export.

        `quantized`: as `precision.rollout` says; otherwise as they are.
        """
        from drpo_megatron.weight_sync import publish

        def load(bucket: Bucket) -> None:
            shared = ray.put(bucket)
            ray.get([engine.load_weights.remote(shared) for engine in engines])

        def finish(policy_version: int, checksums: dict[str, str]) -> None:
            ray.get([engine.finish_update.remote(policy_version, checksums) for engine in engines])

        precision = self.trainer.rollout_precision if quantized else None
        report = publish(
            self.trainer.export_weights(),
            self.trainer.policy_version,
            load,
            finish,
            dtype=engine_dtype(self.trainer.config),
            encode=_encoder(precision, self.trainer.config),
        )
        if self.rank == 0:
            print(f"published version {report.policy_version}: {report.num_bytes} bytes in {report.seconds:.3f} s")
        return report

    def write_hf(self, directory: Path, source: Path) -> None:
        """The present weights as a Hugging Face checkpoint, config, tokenizer and what isn't trained from `source`."""
        from drpo_megatron.checkpoint.hf import HFCheckpoint, write_hf_checkpoint

        exported = self.trainer.export_weights()
        if self.rank == 0:
            checkpoint = HFCheckpoint(source)
            untrained = (name for name in checkpoint.names() if self.trainer.family.ignores(name))
            tensors = chain(exported, ((name, checkpoint.get(name)) for name in untrained))
            write_hf_checkpoint(directory, tensors, source, force=True)
        else:
            for _ in exported:
                pass


class ServerActor(ProcessActor):
    """Keeps one SGLang server up, on the GPUs that it is told. The server ends with this process."""

    keeper: ServerKeeper | None = None

    def start(self, config: Config, log_file: Path, gpus: Sequence[int | str]) -> Endpoint:
        """Returns when the server is ready. ServerFailure, with the end of its log, when it does not start."""
        from drpo_megatron.rollout.sglang_server import ServerKeeper, SGLangServer, server_dtype, server_flags

        section, hf_path = config.rollout.engine, config.model.hf_path
        device = f"cuda:{','.join(map(str, gpus))}" if gpus else "cpu"
        flags = server_flags(
            hf_path,
            section,
            server_dtype(section, hf_path),
            device,
            routed_experts=config.trainer.routing_replay != "off",
            releases_memory=config.cluster.placement == "colocated",
        )
        if config.precision.rolls_out_quantized:
            from drpo_megatron.conversion.fp8 import server_flags as fp8_flags

            flags += fp8_flags(hf_path, config.precision)
        host = "127.0.0.1" if config.cluster.ray_address is None else ray.util.get_node_ip_address()
        server = SGLangServer(flags, section.python, device, log_file, host)
        self.keeper = ServerKeeper(server, section, config.cluster.startup_timeout_s)
        self.keeper.start()
        return server.endpoint

    def hold_restarts(self) -> None:
        """A server that ends is not started again until `allow_restarts`. Waits for a start that is underway."""
        if self.keeper is not None:
            self.keeper.hold()

    def allow_restarts(self) -> None:
        if self.keeper is not None:
            self.keeper.let_go()

    def is_alive(self) -> bool:
        """Raises ServerFailure when the server is down for good."""
        if self.keeper is not None:
            self.keeper.check()
        return True


class EngineActor(ProcessActor):
    """One rollout engine (`drpo_megatron.rollout.engine.RolloutEngine`), on a GPU if Ray gave it one."""

    def start(self, config: Config, *endpoints: Endpoint) -> None:
        """`endpoints`: of the SGLang servers that were launched for it."""
        if config.rollout.engine.name == "sglang":
            self.engine: RolloutEngine = self._connect(config, endpoints)
            return
        from drpo_megatron.rollout.transformers_engine import TransformersEngine

        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self.engine = TransformersEngine(config.model.hf_path, config.rollout.engine, device, config.precision)

    def _connect(self, config: Config, endpoints: Sequence[Endpoint]) -> RolloutEngine:
        """Servers count when their weights were verified, so they are sent the checkpoint that they were launched with."""
        from drpo_megatron.checkpoint.hf import HFCheckpoint
        from drpo_megatron.models import get_family
        from drpo_megatron.precision.rollout import RolloutPrecision
        from drpo_megatron.rollout.sglang_engine import SGLangEngine
        from drpo_megatron.rollout.sglang_server import outside_endpoints
        from drpo_megatron.weight_sync import publish

        section, hf_path = config.rollout.engine, config.model.hf_path
        endpoints = endpoints or outside_endpoints(section)
        engine = SGLangEngine(endpoints, section, hf_path, config.cluster.startup_timeout_s)
        checkpoint = HFCheckpoint(hf_path)
        family = get_family(checkpoint.config, f"{hf_path}/config.json")
        exported = (item for item in checkpoint.iter_tensors() if not family.ignores(item[0]))
        precision = RolloutPrecision.of_checkpoint(config.precision, checkpoint.config, checkpoint.names())
        publish(
            exported,
            0,
            engine.load_weights,
            engine.finish_update,
            dtype=engine_dtype(config),
            encode=_encoder(precision, config),
        )
        return engine

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[Completion]:
        return self.engine.generate(requests, params)

    def stream(
        self, requests: Sequence[GenerationRequest], params: SamplingParams
    ) -> Iterator[list[tuple[int, Completion]]]:
        yield from self.engine.stream(requests, params)

    def round_activations(self, is_on: bool) -> None:
        """Of the embedded engine, which emulates low precision. An SGLang server is launched in its precision."""
        from drpo_megatron.rollout.transformers_engine import TransformersEngine

        if isinstance(self.engine, TransformersEngine):
            self.engine.round_activations(is_on)

    def release_memory(self) -> None:
        """Of SGLang servers on the GPUs of ranks, which have it until the next weights are published."""
        from drpo_megatron.rollout.sglang_engine import SGLangEngine

        assert isinstance(self.engine, SGLangEngine)
        self.engine.release_memory()

    def load_weights(self, bucket: Bucket) -> None:
        self.engine.load_weights(bucket)

    def finish_update(self, policy_version: int, expected_checksums: dict[str, str]) -> None:
        self.engine.finish_update(policy_version, expected_checksums)


class RewardActor(ProcessActor):
    """Rewards, by worker processes of its own. What is scored in one call holds up no other call."""

    def start(self, config: Config) -> None:
        from drpo_megatron.rewards.scorer import RewardScorer

        self.scorer = RewardScorer(config.reward)

    async def score(self, responses: Sequence[Response]) -> Scored:
        return await self.scorer.score_responses(responses)


def _stay_on_the_network_of(address: str) -> None:
    """gloo and NCCL take the interface that has this address, unless the user has named others."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _encoder(precision: RolloutPrecision | None, config: Config) -> Encode | None:
    """The embedded engine emulates: it gets back what was rounded. A server computes with what it gets."""
    if precision is None:
        return None
    return precision.quantized if config.rollout.engine.name == "sglang" else precision.dequantized


def engine_dtype(config: Config) -> torch.dtype:
    """What weights are sent in. The embedded engine holds FP32."""
    import torch

    from drpo_megatron.rollout.sglang_server import server_dtype

    section = config.rollout.engine
    name = server_dtype(section, config.model.hf_path) if section.name == "sglang" else "float32"
    return getattr(torch, name)

"""One real SGLang server for all tests that want one, on a CPU, in the environment that `make sglang-cpu` makes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from drpo_megatron.config.sections import SGLangEngineSection
from drpo_megatron.rollout.sglang_engine import SGLangEngine
from drpo_megatron.rollout.sglang_server import ServerKeeper, SGLangServer, server_flags
from tests.tiny import save_checkpoint, tiny_moe_config

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"


@dataclass(frozen=True)
class Served:
    """A tiny Qwen3-MoE in FP32 and the servers that were launched with it."""

    hf_path: Path
    keepers: list[ServerKeeper]

    def engine(self, sync: str = "tensor", **fields: object) -> SGLangEngine:
        section = SGLangEngineSection(sync=sync, **fields)
        return SGLangEngine([keeper.server.endpoint for keeper in self.keepers], section, str(self.hf_path), 600.0)


def launch(directory: Path, num_servers: int, **fields: object) -> Iterator[Served]:
    if not PYTHON.exists():
        pytest.skip("SGLang's environment is not there; `make sglang-cpu` sets it up")
    hf_path = save_checkpoint(directory / "model", tiny_moe_config(num_hidden_layers=2))
    section = SGLangEngineSection(python=str(PYTHON), flags={"max-running-requests": 64}, **fields)
    flags = server_flags(str(hf_path), section, "float32", "cpu", routed_experts=True)
    servers = [
        SGLangServer(flags, section.python, "cpu", directory / f"server-{index}.log") for index in range(num_servers)
    ]
    keepers = [ServerKeeper(server, section, startup_timeout_s=600.0) for server in servers]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(ServerKeeper.start, keepers))
        yield Served(hf_path, keepers)
    finally:
        for keeper in keepers:
            keeper.close()


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from launch(tmp_path_factory.mktemp("sglang"), 1)

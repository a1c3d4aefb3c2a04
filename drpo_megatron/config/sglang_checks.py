"""What can be wrong with `rollout.engine: {name: sglang}`, as far as files and numbers tell before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from drpo_megatron.config.hf_config import HFModelConfig
from drpo_megatron.config.sections import Config, SGLangEngineSection

_OWNED_FLAGS = {
    "model-path": "model.hf_path",
    "model": "model.hf_path",
    "load-format": "precision.rollout",
    "quantization": "precision.rollout",
    "json-model-override-args": "precision.rollout",
    "dtype": "rollout.engine.dtype",
    "tp-size": "rollout.engine.tensor_parallel",
    "tensor-parallel-size": "rollout.engine.tensor_parallel",
    "dp-size": "rollout.engine.data_parallel",
    "data-parallel-size": "rollout.engine.data_parallel",
    "api-key": "rollout.engine.api_key_file",
    "host": "rollout.engine.servers",
    "port": "rollout.engine.servers",
    "enable-memory-saver": "cluster.placement",
    "enable-return-routed-experts": "trainer.routing_replay",
}
"""Flags of SGLang that are set from other keys."""
_SHARDED_OTHERWISE = "servers are sent and asked for tensors that tensor parallelism alone has cut"
_KEEPS_OTHERWISE = "it rearranges or rounds weights after they are loaded, so that no checksum is the expected one"
_UNUSABLE_FLAGS = {
    "pp-size": ((1,), _SHARDED_OTHERWISE),
    "pipeline-parallel-size": ((1,), _SHARDED_OTHERWISE),
    "ep-size": ((1,), _SHARDED_OTHERWISE),
    "expert-parallel-size": ((1,), _SHARDED_OTHERWISE),
    "ep": ((1,), _SHARDED_OTHERWISE),
    "nnodes": ((1,), _SHARDED_OTHERWISE),
    "attn-cp-size": ((1,), _SHARDED_OTHERWISE),
    "attention-context-parallel-size": ((1,), _SHARDED_OTHERWISE),
    "moe-dp-size": ((1,), _SHARDED_OTHERWISE),
    "moe-data-parallel-size": ((1,), _SHARDED_OTHERWISE),
    "moe-dense-tp-size": ((), _SHARDED_OTHERWISE),
    "moe-a2a-backend": (("none",), _SHARDED_OTHERWISE),
    "enable-dp-attention": ((False,), _SHARDED_OTHERWISE),
    "enable-dp-lm-head": ((False,), _SHARDED_OTHERWISE),
    "enable-eplb": ((False,), _SHARDED_OTHERWISE),
    "ep-num-redundant-experts": ((0,), _SHARDED_OTHERWISE),
    "speculative-algorithm": ((), "a draft model would keep its first weights"),
    "enable-lora": ((False,), "adapters would be served beside the weights that are sent"),
    "weight-cache-mode": (("off",), "SGLang updates no weights that it shares"),
    "moe-runner-backend": (("triton",), _KEEPS_OTHERWISE),
    "fp8-gemm-backend": (("triton", "deep_gemm"), _KEEPS_OTHERWISE),
}
"""Flag -> (values that work, why others don't)."""
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def sglang_problems(config: Config, model: HFModelConfig) -> Iterator[str]:
    engine = config.rollout.engine
    if not isinstance(engine, SGLangEngineSection):
        return
    yield from _server_problems(engine) if engine.servers else _launch_problems(config, engine)
    yield from _sync_problems(config, engine)
    if engine.data_parallel > 1:
        yield (
            f"rollout.engine.data_parallel={engine.data_parallel}: SGLang 0.5.23 takes new weights only without data "
            f"parallelism inside a server; set rollout.engine.data_parallel=1 and rollout.engine.num_engines="
            f"{engine.num_engines * engine.data_parallel}"
        )
    tensor, heads, kv_heads = engine.tensor_parallel, model.num_attention_heads, model.num_key_value_heads
    if heads % tensor:
        yield (
            f"rollout.engine.tensor_parallel={tensor} does not divide num_attention_heads={heads}; "
            f"use {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
        )
    elif max(tensor, kv_heads) % min(tensor, kv_heads):
        yield (
            f"rollout.engine.tensor_parallel={tensor}: ranks must share num_key_value_heads={kv_heads} evenly; use a "
            "divisor or a multiple of it"
        )


def _server_problems(engine: SGLangEngineSection) -> Iterator[str]:
    for url in engine.servers:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not _has_port(url) or parts.path not in ("", "/"):
            yield f"rollout.engine.servers: {url!r} is no URL of a server; give http://HOST:PORT"
    if len(set(engine.servers)) < len(engine.servers):
        yield f"rollout.engine.servers names a server twice: {', '.join(engine.servers)}; give each once"
    if engine.api_key_file is not None and not _has_text(Path(engine.api_key_file)):
        yield (
            f"rollout.engine.api_key_file: {engine.api_key_file} does not exist or is empty; write the servers' key into "
            "its first line"
        )


def _launch_problems(config: Config, engine: SGLangEngineSection) -> Iterator[str]:
    # On a cluster of somebody else's, the servers may start on a machine with other files than this one's.
    if config.cluster.ray_address is None and not os.access(engine.python, os.X_OK):
        yield (
            f"rollout.engine.python: {engine.python} does not exist or can't be executed; run `make sglang-cpu`, give the "
            "interpreter of an environment with SGLang, or the URLs of running servers as rollout.engine.servers"
        )
    if engine.api_key_file is not None:
        yield (
            f"rollout.engine.api_key_file={engine.api_key_file} is for rollout.engine.servers; launched servers get keys of "
            "their own; leave it out"
        )
    for name, value in engine.flags.items():
        flag = _whole_name(name.removeprefix("--"))
        if key := _OWNED_FLAGS.get(flag):
            yield f"rollout.engine.flags.{name} is set by {key}; use that"
        elif flag in _UNUSABLE_FLAGS and str(value) not in map(str, _UNUSABLE_FLAGS[flag][0]):
            works, why = _UNUSABLE_FLAGS[flag]
            fix = f"use {' or '.join(map(str, works))}, or leave it out" if works else "leave it out"
            yield f"rollout.engine.flags.{name}={value}: {why}; {fix}"
        elif name.startswith("-"):
            yield f"rollout.engine.flags.{name}: write the flag without its dashes, {name.lstrip('-')}"


def _whole_name(flag: str) -> str:
    """SGLang takes a flag's beginning for the flag: `tp` is tp-size."""
    ours = (*_OWNED_FLAGS, *_UNUSABLE_FLAGS)
    return flag if flag in ours else next((whole for whole in ours if flag and whole.startswith(flag)), flag)


def _sync_problems(config: Config, engine: SGLangEngineSection) -> Iterator[str]:
    if engine.sync_dir is not None and not Path(engine.sync_dir).is_dir():
        yield f"rollout.engine.sync_dir: the directory {engine.sync_dir} does not exist; make it, on a disk that all see"
    far = [url for url in engine.servers if urlsplit(url).hostname not in _LOCAL_HOSTS]
    if engine.sync == "tensor" and (far or config.cluster.num_machines > 1):
        where = f"{far[0]} is on another" if far else f"cluster.num_machines={config.cluster.num_machines} are several"
        yield (
            f"rollout.engine.sync=tensor shares the memory of one machine, and {where}; use rollout.engine.sync=distributed, "
            "or disk"
        )


def _has_port(url: str) -> bool:
    try:
        return urlsplit(url).port is not None
    except ValueError:
        return False


def _has_text(file: Path) -> bool:
    return file.is_file() and bool(file.read_text(encoding="utf-8", errors="replace").split())

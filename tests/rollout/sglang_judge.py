"""What SGLang itself makes of our launch lines and weights, on a GPU that isn't there. Run by its environment's Python:

    PYTHON sglang_judge.py 9|10 CASES.json ANSWERS.json

`torch.cuda` says that a Hopper or Blackwell GPU is there; kernels are names that can't be called. Everything else is
SGLang's own: it parses and resolves the launch line, builds the model as it would be on each tensor-parallel rank (in the
memory of the CPU, over a process group that carries nothing), takes the weights in the calls of a weight update, does to
them what it does after loading, and its weight checker names their checksums, which on a CPU are SHA-256.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import sys
import traceback
import types
from pathlib import Path
from typing import Any

NAMES = {9: "NVIDIA H100 80GB HBM3", 10: "NVIDIA B200"}
GIB = 2**30
ABSENT = ("cuda", "cutlass", "deep_gemm", "flashinfer", "sgl_kernel")
"""Compiled for GPUs. Whoever only asks whether they are there finds them."""
REPORTED = (
    *(
        "attention_backend",
        "chunked_prefill_size",
        "device",
        "disable_overlap_schedule",
        "disable_shared_experts_fusion",
    ),
    *("dp_size", "dtype", "enable_deterministic_inference", "enable_memory_saver", "enable_return_routed_experts"),
    *("fp8_gemm_runner_backend", "kv_cache_dtype", "load_format", "moe_a2a_backend", "moe_runner_backend", "page_size"),
    *(
        "quantization",
        "skip_server_warmup",
        "skip_tokenizer_init",
        "speculative_algorithm",
        "tp_size",
        "weight_cache_mode",
    ),
)


class Anything(type):
    """A class, function or number of a library that isn't there."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]  # It decorates.
        raise NotImplementedError(f"{cls.__name__} was called, and there is no GPU")

    def __index__(cls) -> int:
        return 0


class Absent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def pretend(major: int) -> Any:
    """Before SGLang is imported: it asks once what it stands on."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"  # It waits for the other ranks, which aren't there.
    os.environ["SGLANG_NCCL_SO_PATH"] = os.devnull  # A torch with CUDA brings NCCL, which would look for the GPU.
    import torch

    properties = types.SimpleNamespace(
        major=major, minor=0, total_memory=80 * GIB, name=NAMES[major], multi_processor_count=132
    )
    torch.version.cuda = "13.0"
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 8
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda device=None: None
    cuda.set_device = lambda device: None
    cuda.empty_cache = lambda: None
    cuda.get_device_capability = lambda device=None: (major, 0)
    cuda.get_device_name = lambda device=None: NAMES[major]
    cuda.mem_get_info = lambda device=None: (79 * GIB, 80 * GIB)
    cuda.get_device_properties = lambda device=None: properties
    cuda.Stream = type("Stream", (), {"__init__": lambda self, *args, **kwargs: None})
    launch = runpy.run_path(str(Path(__file__).parents[2] / "drpo_megatron" / "rollout" / "sglang_launch.py"))
    library = launch["add_torchvision_operators"]()
    sys.meta_path.insert(0, Finder())
    return library


def on_cpu() -> Any:
    """A mode in which whatever would be made on the GPU is made on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    def moved(value: Any) -> Any:
        is_gpu = isinstance(value, torch.device) and value.type == "cuda"
        return "cpu" if is_gpu or (isinstance(value, str) and value.startswith("cuda")) else value

    class OnCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cuda:
                return args[0]
            keywords = {name: moved(value) for name, value in (kwargs or {}).items()}
            return function(*(moved(value) for value in args), **keywords)

    return OnCpu()


def resolved(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """SGLang's arguments of a launch line, and what it makes of those in REPORTED. Raises what it raises."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args(words)
    arguments.resolve_once()
    view = resolving_view(arguments)
    return arguments, {name: getattr(view, name) for name in REPORTED}


def flags() -> dict[str, Any]:
    """Every flag of SGLang, with what it sets."""
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {option: action.dest for action in parser._actions for option in action.option_strings}


def memory_tags() -> list[str]:
    """What memory can be released."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES

    return list(GPU_MEMORY_ALL_TYPES)


def checksums(arguments: Any, rank: int, tensors: dict[str, Any]) -> dict[str, str]:
    """Of one rank's parameters after a weight update. Raises what SGLang raises."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.model_loader.loader import DefaultModelLoader, DummyModelLoader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.utils.weight_checker import WeightChecker

    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    config = ModelConfig.from_server_args(arguments)
    initialize_moe_config()
    initialize_fp8_gemm_config()
    cpu = torch.device("cpu")
    try:
        _groups(arguments, rank, config)
        loader = DummyModelLoader(LoadConfig(load_format="dummy"))
        model = loader.load_model(model_config=config, device_config=types.SimpleNamespace(device="cpu"))
        for _ in range(2):  # The second update finds what the first one left.
            DefaultModelLoader.restore_weights_before_loading(model, cpu)
            model.load_weights(iter(tensors.items()))
            DefaultModelLoader.postprocess_weights(model, cpu)
        return WeightChecker(get_model=lambda: model).handle("checksum", role="target")["checksums"]
    finally:
        from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        destroy_distributed_environment()


def _groups(arguments: Any, rank: int, config: Any) -> None:
    import torch
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import init_dp_gathered_buffer, initialize_dp_attention
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Nobody sends: objects would be of the sizes that happened to lie in memory, up to all of it.
    torch.distributed.broadcast_object_list = lambda objects, *args, **kwargs: None
    torch.distributed.all_gather_object = lambda objects, own, *args, **kwargs: objects.__setitem__(
        slice(None), [own] * len(objects)
    )
    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *args, **kwargs: new_group(*args, **kwargs | {"backend": "fake"})
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=arguments.tp_size)
    init_distributed_environment(world_size=arguments.tp_size, rank=rank, local_rank=rank, backend="fake")
    initialize_model_parallel(backend="fake")
    torch.distributed.new_group = new_group
    initialize_dp_attention(arguments)
    init_dp_gathered_buffer(config)


def judge(case: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    answer: dict[str, Any] = {}
    try:
        arguments, answer["resolved"] = resolved(case["words"])
        if "tensors" in case:
            tensors = load_file(case["tensors"])
            with on_cpu():
                answer["ranks"] = [checksums(arguments, rank, tensors) for rank in range(arguments.tp_size)]
    except BaseException as error:  # What SGLang dies of is the answer.
        answer["error"] = f"{type(error).__name__}: {error}"
        answer["traceback"] = traceback.format_exc()[-4000:]
    gc.collect()  # A model holds itself; some twenty of them took 19 GB.
    return answer


if __name__ == "__main__":
    _library = pretend(int(sys.argv[1]))
    cases = json.loads(Path(sys.argv[2]).read_text())
    answers = {name: judge(case) for name, case in cases.items()} | {"flags": flags(), "memory": memory_tags()}
    Path(sys.argv[3]).write_text(json.dumps(answers, default=str))

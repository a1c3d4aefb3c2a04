"""torch.cuda and the NCCL backend of a machine that has neither. `pretend()` first, before Megatron is imported."""

from __future__ import annotations

import contextlib
import os
import types
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.pretended_gpu.device import CUDA, GLOO_GROUPS, WAITS, CudaTensor, EveryOperation, inside, is_gpu

H100, B200 = (9, 0), (10, 0)
"""Compute capabilities."""


class _Nothing:
    """A stream or an event: everything is done at once."""

    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        WAITS.add("stream or event synchronize")

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None: ...


def pretend(capability: tuple[int, int] = H100) -> None:
    """This process has one GPU. There is no way back."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ["TRITON_INTERPRET"] = "1"
    getattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: None)()
    torch.autograd.set_multithreading_enabled(False)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.version.cuda = "13.0"
    _cuda_module(capability)
    _factories()
    _methods()
    _modules()
    _process_groups()
    EveryOperation().__enter__()


def _cuda_module(capability: tuple[int, int]) -> None:
    stream, name = _Nothing(), "Pretended H100" if capability == H100 else "Pretended B200"
    properties = types.SimpleNamespace(
        major=capability[0], minor=capability[1], name=name, total_memory=80 << 30, multi_processor_count=132
    )
    answers: dict[str, Any] = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: CUDA,  # A number on a GPU; this torch knows no device by number.
        set_device=lambda device: None,
        device=lambda device: contextlib.nullcontext(),
        device_of=lambda tensor: contextlib.nullcontext(),
        get_device_capability=lambda device=None: capability,
        get_device_name=lambda device=None: name,
        get_device_properties=lambda device=None: properties,
        synchronize=lambda device=None: WAITS.add("cuda.synchronize"),
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        Stream=_Nothing,
        Event=_Nothing,
        ExternalStream=_Nothing,
        stream=lambda stream: _Nothing(),
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(inside(state)),
        manual_seed=lambda seed: torch.manual_seed(seed),
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        reset_peak_memory_stats=lambda device=None: None,
        mem_get_info=lambda device=None: (70 << 30, 80 << 30),
        is_current_stream_capturing=lambda: False,
    )
    for attribute, answer in answers.items():
        setattr(torch.cuda, attribute, answer)
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.nccl.version = lambda: (2, 28, 3)
    torch.cuda.nvtx = types.SimpleNamespace(
        range_push=lambda message: None, range_pop=lambda: None, range=lambda *a, **k: contextlib.nullcontext()
    )


def _factories() -> None:
    """torch.tensor and the like make their tensor before any operation can be seen."""

    def made(real: Any) -> Any:
        def make(data: Any, *args: Any, **options: Any) -> Any:
            there, requires_grad = is_gpu(options.get("device")), options.pop("requires_grad", False)
            if isinstance(data, CudaTensor):
                return data.to(options.get("dtype") or data.dtype) if there or not options.get("device") else data.cpu()
            if there:
                options["device"] = "cpu"
                WAITS.add("copy to the device, pageable or blocking")
            out = real(_numbers(data), *args, **options)
            out = CudaTensor(out) if there else out
            return out.requires_grad_() if requires_grad else out

        return make

    def numbered(real: Any) -> Any:
        def make(*args: Any, **options: Any) -> Any:
            if isinstance(options.get("device"), int):
                options["device"] = CUDA
            return real(*args, **options)

        return make

    for name in ("empty", "zeros", "ones", "full", "arange"):
        setattr(torch, name, numbered(getattr(torch, name)))
    torch.tensor, torch.as_tensor = made(torch.tensor), made(torch.as_tensor)
    real_new = torch.Tensor.new_tensor

    def new_tensor(self: torch.Tensor, data: Any, **options: Any) -> torch.Tensor:
        there = isinstance(self, CudaTensor) and options.pop("device", None) is None
        like = torch.empty(0, dtype=options.pop("dtype", None) or self.dtype)
        out = real_new(like, data, **options)
        if there:
            WAITS.add("copy to the device, pageable or blocking")
        return CudaTensor(out) if there else out

    torch.Tensor.new_tensor = new_tensor


def _numbers(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_numbers(x) for x in data]
    return data.item() if isinstance(data, CudaTensor) else data


def _methods() -> None:
    def pin_memory(self: torch.Tensor, *args: Any) -> torch.Tensor:
        if isinstance(self, CudaTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        pinned = self.clone()
        pinned.is_pretended_pinned = True  # type: ignore[attr-defined]
        return pinned

    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.cuda = lambda self, *args, **options: self.to(CUDA, **options)
    torch.Tensor.record_stream = lambda self, stream: None


def _modules() -> None:
    """On a GPU `module.to` gives parameters new data; here it makes new parameters, which keep their attributes."""
    real = torch.nn.Module._apply

    def apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> Any:
        before = {name: dict(p.__dict__) for name, p in self.named_parameters(recurse=False)}
        result = real(self, function, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            for key, value in before.get(name, {}).items():
                if key != "inner" and key not in parameter.__dict__:
                    setattr(parameter, key, value)
        return result

    torch.nn.Module._apply = apply


def _process_groups() -> None:
    """ "nccl" is gloo that takes GPU tensors only."""
    real_init, real_new = dist.init_process_group, dist.new_group

    def init_process_group(backend: Any = None, **options: Any) -> None:
        assert backend == "nccl", f"trainer.backend=gpu asked for {backend}"
        GLOO_GROUPS.clear()  # Names are numbers, counted from 0 again.
        real_init("gloo", **options)

    def new_group(*args: Any, backend: Any = None, **options: Any) -> Any:
        options.pop("pg_options", None)
        group = real_new(*args, **options)
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):
            GLOO_GROUPS.add(group.group_name)
        return group

    dist.init_process_group, dist.new_group = init_process_group, new_group

    def get_backend(group: Any = None) -> str:
        return "gloo" if (group or distributed_c10d._get_default_group()).group_name in GLOO_GROUPS else "nccl"

    dist.get_backend = get_backend

    def device_of_objects(group: Any = None) -> Any:
        name = (group or distributed_c10d._get_default_group()).group_name
        return "cpu" if name in GLOO_GROUPS else CUDA

    real_to_object = distributed_c10d._tensor_to_object
    distributed_c10d._get_object_coll_device = device_of_objects
    distributed_c10d._tensor_to_object = lambda tensor, size, group: real_to_object(inside(tensor), size, group)


def after_megatron() -> None:
    """What Megatron and the loss kernels take from torch's C API, once they are imported."""
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(inside(state))
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()

    from drpo_megatron.trainer import vocab_parallel_rows

    kernels = vocab_parallel_rows.triton_kernels
    vocab_parallel_rows.triton_kernels = types.SimpleNamespace(
        row_statistics=_interpreted(kernels.row_statistics), logit_gradient=_interpreted(kernels.logit_gradient)
    )


def _interpreted(kernel: Any) -> Any:
    def call(*args: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return CudaTensor(kernel(*map(inside, args)))

    return call

"""CPU with gloo, or GPU with NCCL: the one switch, and everything that Megatron-Core has to be told without a GPU.

On a CPU Megatron's sources stay as they are: the modules of the `megatron` package are handed a *view* of torch in
which the current device is the CPU. The torch that everybody else imports stays itself, but for `Tensor.cuda`, which
returns the tensor. Each change below names the upstream line that needs it (paths under megatron/core of 0.16.1); on a
CPU other versions are refused by name, because those lines move.

On a GPU nothing is a view, and with Transformer Engine nothing is changed. Without it Megatron misses the same names as
on a CPU, and gets the same repairs (`_WITHOUT_ENGINE`). `_CPU_ONLY` says of every other repair what a GPU does instead;
tests/pretended_gpu runs both.

Call `activate` before anything imports `megatron`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import queue
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from drpo_megatron.precision.transformer_engine import find_transformer_engine
from drpo_megatron.versions import CPU_MEGATRON, CPU_TORCH_RELEASES

_device = torch.device("cpu")
"""What Megatron is told the current CUDA device is, on the CPU platform."""


@dataclass(frozen=True, slots=True)
class Platform:
    """Where this rank computes."""

    name: Literal["cpu", "gpu"]
    device: torch.device
    backend: Literal["gloo", "nccl"]
    transformer_engine: bool
    """Whether layers are Transformer Engine's."""


_active: Platform | None = None


def resolve_backend(wanted: Literal["auto", "cpu", "gpu"]) -> Literal["cpu", "gpu"]:
    """`auto` is gpu where CUDA is there. Raises ValueError when a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if wanted == "gpu" and not available:
        raise ValueError("trainer.backend=gpu, but torch sees no CUDA device; use trainer.backend=cpu or auto")
    return "gpu" if wanted == "gpu" or (wanted == "auto" and available) else "cpu"


def activate(wanted: Literal["auto", "cpu", "gpu"], local_rank: int = 0) -> Platform:
    """Prepare this process for Megatron on its device. Idempotent; a second, different answer is a ValueError."""
    global _active
    name = resolve_backend(wanted)
    if _active is not None:
        if _active.name != name:
            raise ValueError(f"this process already runs Megatron on the {_active.name}; it can't change to {name}")
        return _active
    if name == "gpu":
        torch.cuda.set_device(local_rank)
        has_engine = find_transformer_engine() is not None
        if not has_engine:
            _refuse_early_megatron("gpu")
            sys.meta_path.insert(0, _MegatronImports(None, _WITHOUT_ENGINE))
        _active = Platform("gpu", torch.device("cuda", local_rank), "nccl", has_engine)
    else:
        check_cpu_versions()
        _tell_megatron_about_the_cpu()
        _active = Platform("cpu", _device, "gloo", False)
    return _active


def activate_meta() -> Platform:
    """The CPU platform with torch's meta device in place of memory: what Megatron builds has shapes and no numbers.

    A cluster's ranks can so be built one after another in one process, over torch's fake process group. Build models
    and optimizers `with platform.device:`. A process that did this can do nothing else.
    """
    global _device
    _device = torch.device("meta")
    return activate("cpu")


def check_cpu_versions() -> None:
    megatron = importlib.metadata.version("megatron-core")
    if megatron not in CPU_MEGATRON:
        raise ValueError(
            f"the CPU platform was checked with megatron-core {', '.join(CPU_MEGATRON)}, but {megatron} is installed; "
            f"pip install megatron-core=={CPU_MEGATRON[-1]}, or train on a GPU"
        )
    release = ".".join(torch.__version__.split(".")[:2])
    if release not in CPU_TORCH_RELEASES:
        raise ValueError(
            f"the CPU platform was checked with torch {', '.join(CPU_TORCH_RELEASES)}, but {torch.__version__} is installed; "
            f"pip install 'torch=={CPU_TORCH_RELEASES[-1]}.*'"
        )


# --- the view of torch ------------------------------------------------------------------------------------------


class _Nothing:
    """A CUDA stream or event on a machine that has none: every method returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> _Nothing:
        return self

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None: ...


_THE_STREAM = _Nothing()


class _View(types.ModuleType):
    """A module that answers like `real`, but for the attributes given."""

    def __init__(self, real: types.ModuleType, **changed: Any) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(changed)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_real"], name)
        self.__dict__[name] = value
        return value


def _on_cpu(factory: Any) -> Any:
    """`factory` with device="cuda" meaning the CPU (and no pinned memory, which needs a driver).

    schedules.py:596,983,2138; optimizer.py:473,481,485,907; clip_grads.py:103,115,174; transformer/utils.py:35;
    utils.py:1207; rope_utils.py:62.
    """

    def build(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _device
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _make_view() -> _View:
    random = _View(torch.cuda.random, get_rng_state=lambda device=None: torch.get_rng_state())
    cuda = _View(
        torch.cuda,
        # mappings.py:141,148,181,442; layers.py:552; utils.py:631; p2p_communication.py:313,321;
        # param_and_grad_buffer.py:800,806; router.py:90; rotary_pos_embedding.py:162; state_dict_saver.py:252
        current_device=lambda: _device,
        # token_dispatcher.py:445,871; p2p_communication.py:398; filesystem_async.py:230; parallel_state.py:933
        Stream=_Nothing,
        Event=_Nothing,
        stream=lambda stream: _THE_STREAM,
        current_stream=lambda device=None: _THE_STREAM,
        default_stream=lambda device=None: _THE_STREAM,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        set_device=lambda device: None,
        nvtx=types.SimpleNamespace(range_push=lambda message: None, range_pop=lambda: None),
        # tensor_parallel/random.py:55,235-240,422: the CUDA generator is the CPU's
        random=random,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        # dist_checkpointing/strategies/torch.py:64 asks how many devices share a node
        device_count=lambda: 1,
    )
    factories = (
        "tensor",
        "empty",
        "zeros",
        "ones",
        "full",
        "arange",
        "empty_like",
        "zeros_like",
        "ones_like",
        "rand",
        "randn",
    )
    return _View(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in factories})


class _MegatronImports(MetaPathFinder):
    """Hands every module of the `megatron` package the view and its fixes as soon as it has run (some load late)."""

    def __init__(self, view: _View | None, fixes: Mapping[str, tuple[Callable[[Any], None], ...]]) -> None:
        self.view, self.fixes = view, fixes

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "megatron" and not fullname.startswith("megatron."):
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                run(module)
                self.show(module)

            spec.loader.exec_module = exec_module
        return spec

    def show(self, module: types.ModuleType) -> None:
        if self.view is not None and getattr(module, "torch", None) is torch:
            module.torch = self.view  # type: ignore[attr-defined]
        for fix in self.fixes.get(module.__name__, ()):
            fix(module)


# --- what a view can't say -----------------------------------------------------------------------------------------


def _fix_jit(module: Any) -> None:
    """jit.py: torch.compile of tiny pointwise functions costs seconds of C++ compilation on a CPU and gains nothing."""
    module.disable_jit_fuser()


def _fix_random(module: Any) -> None:
    """tensor_parallel/random.py:72 sets a CUDA generator through torch's C API."""
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _fix_router_gemm(module: Any) -> None:
    """moe_utils.py:1192,1225 read te_general_gemm, which is only defined when Transformer Engine imports."""
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None


def _fix_moe_utils(module: Any) -> None:
    """moe_utils.py's maybe_move_tensor_to_cpu (called from token_dispatcher.py:879) leaves CPU tensors alone, although
    its caller asked for numpy and then calls .tolist() on them as on numpy."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _fix_mappings(module: Any) -> None:
    """mappings.py:150,193: gloo has neither an uneven all_gather nor an uneven reduce_scatter; all_to_all_single does both."""
    even_gather, even_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(input_, group, output_split_sizes, use_global_buffer)
        ranks = group.size()
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        copies = input_.contiguous().repeat(ranks, *[1] * (input_.dim() - 1))
        torch.distributed.all_to_all_single(
            output, copies, list(output_split_sizes), [input_.shape[0]] * ranks, group=group
        )
        return output

    def reduce_scatter(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(input_, group, input_split_sizes, use_global_buffer)
        ranks, mine = group.size(), input_split_sizes[group.rank()]
        parts = input_.new_empty(mine * ranks, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts, input_.contiguous(), [mine] * ranks, list(input_split_sizes), group=group
        )
        return parts.view(ranks, mine, *input_.shape[1:]).sum(0)

    module._gather_along_first_dim = gather
    module._reduce_scatter_along_first_dim = reduce_scatter


def _fix_optimizer(module: Any) -> None:
    """optimizer/__init__.py falls back to torch's AdamW, whose per-parameter `step` tensors the distributed optimizer
    loads wrongly (distrib_optimizer.py:642,821,940: all parameters then share one step), and which fails on moments
    that are there before a step. Ours keeps step in the group, as the fused Adam of Transformer Engine and NVIDIA's apex
    do. With apex nothing is to be done."""
    from drpo_megatron.trainer.adam import Adam

    if not module.USING_PYTORCH_OPTIMIZER:
        return
    module.Adam = Adam
    module.USING_PYTORCH_OPTIMIZER = False


def _fix_distrib_optimizer(module: Any) -> None:
    """distrib_optimizer.py:515 accepts the Adam classes it knows; :639,817 take what isn't Transformer Engine's or apex's
    for torch's, with a step in every parameter. Ours keeps it in the group, as Transformer Engine's does."""
    from drpo_megatron.trainer.adam import Adam

    if module.HAVE_APEX_OR_TE:
        return
    module.Adam = Adam
    module.HAVE_APEX_OR_TE = module.USING_TE_OPTIMIZER = True


def _fix_utils(module: Any) -> None:
    """utils.py:1200, where apex and Transformer Engine are missing, waits for the GPU once a gradient, and rounds the
    norm to FP32 on the host on the way."""

    def l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool, *args: Any) -> tuple[Any, None]:
        norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
        return torch.stack(norms).float().norm().reshape(1), None

    module.local_multi_tensor_l2_norm = l2_norm


def _fix_filesystem_async(module: Any) -> None:
    """strategies/filesystem_async.py:55,266 start a Manager process and forked writers on every rank: a killed rank
    leaves them behind, and forking a process full of gloo threads can hang. Here the rank itself writes its files."""

    def write_here(transforms: Any, use_msc: bool, rank: int, buckets: Any, results: queue.Queue) -> None:
        written: Any = {}
        for index, bucket in enumerate(buckets):
            answer: queue.Queue = queue.Queue()
            counter: queue.Queue = queue.Queue()
            counter.put(index)
            module.FileSystemWriterAsync.write_preloaded_data(
                transforms,
                local_proc_idx=index,
                write_bucket=bucket,
                results_queue=answer,
                count_queue=counter,
                use_fsync=True,
            )
            _, written_or_error = answer.get()
            if isinstance(written_or_error, Exception):
                written = written_or_error
                break
            written[index] = written_or_error
        results.put(written)

    module._get_write_results_queue = queue.Queue
    module.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write_here)


Fixes = dict[str, tuple[Callable[[Any], None], ...]]

_WITHOUT_ENGINE: Fixes = {
    "megatron.core.transformer.moe.moe_utils": (_fix_router_gemm,),
    "megatron.core.optimizer": (_fix_optimizer,),
    "megatron.core.optimizer.distrib_optimizer": (_fix_distrib_optimizer,),
    "megatron.core.utils": (_fix_utils,),
}
"""Whatever the device, where Transformer Engine is missing."""

_CPU_ONLY: Fixes = {
    # A GPU's ranks start writers of their own, which are forked before any NCCL kernel runs in them.
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (_fix_filesystem_async,),
    # A GPU compiles with torch.compile, at the first step.
    "megatron.core.jit": (_fix_jit,),
    # A GPU has the generator that Megatron sets.
    "megatron.core.tensor_parallel.random": (_fix_random,),
    # A GPU's counts are copied to the host, and then are numpy's as asked.
    "megatron.core.transformer.moe.moe_utils": (_fix_moe_utils,),
    # NCCL gathers and scatters uneven shares.
    "megatron.core.tensor_parallel.mappings": (_fix_mappings,),
}
"""With what a GPU does instead."""


def _fixes(*tables: Fixes) -> Fixes:
    return {name: tuple(fix for t in tables for fix in t.get(name, ())) for name in {n for t in tables for n in t}}


def _refuse_early_megatron(name: str) -> None:
    early = sorted(name for name in sys.modules if name == "megatron.core" or name.startswith("megatron.core."))
    if early:
        raise ValueError(f"{early[0]} was imported before platform.activate('{name}'); activate the platform first")


def _tell_megatron_about_the_cpu() -> None:
    _refuse_early_megatron("cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    sys.meta_path.insert(0, _MegatronImports(_make_view(), _fixes(_WITHOUT_ENGINE, _CPU_ONLY)))


class _CudaTypeNames(TorchFunctionMode):
    """optimizer.py:671,690; distrib_optimizer.py:361,420,582; clip_grads.py:167 choose by `param.type()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1).replace(".meta.", ".")
        return result


@contextlib.contextmanager
def optimizer_scope() -> Iterator[None]:
    """Around building and stepping Megatron's optimizers: on a CPU, tensors answer with the type names they expect."""
    if _active is not None and _active.name == "cpu":
        with _CudaTypeNames():
            yield
    else:
        yield

"""A tensor that says it is on a GPU, while its numbers are on the CPU; and the rules of CUDA for what is done with it.

Every operation goes through `_run`, which refuses what a GPU refuses (operands on two devices, host tensors in an NCCL
collective, products of half-precision matrices in forms that cuBLAS lacks) and notes what makes the host wait for the
device, by the source line that asked for it (`WAITS`).
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

CUDA = torch.device("cuda", 0)
GLOO_GROUPS: set[str] = set()
"""Names of process groups that were asked for with gloo: they take host tensors."""
_ROOT = str(Path(__file__).parents[2])


class PretendedGpuError(RuntimeError):
    """What a GPU would have refused."""


class _Waits:
    """How often the host waited for the device: (what, line of ours, line that did it) -> times."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._on = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[collections.Counter[tuple[str, str, str]]]:
        self.counts.clear()
        self._on = True
        try:
            yield self.counts
        finally:
            self._on = False

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Inside what stands for a kernel."""
        was, self._on = self._on, False
        try:
            yield
        finally:
            self._on = was

    def add(self, what: str) -> None:
        if self._on:
            self.counts[what, *_lines()] += 1


WAITS = _Waits()


def _lines() -> tuple[str, str]:
    """(the innermost line of drpo_megatron, the innermost line that is neither torch's nor this package's)."""
    ours = theirs = ""
    for frame in traceback.walk_stack(None):
        name = frame[0].f_code.co_filename
        if "/torch/" in name or "/tests/pretended_gpu/" in name or name.startswith("<"):
            continue
        line = f"{_short(name)}:{frame[1]}"
        theirs = theirs or line
        if "/drpo_megatron/" in name and "/megatron/core/" not in name:
            ours = line
            break
    return ours, theirs


def _short(name: str) -> str:
    """A file's name from its package on, wherever that is installed."""
    for package in ("megatron/core/", "transformer_engine/"):
        if f"/{package}" in name:
            return package + name.partition(f"/{package}")[2]
    return name.split("site-packages/")[-1].replace(f"{_ROOT}/", "")


class CudaTensor(torch.Tensor):
    """Wraps a CPU tensor. To torch it is a meta tensor, so that autograd asks for no CUDA."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> CudaTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",
            requires_grad=requires_grad,
        )
        wrapper.inner = inner
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> CudaTensor:
        return CudaTensor(self.inner)

    @data.setter
    def data(self, new: CudaTensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    def get_device(self) -> int:
        return 0

    def type(self, dtype: Any = None, **options: Any) -> Any:
        return self.inner.type().replace("torch.", "torch.cuda.", 1) if dtype is None else self.to(dtype)

    def to(self, *args: Any, **options: Any) -> torch.Tensor:
        asked = {name: value for name, value in options.items() if name != "copy"}
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **asked)
        if device is not None and device.type in ("cuda", "meta"):
            copy = options.get("copy", False)
            if (dtype is None or dtype == self.dtype) and not copy:
                return self
            return torch.Tensor.to(self, dtype or self.dtype, copy=copy)
        return torch.Tensor.to(self, *args, **options)

    def tolist(self) -> Any:
        WAITS.add("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __repr__(self, *args: Any, **options: Any) -> str:
        return f"CudaTensor({self.inner!r})"

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.inner.clone(), self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CudaTensor, (self.inner.detach().clone(), self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class EveryOperation(TorchDispatchMode):
    """Also those without a CudaTensor among their arguments: they may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def inside(value: Any) -> Any:
    """The CPU tensor of a CudaTensor; anything else as it is."""
    return value.inner if isinstance(value, CudaTensor) else value


_ACROSS = {"aten::copy_", "aten::_to_copy", "aten::set_", "aten::_pin_memory"}
_INDEXED = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"}
_ASKS_THE_DEVICE = {  # The shape or the value of the answer is on the device.
    "aten::nonzero": "nonzero",
    "aten::nonzero_numpy": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
    "aten::equal": "equal",
    "aten::is_nonzero": "bool()",
    "aten::bincount": "bincount",
    "aten::histc": "histc",
    "aten::_local_scalar_dense": "item",
}
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


def is_gpu(device: Any) -> bool:
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type in ("cuda", "meta")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name, (flat, spec) = func._schema.name, tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, CudaTensor)]
    here = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)]
    if name.startswith("c10d::"):
        return _collective(func, name, flat, spec, there, here)
    device = kwargs.get("device")
    to_host = device is not None and torch.device(device).type == "cpu"
    if there and here:
        _check_devices(name, args, here)
    if there:
        _note_waits(func, name, args, kwargs, to_host)
    if is_gpu(device) and not there and here:
        _note_sending(here[0], kwargs.get("non_blocking", False))
    if name == "aten::copy_":
        _note_copy(*args)
    host_args, host_kwargs = tree_unflatten([_on_host(x) for x in flat], spec)
    if "pin_memory" in host_kwargs:
        host_kwargs["pin_memory"] = False
    result = _compute(func, name, host_args, host_kwargs)
    if name == "aten::copy_":
        return args[0]
    if not (is_gpu(device) or (there and not to_host)):
        return result
    written = {id(x.inner): x for x in _written(func, args, kwargs)}
    leaves, result_spec = tree_flatten(result)
    wrapped = [_wrapped(x, written) for x in leaves]
    return tree_unflatten(wrapped, result_spec)


def _wrapped(value: Any, known: dict[int, CudaTensor]) -> Any:
    """`known`: the wrappers of inner tensors by id."""
    if not isinstance(value, torch.Tensor):
        return value
    return known[id(value)] if id(value) in known else CudaTensor(value)


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type in ("cuda", "meta"):
        return torch.device("cpu")
    return inside(value)


def _check_devices(name: str, args: Any, here: list[torch.Tensor]) -> None:
    if name in _ACROSS:
        return
    if name in _INDEXED:
        if not isinstance(args[0], CudaTensor):
            raise PretendedGpuError(f"{name}: indices should be either on cpu or on the indexed tensor's device (cpu)")
        if any(x.dim() for x in here):
            WAITS.add("host tensor as index or value")
        return
    many = [x for x in here if x.dim()]
    if many or name.startswith("aten::_fused"):
        shape = list((many or here)[0].shape)
        raise PretendedGpuError(f"{name}: expected all tensors on one device, found cuda:0 and cpu, of shape {shape}")


def _note_waits(func: Any, name: str, args: Any, kwargs: Any, to_host: bool) -> None:
    if name in _ASKS_THE_DEVICE:
        WAITS.add(_ASKS_THE_DEVICE[name])
    elif name in _INDEXED:
        indices = tree_flatten(args[1])[0]
        if any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices):
            WAITS.add("boolean index")
    elif name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        WAITS.add("repeat_interleave without output_size")
    elif to_host:
        WAITS.add("copy to the host")


def _note_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
    if isinstance(source, CudaTensor) and not isinstance(target, CudaTensor):
        WAITS.add("copy to the host")
    elif isinstance(target, CudaTensor) and not isinstance(source, CudaTensor):
        _note_sending(source, non_blocking)


def _note_sending(source: torch.Tensor, non_blocking: bool) -> None:
    if not (non_blocking and getattr(source, "is_pretended_pinned", False)):
        WAITS.add("copy to the device, pageable or blocking")


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[CudaTensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for x in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(x, CudaTensor):
                    yield x


def _compute(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """On the CPU. Products with an `out_dtype`, which the CPU lacks, by the rules of ATen/native/cuda/Blas.cpp."""
    if name not in _PRODUCTS or "dtype" not in func._overloadname:
        return func(*args, **kwargs)
    matrices = [x for x in args if isinstance(x, torch.Tensor)]
    left, right = matrices[-2:]
    out_dtype = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype))
    half = left.dtype in (torch.float16, torch.bfloat16)
    if left.dtype != right.dtype or not (out_dtype == left.dtype or (half and out_dtype == torch.float32)):
        raise PretendedGpuError(
            f"{name}: out_dtype {out_dtype} of {left.dtype} by {right.dtype} is no product of cuBLAS"
        )
    total = left.float() @ right.float()
    if name in ("aten::addmm", "aten::baddbmm"):
        if matrices[0].dtype != out_dtype:
            raise PretendedGpuError(f"{name}: the sum is {matrices[0].dtype}, out_dtype {out_dtype}")
        total = total * kwargs.get("alpha", 1) + matrices[0].float() * kwargs.get("beta", 1)
    out = kwargs.get("out")
    if out is None:
        return total.to(out_dtype)
    if out.dtype != out_dtype:
        raise PretendedGpuError(f"{name}: out is {out.dtype}, out_dtype {out_dtype}")
    return out.copy_(total)


def _collective(func: Any, name: str, flat: list[Any], spec: Any, there: list[Any], here: list[Any]) -> Any:
    group = _group_name(flat)
    if here and group not in GLOO_GROUPS and name != "c10d::barrier":
        raise PretendedGpuError(f"{name}: an NCCL group was given a host tensor of shape {list(here[0].shape)}")
    if there and group in GLOO_GROUPS:
        raise PretendedGpuError(f"{name}: a gloo group was given a GPU tensor of shape {list(there[0].shape)}")
    owners = {id(x.inner): x for x in there}
    args, kwargs = tree_unflatten([inside(x) for x in flat], spec)
    leaves, result_spec = tree_flatten(func(*args, **kwargs))
    wrapped = [_wrapped(x, owners) for x in leaves] if there else leaves
    return tree_unflatten(wrapped, result_spec)


def _group_name(flat: list[Any]) -> str:
    for x in flat:
        if isinstance(x, dist.ProcessGroup):
            return x.group_name
        if isinstance(x, torch._C.ScriptObject):
            with contextlib.suppress(Exception):  # Not a group: a reduction, options.
                return dist.ProcessGroup.unbox(x).group_name
    return ""

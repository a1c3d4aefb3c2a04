"""A stand-in for Transformer Engine's compiled part: its Python modules are the real ones, what they call is torch.

GEMMs, RMSNorm, fused Adam and the multi-tensor kernels are written out here, so Transformer Engine's own forward and
backward run: its gathers over tensor parallel ranks, its fused weight gradients, its saved tensors. Attention and fused
RoPE, whose kernels choose among backends, are replaced a level higher. Quantised GEMMs are BF16's: under a recipe only
shapes, padding and flags are checked (`QUANTISED` says what was quantised). Anything else that is asked of the compiled
part raises NotImplementedError with its name.
"""

from __future__ import annotations

import enum
import functools
import importlib.machinery
import importlib.metadata
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.pretended_gpu.device import WAITS, CudaTensor

_ENUMS: dict[str, list[str]] = json.loads(Path(__file__).with_name("engine_enums.json").read_text(encoding="utf-8"))
"""Members of the compiled part's enumerations, which its Python mirrors name by name."""
_TORCH = {"kFloat32": torch.float32, "kFloat16": torch.float16, "kBFloat16": torch.bfloat16, "kByte": torch.uint8}

QUANTISED: list[tuple[str, str, tuple[int, ...]]] = []
"""(recipe, module, shape of its input) of every forward pass under a recipe."""
ATTENTION: dict[str, Any] = {}
"""What attention was last called with."""


class _Missing:
    """A name of the compiled part that nobody may call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self._name} has no stand-in")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Missing(f"{self._name}.{name}")
        setattr(self, name, value)
        return value

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Missing) and other._name == self._name

    def __or__(self, other: Any) -> Any:
        return other

    def __ror__(self, other: Any) -> Any:
        return other

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (_base(self._name),)


@functools.cache
def _base(name: str) -> type:
    return type(name, (), {"__init__": lambda self, *args, **options: None})


class _Extension(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Missing(name)
        setattr(self, name, value)
        return value


def pretend() -> None:
    """Before transformer_engine is imported, with its folder on PYTHONPATH."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Its CUDA library isn't looked for.
    extension = _Extension("transformer_engine_torch")
    extension.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    is_old = _version() < (2, 10)
    for name, members in _ENUMS.items():
        if is_old and name not in ("DType", "FP8FwdTensors", "FP8BwdTensors"):
            continue  # Mirrored by newer ones only, and of other members.
        setattr(extension, name, enum.IntEnum(name, [(m, i) for i, m in enumerate(members)]))
    extension.get_cudnn_version = lambda: 92000
    extension.get_cublasLt_version = lambda: 130000
    extension.get_num_cublas_streams = lambda: 4
    for kernel in (
        generic_gemm,
        te_general_grouped_gemm,
        rmsnorm_fwd,
        rmsnorm_bwd,
        multi_tensor_adam,
        multi_tensor_l2norm,
        multi_tensor_scale,
        multi_tensor_scale_tensor,
    ):
        setattr(extension, kernel.__name__, _kernel(kernel))
    sys.modules["transformer_engine_torch"] = extension
    import transformer_engine.common

    for source in Path(transformer_engine.__path__[0], "pytorch").rglob("*.py"):  # Some of it is imported by `*`.
        for name in re.findall(r"\btex\.(\w+)", source.read_text(encoding="utf-8")):
            getattr(extension, name)

    transformer_engine.common.load_framework_extension = lambda framework: None


def _version() -> tuple[int, int]:
    major, minor, *_ = importlib.metadata.version("transformer-engine").split(".")
    return int(major), int(minor)


def _kernel(function: Any) -> Any:
    """A kernel waits for nothing, whatever torch does in its place."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with WAITS.pause(), torch.no_grad():
            return function(*args, **options)

    return call


def _dtype(of_engine: Any) -> torch.dtype | None:
    if of_engine is None or isinstance(of_engine, torch.dtype):
        return of_engine
    return _TORCH[sys.modules["transformer_engine_torch"].DType(int(of_engine)).name]


# --- kernels --------------------------------------------------------------------------------------------------------


def _product(a: torch.Tensor, transa: bool, b: torch.Tensor, transb: bool) -> torch.Tensor:
    """In cuBLAS's order, column-major: op(b) @ op(a) of the row-major matrices, summed in FP32."""
    if a.dtype != b.dtype:
        raise RuntimeError(f"generic_gemm of {a.dtype} by {b.dtype}")
    left, right = b.reshape(-1, b.shape[-1]).float(), a.reshape(-1, a.shape[-1]).float()
    return (left.T if transb else left) @ (right.T if transa else right)


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    bias: Any,
    *rest: Any,
    **more: Any,
) -> Any:
    """(out, bias gradient, GELU input, extra output)"""
    gelu, _, grad, _, _, accumulate = rest[1:7]
    if quantizer is not None or gelu:
        raise NotImplementedError("generic_gemm with a quantised output or GELU has no stand-in")
    result = _product(A, transa, B, transb)
    bias_gradient = B.reshape(-1, B.shape[-1]).float().sum(0).to(B.dtype) if grad and bias is not None else None
    if bias is not None and not grad:
        result = result + bias.float()
    dtype = _dtype(out_dtype) or (out.dtype if out is not None else A.dtype)
    if out is None:
        shape = result.shape if transb else (*B.shape[:-1], result.shape[-1])
        return result.reshape(shape).to(dtype), bias_gradient, None, None
    result = result.view_as(out)
    out.copy_(out + result if accumulate else result)
    return out, bias_gradient, None, None


def te_general_grouped_gemm(
    A: Any, transa: bool, B: Any, transb: bool, out: Any, out_dtype: Any, m_splits: Any, bias: Any, bias_dtype: Any,
    single_output: bool, gelu_input: Any, grad: bool, workspaces: Any, workspace_size: int, accumulate: bool, *rest: Any,
) -> Any:  # fmt: skip
    if bias is not None and any(x is not None and x.numel() for x in bias):
        raise NotImplementedError("te_general_grouped_gemm with biases has no stand-in")
    outs = list(out[0].split(list(m_splits))) if single_output else list(out)
    for a, b, o in zip(A, B, outs, strict=True):
        result = _product(a, transa, b, transb).view_as(o)
        o.copy_(o + result if accumulate else result)
    return bias


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> Any:
    """(y, None, 1 / rms of the rows)"""
    rows = x.float()
    scale = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (rows * scale * (weight.float() + 1 if centered else weight.float())).to(_dtype(dtype))
    if out is not None:
        out.copy_(y)
        y = out
    return y, None, scale.reshape(-1)


def rmsnorm_bwd(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, margin: int, centered: bool
) -> Any:
    """(dx, dweight)"""
    shape, rows, dy = x.shape, x.float().reshape(-1, x.shape[-1]), dy.float().reshape(-1, x.shape[-1])
    normed = rows * scale[:, None]
    g = dy * (weight.float() + 1 if centered else weight.float())
    dx = scale[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).view(shape), (dy * normed).sum(0).to(weight.dtype)


def multi_tensor_adam(
    chunk: int, noop: Any, lists: Any, lr: float, beta1: float, beta2: float, eps: float, step: int, mode: Any,
    bias_correction: Any, weight_decay: float,
) -> None:  # fmt: skip
    decoupled = int(mode) == 1
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for g, p, m, v in zip(*lists, strict=True):
        gradient, value = g.float(), p.float()
        if not decoupled:
            gradient = gradient + weight_decay * value
        m.copy_(m * beta1 + (1 - beta1) * gradient)
        v.copy_(v * beta2 + (1 - beta2) * gradient.square())
        update = (m / first) / ((v / second).sqrt() + eps)
        p.copy_(value - lr * (update + (weight_decay * value if decoupled else 0)))


def multi_tensor_l2norm(chunk: int, noop: Any, lists: Any, per_tensor: bool = False) -> Any:
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk: int, noop: Any, lists: Any, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, noop: Any, lists: Any, scale: torch.Tensor) -> None:
    multi_tensor_scale(chunk, noop, lists, scale)


# --- above the kernels ----------------------------------------------------------------------------------------------


def after_megatron() -> None:
    """Attention, RoPE, and the checks of quantised inputs: on Transformer Engine's classes, once Megatron is imported."""
    import megatron.core.models.common.embeddings.rope_utils as rope
    import transformer_engine.pytorch as te

    te.DotProductAttention.forward = _bound(te.DotProductAttention.forward, _attention)
    rope.fused_apply_rotary_pos_emb_thd = functools.partial(_rope, rope._apply_rotary_pos_emb_thd)
    # Recomputation under a recipe is Transformer Engine's: it keeps the generator of a device by its number.
    te.distributed._get_cuda_rng_state = lambda *args, **options: torch.get_rng_state()
    te.distributed._set_cuda_rng_state = lambda state, *args, **options: torch.set_rng_state(state)
    _without_permute_fusion()
    _plain_tensors()
    for module in (te.Linear, te.LayerNormLinear, te.GroupedLinear):
        module.forward = _without_quantising(module)


def _plain_tensors() -> None:
    """Transformer Engine takes any class but torch.Tensor for a quantised one, and rounds an FP32 bias for its GEMM."""
    for name, module in list(sys.modules.items()):
        real = getattr(module, "needs_quantized_gemm", None) if name.startswith("transformer_engine.") else None
        if real is not None:
            module.needs_quantized_gemm = lambda x, *rest, real=real, **more: (
                not isinstance(x, CudaTensor) and real(x, *rest, **more)
            )


def _without_permute_fusion() -> None:
    """Its Triton kernels would take minutes in the interpreter: Megatron's unfused permutation stands for them."""
    from drpo_megatron.trainer import setup

    real = setup.transformer_config

    def transformer_config(*args: Any, **options: Any) -> Any:
        config = real(*args, **options)
        config.moe_permute_fusion = False
        return config

    setup.transformer_config = transformer_config


def _bound(real: Any, stand_in: Any) -> Any:
    """The call must fit the real signature."""
    signature = inspect.signature(real)

    @functools.wraps(real)
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        call = signature.bind(self, *args, **options)
        with WAITS.pause():
            return stand_in(**call.arguments)

    return forward


class _Alone:
    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _attention(self: Any, query_layer: Any, key_layer: Any, value_layer: Any, **options: Any) -> torch.Tensor:
    """Causal attention of packed sequences, in the zig-zag order of context parallel ranks."""
    from drpo_megatron.trainer.layers import PackedAttention, PackedSequences

    ATTENTION.clear()
    ATTENTION.update(options)
    bounds = options["cu_seqlens_q"]
    if options["qkv_format"] != "thd" or bounds.dtype != torch.int32 or not bounds.is_cuda:
        raise RuntimeError(f"packed attention needs thd and int32 bounds on the GPU, not {options}")
    if "padding" not in (options.get("attn_mask_type") or self.attn_mask_type):
        raise RuntimeError("packed attention needs a padding mask type")
    group = self.cp_group if self.cp_group is not None else _Alone()
    packed = PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=options["max_seqlen_q"],
        max_seqlen_kv=options["max_seqlen_kv"],
        num_rows=query_layer.shape[0] * group.size(),
    )
    layer = types.SimpleNamespace(cp_group=group, scale=self.unfused_attention.softmax_scale)
    return PackedAttention.forward(layer, query_layer, key_layer, value_layer, packed_seq_params=packed)


def _rope(unfused: Any, t: Any, cu_seqlens: Any, freqs: Any, cp_size: int = 1, cp_rank: int = 0, **options: Any) -> Any:
    group = types.SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    with WAITS.pause():
        return unfused(t, cu_seqlens, freqs, cp_group=group)


def _without_quantising(module: Any) -> Any:
    real = module.forward

    @functools.wraps(real)
    def forward(self: Any, rows: torch.Tensor, *args: Any, **options: Any) -> Any:
        recipe = _current_recipe()
        if recipe is None:
            return real(self, rows, *args, **options)
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

        flat = rows.reshape(-1, rows.shape[-1])
        parts = [flat]
        if module is te.GroupedLinear:
            splits = args[0] if args else options["m_splits"]
            parts = list(flat.split(splits.tolist() if hasattr(splits, "tolist") else list(splits)))
        for part in parts:
            assert_dim_for_fp8_exec(part)
        name = next(c.__name__ for c in type(recipe).__mro__ if c.__module__.startswith("transformer_engine"))
        QUANTISED.extend((name, type(self).__name__, tuple(part.shape)) for part in parts)
        self.fp8 = False  # Else a recomputation looks for the scales of the first forward pass, which were never made.
        with te.fp8_autocast(enabled=False):
            result = real(self, rows, *args, **options)
        self.fp8 = True  # As the real forward pass leaves it.
        return result

    return forward


def _current_recipe() -> Any:
    try:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    except ImportError:  # Before 2.9.
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
    return FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None

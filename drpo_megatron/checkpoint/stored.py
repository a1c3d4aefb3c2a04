"""What the tensors of a Hugging Face checkpoint mean: FP8 with its scales is read as the numbers that it stands for.

    X.weight            FP8 [N, K]
    X.weight_scale_inv  (or X.weight_scale), what X.weight is multiplied by to get the weights back:
                        [ceil(N / rows), ceil(K / columns)] for blocks, or one of the tensor, or one of every row

The same for stacked experts, `experts.down_proj` [E, N, K] with `experts.down_proj_scale_inv` [E, ...]. Whatever else is
packed into small types (int8, FP4, GPTQ's int32, FP8 without a scale, a scale without FP8) is a problem with a name:
nothing of it is ever taken for weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.safetensors_file import TensorInfo

CONFIG_KEY = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt says what it did."""
_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SCALES = ("_scale_inv", "_scale")
"""What follows the name of a tensor in that of its scale."""
_ONLY_SCALES = ("_scale_inv", "weight_scale", "weight_scale_2", "input_scale", ".k_scale", ".v_scale")
"""Names that end so are scales and nothing else."""
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How config.json says that FP8 tensors are scaled."""

    dtype: torch.dtype
    block: tuple[int, int] | None
    """Rows and columns that share a scale. None: all of a tensor do, or each row has its own."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Quantisation | None:
        """None: config.json speaks of no quantisation. ValueError for one that nothing here can undo."""
        found = {name: section for name, section in _sections(config) if section is not None}
        if not found:
            return None
        name, section = next(iter(found.items()))
        if len(found) > 1 or name != CONFIG_KEY or not isinstance(section, Mapping):
            raise ValueError(f"config.json speaks of quantisation in {', '.join(found)}; {_UNQUANTISED}")
        method, block = section.get("quant_method"), section.get("weight_block_size")
        is_block = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        if method != "fp8" or not (block is None or is_block):
            raise ValueError(
                f"{CONFIG_KEY} has quant_method={method!r}, weight_block_size={block}; only fp8 in blocks of rows x "
                f"columns, or with a scale a tensor or a row, can be dequantised: {_UNQUANTISED}"
            )
        scheme, format = section.get("activation_scheme", "dynamic"), section.get("fmt", "e4m3")
        if scheme != "dynamic" or format not in _FORMATS:
            raise ValueError(
                f"{CONFIG_KEY} has activation_scheme={scheme!r}, fmt={format!r}; only dynamic and "
                f"{', '.join(_FORMATS)} can be dequantised: {_UNQUANTISED}"
            )
        return cls(_FORMATS[format], None if block is None else (block[0], block[1]))

    def scale_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Those that the scale of a tensor of this shape may have."""
        if len(shape) < 2:
            return []
        stack, (rows, columns) = shape[:-2], shape[-2:]
        if self.block is not None:
            return [(*stack, -(-rows // self.block[0]), -(-columns // self.block[1]))]
        each = [(*stack, 1, 1), (*stack, rows, 1)]
        return [*each, stack, (1,), (rows,)] if not stack else [*each, stack, (*stack, 1)]

    def dequantised(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """FP32 [N, K] or [E, N, K]."""
        wide, scale = values.float(), scale.float()
        if self.block is None:
            return wide.mul_(scale.reshape(*scale.shape, *[1] * (wide.ndim - scale.ndim)))
        rows, columns = self.block
        for index in range(scale.shape[-2]):
            factors = scale[..., index, :].repeat_interleave(columns, -1)[..., : wide.shape[-1]]
            wide[..., index * rows : (index + 1) * rows, :] *= factors.unsqueeze(-2)
        return wide


_UNQUANTISED = "take the unquantised checkpoint"


class StoredTensors:
    """The tensors of a checkpoint, those in FP8 as what they stand for: BF16, unless another type is asked for."""

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        """Raises ValueError, with the name of the file, for a quantisation that nothing here can undo."""
        self.checkpoint = checkpoint
        try:
            self.quantisation = Quantisation.of(checkpoint.config)
        except ValueError as error:
            raise ValueError(f"{checkpoint.directory}: {error}") from error
        if (checkpoint.directory / MODELOPT_FILE).exists():
            raise ValueError(f"{checkpoint.directory} has a {MODELOPT_FILE}, which is not understood; {_UNQUANTISED}")
        self._infos = {name: checkpoint.info(name) for name in checkpoint.names()}
        self._scales = self._find_scales()
        hidden = set(self._scales.values())
        self.names = [name for name in self._infos if name not in hidden]
        """All but the scales."""

    @property
    def num_quantised(self) -> int:
        return len(self._scales)

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the numbers that are read here."""
        return {key: value for key, value in self.checkpoint.config.items() if key != CONFIG_KEY}

    def info(self, name: str) -> TensorInfo:
        """Shape, and dtype after dequantisation."""
        info = self._infos[name]
        return TensorInfo(torch.bfloat16, info.shape) if name in self._scales else info

    def get(self, name: str, index: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, or `tensor[index]`, as `dtype` (None: as `info` says). ValueError for a scale that is no number."""
        tensor = self.checkpoint.get(name, index)
        if name not in self._scales:
            return tensor if dtype is None else tensor.to(dtype)
        assert self.quantisation is not None
        scale = self.checkpoint.get(self._scales[name], index)
        if not torch.isfinite(scale.float()).all():
            raise ValueError(
                f"{self._scales[name]} of {self.checkpoint.directory} holds NaN or infinity; copy it again"
            )
        return self.quantisation.dequantised(tensor, scale).to(dtype or torch.bfloat16)

    def problems(self) -> Iterator[str]:
        """`kind: what`, one for every tensor that isn't what it seems."""
        stray = self.stray_scales()
        for name, info in self._infos.items():
            base = self._base(name)
            if name in stray and base is None:
                yield f"scale: {name} has no tensor that it scales"
            elif name in stray and base is not None:
                yield f"scale: {name} scales {base}, which is {dtype_name(self._infos[base].dtype)} and not FP8"
            elif base is None:
                yield from self._packed(name, info)

    def stray_scales(self) -> set[str]:
        """Scales of nothing, and of tensors that need none."""
        return {
            name
            for name in self.names
            if ((base := self._base(name)) is None and name.endswith(_ONLY_SCALES))
            or (base is not None and not _is_fp8(self._infos[base].dtype))
        }

    def _packed(self, name: str, info: TensorInfo) -> Iterator[str]:
        dtype = info.dtype
        if is_packed(info):
            yield f"dtype: {name} is {dtype_name(dtype)}: weights that are packed can't be unpacked here"
        elif not (dtype.is_floating_point and dtype.itemsize == 1):
            return
        elif name not in self._scales:
            yield (
                f"dtype: {name} is {dtype_name(dtype)} without a {name}{_SCALES[0]} and a {CONFIG_KEY} for it"
                if self.quantisation is None or not self._scale_names(name)
                else f"dtype: {name} is {dtype_name(dtype)}, but {CONFIG_KEY} speaks of "
                f"{dtype_name(self.quantisation.dtype)}"
            )
        else:
            yield from self._scale_problems(name, info)

    def _scale_problems(self, name: str, info: TensorInfo) -> Iterator[str]:
        assert self.quantisation is not None
        scale = self._infos[self._scales[name]]
        if len(found := self._scale_names(name)) > 1:
            yield f"scale: {name} has two, {' and '.join(found)}"
        shapes = self.quantisation.scale_shapes(info.shape)
        if scale.shape not in shapes:
            block, wanted = self.quantisation.block, " or ".join(str(list(shape)) for shape in shapes) or "a matrix"
            of = f"blocks of {block[0]} x {block[1]} in" if block else "a scale of"
            yield f"misshapen: {self._scales[name]} is {list(scale.shape)}, {of} {list(info.shape)} need {wanted}"
        if scale.dtype not in _SCALE_DTYPES:
            yield f"dtype: {self._scales[name]} is {dtype_name(scale.dtype)}, which no scale can be"

    def _find_scales(self) -> dict[str, str]:
        """The scale of every FP8 tensor that has one, if config.json speaks of them."""
        if self.quantisation is None:
            return {}
        return {
            name: found[0]
            for name, info in self._infos.items()
            if info.dtype == self.quantisation.dtype and (found := self._scale_names(name))
        }

    def _scale_names(self, name: str) -> list[str]:
        return [name + suffix for suffix in _SCALES if name + suffix in self._infos]

    def _base(self, name: str) -> str | None:
        """What this is the scale of, by its name; a tensor that is no scale may be called so, too."""
        for suffix in _SCALES:
            base = name.removesuffix(suffix)
            if (
                base != name
                and base in self._infos
                and (_is_fp8(self._infos[base].dtype) or name.endswith(_ONLY_SCALES))
            ):
                return base
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def require_plain(tensors: Mapping[str, TensorInfo], where: object) -> None:
    """ValueError when one of the tensors, which are copied as they are, is packed or quantised."""
    packed = [name for name, info in tensors.items() if info.dtype.itemsize == 1 and info.dtype != torch.bool]
    if packed:
        raise ValueError(
            f"{where}: {len(packed)} tensors that aren't trained are quantised, such as {packed[0]} "
            f"({dtype_name(tensors[packed[0]].dtype)}), and would be taken for weights; {_UNQUANTISED}"
        )


def is_packed(info: TensorInfo) -> bool:
    """Integers that only weights of a few bits are kept in; an index or a mask is of another type, or a vector."""
    return info.dtype in (torch.int8, torch.uint8) or (info.dtype in (torch.int16, torch.int32) and len(info.shape) > 1)


def _is_fp8(dtype: torch.dtype) -> bool:
    return dtype in _FORMATS.values()


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in (CONFIG_KEY, "compression_config", "quantization"):
        yield key, config.get(key)
        for part in ("text_config", "vision_config"):
            if isinstance(config.get(part), Mapping):
                yield f"{part}.{key}", config[part].get(key)

"""Rounding tensors to FP8 and FP4 and back, in plain torch: the arithmetic of quantised training without its kernels.

    blocks of x -> amax -> scale_inv (a multiplier) -> x / scale_inv, rounded to the element format -> times scale_inv

A format is an element type, the block that shares a scale, and the rule by which the scale comes from the block's
amax. Everything is a pure, deterministic function of the tensor. Nothing saturates except where a caller gives an amax
of its own (delayed scaling). A block that holds a NaN or an infinity becomes NaN as a whole: a broken tensor stays
visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

TINY_AMAX = 1e-12
"""Blocks of zeros are scaled as if this were their amax, as SGLang does."""


@dataclass(frozen=True, slots=True)
class Element:
    """A floating point type of at most 8 bits."""

    name: str
    largest: float
    mantissa_bits: int
    smallest_normal: float
    dtype: torch.dtype | None
    """None: torch has no cast to it, and its values are held in FP32."""

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal: also the spacing around 0."""
        return self.smallest_normal * 2.0**-self.mantissa_bits


E4M3 = Element("e4m3", 448.0, 3, 2.0**-6, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 57344.0, 2, 2.0**-14, torch.float8_e5m2)
E2M1 = Element("e2m1", 6.0, 1, 1.0, None)

ScaleRule = Literal["fp32", "power_of_two", "nvfp4"]
Block = tuple[int | None, int | None]
"""Rows and columns that share a scale. None: all of them."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix [M, K] (leading dimensions are rows) is quantised along K, its inner dimension.

    scale fp32: amax / largest. power_of_two: that, rounded up to a power of two, which is the range of E8M0; said of
    the inverse, largest / amax rounded down. nvfp4: amax / largest as an E4M3 number times one FP32 of the tensor.
    """

    element: Element
    block: Block
    scale: ScaleRule = "fp32"

    def transposed(self) -> Format:
        """The same along M: what a matrix product sees that sums over the rows."""
        return replace(self, block=self.block[::-1])


@dataclass(frozen=True, slots=True)
class Noise:
    """Not a rounding: every number times 1 + size * N(0, 1). For experiments that need an error of a known size.

    The draws are seeded by the tensor's own bits: the same tensor always gets the same noise, and no state is kept.
    """

    size: float

    def transposed(self) -> Noise:
        return self


BLOCK128 = Format(E4M3, (128, 128))
"""Weights of block-FP8 checkpoints (DeepSeek's layout, which SGLang loads)."""
GROUP128 = Format(E4M3, (1, 128))
"""Activations beside them: `activation_scheme: dynamic`."""

FORMATS: dict[str, Format] = {
    "e4m3": Format(E4M3, (None, None)),
    "e5m2": Format(E5M2, (None, None)),
    "e4m3-row": Format(E4M3, (1, None)),
    "e4m3-1x128": GROUP128,
    "e4m3-128x128": BLOCK128,
    "mxfp8": Format(E4M3, (1, 32), "power_of_two"),
    "mxfp4": Format(E2M1, (1, 32), "power_of_two"),
    "nvfp4": Format(E2M1, (1, 16), "nvfp4"),
    "nvfp4-16x16": Format(E2M1, (16, 16), "nvfp4"),
}


@dataclass(frozen=True, slots=True)
class Quantized:
    values: torch.Tensor
    """The shape of the input; in the element's dtype, or in FP32 where torch has none."""
    scale_inv: torch.Tensor
    """FP32 [row blocks, column blocks]: what the values are multiplied by."""
    format: Format

    def dequantize(self) -> torch.Tensor:
        """FP32 in the shape of the input."""
        shape = self.values.shape
        if self.values.numel() == 0:
            return self.values.float()
        blocks = _to_blocks(self.values.float(), self.format.block) * self.scale_inv[:, None, :, None]
        return _from_blocks(blocks, shape)


@torch.no_grad()
def quantize(x: torch.Tensor, format: Format, amax: torch.Tensor | None = None) -> Quantized:
    """Round x [..., K] to nearest, ties to even, beyond the largest number to the largest.

    The last blocks of rows and columns may be ragged; they are padded with zeros, which change no amax.

    Args:
        amax: FP32, broadcast to the blocks' shape: scale by it instead of by x itself.
    """
    if x.numel() == 0:
        dtype = format.element.dtype or torch.float32
        return Quantized(x.to(dtype), x.new_zeros(0, 0, dtype=torch.float32), format)
    blocks = _to_blocks(x.float(), format.block)
    found = block_amax(x, format) if amax is None else amax.float().expand(blocks.shape[0], blocks.shape[2])
    scale_inv = _scale_inv(found, format)
    scaled = blocks / scale_inv[:, None, :, None]
    if format.scale == "nvfp4":  # A block far below the tensor's largest number has the scale 0.
        scaled = scaled.masked_fill(scale_inv[:, None, :, None] == 0, 0.0)
    return Quantized(_from_blocks(round_to(scaled, format.element), x.shape), scale_inv, format)


def fake_quantize(x: torch.Tensor, format: Format | Noise, amax: torch.Tensor | None = None) -> torch.Tensor:
    """FP32 in the shape of x: what is left of x in this format. `amax` as in `quantize`."""
    if isinstance(format, Noise):
        return _with_noise(x, format.size)
    return quantize(x, format, amax).dequantize()


def quantize_block128(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [N, K], scale_inv FP32 [ceil(N/128), ceil(K/128)]) of a weight [N, K], as block-FP8 checkpoints hold it.

    scale_inv = max(amax, 1e-12) / 448 of a 128 x 128 block, ragged at the edges. ValueError if weight is no matrix.
    """
    if weight.ndim != 2:
        raise ValueError(f"only a matrix has 128 x 128 blocks; this weight has the shape {tuple(weight.shape)}")
    quantized = quantize(weight, BLOCK128)
    return quantized.values, quantized.scale_inv


def dequantize_block128(values: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """FP32 [N, K] of what `quantize_block128` made. ValueError where the shapes don't fit."""
    expected = tuple(-(-size // 128) for size in values.shape)
    if values.ndim != 2 or tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"weight {tuple(values.shape)} has 128 x 128 blocks {expected}, but its scale_inv is {tuple(scale_inv.shape)}"
        )
    return Quantized(values, scale_inv.float(), BLOCK128).dequantize()


def block_amax(x: torch.Tensor, format: Format) -> torch.Tensor:
    """FP32 [row blocks, column blocks]: the largest magnitude of every block of x, which is not empty."""
    return _to_blocks(x.detach().float(), format.block).abs().amax((1, 3))


def round_to(x: torch.Tensor, element: Element) -> torch.Tensor:
    """x (FP32) as numbers of the element type, unscaled: nearest, ties to even, saturated, NaN kept."""
    x = x.clamp(-element.largest, element.largest)
    if element.dtype is not None:
        return x.to(element.dtype)
    # A binade's numbers are spaced evenly, from the smallest normal downwards as in its own binade.
    exponent = torch.frexp(x.abs().clamp(min=element.smallest_normal)).exponent - 1
    step = torch.ldexp(torch.ones_like(x), exponent - element.mantissa_bits)
    return torch.round(x / step) * step


def _scale_inv(amax: torch.Tensor, format: Format) -> torch.Tensor:
    largest = format.element.largest
    if format.scale == "fp32":
        return amax.clamp(min=TINY_AMAX) / largest
    if format.scale == "power_of_two":
        mantissa, exponent = torch.frexp(amax / largest)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 127)
        return torch.ldexp(torch.ones_like(amax), exponent).where(amax.isfinite(), torch.nan)
    of_tensor = amax.amax().clamp(min=TINY_AMAX) / (largest * E4M3.largest)
    return round_to(amax / largest / of_tensor, E4M3).float() * of_tensor


def _to_blocks(x: torch.Tensor, block: Block) -> torch.Tensor:
    """[..., K] -> [row blocks, rows of a block, column blocks, columns of a block], padded with zeros."""
    rows = x.reshape(-1, x.shape[-1] if x.ndim else 1)
    num_rows, num_columns = rows.shape
    height, width = block[0] or num_rows, block[1] or num_columns
    missing = (-num_rows % height, -num_columns % width)
    if any(missing):
        rows = torch.nn.functional.pad(rows, (0, missing[1], 0, missing[0]))
    return rows.reshape(rows.shape[0] // height, height, rows.shape[1] // width, width)


def _from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
    num_columns = shape[-1] if shape else 1
    return rows[: math.prod(shape[:-1]), :num_columns].reshape(shape)


def _with_noise(x: torch.Tensor, size: float) -> torch.Tensor:
    x = x.detach().float()
    seed = int(x.contiguous().view(torch.int32).sum(dtype=torch.int64)) if x.numel() else 0
    generator = torch.Generator(device=x.device).manual_seed(seed & (2**63 - 1))
    return x * (1 + size * torch.randn(x.shape, generator=generator, device=x.device))

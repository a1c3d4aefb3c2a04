"""FP8 and FP4 rounding against a table of all numbers in float64, against torchao, and against its own error bounds."""

from __future__ import annotations

import math

import pytest
import torch

from drpo_megatron.precision.quantize import (
    BLOCK128,
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    Element,
    Format,
    Noise,
    dequantize_block128,
    fake_quantize,
    quantize,
    quantize_block128,
    round_to,
)

POWER_OF_TWO_BLOCKS = Format(E4M3, (128, 128), "power_of_two")


def random_matrix(num_rows: int, num_columns: int, spread: float = 2.0) -> torch.Tensor:
    """Normal numbers whose size differs by orders of magnitude between columns, as activations' do."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_columns)
    size = torch.randn(num_columns, generator=generator).mul(spread).exp()
    return torch.randn(num_rows, num_columns, generator=generator) * size


def sqnr_db(x: torch.Tensor, rounded: torch.Tensor) -> float:
    x, rounded = x.double(), rounded.double()
    return 10 * math.log10(x.square().sum() / (x - rounded).square().sum())


def all_numbers(element: Element) -> torch.Tensor:
    """[N] float64, ascending from 0, every non-negative number of the type: m 2^(e - bits), then the binades above."""
    bits = element.mantissa_bits
    numbers = [mantissa * element.smallest for mantissa in range(2**bits)]
    binade = element.smallest_normal
    while binade <= element.largest:
        numbers += [binade * (1 + mantissa / 2**bits) for mantissa in range(2**bits)]
        binade *= 2
    return torch.tensor([x for x in numbers if x <= element.largest], dtype=torch.float64)


def nearest(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Nearest number of the table, the one at an even place where two are as near. float64."""
    distance = (x.double().abs()[:, None] - numbers).abs()
    tie_break = torch.arange(len(numbers)) % 2
    best = distance.amin(1, keepdim=True)
    place = torch.where(distance == best, tie_break, 2).argmin(1)
    return numbers[place].copysign(x.double())


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1], ids=lambda element: element.name)
def test_rounding_is_to_the_nearest_number_ties_to_even_and_saturates(element: Element) -> None:
    numbers = all_numbers(element)
    assert numbers[1] == element.smallest and numbers[-1] == element.largest
    middles = (numbers[1:] + numbers[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.rand(2000, generator=generator).double() * numbers[-1]
    small = torch.rand(500, generator=generator).double() * element.smallest_normal
    x = torch.cat([numbers, middles, anywhere, small, numbers[-1:] * 3]).float()
    x = torch.cat([x, -x])
    assert torch.equal(round_to(x, element).double(), nearest(x, numbers))
    assert round_to(torch.tensor([math.nan]), element).float().isnan()


@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (130, 257), (5, 3), (1, 1)])
def test_block128_is_the_loop_over_blocks(shape: tuple[int, int]) -> None:
    weight = random_matrix(*shape)
    values, scale_inv = quantize_block128(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    assert scale_inv.dtype == torch.float32 and scale_inv.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    expected = torch.empty_like(weight)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            block = weight[i : i + 128, j : j + 128]
            scale = block.abs().max().clamp(min=1e-12) / 448
            assert scale_inv[i // 128, j // 128] == scale
            expected[i : i + 128, j : j + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(dequantize_block128(values, scale_inv), expected)
    assert torch.equal(fake_quantize(weight, BLOCK128), expected)


def test_block128_refuses_what_has_no_such_blocks() -> None:
    with pytest.raises(ValueError, match=r"only a matrix.*\(2, 3, 4\)"):
        quantize_block128(torch.zeros(2, 3, 4))
    values, _ = quantize_block128(torch.ones(130, 128))
    with pytest.raises(ValueError, match=r"\(130, 128\) has 128 x 128 blocks \(2, 1\), but its scale_inv is \(1, 1\)"):
        dequantize_block128(values, torch.ones(1, 1))


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_at_most_half_a_step(name: str) -> None:
    """Half a step is |x| 2^-(bits + 1) for normal numbers and half the smallest number, times the scale, below."""
    format, x = FORMATS[name], random_matrix(96, 272)
    quantized = quantize(x, format)
    rows, columns = (torch.arange(size) // (block or size) for size, block in zip(x.shape, format.block, strict=True))
    scale = quantized.scale_inv[rows][:, columns]
    half_step = torch.maximum(x.abs() * 2.0 ** -(format.element.mantissa_bits + 1), scale * format.element.smallest / 2)
    error = (quantized.dequantize() - x).abs()
    if format.scale == "nvfp4":  # The scale itself was rounded: the largest number may lie beyond 6.
        half_step = torch.maximum(half_step, x.abs() - 6 * scale)
    assert bool((error <= half_step * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_rounded_stays(name: str) -> None:
    once = fake_quantize(random_matrix(64, 256, spread=0.5), FORMATS[name])
    torch.testing.assert_close(fake_quantize(once, FORMATS[name]), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("e4m3", 30, 33),
        ("e4m3-1x128", 30, 33),
        ("mxfp8", 30, 33),
        ("e5m2", 24, 27),
        ("nvfp4", 19, 22),
        ("mxfp4", 17, 20),
    ],
)
def test_signal_to_noise_of_a_gaussian(name: str, low: float, high: float) -> None:
    """Relative error uniform in +-2^-(bits + 1), mantissa log-uniform: E4M3 31.5 dB, E5M2 25.5; FP4 is not as smooth."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert low < sqnr_db(x, fake_quantize(x, FORMATS[name])) < high


def test_a_scale_of_a_power_of_two_is_the_smallest_that_does_not_saturate() -> None:
    x = random_matrix(256, 256)
    scale = quantize(x, POWER_OF_TWO_BLOCKS).scale_inv
    exact = quantize(x, BLOCK128).scale_inv
    assert torch.equal(scale.log2(), scale.log2().round())
    assert bool((scale >= exact).all()) and bool((scale / 2 < exact).all())
    # amax = 448: the factor 1 fits exactly.  amax = 449: it does not, and 2 is next.
    for amax, expected in ((448.0, 1.0), (449.0, 2.0), (0.0, 1.0), (1e-36, 2.0**-127)):
        assert quantize(torch.tensor([[amax]]), POWER_OF_TWO_BLOCKS).scale_inv.item() == expected


def test_columns_are_rounded_as_rows_of_the_transpose() -> None:
    x = random_matrix(200, 300)
    for format in FORMATS.values():
        assert torch.equal(fake_quantize(x, format.transposed()), fake_quantize(x.t(), format).t())


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_empty_tensors_stay_and_broken_blocks_show(name: str) -> None:
    format = FORMATS[name]
    assert torch.equal(fake_quantize(torch.zeros(3, 40), format), torch.zeros(3, 40))
    assert fake_quantize(torch.zeros(0, 40, dtype=torch.bfloat16), format).shape == (0, 40)
    assert fake_quantize(torch.ones(2, 3, 40), format).shape == (2, 3, 40)
    for broken in (math.nan, math.inf, -math.inf):
        x = torch.ones(256, 256)
        x[0, 0] = broken
        got = fake_quantize(x, format)
        height, width = (block or 256 for block in format.block)
        assert bool(got[:height, :width].isnan().all())
        if format.scale != "nvfp4":  # Its tensor has one scale in common.
            assert torch.equal(got[height:], torch.ones_like(got[height:]))


def test_a_given_amax_that_is_too_small_saturates() -> None:
    x = torch.tensor([[1.0, -8.0, 3.0]])
    assert fake_quantize(x, FORMATS["e4m3"], amax=torch.tensor(2.0)).tolist() == [[1.0, -2.0, 2.0]]


def test_noise_has_the_asked_size_and_repeats() -> None:
    x = torch.randn(400, 500)
    once = fake_quantize(x, Noise(0.01))
    assert sqnr_db(x, once) == pytest.approx(40, abs=0.2)  # 20 log10(1 / 0.01)
    assert torch.equal(once, fake_quantize(x, Noise(0.01)))
    assert not torch.equal(once[:1], fake_quantize(x + 1e-3, Noise(0.01))[:1])


# --- torchao as an oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_and_row_scaling_are_torchaos(dtype: torch.dtype) -> None:
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    x = random_matrix(64, 256).to(dtype)
    for format, element, options in (
        ("e4m3", torch.float8_e4m3fn, {}),
        ("e5m2", torch.float8_e5m2, {}),
        ("e4m3-row", torch.float8_e4m3fn, {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}),
    ):
        factor = tensor_to_scale(x, element, **options)
        mine, theirs = quantize(x, FORMATS[format]), to_fp8_saturated(x.float() * factor, element)
        torch.testing.assert_close(mine.scale_inv, 1 / factor.reshape(mine.scale_inv.shape), rtol=1e-6, atol=0)
        # x / s and x * (1 / s) may fall on two sides of a tie.
        assert (mine.values.float() != theirs.float()).float().mean() < 1e-3


def test_microscaling_is_torchaos_rounded_up() -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    x = random_matrix(64, 256)
    scale, values = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    mine = quantize(x, FORMATS["mxfp8"])
    assert torch.equal(mine.scale_inv, scale.float().reshape(64, 8))
    assert torch.equal(mine.values.float(), values.float().reshape(64, 256))


def test_nvfp4_is_torchaos() -> None:
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    x = random_matrix(64, 256, spread=0.3)
    of_tensor = per_tensor_amax_to_scale(x.abs().max())
    scale, packed = nvfp4_quantize(x, 16, of_tensor)
    mine = quantize(x, FORMATS["nvfp4"])
    torch.testing.assert_close(mine.scale_inv, scale.float().reshape(64, 16) * of_tensor, rtol=1e-6, atol=0)
    theirs = f4_unpacked_to_f32(unpack_uint4(packed)).reshape(64, 256)
    assert (mine.values != theirs).float().mean() < 1e-3

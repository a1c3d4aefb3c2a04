"""Where a saved tensor's bytes lie: found only where they are exactly the tensor, row by row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.checkpoint.torch_save import tensor_bytes


def saved(file: Path, value: Any) -> tuple[int, int]:
    """The part of the file that torch.save wrote, other bytes before and behind it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    file.write_bytes(b"before" + buffer.getvalue() + b"behind")
    return len("before"), len(buffer.getvalue())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (1, 4, 7), (9,), ()])
def test_the_bytes_are_the_tensors(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    part = saved(tmp_path / "file", tensor)
    place = tensor_bytes(tmp_path / "file", *part, dtype, shape)
    assert place is not None
    found = (tmp_path / "file").read_bytes()[place.begin : place.begin + place.num_bytes]
    assert found == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12.0).reshape(4, 3).t(),
        torch.arange(24.0).reshape(6, 4)[2:5],
        torch.arange(12.0).reshape(3, 4).double(),
        torch.arange(12.0).reshape(4, 3),
        torch.arange(12).reshape(3, 4),
        {"weight": torch.arange(12.0).reshape(3, 4)},
        [torch.arange(12.0).reshape(3, 4)] * 2,
        torch.nn.Parameter(torch.arange(12.0).reshape(3, 4)),
        "not a tensor",
    ],
    ids=["transposed", "part", "dtype", "shape", "integers", "dictionary", "list", "parameter", "text"],
)
def test_nothing_else_is_taken_for_the_tensor(value: Any, tmp_path: Path) -> None:
    part = saved(tmp_path / "file", value)
    assert tensor_bytes(tmp_path / "file", *part, torch.float32, (3, 4)) is None


def test_a_damaged_archive_has_no_place(tmp_path: Path) -> None:
    begin, num_bytes = saved(tmp_path / "file", torch.arange(12.0).reshape(3, 4))
    assert tensor_bytes(tmp_path / "file", begin, num_bytes, torch.float32, (3, 4)) is not None
    assert tensor_bytes(tmp_path / "file", begin, num_bytes - 30, torch.float32, (3, 4)) is None
    assert tensor_bytes(tmp_path / "missing", begin, num_bytes, torch.float32, (3, 4)) is None

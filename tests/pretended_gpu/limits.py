"""How far a rank of the pretended GPU may be from the CPU, by what rounding does to the case on the CPU itself.

The reference is one rank in FP32. It is run again, with every weight moved by at most one rounding: by how much its
log-probs and gradients move is what nobody can promise. For BF16 it is run again in BF16, as it is and so moved. A loss
and a norm are single numbers, which may agree by luck where a vector can't: the gradients' error bounds theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EPS = {"fp32": 2.0**-23, "bf16": 2.0**-7}
NUM_DRAWS = 2
FACTOR = {"fp32": 8.0, "bf16": 4.0}
"""2 for each of: an element is rounded after every operation, and there are several for each weight that a draw moves (not
in BF16: the draws are rounded in all of these places); two draws find less than the largest loss, not least where experts
of near ties change sides; both sides are off (not in BF16: FP32 is exact beside it)."""
NUM_ROUNDINGS = 4 * 16 * 64
"""Behind an element: layers, operations of a layer, summands of each. They add up like a random walk."""
FLOOR = EPS["fp32"] * NUM_ROUNDINGS**0.5

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reference:
    values: Result
    limits: dict[str, float]


def distances(result: Result, exact: Result) -> dict[str, float]:
    """log-probs: the largest difference, in nats. gradients: the largest of a tensor's, of its largest element.
    norms and loss: relative."""
    found = {
        "log-probs": max(
            float(np.abs(np.subtract(result["logprobs"][name], values)).max())
            for name, values in exact["logprobs"].items()
        ),
        "norms": max(_relative(result["metrics"][name], exact["metrics"][name]) for name in norms(exact)),
        "loss": _relative(result["metrics"]["objective/loss"], exact["metrics"]["objective/loss"]),
    }
    if "gradients" in result:  # Not of a case that went on after its first step.
        found["gradients"] = max(
            float(np.abs(result["gradients"][name] - gradient).max() / max(np.abs(gradient).max(), 1e-12))
            for name, gradient in exact["gradients"].items()
        )
    return found


def norms(result: Result) -> list[str]:
    return [name for name in result["metrics"] if name.startswith("optim/grad_norm")]


def reference_of(exact: Result, others: Sequence[Result], dtype: str) -> Reference:
    """`others`: the same step as roundings of `dtype` move it."""
    largest: dict[str, float] = {}
    for other in others:
        for what, value in distances(other, exact).items():
            largest[what] = max(largest.get(what, 0.0), value)
    vector = max(largest.get("gradients", 0.0), largest["norms"])
    largest |= {"norms": vector, "loss": max(vector, largest["loss"])}
    return Reference(exact, {what: FACTOR[dtype] * value + FLOOR for what, value in largest.items()})


def perturbed(hf_path: str, directory: Path, eps: float, draw: int) -> str:
    """A checkpoint whose weights are within one rounding of the other's."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(hf_path, directory)
    generator = torch.Generator().manual_seed(draw)
    for file in directory.glob("*.safetensors"):
        moved = {
            name: weight * (1 + eps * (torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.5))
            for name, weight in load_file(file).items()
        }
        save_file({name: weight.float() for name, weight in moved.items()}, file, metadata={"format": "pt"})
    return str(directory)


def assert_same(ranks: Sequence[Result], reference: Reference) -> None:
    """All ranks say the same, and what the reference says: loss, every gradient norm, log-probs, gradients."""
    import pytest

    got, exact = ranks[0], reference.values
    for rank in ranks:
        assert rank["marks"] == []
        assert rank["metrics"] == pytest.approx(got["metrics"], rel=0, abs=0, nan_ok=True), "reports differ"
        assert rank["logprobs"] == got["logprobs"], "log-probs differ between ranks"
    assert norms(got) == norms(exact)
    assert got["logprobs"].keys() == exact["logprobs"].keys()
    assert "gradients" not in got or got["gradients"].keys() == exact["gradients"].keys()
    found = distances(got, exact)
    entropy = "policy/entropy/mean"  # Sums of p log p, which are off as log-probs are.
    found["entropy"] = abs(got["metrics"][entropy] - exact["metrics"][entropy])
    limits = reference.limits | {"entropy": reference.limits["log-probs"]}
    far = {what: f"{value:.1e} (limit {limits[what]:.1e})" for what, value in found.items() if not value < limits[what]}
    assert not far, f"too far from the reference: {far}; all: {found}"


def _relative(value: float, exact: float) -> float:
    return abs(value - exact) / max(abs(exact), 1e-12)

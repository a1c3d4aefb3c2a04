"""Transformer Engine's recipes against their emulation: what the stage `recipes` of `doctor --accept` measures."""

from __future__ import annotations

import os

import pytest
import torch

from drpo_megatron.doctor.accept.recipes import engine_distances
from drpo_megatron.doctor.accept.stage import Skip
from drpo_megatron.precision.recipes import FP32_SCALES, TRAIN_RECIPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("name", [name for name, recipe in TRAIN_RECIPES.items() if recipe.engine])
def test_transformer_engine_computes_what_is_emulated(name: str) -> None:
    os.environ[FP32_SCALES] = "1"  # As a trainer rank of the blockwise recipe is started.
    from drpo_megatron.trainer.platform import activate

    activate("gpu")
    try:
        distances = engine_distances(TRAIN_RECIPES[name], "gpu")
    except Skip as skip:
        pytest.skip(str(skip))
    for found, limit in distances:
        assert found < limit

"""The CPU platform tells Megatron what it must know and leaves everybody else's torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from drpo_megatron.trainer import platform
from drpo_megatron.trainer.adam import Adam


def test_only_megatron_sees_the_view_of_torch() -> None:
    platform.activate("cpu")
    from megatron.core.tensor_parallel import mappings

    assert mappings.torch is not torch
    assert mappings.torch.cuda.current_device() == torch.device("cpu")
    assert mappings.torch.empty(2, device="cuda").device == torch.device("cpu")
    assert mappings.torch.Tensor is torch.Tensor
    assert torch.cuda.current_device is not mappings.torch.cuda.current_device


def test_optimizers_see_cuda_type_names_only_inside_the_scope() -> None:
    platform.activate("cpu")
    weight = torch.zeros(2)
    with platform.optimizer_scope():
        assert weight.type() == "torch.cuda.FloatTensor"
    assert weight.type() == "torch.FloatTensor"


def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform.importlib.metadata, "version", lambda name: "0.18.2")
    with pytest.raises(ValueError, match=r"checked with megatron-core 0\.16\.1, 0\.19\.2, but 0\.18\.2 is installed"):
        platform.check_cpu_versions()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="trainer.backend=gpu, but torch sees no CUDA device"):
        platform.resolve_backend("gpu")


def test_megatron_imported_too_early_is_an_error() -> None:
    program = "import megatron.core; from drpo_megatron.trainer.platform import activate; activate('cpu')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "was imported before platform.activate('cpu')" in result.stderr


def test_adam_is_torchs_adamw_with_the_step_in_the_group() -> None:
    torch.manual_seed(0)
    ours, theirs = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    adam, reference = Adam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert adam.param_groups[0]["step"] == 5
    assert set(adam.state[ours]) == {"exp_avg", "exp_avg_sq"}

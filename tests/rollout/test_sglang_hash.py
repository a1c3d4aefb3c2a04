"""The hashes of exported tensors against SGLang's own code, its GPU kernel in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from drpo_megatron.rollout import sglang_hash
from drpo_megatron.rollout.sglang_hash import cpu_hash, gpu_hash
from tests.rollout.conftest import PYTHON

_SIZES = (1, 3, 8192, 140_001)
"""Numbers of BF16 elements: less than a word, ragged, half a tile, and more than a thread takes below."""

_THEIRS = """
import hashlib, json, sys, importlib.util, pathlib, torch
spec = importlib.util.find_spec("sglang")
file = pathlib.Path(spec.submodule_search_locations[0], "kernels/ops/memory/gpu_tensor_hash.py")
source = file.read_text().replace("assert tensor.is_cuda", "assert True").replace("assert t.is_cuda", "assert True")
work = pathlib.Path(sys.argv[1], "kernel.py")
work.write_text(source)
sys.path.insert(0, sys.argv[1])
from kernel import gpu_tensor_hash
torch.manual_seed(0)
tensors = [torch.randn(size).bfloat16() for size in json.loads(sys.argv[2])]
print(json.dumps([f"{gpu_tensor_hash(tensor, use_cg=False):016x}" for tensor in tensors]))
"""


def test_the_gpu_hash_is_that_of_sglangs_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not PYTHON.exists():
        pytest.skip("SGLang's environment is not there; `make sglang-cpu` sets it up")
    command = [str(PYTHON), "-c", _THEIRS, str(tmp_path), json.dumps(_SIZES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    theirs = json.loads(subprocess.check_output(command, env=environment, text=True, timeout=600))
    torch.manual_seed(0)
    tensors = [torch.randn(size).bfloat16() for size in _SIZES]
    monkeypatch.setattr(sglang_hash, "_WORDS_A_THREAD", sglang_hash._WORDS_AT_ONCE)
    assert [gpu_hash([tensor]) for tensor in tensors] == theirs
    assert [gpu_hash(tensor.split(5)) for tensor in tensors] == theirs


def test_a_hash_sees_every_element() -> None:
    tensor = torch.arange(10_000, dtype=torch.float32)
    other = tensor.clone()
    other[[8_200, 8_201]] = other[[8_201, 8_200]]
    assert gpu_hash([tensor]) != gpu_hash([other])
    assert cpu_hash([tensor]) != cpu_hash([other])

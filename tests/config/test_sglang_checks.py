"""What can't work with SGLang servers is refused by key and value before anything starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config.checks import check_config
from tests.config.test_checks import config, directory, the_problem  # noqa: F401  # `directory` is a fixture


def engine(**fields: Any) -> dict[str, Any]:
    return {"engine": {"name": "sglang", "python": sys.executable} | fields}


@pytest.mark.parametrize(
    "fields",
    [
        {"tensor_parallel": 4, "flags": {"mem-fraction-static": 0.8}},
        {"servers": ["http://10.0.0.7:30000"], "api_key_file": "train.jsonl", "python": "nowhere"},
        {"servers": ["http://127.0.0.1:30000"], "sync": "tensor"},
    ],
)
def test_what_fits_passes(directory: Path, fields: dict[str, Any]) -> None:  # noqa: F811
    assert check_config(config(rollout=engine(**fields))) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"python": "nowhere/python"}, "rollout.engine.python: nowhere/python does not exist .* `make sglang-cpu`"),
        ({"servers": ["10.0.0.7:30000"]}, "'10.0.0.7:30000' is no URL of a server; give http://HOST:PORT"),
        ({"servers": ["http://10.0.0.7"]}, "give http://HOST:PORT"),
        ({"servers": ["http://a:1", "http://a:1"]}, "names a server twice"),
        ({"servers": ["http://a:1"], "api_key_file": "no_key"}, "no_key does not exist or is empty"),
        ({"api_key_file": "train.jsonl"}, "launched servers get keys of their own"),
        ({"flags": {"tp-size": 2}}, "flags.tp-size is set by rollout.engine.tensor_parallel"),
        ({"flags": {"--log-level": "error"}}, "write the flag without its dashes, log-level"),
        ({"flags": {"tp": 2}}, "flags.tp is set by rollout.engine.tensor_parallel; use that"),
        ({"flags": {"tensor-parallel-size": 2}}, "flags.tensor-parallel-size is set by rollout.engine.tensor_parallel"),
        (
            {"flags": {"moe-runner-backend": "flashinfer_trtllm"}},
            "moe-runner-backend=flashinfer_trtllm: it rearranges or rounds weights .*; use triton, or leave it out",
        ),
        ({"flags": {"ep-size": 2}}, "ep-size=2: servers are sent and asked for tensors .*; use 1, or leave it out"),
        ({"flags": {"speculative-algorithm": "EAGLE"}}, "speculative-algorithm=EAGLE: a draft model .*; leave it out"),
        (
            {"data_parallel": 2, "num_engines": 3},
            "data_parallel=2: SGLang 0.5.23 takes new weights only without .*set .*data_parallel=1 and .*num_engines=6",
        ),
        ({"tensor_parallel": 3}, "tensor_parallel=3 does not divide num_attention_heads=4; use 1, 2, 4"),
        (
            {"sync": "tensor", "servers": ["http://a:1"]},
            "http://a:1 is on another; use rollout.engine.sync=distributed",
        ),
        ({"sync": "disk", "sync_dir": "nowhere"}, "sync_dir: the directory nowhere does not exist"),
    ],
)
def test_what_cannot_work_is_refused(directory: Path, fields: dict[str, Any], expected: str) -> None:  # noqa: F811
    assert re.search(expected, the_problem(rollout=engine(**fields)))

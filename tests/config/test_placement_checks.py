"""Colocation and NCCL broadcasts that can't work are refused by key and value before anything starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config.checks import check_config
from tests.config.test_checks import config, directory, the_problem  # noqa: F401  # `directory` is a fixture


def sections(engine: dict[str, Any], **others: Any) -> dict[str, Any]:
    engine = engine if "name" in engine else {"name": "sglang", "python": sys.executable} | engine
    defaults = {"rollout": {"engine": engine}, "cluster": {"placement": "colocated"}, "parallel": {"num_ranks": 4}}
    return {name: defaults.get(name, {}) | others.get(name, {}) for name in defaults | others}


@pytest.mark.parametrize(
    "chosen",
    [
        sections({"num_engines": 4}),
        sections({"num_engines": 2, "tensor_parallel": 2, "sync": "tensor"}),
        sections({"broadcast": "nccl"}, cluster={"placement": "disaggregated"}),
        sections({"num_engines": 4, "sync": "disk", "broadcast": "nccl"}),  # `broadcast` is of sync=distributed.
    ],
)
def test_what_fits_passes(directory: Path, chosen: dict[str, Any]) -> None:  # noqa: F811
    assert check_config(config(**chosen)) == []


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (sections({"name": "transformers"}), "engine.name=transformers has none; set rollout.engine.name=sglang"),
        (sections({"servers": ["http://a:1"]}), "servers=http://a:1 run elsewhere; leave rollout.engine.servers out"),
        (
            sections({"num_engines": 3, "tensor_parallel": 2}),
            r"num_engines=3 servers of tensor_parallel=2 x data_parallel=1 GPUs are 6, and parallel.num_ranks=4; "
            "every GPU trains and draws: set rollout.engine.num_engines=2",
        ),
        (sections({"num_engines": 1, "tensor_parallel": 2}), "are 2, and parallel.num_ranks=4; .*num_engines=2"),
        (
            sections({"num_engines": 1, "tensor_parallel": 4}, parallel={"num_ranks": 2}),
            "are 4, and parallel.num_ranks=2; .* set another tensor_parallel",
        ),
        (sections({"num_engines": 4, "broadcast": "nccl"}), "two ranks on one GPU, which NCCL refuses; set .*=gloo"),
        (
            sections({"num_engines": 4, "flags": {"enable-memory-saver": True}}),
            "memory-saver is set by cluster.placement",
        ),
        (
            sections({"broadcast": "nccl"}, cluster={"placement": "disaggregated"}, trainer={"backend": "cpu"}),
            "broadcast=nccl needs GPUs, and trainer.backend=cpu; set rollout.engine.broadcast=gloo",
        ),
    ],
)
def test_what_cannot_work_is_refused(directory: Path, chosen: dict[str, Any], expected: str) -> None:  # noqa: F811
    assert re.search(expected, the_problem(**chosen))


def test_drawing_ahead_is_refused_where_ranks_and_servers_take_turns(directory: Path) -> None:  # noqa: F811
    engine = sections({"num_engines": 4})["rollout"]["engine"]
    chosen = sections({}, rollout={"engine": engine, "max_staleness": 1})
    assert re.search("rollout.max_staleness=1: .* set rollout.max_staleness=0", the_problem(**chosen))

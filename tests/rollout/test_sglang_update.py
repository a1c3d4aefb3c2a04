"""New weights while a rollout is drawn: it goes on, and every token's mu is of the weights that drew it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
from drpo_megatron.types import Completion
from tests.orchestration import command
from tests.rollout.conftest import Served
from tests.rollout.test_sglang_engine import logprobs, publish, reference, requests, weights
from tests.tiny import SAME_WEIGHTS


def assert_mu_is_of_the_versions_that_drew(
    models: dict[int, torch.nn.Module], request: GenerationRequest, completion: Completion
) -> None:
    spans = completion.version_spans or ((completion.policy_version, len(completion.token_ids)),)
    assert completion.policy_version == spans[0][0]
    start = 0
    for version, length in spans:
        expected = logprobs(models[version], request.prompt_ids, completion.token_ids, 1.0)
        part = slice(start, start + length)
        assert completion.logprobs[part] == pytest.approx(expected[part], abs=SAME_WEIGHTS)
        start += length
    assert start == len(completion.token_ids)


def test_a_rollout_goes_on_across_an_update(sglang: Served) -> None:
    engine = sglang.engine(max_concurrent_requests=4)  # 48 rounds: the update falls into one of them.
    old, new = weights(sglang, 7), weights(sglang, 8)
    before = publish(engine, old)
    wanted = requests(192)
    drawn: dict[int, Completion] = {}
    first_is_there = threading.Event()

    def draw() -> None:
        for group in engine.stream(wanted, SamplingParams(50)):
            drawn.update(group)
            first_is_there.set()

    thread = threading.Thread(target=draw)
    thread.start()
    assert first_is_there.wait(600.0)
    after = publish(engine, new)
    thread.join(600.0)
    engine.close()
    assert sorted(drawn) == list(range(192))
    models = {before: reference(sglang, old), after: reference(sglang, new)}
    for index, completion in drawn.items():
        assert_mu_is_of_the_versions_that_drew(models, wanted[index], completion)
    assert any(c.version_spans and [v for v, _ in c.version_spans] == [before, after] for c in drawn.values())
    assert {before, after} == {completion.policy_version for completion in drawn.values()}
    assert engine.router.num_resent == engine.router.num_lost == 0


@pytest.mark.slow
def test_a_run_draws_ahead_with_servers(sglang: Served, tmp_path: Path) -> None:
    endpoint = sglang.keepers[0].server.endpoint
    (tmp_path / "key").write_text(f"{endpoint.api_key}\n")
    engine = {"name": "sglang", "servers": [endpoint.url], "api_key_file": "key", "sync": "tensor"}
    command.prepare(tmp_path, rollout={"engine": engine, "max_response_tokens": 64, "max_staleness": 1})
    code, output = command.finish(command.start(tmp_path, "train", "run.yaml"), tmp_path, 900.0)
    assert code == 0, output
    rows = command.metrics(tmp_path / "run")[1:]
    assert rows[0]["mismatch/abs_prob_shift/max"] < SAME_WEIGHTS
    assert len(rows) == 4
    assert all(row["rollout/staleness/max"] <= 1 for row in rows)
    assert [row.get("time/overlap_share", 0.0) > 0 for row in rows[:3]] == [True, True, True]

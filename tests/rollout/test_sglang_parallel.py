"""One SGLang server of two tensor-parallel ranks: each rank's shards are what was exported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from drpo_megatron.rollout.engine import SamplingParams
from tests.rollout.conftest import Served, launch
from tests.rollout.test_sglang_engine import logprobs, publish, reference, requests, weights
from tests.tiny import SAME_WEIGHTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from launch(tmp_path_factory.mktemp("two-ranks"), 1, tensor_parallel=2)


@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed"])
def test_two_ranks_draw_with_the_weights_that_were_sent(two_ranks: Served, sync: str) -> None:
    engine = two_ranks.engine(sync, tensor_parallel=2)
    publish(engine, weights(two_ranks, seed=20))
    engine.release_memory()  # Both ranks meet before they let go of the weights.
    tensors = weights(two_ranks, seed=21)
    version = publish(engine, tensors)
    drawn = engine.generate(requests(16), SamplingParams(12))
    engine.close()
    model = reference(two_ranks, tensors)
    for request, completion in zip(requests(16), drawn, strict=True):
        assert completion.policy_version == version
        expected = logprobs(model, request.prompt_ids, completion.token_ids, 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=SAME_WEIGHTS)

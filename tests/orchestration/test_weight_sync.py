"""Weights reach the engine whole, in buckets, and a version is published only when they are verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.config.sections import TransformersEngineSection
from drpo_megatron.rollout.transformers_engine import TransformersEngine
from drpo_megatron.weight_sync import Bucket, publish
from tests.tiny import save_checkpoint, tiny_moe_config


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape and different weights."""
    root = tmp_path_factory.mktemp("models")
    config = tiny_moe_config(num_hidden_layers=2)
    return save_checkpoint(root / "old", config, seed=0), save_checkpoint(root / "new", config, seed=1)


def logits(engine: TransformersEngine) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(torch.arange(8)[None]).logits


def test_the_engine_becomes_the_exported_model_whatever_the_buckets(checkpoints: tuple[Path, Path]) -> None:
    old, new = checkpoints
    expected = logits(TransformersEngine(str(new), TransformersEngineSection()))
    exported = list(HFCheckpoint(new).iter_tensors())
    for bucket_bytes in (1, 5000, 10**9):
        engine = TransformersEngine(str(old), TransformersEngineSection())
        assert not torch.equal(logits(engine), expected)
        sizes = []

        def load(bucket: Bucket, engine: TransformersEngine = engine, sizes: list[int] = sizes) -> None:
            sizes.append(len(bucket))
            engine.load_weights(bucket)

        report = publish(exported, 7, load, engine.finish_update, bucket_bytes=bucket_bytes)
        assert torch.equal(logits(engine), expected)
        assert engine.policy_version == report.policy_version == 7
        assert report.num_tensors == sum(sizes) == len(exported)
        assert report.num_bytes == sum(tensor.nbytes for _, tensor in exported)
        assert {1: max(sizes) == 1, 5000: 1 < len(sizes) < len(exported), 10**9: len(sizes) == 1}[bucket_bytes]


def test_a_tensor_damaged_on_the_way_is_not_published(checkpoints: tuple[Path, Path]) -> None:
    old, new = checkpoints
    engine = TransformersEngine(str(old), TransformersEngineSection())

    def load(bucket: Bucket) -> None:
        engine.load_weights([(name, tensor + 1 if name == "model.norm.weight" else tensor) for name, tensor in bucket])

    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        publish(HFCheckpoint(new).iter_tensors(), 7, load, engine.finish_update)
    assert engine.policy_version == 0


def test_a_rank_that_is_given_no_tensors_sends_nothing() -> None:
    sent: list[object] = []
    report = publish([("a", None), ("b", None)], 3, sent.append, lambda version, checksums: sent.append(checksums))
    assert sent == [] and report.num_tensors == report.num_bytes == 0


def test_bf16_weights_are_compared_in_the_engines_dtype() -> None:
    weight = torch.randn(3, 4).bfloat16()
    received: Bucket = []
    report = publish([("a", weight)], 1, received.extend, lambda version, checksums: None, dtype=torch.float32)
    [(_, tensor)] = received
    assert tensor.dtype == torch.float32 and torch.equal(tensor, weight.float())
    assert report.num_bytes == 48  # 12 numbers of 4 bytes


def test_a_name_exported_twice_is_refused() -> None:
    exported = [("a", torch.ones(2)), ("a", torch.ones(2))]
    with pytest.raises(ValueError, match="tensor a was exported twice"):
        publish(exported, 1, lambda bucket: None, lambda version, checksums: None)

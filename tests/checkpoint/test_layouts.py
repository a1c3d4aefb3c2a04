"""Converted checkpoints are what training starts from and writes, in a layout that the conversion never heard of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.checkpoint.checksums import CHECKSUMS_FILE
from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.conversion.to_hf import megatron_to_hf
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.conversion.verify import verify
from tests.checkpoint.test_convert import shard, silent
from tests.checkpoint.test_foreign import TE_NORM, rename
from tests.distributed import run_ranks
from tests.tiny import save_checkpoint, tiny_config, tiny_moe_config, tiny_qwen2_config, tiny_qwen3_5_config

MODELS: dict[str, Any] = {
    "qwen2_tied": tiny_qwen2_config(tie_word_embeddings=True),
    "qwen3_moe_some_dense": tiny_moe_config(decoder_sparse_step=2, mlp_only_layers=[3]),
    "qwen3_5_moe": tiny_qwen3_5_config(),
}
DENSE = "qwen2_tied"
"""This one is trained in BF16, the others in FP32."""
TE_SPELLED = "qwen3_moe_some_dense"
"""The norm before its experts is called as Transformer Engine's layers call it."""
TP2PP2EP2 = {"num_ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2}


def start_and_save(rank: int, world_size: int, root: Path) -> None:
    """Each model starts from the converted checkpoint, is not trained, and is saved. The vocabulary is padded for TP2."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    for name in MODELS:
        parallel = TP2PP2EP2 | ({"expert": 1} if name == DENSE else {})
        config = tiny_config(
            root / name / "others_weights",
            parallel,
            model={"megatron_path": str(root / name / "megatron")},
            trainer={"dtype": "bf16" if name == DENSE else "fp32"},
        )
        Trainer(config).save_checkpoint(root / name / "saved")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for name, hf_config in MODELS.items():
        hf_to_megatron(save_checkpoint(root / name / "hf", hf_config), root / name / "megatron", say=silent)
        shard(save_checkpoint(root / name / "others_weights", hf_config, seed=1), 3)
    rename(root / TE_SPELLED / "megatron/.metadata", *TE_NORM)
    (root / TE_SPELLED / "megatron" / CHECKSUMS_FILE).unlink()
    run_ranks(4, start_and_save, root, timeout_s=600)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_starts_from_its_part_of_the_converted_weights(root: Path, name: str) -> None:
    source, found = HFCheckpoint(root / name / "hf"), verify(root / name / "hf", root / name / "saved")
    untrained = [n for n in source.names() if n.startswith(("model.visual.", "mtp."))]
    # What isn't trained stays in the run's own checkpoint; everything else is what was converted.
    assert {difference.split(":")[0] for difference in found.differences} == {
        n for n in untrained if not torch.equal(source.get(n), HFCheckpoint(root / name / "others_weights").get(n))
    }
    assert found.num_cast == (len(source.names()) if name == DENSE else 0)


@pytest.mark.parametrize("name", MODELS)
def test_what_training_saves_becomes_a_checkpoint_with_the_files_of_the_first_one(root: Path, name: str) -> None:
    megatron_to_hf(root / name / "saved", root / name / "back", say=silent)
    source, first, back = (HFCheckpoint(root / name / directory) for directory in ("hf", "others_weights", "back"))
    assert {path.name for path in first.directory.iterdir()} == {path.name for path in back.directory.iterdir()}
    assert {file: list(h.tensors) for file, h in back.headers.items()} == {
        file: list(h.tensors) for file, h in first.headers.items()
    }
    dtype = torch.bfloat16 if name == DENSE else torch.float32
    for tensor in back.names():
        is_untrained = tensor.startswith(("model.visual.", "mtp."))
        expected = first.get(tensor) if is_untrained else source.get(tensor).to(dtype)
        assert torch.equal(back.get(tensor), expected), tensor

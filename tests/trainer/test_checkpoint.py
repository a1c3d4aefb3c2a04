"""A checkpoint continues exactly: bitwise in the same layout, to rounding in another."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.disks import mounted
from tests.distributed import run_ranks
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

TP2EP2 = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}


def train(
    rank: int,
    world_size: int,
    hf_path: str,
    parallel: dict[str, Any],
    load: str | None,
    save: str | None,
    precision: str = "bf16",
) -> Any:
    """Two rollouts, or (when `load` is given) the second of them only. What the second reported, and the weights."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    # Wide, so that the first steps of Adam, which are of size lr whatever the gradient's rounding, stay comparable.
    trainer = Trainer(
        tiny_config(
            hf_path,
            parallel,
            trainer={"optimizer": {"lr": 1e-3, "schedule": "cosine", "eps": 1e-4}},
            precision={"train": {"name": precision}},
        )
    )
    if load is None:
        trainer.train_step(random_samples(8, seed=1))
        if save is not None:
            trainer.save_checkpoint(Path(save))
    else:
        trainer.load_checkpoint(Path(load))
    report = trainer.train_step(random_samples(8, seed=2))
    weights = {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}
    return report.metrics, weights, report.policy_version


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Any]:
    scratch = tmp_path_factory.mktemp("resume")
    hf_path = str(save_checkpoint(scratch / "hf", tiny_moe_config(num_hidden_layers=2)))
    checkpoint = str(scratch / "checkpoint")
    return hf_path, checkpoint, run_ranks(2, train, hf_path, TP2EP2, None, checkpoint)[0]


def test_same_layout_continues_bitwise(saved: tuple[str, str, Any]) -> None:
    hf_path, checkpoint, (metrics, weights, version) = saved
    resumed_metrics, resumed_weights, resumed_version = run_ranks(2, train, hf_path, TP2EP2, checkpoint, None)[0]
    assert resumed_metrics == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert resumed_version == version == 2
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())


def test_delayed_scaling_continues_with_its_history(saved: tuple[str, str, Any], tmp_path: Path) -> None:
    hf_path, delayed = saved[0], "fp8-delayed"
    [(metrics, weights, _)] = run_ranks(1, train, hf_path, {}, None, str(tmp_path / "checkpoint"), delayed)
    [(resumed_metrics, resumed_weights, _)] = run_ranks(
        1, train, hf_path, {}, str(tmp_path / "checkpoint"), None, delayed
    )
    assert resumed_metrics == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())
    (tmp_path / "checkpoint" / "amax_history-rank0.safetensors").unlink()
    [(_, anew, _)] = run_ranks(1, train, hf_path, {}, str(tmp_path / "checkpoint"), None, delayed)
    assert not all(torch.equal(anew[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "parallel", [{}, {"num_ranks": 2, "pipeline": 2}, {"num_ranks": 2}], ids=["single", "pp2", "dp2"]
)
def test_another_layout_continues(parallel: dict[str, Any], saved: tuple[str, str, Any]) -> None:
    """Optimizer state moves too, from EP 2 to EP 1: without it the next AdamW step would differ at once."""
    hf_path, checkpoint, (metrics, weights, _) = saved
    ranks = run_ranks(parallel.get("num_ranks", 1), train, hf_path, parallel, checkpoint, None)
    resumed_metrics, resumed_weights, _ = ranks[0]
    assert resumed_metrics["objective/loss"] == pytest.approx(metrics["objective/loss"], rel=1e-4)
    # FP32 loses less than 1e-6 of a gradient here. Adam divides that by its eps, 1e-4, and multiplies by lr, 1e-3: 1e-5 of
    # a weight at most; with the moments of another weight, or none, the step would be another by about lr.
    for name, weight in weights.items():
        torch.testing.assert_close(resumed_weights[name], weight, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_directory_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint.megatron import read_counters

    with pytest.raises(ValueError, match="no finished checkpoint: trainer.json is missing"):
        read_counters(tmp_path)
    (tmp_path / "trainer.json").write_text('{"counters": ')
    with pytest.raises(ValueError, match="trainer.json is not JSON"):
        read_counters(tmp_path)


def time_limits(rank: int, world_size: int, hf_path: str, parallel: dict[str, Any], limit_s: float) -> Any:
    """Of every process group that there is once a trainer trains; and how a collective ends that waits for nobody."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(tiny_config(hf_path, parallel, cluster={"step_timeout_s": limit_s}))
    trainer.train_step(random_samples(8, seed=1))
    world = dist.distributed_c10d._world
    limits = [
        group._get_backend(torch.device("cpu")).options._timeout for group in world.pg_map if group != dist.group.WORLD
    ]
    error, started = "", time.monotonic()
    if rank == 0:  # The others don't come.
        try:
            dist.all_reduce(torch.zeros(1), group=trainer.layout.tp)
        except RuntimeError as caught:
            error = str(caught)
    else:
        time.sleep(3 * limit_s)
    return [limit == timedelta(seconds=limit_s) for limit in limits], error, time.monotonic() - started


def test_a_collective_of_any_group_waits_no_longer_than_the_step_time_out(saved: tuple[str, str, Any]) -> None:
    [(limits, error, seconds), (others, _, _)] = run_ranks(2, time_limits, saved[0], TP2EP2, 4.0, timeout_s=600)
    assert len(limits) > 5 and all(limits) and all(others)
    assert "Timed out waiting 4000ms" in error and seconds >= 4.0


def saves_without_room(rank: int, world_size: int, hf_path: str, disk: str, room: str) -> Any:
    """What saving says on a disk that is full, twice: found before, and met while the shards are written."""
    import torch.distributed as dist

    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint import megatron
    from drpo_megatron.trainer.trainer import Trainer

    trainer = Trainer(tiny_config(hf_path, TP2EP2))
    trainer.train_step(random_samples(8, seed=1))
    before = trainer.save_checkpoint(Path(disk) / "before")
    dist.barrier()
    megatron.require_free_space = lambda directory, num_bytes: None  # Somebody else fills it after the look.
    meanwhile = trainer.save_checkpoint(Path(disk) / "meanwhile")
    afterwards = trainer.save_checkpoint(Path(room) / "afterwards")
    return before, meanwhile, afterwards, trainer.verify_checkpoint(Path(room) / "afterwards")


def test_ranks_on_a_full_disk_agree_on_why_and_go_on(saved: tuple[str, str, Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 200_000) as disk:
        first, second = run_ranks(2, saves_without_room, saved[0], str(disk), str(tmp_path), timeout_s=600)
    assert first == second
    before, meanwhile, afterwards, damage = first
    assert re.fullmatch(rf"{disk}/before has [\d,]+ bytes of disk free, but [\d,]+ are needed; free some, .*", before)
    assert re.fullmatch(
        rf"can't write {disk}/meanwhile.*: No space left on device \([\d,]+ bytes are free\); .*", meanwhile
    )
    assert afterwards is None and damage == []


def finds_damage(rank: int, world_size: int, directory: str) -> list[str]:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint.megatron import find_damage

    return find_damage(Path(directory))


def test_a_flipped_bit_in_any_file_is_found_by_all_ranks(saved: tuple[str, str, Any], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(saved[1], tmp_path / "checkpoint")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "checksums.json")
    assert {".metadata", "common.pt", "trainer.json", "__0_0.distcp", "__1_0.distcp"} <= {path.name for path in files}
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)
    found, other = run_ranks(2, finds_damage, str(checkpoint), timeout_s=600)
    assert other == found
    assert sorted(text.partition(" is damaged: ")[0] for text in found) == [str(path) for path in files]

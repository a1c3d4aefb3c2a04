"""metrics.jsonl survives crashes and resumes; the console says what a person watches; pictures come out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo_megatron.config.sections import MetricsSection, WandbSection
from drpo_megatron.plots import draw_training
from drpo_megatron.sinks import METRICS_FILE, JsonLines, MetricsLogger, headline, read_metrics
from tests.disks import mounted, resize

STEP = {
    "reward/mean": 0.5,
    "mismatch/abs_prob_shift/mean": 1e-7,
    "mismatch/abs_prob_shift/p99": 1e-6,
    "shift/abs_prob_shift/mean": 1e-2,
    "policy/entropy/mean": 0.7,
    "objective/weight/min": -0.5,
    "objective/weight/mean": 1.0,
    "objective/weight/max": 2.0,
    "throughput/generate_tokens_per_s": 2000.0,
    "throughput/train_tokens_per_s": float("nan"),
}


def test_resume_drops_the_steps_after_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    sink = JsonLines(path, None)
    for step in (1, 2, 3):
        sink.log(step, STEP)
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "rew')  # what a killed process leaves
    sink = JsonLines(path, 2)
    sink.log(3, {"reward/mean": 0.9})
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["reward/mean"] == 0.9
    assert rows[0]["throughput/train_tokens_per_s"] is None  # JSON has no NaN


def test_what_is_measured_afterwards_stands_in_the_same_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    sink = JsonLines(path, None)
    sink.log(1, STEP)
    sink.log(2, STEP)
    sink.amend(2, {"eval/accuracy": 0.75, "time/eval_s": 2.0})
    sink.close()
    sink = JsonLines(path, 2)  # A run that was broken off before its evaluation makes up for it.
    sink.amend(2, {"eval/accuracy": 0.5})
    sink.amend(3, {"eval/accuracy": 0.25})
    sink.log(4, STEP)
    sink.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("eval/accuracy") for row in rows] == [None, 0.5, 0.25, None]
    assert rows[1]["reward/mean"] == 0.5 and rows[1]["time/eval_s"] == 2.0


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", 8192) as disk:
        sink = JsonLines(disk / METRICS_FILE, None)
        for step in range(60):
            sink.log(step, STEP)
        said = capsys.readouterr().out
        assert said.count("warning: can't write") == 1 and "No space left on device" in said
        before = [row["step"] for row in read_metrics(disk / METRICS_FILE)]
        assert before == list(range(len(before))) and 0 < len(before) < 60
        resize(disk, 2**20)
        sink.log(60, STEP)
        sink.close()
        assert [row["step"] for row in read_metrics(disk / METRICS_FILE)] == list(range(61))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(path)


def test_plain_lines_name_reward_mismatch_weights_and_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = MetricsLogger(tmp_path, MetricsSection(console="plain"), total_steps=2)
    logger.log(0, {"eval/accuracy": 0.45})
    logger.log(1, STEP)
    logger.log(2, STEP | {"eval/accuracy": 0.93})
    logger.close()
    before, first, last = capsys.readouterr().out.splitlines()
    assert before.startswith("step 0/2") and "held-out accuracy 45.0%" in before
    assert "reward 0.500" in first and "|pi-mu| 1.0e-07" in first and "w -0.50..2.00" in first and "left" in first
    assert "held-out accuracy 93.0%" in last and last.endswith("left 0 s")


def test_missing_and_nan_metrics_show_as_a_dash() -> None:
    assert headline(STEP)["train tok/s"] == "-"
    assert headline({})["reward"] == "-"
    assert "MFU" not in headline(STEP) and headline(STEP | {"throughput/mfu": 0.312})["MFU"] == "31.2%"


def test_tensorboard_and_offline_wandb_write_without_a_network(tmp_path: Path) -> None:
    section = MetricsSection(console="off", tensorboard=True, wandb=WandbSection(enabled=True))
    logger = MetricsLogger(tmp_path, section, total_steps=1)
    logger.log(1, STEP)
    logger.close()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_the_picture_is_drawn_from_the_metrics(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / METRICS_FILE, None)
    for step in range(5):
        sink.log(step, STEP | {"eval/accuracy": 0.1 * step})
    sink.close()
    picture = draw_training(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000

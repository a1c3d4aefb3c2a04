"""A run directory: one run in it, checkpoints whole or absent, and a resume that continues the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron.config import Config
from drpo_megatron.orchestration.run_directory import Progress, RunDirectory, fingerprint
from tests.tiny import tiny_config


def config_in(tmp_path: Path, **sections: Any) -> Config:
    run = {"run_dir": str(tmp_path / "run")} | sections.pop("run", {})
    return tiny_config("model", run=run, **sections)


def progress(step: int) -> Progress:
    return Progress(step, step, {"0": 0.5}, {"train": 1.5}, 20, 3.0)


def save(run: RunDirectory, config: Config, step: int) -> None:
    with run.writing_checkpoint(progress(step), config) as directory:
        (directory / "weights").write_text(f"weights of step {step}")


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    RunDirectory.create(config)
    with pytest.raises(ValueError, match="holds another run.*--resume"):
        RunDirectory.create(config)


def test_the_newest_checkpoint_comes_back_with_its_progress(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    assert run.latest_checkpoint(config) is None
    for step in (0, 8, 10):
        save(run, config, step)
    found = run.latest_checkpoint(config)
    assert found is not None
    path, saved = found
    assert saved == progress(10)
    assert (path / "weights").read_text() == "weights of step 10"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    config = config_in(tmp_path, checkpoint={"keep": 2})
    run = RunDirectory.create(config)
    for step in (2, 4, 6, 8):
        save(run, config, step)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000006", "step_000008"]


def test_a_save_that_breaks_off_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    with pytest.raises(OSError, match="disk full"), run.writing_checkpoint(progress(4), config) as directory:
        (directory / "weights").write_text("half of")
        raise OSError("disk full")
    found = run.latest_checkpoint(config)
    assert found is not None and found[1].step == 2
    save(run, config, 6)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000002", "step_000006"]


def test_a_resume_takes_harmless_changes(tmp_path: Path) -> None:
    run = RunDirectory.create(config_in(tmp_path))
    _, config = RunDirectory.reopen(run.path, None, ["run.num_steps=20", "eval.every=5", "cluster.rank_threads=2"])
    assert (config.run.num_steps, config.eval.every, config.cluster.rank_threads) == (20, 5, 2)
    assert fingerprint(config) == fingerprint(config_in(tmp_path))


def test_a_resume_refuses_what_makes_it_another_run_by_name(tmp_path: Path) -> None:
    run = RunDirectory.create(config_in(tmp_path))
    with pytest.raises(ValueError, match=r"trainer\.optimizer\.lr=0\.5 \(the run has 0\.001\)"):
        RunDirectory.reopen(run.path, None, ["trainer.optimizer.lr=0.5"])
    other = tmp_path / "other.yaml"
    tree = yaml.safe_load(run.config_file.read_text())
    tree["run"]["seed"] = 7
    other.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"run\.seed=7 \(the run has 1\)"):
        RunDirectory.reopen(run.path, other, [])


def test_a_complete_run_is_not_resumed_unless_it_becomes_longer(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, config.run.num_steps)
    with pytest.raises(ValueError, match="is complete: 8 of run.num_steps=8"):
        RunDirectory.reopen(run.path, None, [])
    assert RunDirectory.reopen(run.path, None, ["run.num_steps=9"])[1].run.num_steps == 9


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    edited = config_in(tmp_path, trainer={"optimizer": {"lr": 0.5}})
    run.save_config(edited)
    with pytest.raises(ValueError, match="saved with another configuration"):
        run.latest_checkpoint(edited)


def test_a_directory_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run to resume: config\.yaml is missing"):
        RunDirectory.reopen(tmp_path, None, [])

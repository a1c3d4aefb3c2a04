"""A run directory: one run in it, checkpoints whole or absent, and a resume that continues the same run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron.checkpoint.checksums import damaged, read_checksums, sealed, sums_of, write_checksums
from drpo_megatron.config import Config, describe_fields
from drpo_megatron.orchestration.changeable import CHANGEABLE, refused, settings
from drpo_megatron.orchestration.run_directory import Progress, RunDirectory
from tests.tiny import tiny_config


def config_in(tmp_path: Path, **sections: Any) -> Config:
    run = {"run_dir": str(tmp_path / "run")} | sections.pop("run", {})
    return tiny_config("model", run=run, **sections)


def progress(step: int) -> Progress:
    return Progress(step, step, {"0": 0.5}, {"train": 1.5}, 20, 3.0)


def save(run: RunDirectory, config: Config, step: int) -> None:
    with run.writing_checkpoint(progress(step), config) as directory:
        (directory / "weights").write_text(f"weights of step {step}")
        (directory / "rollouts.json").write_text(sealed({"step": step}))
        (directory / "trainer").mkdir()
        (directory / "trainer" / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
        write_checksums(directory / "trainer", sums_of(directory / "trainer", ["__0_0.distcp"]))


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
    assert found.progress == progress(10)
    assert (found.path / "weights").read_text() == "weights of step 10"


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
    assert found is not None and found.progress.step == 2
    save(run, config, 6)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000002", "step_000006"]


def test_a_resume_takes_harmless_changes(tmp_path: Path) -> None:
    run = RunDirectory.create(config_in(tmp_path))
    _, config = RunDirectory.reopen(run.path, None, ["run.num_steps=20", "eval.every=5", "cluster.rank_threads=2"])
    assert (config.run.num_steps, config.eval.every, config.cluster.rank_threads) == (20, 5, 2)
    changed = ["trainer.loss_low_memory=true", "model.recompute=full", "rollout.dump=true", "checkpoint.fallback=true"]
    RunDirectory.reopen(run.path, None, [*changed, "trainer.max_tokens_per_micro_batch=500"])


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


def test_a_run_of_a_version_without_a_key_had_its_default(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    before = {key: value for key, value in settings(config).items() if key != "model.moe_aux_loss_coeff"}
    assert len(before) == len(settings(config)) - 1
    assert refused(before, config) == []
    changed = tiny_config(tmp_path, model={"moe_aux_loss_coeff": 0.5})
    assert refused(before, changed) == ["model.moe_aux_loss_coeff=0.5 (the run has 0.0)"]
    assert refused(before | {"reward.gone": 1}, config) == ["reward.gone=None (the run has 1)"]


def test_a_complete_run_is_not_resumed_unless_it_becomes_longer(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, config.run.num_steps)
    assert RunDirectory.reopen(run.path, None, [])[1] == config, "hf/ and summary.json are missing yet"
    run.hf.mkdir()
    (run.hf / "config.json").write_text("{}")
    run.summary_file.write_text(json.dumps({"num_steps": 4}))  # Of the run when it was shorter.
    assert RunDirectory.reopen(run.path, None, [])[1] == config
    run.summary_file.write_text(json.dumps({"num_steps": 8}))
    with pytest.raises(ValueError, match="is complete: all of run.num_steps=8"):
        RunDirectory.reopen(run.path, None, [])
    assert RunDirectory.reopen(run.path, None, ["run.num_steps=9"])[1].run.num_steps == 9


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    edited = config_in(tmp_path, trainer={"optimizer": {"lr": 0.5}})
    run.save_config(edited)
    with pytest.raises(
        ValueError, match=r"saved with another configuration .*: trainer\.optimizer\.lr=0\.5 \(the run has 0\.001\)"
    ):
        run.latest_checkpoint(edited)


def test_a_directory_without_a_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run to resume: config\.yaml is missing"):
        RunDirectory.reopen(tmp_path, None, [])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lost(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [emptied, cut_off, flipped, lost])
@pytest.mark.parametrize("file", ["driver.json", "rollouts.json", "trainer/checksums.json", "trainer/__0_0.distcp"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken_if_that_is_asked_for(
    tmp_path: Path, file: str, harm: Callable[[Path], None]
) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    save(run, config, 4)
    newest = run.checkpoints / "step_000004"
    harm(newest / file)
    if file.endswith(".distcp") and harm is flipped:  # What no size shows is found by the ranks, which read it all.
        assert run.latest_checkpoint(config) is not None
        sums = read_checksums(newest / "trainer")
        assert sums is not None
        [problem] = damaged(newest / "trainer", sums)
        assert problem.startswith(f"{newest / file} is damaged: its checksum is ")
        return
    with pytest.raises(ValueError) as caught:
        run.latest_checkpoint(config)
    assert f"checkpoint {newest} can't be used: {newest / file} " in str(caught.value)
    assert "continue from step_000002 with checkpoint.fallback=true" in str(caught.value)
    said: list[str] = []
    run.falls_back = True
    found = run.latest_checkpoint(config, said.append)
    assert found is not None and found.progress.step == 2
    assert len(said) == 1 and str(newest / file) in said[0] and "Continuing from step_000002" in said[0]
    save(run, config, 4)
    found = run.latest_checkpoint(config)
    assert found is not None and found.progress.step == 4, "the damaged one is not in the way"


def test_nothing_is_begun_anew_because_the_only_checkpoint_is_damaged(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    lost(run.checkpoints / "step_000002" / "driver.json")
    run.falls_back = True
    with pytest.raises(
        ValueError, match=r"driver\.json is missing. It is the only one: restore it, or start a new run"
    ):
        run.latest_checkpoint(config)


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"progress": 3}', '{"progress": {"step": 1}}', "{" * 100_000, "\udcff"]
)
def test_a_driver_file_of_another_shape_is_named(tmp_path: Path, content: str) -> None:
    config = config_in(tmp_path)
    run = RunDirectory.create(config)
    save(run, config, 2)
    (run.checkpoints / "step_000002" / "driver.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"step_000002/driver\.json is damaged"):
        run.latest_checkpoint(config)


def test_a_removal_that_breaks_off_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, checkpoint={"keep": 1})
    run = RunDirectory.create(config)
    save(run, config, 2)

    def breaks_off(directory: Path, ignore_errors: bool = False) -> None:
        if directory.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", breaks_off)
        save(run, config, 4)
    assert [path.name for path in run.checkpoints.glob("step_*")] == ["step_000004"]
    save(run, config, 6)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000006"]


def test_what_may_change_at_a_resume_is_in_the_configuration_and_in_the_docs() -> None:
    explained = describe_fields()
    running = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    for key in CHANGEABLE:
        name = key.rpartition(".")[2]
        assert ".flags." in key or re.search(rf"\b{re.escape(name)}\b", explained), key
        assert f"`{key}`" in running, f"docs/running.md lacks {key}"

"""What lies in a study's directory, what the report says of it, and the claims, from synthetic metrics."""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from drpo_megatron.study.claims import Judgement, collapsed, judge
from drpo_megatron.study.report import write_report
from drpo_megatron.study.results import read_results, reservations, save_grid
from drpo_megatron.study.runner import inspect
from drpo_megatron.study.runs import Study, load_study
from tests.study.small import STUDY, write_base, write_run

GRID: dict[str, Any] = STUDY | {
    "seeds": [0, 1, 2],
    "axes": {
        "objective": {
            "grpo": {"objective": "grpo"},
            "spo": {"objective": "spo"},
            "dppo": {"objective": {"name": "dppo", "delta": 0.15}},
            "drpo": {"objective": {"name": "drpo", "delta": 0.15}},
        },
        "precision": {"none": {}, "fp8": {"precision.rollout": "mxfp8"}},
    },
    "claims": {
        "full": {"precision": ["none"]},
        "fp8": {"precision": ["fp8"]},
        "ratio": {"objective": ["grpo", "spo"]},
        "dppo": {"objective": ["dppo"]},
        "drpo": {"objective": ["drpo"]},
    },
}
RISES, COLLAPSES = [0.5, 0.7, 0.9], [0.5, 0.9, 0.4]

Accuracies = Callable[[str, int], list[float]]
"""(cell, seed) -> the accuracy in every step."""


def as_in_the_paper(cell: str, seed: int) -> list[float]:
    return COLLAPSES if cell in ("grpo+fp8", "spo+fp8") else [*RISES[:2], 0.9 + 0.001 * seed]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """A study of which these cells have run, with accuracies of one's own."""
    monkeypatch.chdir(directory)

    def make(accuracies: Accuracies, seeds: list[int] | None = None, leave_out: tuple[str, ...] = ()) -> Study:
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(GRID, sort_keys=False))
        study = load_study(file, tmp_path / "runs", seeds)
        save_grid(study)
        for run in study.runs:
            if run.cell not in leave_out:
                write_run(run, accuracies(run.cell, run.seed))
        return study

    return make


def verdicts(study: Study) -> dict[str, Judgement]:
    judgements = judge(read_results(study.runs_dir))
    names = ("ratio", "dppo", "drpo", "as good")
    return dict(zip(names, judgements, strict=True))


def test_the_papers_picture_is_recognised(make: Callable[..., Study]) -> None:
    assert {name: j.verdict for name, j in verdicts(make(as_in_the_paper)).items()} == dict.fromkeys(
        ("ratio", "dppo", "drpo", "as good"), "reproduced"
    )


def test_the_opposite_is_recognised(make: Callable[..., Study]) -> None:
    found = verdicts(make(lambda cell, seed: COLLAPSES if cell in ("dppo+fp8", "drpo+fp8") else RISES))
    assert {name: j.verdict for name, j in found.items()} == dict.fromkeys(
        ("ratio", "dppo", "drpo", "as good"), "not reproduced"
    )
    # 0.4 against 0.9 in every seed; equal in full precision.
    assert "drpo+fp8 against grpo+fp8: -50.0 ± 0.0 points, 3 seed(s)" in found["as good"].numbers


def test_a_collapse_in_full_precision_or_in_few_seeds_decides_nothing(make: Callable[..., Study]) -> None:
    everywhere = verdicts(make(lambda cell, seed: COLLAPSES if cell.startswith(("grpo", "spo")) else RISES))
    assert everywhere["ratio"].verdict == "undecided"


def test_one_seed_of_three_collapsed_is_undecided(make: Callable[..., Study]) -> None:
    found = verdicts(make(lambda cell, seed: COLLAPSES if (cell, seed) == ("dppo+fp8", 1) else RISES))
    assert found["dppo"].verdict == "undecided"
    assert found["dppo"].numbers == ["dppo+fp8: 1 of 3 collapsed, 73.3 % at the end"]
    assert "Says little here" in found["drpo"].remark


def test_one_seed_is_a_tendency_and_no_verdict(make: Callable[..., Study]) -> None:
    found = verdicts(make(as_in_the_paper, seeds=[0]))
    assert {j.verdict for j in found.values()} == {"undecided"}
    assert found["ratio"].remark == "1 finished seed(s) where 3 are needed. Tendency: reproduced."


def test_a_missing_cell_leaves_its_claims_undecided(make: Callable[..., Study]) -> None:
    found = verdicts(make(as_in_the_paper, leave_out=("spo+fp8",)))
    assert found["ratio"].verdict == "undecided" and found["ratio"].remark == "0 finished seed(s) where 3 are needed."
    assert found["dppo"].verdict == "reproduced"


@pytest.mark.parametrize(
    ("accuracies", "is_collapse"),
    [
        ([0.5, 0.9, 0.71], False),  # It lost 19 points of 40 gained.
        ([0.5, 0.9, 0.69], True),
        ([0.5, 0.54, 0.50], False),  # More than half of what it gained, but only 4 points.
        ([0.5, 0.5, 0.44], True),  # It only lost.
        ([0.5], False),
    ],
)
def test_a_collapse_is_a_loss_of_half_the_gain_and_of_five_points(
    make: Callable[..., Study], accuracies: list[float], is_collapse: bool
) -> None:
    results = read_results(make(lambda cell, seed: accuracies, seeds=[0]).runs_dir)
    assert {collapsed(results, run) for run in results.runs} == {is_collapse}


def test_a_run_that_diverged_counts_as_collapsed_and_is_not_run_again(make: Callable[..., Study]) -> None:
    study = make(lambda cell, seed: RISES, seeds=[0], leave_out=("grpo+fp8",))
    run = next(run for run in study.runs if run.cell == "grpo+fp8")
    write_run(run, [0.5, 0.9], state="diverged")
    results = read_results(study.runs_dir)
    found = next(result for result in results.runs if result.cell.name == "grpo+fp8")
    assert found.has_ended and collapsed(results, found)
    assert inspect(study)[run] == "done"


def test_the_report_holds_everything_in_one_file(make: Callable[..., Study]) -> None:
    study = make(as_in_the_paper)
    files, notes = write_report(study.runs_dir)
    html, markdown = (file.read_text() for file in files)
    assert [file.name for file in files] == ["report.html", "report.md"]
    assert not re.search(r"""(src|href)=["'](?!data:)""", html), "it must not need other files"
    pictures = [base64.b64decode(text) for text in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert len(pictures) >= 14 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    for text in (html, markdown):
        # Mean of 0.900, 0.901, 0.902, and their standard deviation.
        assert "90.1% ± 0.1%" in text
        assert "40.0% ± 0.0% (3 collapsed)" in text
        assert "DRPO (drpo) is at least as good as the best other method" in text
        assert "A run collapsed when" in text
        assert "chance alone spreads it by" in text
    # 8 held-out problems, one answer each: 50 / sqrt(8).
    assert notes == [
        "Held-out accuracy rests on 8 answers: chance alone spreads it by 17.7 points (one standard error at 50 %), "
        "beside the spread over seeds."
    ]
    # The exact configuration of every run, and the command that made it.
    assert html.count("<summary>drpo+fp8, seed ") == 3
    assert "precision.rollout=&#34;mxfp8&#34;" in html and "name: mxfp8" in html
    assert "| drpo | 90.1% ± 0.1% | 90.1% ± 0.1% |" in markdown


def test_the_report_says_what_is_incomplete_and_what_other_code_made(make: Callable[..., Study]) -> None:
    study = make(as_in_the_paper, seeds=[0], leave_out=("spo+none", "drpo+none", "dppo+none"))
    runs = {run.cell: run for run in study.runs}
    write_run(runs["drpo+none"], RISES, state="failed", error=["<b>boom</b>"])
    write_run(runs["dppo+none"], RISES, code="0123456789ab", versions={"torch": "1.0"})
    text = "\n".join(reservations(read_results(study.runs_dir)))
    assert "2 of 8 runs are incomplete and are left out: spo+none seed 0 (not run), drpo+none seed 0 (failed)." in text
    assert "Runs of different versions are compared, code: 0123456789ab, " in text
    assert "Runs of different versions are compared, torch: 1.0, " in text
    assert "One seed only (0)" in text


def test_a_directory_without_results_is_refused(make: Callable[..., Study], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no study: study.json is missing"):
        write_report(tmp_path)
    study = make(
        as_in_the_paper, leave_out=tuple(f"{o}+{p}" for o in GRID["axes"]["objective"] for p in ("none", "fp8"))
    )
    with pytest.raises(ValueError, match="no run of the study has ended yet"):
        write_report(study.runs_dir)


def test_what_another_configuration_made_is_refused_by_name(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make(as_in_the_paper, seeds=[0])
    grid = GRID | {"overrides": {"run.num_steps": 5}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(grid, sort_keys=False))
    with pytest.raises(ValueError, match=re.escape(f"{study.runs[0].path}: run.num_steps=5 (it has 2)")):
        inspect(load_study(other, study.runs_dir, [0]))


def test_a_run_that_somebody_is_at_is_left_alone(make: Callable[..., Study]) -> None:
    study = make(as_in_the_paper, seeds=[0])
    here, there = study.runs[:2]
    me = psutil.Process()
    for run, host in ((here, socket.gethostname()), (there, "elsewhere")):
        shutil.rmtree(run.path)
        write_run(run, RISES, state="running", host=host, pid=me.pid, pid_created=me.create_time())
    with pytest.raises(ValueError) as error:
        inspect(study)
    assert f"{here.path}: process {me.pid} of {socket.gethostname()} is running it" in str(error.value)
    assert f"{there.path}: process {me.pid} of elsewhere is running it" in str(error.value)
    # Another process that has got the number; a machine that gave no sign of life for an hour.
    os.utime(there.path / "cell.json", (0, time.time() - 3600))
    shutil.rmtree(here.path)
    write_run(here, RISES, state="running", host=socket.gethostname(), pid=me.pid, pid_created=1.0)
    assert [inspect(study)[run] for run in (here, there)] == ["new", "new"]


def test_a_directory_of_another_study_file_is_refused_and_one_may_grow(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    study = make(as_in_the_paper, seeds=[0])
    assert set(inspect(study).values()) == {"new", "done"}  # The start is new.

    def changed(**axes: Any) -> Study:
        file = tmp_path / "changed.yaml"
        file.write_text(yaml.safe_dump(GRID | {"axes": GRID["axes"] | axes}, sort_keys=False))
        return load_study(file, study.runs_dir, [1])

    wider = changed(precision=GRID["axes"]["precision"] | {"fp4": {"precision.rollout": "nvfp4"}})
    save_grid(wider)
    results = read_results(study.runs_dir)
    assert results.file.seeds == [0, 1] and len(results.cells) == 12
    with pytest.raises(ValueError, match="was made by another study file than .* it has the cell grpo.fp8"):
        save_grid(changed(precision={"none": {}, "fp8": {"precision.rollout": "e4m3"}}))

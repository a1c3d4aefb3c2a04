"""Study files: the grid they stand for, and every way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron.study.file import expand, read_study_file
from drpo_megatron.study.runs import Study, load_study
from tests.study.small import STUDY, write_base

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_base(tmp_path)


def load(directory: Path, changes: dict[str, Any] | None = None, **arguments: Any) -> Study:
    file = directory / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | (changes or {}), sort_keys=False))
    return load_study(file, **arguments)


def problem(directory: Path, changes: dict[str, Any], **arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        load(directory, changes, **arguments)
    return str(error.value)


def test_the_grid_is_the_product_of_the_axes_less_what_is_excluded(base: Path) -> None:
    study = load(base, {"exclude": [{"objective": "grpo", "anchor": ["recompute"]}], "seeds": [3, 4]})
    names = ["grpo+rollout", "drpo+rollout", "drpo+recompute"]
    assert [cell.name for cell in study.cells] == names
    assert [(run.cell, run.seed) for run in study.runs] == [(name, seed) for seed in (3, 4) for name in names]
    drpo = study.runs[2].config
    assert (drpo.objective.name, drpo.objective.anchor, drpo.run.seed, drpo.run.num_steps) == (
        "drpo",
        "recompute",
        3,
        2,
    )
    assert study.runs[2].path == Path("runs/small/drpo+recompute/seed-3")


def test_all_cells_of_a_seed_start_from_one_warm_up(base: Path) -> None:
    study = load(base, {"seeds": [0, 1]})
    assert [run.config.run.num_steps for run in study.prepares] == [0, 0]
    assert all(run.config.warmup is not None for run in study.prepares)
    for run in study.runs:
        assert run.start is study.prepares[run.seed]
        assert run.config.warmup is None
        assert run.config.model.hf_path == str(run.start.path / "hf")


def test_without_prepare_every_run_is_whole(base: Path) -> None:
    study = load(base, {"prepare": None})
    assert study.prepares == ()
    assert all(run.start is None and run.config.warmup is not None for run in study.runs)


def test_only_some_cells_are_chosen_and_unknown_ones_get_a_suggestion(base: Path) -> None:
    study = load(base, only={"objective": ["drpo"], "anchor": ["rollout", "recompute"]})
    assert [cell.name for cell in study.cells] == ["drpo+rollout", "drpo+recompute"]
    assert "there is no axis objectiv; did you mean objective?" in problem(base, {}, only={"objectiv": ["drpo"]})
    assert "axis objective has no level drop; did you mean drpo?" in problem(base, {}, only={"objective": ["drop"]})
    exclude = {"exclude": [{"objective": "drpo"}]}
    assert "--only objective=drpo: the grid has no such cell" in problem(base, exclude, only={"objective": ["drpo"]})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"axes": {}}, "axes: the grid is empty"),
        ({"axes": {"objective": {}}}, "axes.objective: has no levels, so the grid is empty"),
        ({"exclude": [{"objective": ["grpo", "drpo"]}]}, "exclude leaves out every cell"),
        ({"seeds": []}, "seeds: give at least one"),
        ({"seeds": [1, 1]}, "seeds: 1 stands there 2 times"),
        ({"sedes": [1]}, "sedes is unknown; did you mean seeds?"),
        ({"exclude": [{"objektive": "drpo"}]}, "exclude: there is no axis objektive; did you mean objective?"),
        ({"exclude": [{"objective": "dppo"}]}, "exclude: axis objective has no level dppo; did you mean drpo?"),
        (
            {"claims": dict.fromkeys(("full", "fp8", "ratio", "dppo", "drpo"), {"precision": ["x"]})},
            "claims.full: there",
        ),
        ({"axes": {"a": {"x/y": {"run.num_steps": 1}}}}, "axes.a.x/y: use letters"),
        ({"axes": {"a": {"x": {"run.seed": 1}}}}, "axes.a: run.seed is set by the study itself"),
        ({"axes": {"a": {"x": {"model.hf_path": "y"}}}}, "axes.a: model.hf_path is set by the study itself"),
        (
            {
                "axes": {
                    "anchor": {"r": {"objective.anchor": "recompute"}},
                    "objective": {"grpo": {"objective": "grpo"}},
                }
            },
            "axes.objective sets objective and so undoes objective.anchor of axes.anchor",
        ),
        ({"base": "nowhere.yaml"}, "nowhere.yaml can't be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(base: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in problem(base, changes)


def test_a_cell_that_cannot_run_is_named_before_anything_starts(base: Path) -> None:
    axes = {"objective": {"grpo": {"objective": "grpo"}, "drpo": {"objective.detla": 0.1}}}
    text = problem(base, {"axes": axes})
    assert "unknown key objective.detla" in text and "did you mean objective.delta?" in text and "(in drpo)" in text
    axes = {"layout": {"one": {}, "two": {"parallel": {"num_ranks": 3, "tensor": 2}}}}
    assert "(in two)" in problem(base, {"axes": axes})
    axes = {"precision": {"none": {}, "both": {"precision.train": "fp8-delayed", "precision.keep_bf16": ["first"]}}}
    text = problem(base, {"axes": axes})
    assert "precision.train=fp8-delayed" in text and "(in both)" in text


def test_two_cells_of_one_configuration_are_refused(base: Path) -> None:
    axes = {"objective": {"a": {"objective": "grpo"}, "b": {"objective": {"name": "grpo", "eps_low": 0.2}}}}
    assert "the configuration is that of a (in b)" in problem(base, {"axes": axes})


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_studies_are_valid(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path)
    study = read_study_file(file)
    # Their data is made by the quickstart; the same grid over the test's model shows that every cell is a valid run.
    overrides = {key: value for key, value in study.overrides.items() if not key.startswith(("checkpoint", "eval"))}
    (tmp_path / "study.yaml").write_text(json.dumps(study.model_dump() | {"base": "run.yaml", "overrides": overrides}))
    monkeypatch.chdir(tmp_path)
    assert len(load_study(Path("study.yaml")).runs) == len(expand(study)) >= 4

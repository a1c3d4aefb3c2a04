"""`drpo-megatron study report RUNS`: report.html and report.md from what lies in the directory of a study."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from drpo_megatron.files import write_text
from drpo_megatron.study.figures import draw_all
from drpo_megatron.study.page import Page, as_html, as_markdown, inline
from drpo_megatron.study.results import GRID_FILE, Results, read_results, reservations
from drpo_megatron.study.tables import accuracy_table, claims_table, measure_tables, time_table

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def write_report(runs_dir: Path) -> tuple[list[Path], list[str]]:
    """The files, and what can't be concluded from them.

    Raises: ValueError when the directory holds no study, or no run of it has ended.
    """
    results = read_results(runs_dir)
    notes = reservations(results)
    claims = claims_table(results)
    page = Page(
        title=f"Study: {results.file.name}",
        summary=_summary(results),
        reservations=notes,
        tables=[
            *([claims] if claims else []),
            accuracy_table(results),
            *measure_tables(results),
            time_table(results),
        ],
        pictures=[inline(picture.title, picture.caption, picture.figure) for picture in draw_all(results)],
        configurations=list(_configurations(results)),
    )
    files = {runs_dir / HTML_FILE: as_html(page), runs_dir / MARKDOWN_FILE: as_markdown(page)}
    for path, text in files.items():
        write_text(path, text)
    return list(files), notes


def _summary(results: Results) -> list[str]:
    ended = [run for run in results.runs if run.has_ended]
    axes = "; ".join(f"{axis}: {', '.join(levels)}" for axis, levels in results.file.axes.items())
    records = [run.record for run in ended if run.record]
    versions = "; ".join(
        ", ".join(f"{package} {version}" for package, version in dict(items).items())
        for items in sorted({tuple(record.versions.items()) for record in records})
    )
    codes = ", ".join(sorted({record.code for record in records}))
    return [
        f"{len(results.cells)} cells x {len(results.file.seeds)} seed(s): {len(ended)} of {len(results.runs)} runs ended. "
        f"{axes}.",
        f"Made by code {codes} with {versions}. Base: {results.file.base}.",
    ]


def _configurations(results: Results) -> Iterator[tuple[str, str]]:
    """The study file, what each cell changes, and every run's whole configuration."""
    yield f"The study ({GRID_FILE})", _yaml(results.file.model_dump(mode="json"))
    for run in results.runs:
        if run.record is None:
            continue
        title = f"{run.cell.name}, seed {run.seed} ({run.state})"
        command = "drpo-megatron train " + " ".join(
            [results.file.base, *(f"'{text}'" for text in run.record.overrides)]
        )
        yield title, f"{command}\n\n{_yaml(run.config)}"


def _yaml(tree: object) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)

"""Tables of a report, the same for its HTML and its Markdown: mean and standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from drpo_megatron.study.claims import RULES, collapsed, judge
from drpo_megatron.study.results import FINAL, GROUPS, Measure, Results


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}.** {self.note}".strip(), "", *texts])


def claims_table(results: Results) -> Table | None:
    """None for a study that speaks of no claims."""
    rows = [[j.claim, j.verdict, j.remark, "; ".join(j.numbers)] for j in judge(results)]
    if not rows:
        return None
    rules = " ".join(f"({number}) {rule}" for number, rule in enumerate(RULES, start=1))
    return Table(
        "The paper's claims",
        f"By rules that were fixed in code before the runs: {rules}",
        ["claim", "at this scale", "remark", "numbers"],
        rows,
    )


def accuracy_table(results: Results) -> Table:
    """Rows: the first axis. Columns: all other axes."""
    rows = []
    for row in results.row_names:
        cells = [results.at(row, column) for column in results.column_names]
        texts = []
        for cell in cells:
            num_collapsed = sum(collapsed(results, run) for run in results.ended(cell)) if cell else 0
            text = mean_and_spread(list(results.values(cell, FINAL).values()), results.form(FINAL)) if cell else ""
            texts.append(f"{text} ({num_collapsed} collapsed)" if num_collapsed else text)
        rows.append([row, *texts])
    axes = list(results.file.axes)
    seeds = ", ".join(map(str, results.file.seeds))
    return Table(
        f"Held-out {results.heldout_name} at the end",
        f"Mean ± standard deviation over seeds {seeds}, in the cell's own rollout precision; a dash: no finished run.",
        [axes[0], *(column or results.heldout_name for column in results.column_names)],
        rows,
    )


def measure_tables(results: Results) -> list[Table]:
    """A row a cell; measures that no run has are left out."""
    tables = []
    for title, note, measures in GROUPS:
        present = [measure for measure in measures if results.has(measure.metric)]
        if present:
            tables.append(_of_cells(results, title, note, present))
    return tables


def time_table(results: Results) -> Table:
    """Wall time of the runs, over all attempts."""
    runs = [run for run in results.runs if run.record]
    seconds = [run.record.seconds for run in runs if run.record]
    attempts = sum(run.record.attempts for run in runs if run.record)
    numbers = [str(len(runs)), str(attempts), f"{sum(seconds):.0f} s", f"{statistics.median(seconds):.0f} s"]
    return Table("Time", "", ["runs begun", "attempts", "wall time of all, added", "median of a run"], [numbers])


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """`63.2% ± 1.1%`: mean and standard deviation over seeds; a dash without values."""
    if not values:
        return "-"
    text = format(statistics.fmean(values), form)
    return text if len(values) == 1 else f"{text} ± {format(statistics.stdev(values), form)}"


def _of_cells(results: Results, title: str, note: str, measures: Sequence[Measure]) -> Table:
    rows = []
    for cell in results.cells:
        values = [list(results.values(cell, measure).values()) for measure in measures]
        texts = [mean_and_spread(found, results.form(measure)) for found, measure in zip(values, measures, strict=True)]
        rows.append([cell.name, f"{len(results.ended(cell))}/{len(results.file.seeds)}", *texts])
    return Table(title, note, ["cell", "seeds", *(measure.label for measure in measures)], rows)

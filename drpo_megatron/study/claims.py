"""The paper's three claims about FP8, each judged by a rule that was fixed before any run of a study was looked at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from drpo_megatron.intervals import student_t_975
from drpo_megatron.study.file import Cell, Claims, Selector, selects
from drpo_megatron.study.results import BEFORE, BEST, FINAL, Result, Results

Verdict = Literal["reproduced", "not reproduced", "undecided"]

MIN_SEEDS = 3
MIN_LOSS = 0.05
MARGIN = 0.02

RULES = (
    f"A run collapsed when its held-out accuracy at the end is below its best by more than {100 * MIN_LOSS:.0f} points "
    "and by more than half of what it had gained over the accuracy before RL, or when a gradient that is not finite "
    "ended it.",
    "Ratio methods collapse: reproduced when every FP8 cell of them collapses in more than half of its seeds and no "
    "full-precision cell does; not reproduced when no FP8 cell does; undecided otherwise.",
    "A method does not collapse: reproduced when none of its FP8 runs collapses; not reproduced when an FP8 cell does "
    "in more than half of its seeds; undecided otherwise.",
    "DRPO is at least as good: in every setting, full precision or FP8, final accuracy minus that of the best of the "
    "other methods (GRPO, SPO, DPPO; best by the mean over seeds, which favours them), paired by seed, with a 95 % t "
    f"interval. Reproduced when every interval lies above -{100 * MARGIN:.0f} points; not reproduced when one lies "
    "below it; undecided otherwise.",
    f"With fewer than {MIN_SEEDS} finished seeds in any cell that a claim speaks of it is undecided; the verdict that "
    "the rule would give is named as a tendency.",
)


@dataclass(frozen=True, slots=True)
class Judgement:
    claim: str
    verdict: Verdict
    remark: str
    numbers: list[str]


def judge(results: Results) -> list[Judgement]:
    """The claims, if the study file says which cells they speak of, and rewards are 0 or 1, which the rules are for."""
    claims = results.file.claims
    if claims is None or not results.is_accuracy:
        return []
    found = [_ratio_collapses(results, claims)]
    for name, methods in (("DPPO", claims.dppo), ("DRPO", claims.drpo)):
        found += [_stays(results, claims, f"{name} ({method})", cells) for method, cells in _methods(results, methods)]
    return found + [_as_good(results, claims, method, cells) for method, cells in _methods(results, claims.drpo)]


def collapsed(results: Results, run: Result) -> bool:
    """Where rewards are not 0 or 1 the rule in points has no scale, and only a broken gradient counts."""
    if run.diverged or not results.is_accuracy:
        return run.diverged
    before, best, final = (measure.of(run.rows) for measure in (BEFORE, BEST, FINAL))
    if before is None or best is None or final is None:
        return False
    return best - final > max(MIN_LOSS, (best - before) / 2)


# --- the claims -----------------------------------------------------------------------------------------------------


def _ratio_collapses(results: Results, claims: Claims) -> Judgement:
    full = _cells(results, claims.ratio, claims.full)
    low = _cells(results, claims.ratio, claims.fp8)
    shares = {cell: _collapsed_share(results, cell) for cell in (*full, *low)}
    rule: Verdict = "undecided"
    if not any(shares[cell] > 0.5 for cell in low):
        rule = "not reproduced"
    elif all(shares[cell] > 0.5 for cell in low) and not any(shares[cell] > 0.5 for cell in full):
        rule = "reproduced"
    return _judgement(results, "Ratio methods (GRPO, SPO) collapse under FP8", rule, [*full, *low], "")


def _stays(results: Results, claims: Claims, name: str, cells: Sequence[Cell]) -> Judgement:
    low = [cell for cell in cells if selects(claims.fp8, cell.levels)]
    shares = [_collapsed_share(results, cell) for cell in low]
    rule: Verdict = "undecided"
    if max(shares, default=0) > 0.5:
        rule = "not reproduced"
    elif max(shares, default=0) == 0:
        rule = "reproduced"
    ratio = [_collapsed_share(results, cell) for cell in _cells(results, claims.ratio, claims.fp8)]
    remark = "" if max(ratio, default=0) > 0 else "Says little here: the ratio methods did not collapse, either."
    return _judgement(results, f"{name} does not collapse under FP8", rule, low, remark)


def _as_good(results: Results, claims: Claims, method: str, cells: Sequence[Cell]) -> Judgement:
    verdicts, numbers, spoken_of = [], [], []
    for cell in cells:
        if not (selects(claims.full, cell.levels) or selects(claims.fp8, cell.levels)):
            continue
        others = [other for other in _others(results, claims, cell) if results.values(other, FINAL)]
        spoken_of += [cell, *others]
        if not others or not results.values(cell, FINAL):
            continue
        best = max(others, key=lambda other: statistics.fmean(results.values(other, FINAL).values()))
        ours, theirs = results.values(cell, FINAL), results.values(best, FINAL)
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if not differences:
            continue
        mean, half = statistics.fmean(differences), _half_width(differences)
        verdicts.append(_against_margin(mean, half if math.isfinite(half) else 0.0))
        interval = f" ± {100 * half:.1f}" if math.isfinite(half) else ""
        numbers.append(
            f"{cell.name} against {best.name}: {100 * mean:+.1f}{interval} points, {len(differences)} seed(s)"
        )
    rule: Verdict = "undecided"
    if "not reproduced" in verdicts:
        rule = "not reproduced"
    elif verdicts and set(verdicts) == {"reproduced"}:
        rule = "reproduced"
    return _with_seeds(
        results, f"DRPO ({method}) is at least as good as the best other method", rule, spoken_of, "", numbers
    )


def _against_margin(mean: float, half: float) -> Verdict:
    if mean - half > -MARGIN:
        return "reproduced"
    return "not reproduced" if mean + half < -MARGIN else "undecided"


def _half_width(differences: Sequence[float]) -> float:
    """Of the 95 % interval of the mean; infinite with one number."""
    n = len(differences)
    if n == 1:
        return math.inf
    return student_t_975(n - 1) * statistics.stdev(differences) / math.sqrt(n)


# --- which cells, and how many seeds --------------------------------------------------------------------------------


def _cells(results: Results, *selectors: Selector) -> list[Cell]:
    return [cell for cell in results.cells if all(selects(selector, cell.levels) for selector in selectors)]


def _methods(results: Results, selector: Selector) -> list[tuple[str, list[Cell]]]:
    """The cells of a selector by method: the levels on the axes that it names."""
    found: dict[str, list[Cell]] = {}
    for cell in _cells(results, selector):
        found.setdefault("+".join(cell.levels[axis] for axis in selector), []).append(cell)
    return list(found.items())


def _others(results: Results, claims: Claims, cell: Cell) -> list[Cell]:
    """GRPO, SPO and DPPO where all else is the same."""
    rest = {axis: [level] for axis, level in cell.levels.items() if axis not in claims.drpo}
    return [*_cells(results, claims.ratio, rest), *_cells(results, claims.dppo, rest)]


def _collapsed_share(results: Results, cell: Cell) -> float:
    runs = results.ended(cell)
    return statistics.fmean(collapsed(results, run) for run in runs) if runs else 0.0


def _judgement(results: Results, claim: str, rule: Verdict, cells: Sequence[Cell], remark: str) -> Judgement:
    numbers = []
    for cell in cells:
        runs = results.ended(cell)
        finals = [value for run in runs if (value := FINAL.of(run.rows)) is not None]
        at_the_end = f", {100 * statistics.fmean(finals):.1f} % at the end" if finals else ""
        numbers.append(
            f"{cell.name}: {sum(collapsed(results, run) for run in runs)} of {len(runs)} collapsed{at_the_end}"
        )
    return _with_seeds(results, claim, rule, cells, remark, numbers)


def _with_seeds(
    results: Results, claim: str, rule: Verdict, cells: Sequence[Cell], remark: str, numbers: list[str]
) -> Judgement:
    fewest = min((len(results.ended(cell)) for cell in cells), default=0)
    if fewest >= MIN_SEEDS:
        return Judgement(claim, rule, remark, numbers)
    few = f"{fewest} finished seed(s) where {MIN_SEEDS} are needed."
    if fewest:
        few += f" Tendency: {rule}."
    return Judgement(claim, "undecided", f"{few} {remark}".strip(), numbers)

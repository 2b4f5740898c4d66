"""Did a repeated study give the same?

Three answers: reproduced exactly (every compared table has the same bytes), reproduced within seed noise, or differs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

EXACT, NOISE, DIFFERS, FIRST = "reproduced exactly", "reproduced within seed noise", "differs", "first run"
_NEEDED = ("arm", "seed", "test_accuracy")


@dataclass(frozen=True)
class Verdict:
    """kind: one of the four above; text: one line; arms: a table behind it (empty when there is nothing to compare)."""

    kind: str
    text: str
    arms: pd.DataFrame


def compare_results(old: pd.DataFrame, new: pd.DataFrame, *, confidence: float = 0.95) -> Verdict:
    """Compare the results tables of two runs of one study, arm by arm.

    old, new: one row per arm and seed with the columns arm, seed, test_accuracy (fractions). The mean of an arm may
    move by its seed noise: the half-width of the t-interval of the difference of two means (Welch 1947), with the
    confidence shared out over the arms (Bonferroni), so that a true repetition is called different in at most 5 % of
    studies, not of arms. An arm with fewer than two seeds takes the standard deviation pooled over the others; when
    no arm has two seeds there is no noise to measure and only equal numbers pass.

    Returns a Verdict; its arms have the columns arm, old, new, difference, allowed, inside.
    """
    for name, table in (("old", old), ("new", new)):
        missing = [column for column in _NEEDED if column not in table]
        if missing:
            return Verdict(
                DIFFERS, f"{DIFFERS}: the {name} results table has no column {', '.join(missing)}", pd.DataFrame()
            )
    names = list(dict.fromkeys([*old["arm"], *new["arm"]]))
    groups = {name: (_values(old, name), _values(new, name)) for name in names}
    for name, (before, now) in groups.items():
        if before.empty or now.empty:
            where = "new" if before.empty else "gone"
            return Verdict(
                DIFFERS,
                f"{DIFFERS}: arm {name} is {where} (the arms compared before: {', '.join(dict.fromkeys(old['arm']))})",
                pd.DataFrame(),
            )
    level = 1 - (1 - confidence) / len(names)
    pooled = _pooled([values for pair in groups.values() for values in pair])
    rows = []
    for name, (before, now) in groups.items():
        difference = float(now.mean() - before.mean())
        allowed = _half_width(before, now, level, pooled)
        rows.append((name, float(before.mean()), float(now.mean()), difference, allowed, abs(difference) <= allowed))
    arms = pd.DataFrame(rows, columns=["arm", "old", "new", "difference", "allowed", "inside"])
    return _judged(arms)


def _judged(arms: pd.DataFrame) -> Verdict:
    if not len(arms):
        return Verdict(DIFFERS, f"{DIFFERS}: both results tables are empty", arms)
    outside = arms[~arms["inside"]]
    if outside.empty:
        most = arms.loc[arms["difference"].abs().idxmax()]
        moved = f"largest change: {most['arm']} by {100 * most['difference']:+.2f} points of test accuracy"
        return Verdict(NOISE, f"{NOISE}: {moved}, inside ±{100 * most['allowed']:.2f}", arms)
    worst = outside.loc[(outside["difference"].abs() - outside["allowed"]).idxmax()]
    text = (
        f"{DIFFERS}: {worst['arm']} test accuracy {100 * worst['old']:.2f} % -> {100 * worst['new']:.2f} % "
        f"({100 * worst['difference']:+.2f} points; seed noise allows ±{100 * worst['allowed']:.2f}); "
        f"{len(outside)} of {len(arms)} arms outside"
    )
    return Verdict(DIFFERS, text, arms)


def judge(
    old_results: pd.DataFrame | None,
    new_results: pd.DataFrame | None,
    old_digests: Mapping[str, str],
    new_digests: Mapping[str, str],
    changed_parameters: str = "",
) -> Verdict:
    """The verdict on a run that has just ended.

    old_results is None on a first run. Digests are sha256 by table name; only names known to both runs are compared.
    changed_parameters names what was asked for differently, if anything: then "reproduced" is never said.
    """
    if old_results is None:
        return Verdict(FIRST, f"{FIRST}: nothing to compare with", pd.DataFrame())
    both = [name for name in new_digests if name in old_digests]
    changed = [name for name in both if old_digests[name] != new_digests[name]]
    if changed_parameters:
        result = compare_results(old_results, new_results)
        return Verdict(
            DIFFERS, f"{DIFFERS}, as it was asked something else ({changed_parameters}); {result.text}", result.arms
        )
    if both and not changed:
        return Verdict(EXACT, f"{EXACT}: {len(both)} tables with the same bytes", pd.DataFrame())
    result = compare_results(old_results, new_results)
    others = f"; bytes differ in {', '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}" if changed else ""
    return Verdict(result.kind, result.text + others, result.arms)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """What is kept of a verdict."""
    arms = verdict.arms.astype(object).where(verdict.arms.notna(), None)
    return {"verdict": verdict.kind, "text": verdict.text, "arms": arms.to_dict("records")}


def _values(table: pd.DataFrame, arm: str) -> pd.Series:
    return table.loc[table["arm"] == arm, "test_accuracy"].dropna().astype(float)


def _pooled(groups: list[pd.Series]) -> tuple[float, int]:
    """Variance within groups and its degrees of freedom."""
    freedom = sum(len(values) - 1 for values in groups)
    if freedom <= 0:
        return 0.0, 0
    return sum(float(((values - values.mean()) ** 2).sum()) for values in groups) / freedom, freedom


def _half_width(before: pd.Series, now: pd.Series, level: float, pooled: tuple[float, int]) -> float:
    from scipy.stats import t  # here: importing scipy takes longer than a run with nothing to do

    if min(len(before), len(now)) >= 2:
        parts = [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in (before, now)]
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / n for part, n in parts) if variance else 0
    else:
        variance, freedom = pooled[0] * (1 / len(before) + 1 / len(now)), pooled[1]
    return float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance) if variance > 0 and freedom > 0 else 0.0

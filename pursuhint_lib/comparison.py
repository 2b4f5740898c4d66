"""Arms -> paired differences with intervals.

Two students of one seed start from the same weights and see the same batches, so arms are compared seed by seed: what
is looked at is the difference of two accuracies, one number per seed. Accuracies are fractions in [0, 1]; differences
of accuracies are therefore fractions too (0.01 is one point).
"""

import functools
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

from pursuhint_lib.params import LANDSCAPE

MINUS = "\N{MINUS SIGN}"
POWER = 0.8  # Cohen 1988: the usual chance of finding a difference that is there
RESAMPLES = 9999  # the smallest tail that matters is that of five differences, about 0.001
ROUNDING = 1e-12  # accuracies are shares of at most some 100 000 images: none differ by so little
OTHER_SPEAKERS = ("clustered_first_", "clustered_last_", "clustered_medoid_")  # another layer of each of the clusters
# Columns of a study's results that `average_measures` sums up.
MEASURES = ("test_accuracy", "top5", "test_loss", "agreement", "agreement_wrong", "kl", "ece", "ece_scaled")
MEASURES += ("loss_scaled",)
SUMMARY_COLUMNS = ["arm", "method", "strategy", "same_as", "n", "val_mean", "test_mean", "test_low", "test_high"]
SUMMARY_COLUMNS += ["difference", "difference_low", "difference_high", "boot_low", "boot_high", "effect", "p", "p_holm"]
SUMMARY_COLUMNS += ["detectable", "gap_closed", "reading"]
CONTRAST_COLUMNS = ["arm", "control", "family", "n", "mean", "low", "high", "boot_low", "boot_high", "effect", "p"]
CONTRAST_COLUMNS += ["p_holm", "comparisons", "detectable", "word"]


# ---- One set of paired differences ----


class Difference(NamedTuple):
    """What n paired differences say, see `paired_difference`. All but n, effect and p are in the differences' unit."""

    n: int
    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    effect: float
    p: float
    detectable: float


NO_DIFFERENCE = Difference(0, *[math.nan] * 8)


def paired_difference(differences: np.ndarray, confidence: float = 0.95) -> Difference:
    """What n paired differences (n,), without NaN, say about the true mean difference.

    mean; low, high (Student's t interval); boot_low, boot_high (see `bootstrap_interval`).
    effect: Hedges' g of paired differences, mean / sd (sd with n - 1, of the differences: often called d_z) times the
    exact correction Gamma(m/2) / (sqrt(m/2) Gamma((m-1)/2)), m = n - 1 (Hedges 1981, Journal of Educational Statistics
    6(2); 1 - 3 / (4 m - 1) is about the same). It needs n >= 3: of two differences no unbiased effect exists.
    p: of the two-sided paired t test. detectable: see `detectable_difference`.

    n = 0 knows nothing, n = 1 knows its mean; the rest is NaN. Where all differences are equal, both intervals are that
    point, detectable is 0, p is 1 and effect NaN for zeros, else p is 0 and effect infinite with the mean's sign: right
    as arithmetic, but with few seeds and few test images equal differences come about by chance. What differs by less
    than 1e-12 is equal but for rounding.
    """
    values = np.sort(np.asarray(differences, dtype=float))
    n = len(values)
    if n == 0:
        return NO_DIFFERENCE
    if n == 1:
        return NO_DIFFERENCE._replace(n=1, mean=float(values[0]))
    if values[-1] - values[0] < ROUNDING:
        point = float(values[0]) if abs(values[0]) >= ROUNDING else 0.0
        effect = math.copysign(math.inf, point) if point else math.nan
        return Difference(n, *[point] * 5, effect=effect, p=float(point == 0), detectable=0.0)
    spread = float(values.std(ddof=1))
    m = n - 1
    correction = special.poch((m - 1) / 2, 0.5) / math.sqrt(m / 2) if n > 2 else math.nan
    return Difference(
        n,
        *mean_interval(values, confidence),
        *bootstrap_interval(values, confidence),
        effect=float(values.mean() / spread * correction),
        p=float(stats.ttest_1samp(values, 0).pvalue),
        detectable=detectable_difference(n, spread, confidence),
    )


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval of independent values (n,). With one value the interval is unknown: NaN."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def paired_interval(a: pd.Series, b: pd.Series, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval of a - b, paired by their index (the seed). Raises ValueError when the seeds differ."""
    if set(a.index) != set(b.index):
        raise ValueError(f"seeds differ: {sorted(a.index)} against {sorted(b.index)}")
    return mean_interval((a - b.loc[a.index]).to_numpy(), confidence)


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Expanded percentile bootstrap interval of the mean of independent values (n,), n >= 2.

    The plain percentile interval is too short for few values. This one takes percentiles further out, at
    Phi(-sqrt(n / (n - 1)) t(alpha / 2, n - 1)) and its complement, which gives it the t interval's length where the
    values are normal and many enough (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American
    Statistician 69(4), 371-386). It assumes no normal values, but few values hold it back: no mean of resampled values
    leaves their range, so of n symmetric values it covers at most 1 - 2^(1 - n): 75 % for 3, 93.75 % for 5. Measured on
    normal values, a 95 % interval covers about 75 % for n = 3, 92 % for 5, 94 % for 8 and 95 % for 20. Equal values in
    any order give the same interval.
    """
    n = len(values)
    tail = stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - confidence) / 2, n - 1))
    found = stats.bootstrap(
        (np.sort(values),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def detectable_difference(n: int, spread: float, confidence: float = 0.95) -> float:
    """The smallest true mean difference that a paired t test finds with 80 % probability.

    Of n >= 2 differences of standard deviation `spread`, two-sided at level 1 - confidence, before any correction for
    the number of tests. The spread is taken as if it were the true one, and finding counts in either direction. It
    depends on n and the spread alone, not on what was observed: it says what the study could see, which the power at
    the observed mean does not (Hoenig & Heisey 2001, The American Statistician 55(1)).
    """
    return _detectable_noncentrality(n, confidence) * spread / math.sqrt(n)


@functools.cache
def _detectable_noncentrality(n: int, confidence: float) -> float:
    """Of the noncentral t with n - 1 degrees of freedom that lies beyond the test's bounds with probability POWER."""
    bound = stats.t.ppf((1 + confidence) / 2, n - 1)

    def excess(noncentrality: float) -> float:
        # Both tails at once, as the square of t is F with 1 and n - 1; scipy's t has no numbers for its far tail.
        return float(stats.ncf.sf(bound**2, 1, n - 1, noncentrality**2)) - POWER

    return float(optimize.brentq(excess, 0, 2 * bound + 2))


def verdict(low: float, high: float) -> str:
    """How to read an interval of a difference: "better", "worse", or "includes zero"."""
    if not low <= high:
        return "unknown (one seed)"
    return "better" if low > 0 else "worse" if high < 0 else "includes zero"


def holm(p: Iterable[float]) -> np.ndarray:
    """p values (m,) -> adjusted p values (m,): of studies of no difference at most a share alpha has one <= alpha.

    The i-th smallest is multiplied by m - i + 1, is at least the adjusted one before it, and at most 1 (Holm 1979,
    Scandinavian Journal of Statistics 6(2), 65-70). It holds however the tests depend on each other, as those against
    one shared control do. NaN stays NaN and is not counted in m.
    """
    p = np.asarray(p, dtype=float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted


# ---- In words ----


def in_points(fraction: float) -> str:
    """Points with two decimals and a sign; what rounds to zero has no sign."""
    text = f"{100 * fraction:+.2f}".replace("-", MINUS)
    return text[1:] if float(text[1:]) == 0 else text


def p_in_words(p: float) -> str:
    """A p value with three decimals."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference_in_words(difference: Difference, confidence: float, p_holm: float, comparisons: int) -> str:
    """One comparison as a plain sentence without its full stop: how large, how sure, what could have been found.

    difference: of accuracies as fractions; the rows of ``contrast(...).itertuples()`` have the same fields. p_holm: its
    p value corrected over `comparisons` comparisons. An interval without a p value is of the same students, which is
    then all that is said.
    """
    if difference.n > 1 and math.isnan(difference.p):
        return "the same students: there is nothing to compare"
    seeds = f"n = {difference.n} paired seed{'s' if difference.n > 1 else ''}"
    word = verdict(difference.low, difference.high)
    if word not in ("better", "worse", "includes zero"):
        return f"{in_points(difference.mean)} points ({seeds}): one seed gives no interval"
    said = (
        f"{in_points(difference.mean)} points, {100 * confidence:g}\u202f% interval {in_points(difference.low)} to "
        f"{in_points(difference.high)} ({seeds}): the interval "
    )
    if word == "includes zero":
        return said + (
            f"includes zero; a true difference of {in_points(difference.detectable).lstrip('+')} points would have "
            f"been found with {100 * POWER:g}\u202f% probability"
        )
    survives = "survives" if p_holm <= 1 - confidence else "does not survive"
    many = f"{comparisons} comparison{'s' if comparisons > 1 else ''}"
    return said + f"excludes zero, which {survives} Holm's correction over {many} ({p_in_words(p_holm)})"


# ---- The arms of a study ----


def main_strategy(strategies: Iterable[str]) -> str:
    """The study's main choice: the cluster centers by its first measure; "" if it has none.

    strategies: in the study's order, as in ``hint_points.json``.
    """
    return next((name for name in strategies if _is_main_speaker(name)), "")


def _is_main_speaker(strategy: str) -> bool:
    return strategy.startswith("clustered_") and not strategy.startswith(OTHER_SPEAKERS)


def summarize(
    results: pd.DataFrame, teacher_accuracy: float, reference: str = "kd", confidence: float = 0.95
) -> pd.DataFrame:
    """One row per arm, best mean test accuracy first.

    results: one row per arm and seed with columns arm, method, strategy, same_as, seed, val_accuracy, test_accuracy.
    Columns returned: arm, method, strategy, same_as, n (seeds of the arm), val_mean, test_mean, test_low, test_high (t
    interval of the mean); of the differences to `reference`, over the seeds that both have: difference (their mean),
    difference_low, difference_high (t interval), boot_low, boot_high, effect, p, detectable (see `paired_difference`);
    p_holm; gap_closed (share of the gap unaided student - teacher, in means); reading (see `verdict`).

    The columns of differences and reading are empty for the reference, for an arm of the same students, and where no
    seed is shared. p_holm corrects over all arms with a difference, the unaided student among them; the single layers
    and subsets of a landscape, which are no choices that anyone made, are a family of their own. Arms of the same
    students (same_as) share one difference and are counted once.
    """
    accuracy = results.pivot(index="seed", columns="arm", values="test_accuracy")
    trained = _students(results)
    reference_students = trained.get(reference)
    compared = {}
    for arm, students in trained.items():
        if reference_students not in (None, students) and students not in compared:
            difference = (accuracy[arm] - accuracy[reference]).dropna()
            if len(difference):
                compared[students] = paired_difference(difference.to_numpy(), confidence)
    chosen = {trained[row.arm] for row in results.itertuples() if not row.strategy.startswith(LANDSCAPE)}
    p_holm = {}
    for family in (chosen, compared.keys() - chosen):
        names = [name for name in compared if name in family]
        p_holm |= zip(names, holm([compared[name].p for name in names]), strict=True)

    unaided = accuracy["unaided"].mean() if "unaided" in accuracy else math.nan
    gap = teacher_accuracy - unaided
    table = []
    for arm, rows in results.groupby("arm", sort=False):
        mean, low, high = mean_interval(rows["test_accuracy"], confidence)
        row = {key: rows[key].iloc[0] for key in ("arm", "method", "strategy", "same_as")}
        row |= {"n": len(rows), "val_mean": rows["val_accuracy"].mean()}
        row |= {"test_mean": mean, "test_low": low, "test_high": high, "reading": ""}
        if trained[arm] in compared:
            difference = compared[trained[arm]]
            own = {"mean": "difference", "low": "difference_low", "high": "difference_high"}
            row |= {own.get(name, name): value for name, value in difference._asdict().items() if name != "n"}
            row |= {"p_holm": p_holm[trained[arm]], "reading": verdict(difference.low, difference.high)}
        row["gap_closed"] = (mean - unaided) / gap if gap else math.nan
        table.append(row)
    return (
        pd.DataFrame(table)
        .reindex(columns=SUMMARY_COLUMNS)
        .sort_values("test_mean", ascending=False, ignore_index=True, kind="stable")
    )


def average_measures(results: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Every measure of every arm over its seeds: one row per arm and measure, in the order of `results` and MEASURES.

    results: one row per arm and seed with columns arm, seed and MEASURES. Columns returned: arm, measure, n (seeds that
    have a value), mean, low, high (t interval of the mean). A measure without a value in an arm has no row: top5 with
    five classes or fewer, agreement_wrong with a teacher that is never wrong.
    """
    table = []
    for arm, rows in results.groupby("arm", sort=False):
        for measure in MEASURES:
            values = rows[measure].dropna().to_numpy()
            if len(values):
                mean, low, high = mean_interval(values, confidence)
                table.append({"arm": arm, "measure": measure, "n": len(values), "mean": mean, "low": low, "high": high})
    return pd.DataFrame(table, columns=["arm", "measure", "n", "mean", "low", "high"])


def best_on_validation(summary: pd.DataFrame) -> str:
    """The aided arm with the best mean accuracy on validation; "" if there is none.

    Of equals (up to rounding), the first by name: `summary` (of `summarize`) is sorted by test accuracy, which must
    have no say. An arm that repeats another is not asked.
    """
    aided = summary[(summary["arm"] != "unaided") & (summary["same_as"].astype(object).fillna("") == "")].sort_values(
        "arm"
    )
    return aided["arm"][aided["val_mean"].round(9).idxmax()] if aided["val_mean"].notna().any() else ""


def contrast(results: pd.DataFrame, main: str, confidence: float = 0.95) -> pd.DataFrame:
    """Every arm with clustered hints against what it must beat, paired by seed.

    results: as for `summarize`. main: the strategy that is the study's main choice, see `main_strategy`. The controls,
    as far as the study has them: `kd`; the arm with the same logit loss and no hints, where that is not kd ("wsld" for
    the method "wsld+at"); every strategy of the arm's own method that does not choose by clusters or does something
    else with them (stage_ends, reversed, untrained, ...); and for the main choice the other speakers of its clusters
    ("clustered_first_r2_cca"). Clusters by another measure are no control. Of random, single and subset, which stand
    for many arms each, the control is the mean of all, seed by seed; that one of them may have the clustered arm's own
    layers is no fault, as they stand for what a choice without clusters gives on average.

    Columns: arm, control (a strategy or arm), family ("main" for the main choice, whatever the method, else "other"),
    those of `Difference` over the seeds that all of them have, p_holm (corrected over the family), comparisons (in the
    family: how many it was corrected over), word (see `verdict`; "same layers" where both are the same students,
    because two strategies chose the same layers: there is nothing to test, p is NaN and the row does not count).
    Comparisons of the same students stand in several rows and count once.
    """
    from pursuhint_lib.arms import parse_method  # here: it brings torch, which nothing else here needs

    accuracy = results.pivot(index="seed", columns="arm", values="test_accuracy")
    arms = results.drop_duplicates("arm").set_index("arm", drop=False)
    trained = _students(results)
    table, compared = [], []
    for arm in arms[arms["strategy"].str.startswith("clustered")].itertuples():
        own = arms[arms["method"] == arm.method]
        logit_loss = parse_method(arm.method).logit_loss
        controls = {name: [name] for name in ("kd", logit_loss) if name in trained}
        for other in own.itertuples():
            speaker = arm.strategy == main and other.strategy.startswith(OTHER_SPEAKERS)
            if speaker or not other.strategy.startswith("clustered"):
                draws = re.match(r"(random|single|subset)_", other.strategy)
                controls.setdefault(draws[1] if draws else other.strategy, []).append(other.arm)
        for control, names in controls.items():
            differences = (accuracy[arm.arm] - accuracy[names].mean(axis="columns", skipna=False)).dropna()
            if differences.empty:
                continue
            difference = paired_difference(differences.to_numpy(), confidence)
            students = (trained[arm.arm], *sorted(trained[name] for name in names))
            word = verdict(difference.low, difference.high)
            if len(set(students)) == 1:
                word = "same layers"
                difference = difference._replace(effect=math.nan, p=math.nan, detectable=math.nan)
            family = "main" if arm.strategy == main else "other"
            table.append({"arm": arm.arm, "control": control, "family": family, **difference._asdict(), "word": word})
            compared.append(students)
    found = pd.DataFrame(table).reindex(columns=CONTRAST_COLUMNS).assign(comparisons=0)
    tests = found.assign(students=compared).dropna(subset="p")
    for family, rows in tests.groupby("family"):
        once = rows.drop_duplicates("students")
        p_holm = dict(zip(once["students"], holm(once["p"]), strict=True))
        found.loc[rows.index, "p_holm"] = [p_holm[students] for students in rows["students"]]
        found.loc[found["family"] == family, "comparisons"] = len(once)
    return found


def _students(results: pd.DataFrame) -> dict[str, str]:
    """Arm -> the arm whose students it has: its own name, or that of the earlier arm with the same hints."""
    arms = results.drop_duplicates("arm")
    return dict(zip(arms["arm"], arms["same_as"].where(arms["same_as"] != "", arms["arm"]), strict=True))

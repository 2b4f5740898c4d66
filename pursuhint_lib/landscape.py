"""Every choice of hint points, compared.

A study with the strategy "subset" trains a student for every M-subset of the teacher's L candidate layers
("subset_3_9_15": the depths, from 1). Here its results become answers: where do the named choices stand among all
subsets, do the subsets differ at all beyond the noise of the seeds, which layers help, and what does one hint alone do
at each depth. Hint methods are handled apart; a study without subsets gives empty tables.

Students of one seed share initial weights and batches, so seeds are blocks, and the model is the two-way layout
without replication (Scheffé 1959, section 4.2): accuracy = mean + subset + seed + residual. The residual, what a seed
does to one subset and not to the others, is the noise of every comparison here. Only seeds vary: one teacher, one set
of images.

The layout must be complete. While a student is missing (it failed), the subset or the seed that misses the larger
share of its students is left out, a subset in a tie: one failed student among many subsets costs its subset, a seed
that was stopped half-way costs the seed. What was left out is named in the facts; a subset keeps its row, without a
rank.

Accuracies and percentiles are fractions in [0, 1]. The percentile of a value among the subsets is the share of subsets
below it plus half the share of those equal to it (`scipy.stats.percentileofscore`, kind "mean"): a subset is equal to
itself, so that the best of 84 stands at 83.5/84, the worst at 0.5/84, and on average they stand at one half.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from pursuhint_lib.comparison import in_points, mean_interval, p_in_words

SUBSET_COLUMNS = ["method", "arm", "layers", "n", "mean", "low", "high", "difference", "difference_low"]
SUBSET_COLUMNS += ["difference_high", "shrunken", "rank", "percentile", "noise_low", "noise_high", "strategies"]
PLACEMENT_COLUMNS = ["method", "strategy", "arm", "layers", "n", "mean", "percentile", "percentile_low"]
PLACEMENT_COLUMNS += ["percentile_high", "seed_low", "seed_median", "seed_high", "gain", "gain_low", "gain_high"]
EFFECT_COLUMNS = ["method", "hint", "depth", "subsets", "n", "mean", "low", "high"]
POSITION_COLUMNS = ["method", "depth", "layer", "n", "mean", "low", "high", "difference", "difference_low"]
POSITION_COLUMNS += ["difference_high"]
DRAWS = 5000  # of the true means, for intervals of percentiles and gains


class Layout(NamedTuple):
    """What one hint method's subsets did.

    every: accuracy, arms x seeds, NaN where a student failed; complete: the part of it that is compared; depths: arm
    -> depths of its hint points; strategies: arm -> other names of the same students.
    """

    every: pd.DataFrame
    complete: pd.DataFrame
    depths: dict[str, tuple[int, ...]]
    strategies: dict[str, list[str]]


def layouts(results: pd.DataFrame, measure: str = "test_accuracy") -> dict[str, Layout]:
    """Hint method -> its subsets' accuracies; methods without subset arms are left out.

    results: one row per arm and seed with columns arm, method, strategy, same_as, seed and `measure`.
    """
    accuracy = results.pivot(index="arm", columns="seed", values=measure)
    arms = results.drop_duplicates("arm").fillna({"same_as": ""})
    arms = arms.assign(trained=arms["same_as"].where(arms["same_as"] != "", arms["arm"]))
    found = {}
    for method, rows in arms.groupby("method", sort=False):
        is_subset = rows["strategy"].str.startswith("subset_")
        subsets = rows[is_subset]
        if subsets.empty:
            continue
        every = accuracy.loc[subsets["arm"]].dropna(axis="columns", how="all")
        named = rows[~is_subset & ~rows["strategy"].str.startswith(("single_", "random_"))]
        others = named.groupby("trained")["strategy"].agg(list).to_dict()
        found[method] = Layout(
            every=every,
            complete=complete(every),
            depths={row.arm: tuple(map(int, row.strategy.split("_")[1:])) for row in subsets.itertuples()},
            strategies={row.arm: others.get(row.trained, []) for row in subsets.itertuples()},
        )
    return found


def complete(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The part of a table (subsets x seeds) without missing values, see above for what is left out."""
    missing = accuracy.isna()
    while missing.to_numpy().any():
        subsets, seeds = missing.mean(axis="columns"), missing.mean(axis="index")
        if subsets.max() >= seeds.max():
            missing = missing.drop(index=subsets.idxmax())
        else:
            missing = missing.drop(columns=seeds.idxmax())
    return accuracy.loc[missing.index, missing.columns]


def variance_components(accuracy: pd.DataFrame, confidence: float = 0.95) -> dict[str, float]:
    """Does the choice matter? The two-way layout without replication of a complete table (S subsets x n seeds).

    mean; ss_, df_, ms_ of subset, seed and residual (sums of squares, degrees of freedom, mean squares). f, p: F test
    of no subset effect. sd_subset, sd_seed, sd_residual: standard deviations by the method of moments, cut off at
    zero; sd_subset_low, sd_subset_high by Williams (1962), which covers at least about as often as asked. intraclass:
    share of sd_subset^2 in the variance of two students of one seed (Shrout and Fleiss 1979, ICC(3,1)); reliability:
    the same for means over all n seeds (ICC(3,n)); both with exact F-based intervals, cut off at zero. best_by_noise:
    by how much the best of S subsets would lead their mean if they did not differ, from the expected maximum of S
    normal variables. All that needs a second seed or a second subset is NaN without one.
    """
    table = accuracy.to_numpy(dtype=float)
    n_subsets, n = table.shape
    mean = table.mean() if table.size else math.nan
    of_subset, of_seed = table.mean(axis=1, keepdims=True) - mean, table.mean(axis=0, keepdims=True) - mean
    squares = {
        "subset": (n * float((of_subset**2).sum()), n_subsets - 1),
        "seed": (n_subsets * float((of_seed**2).sum()), n - 1),
        "residual": (float(((table - mean - of_subset - of_seed) ** 2).sum()), (n_subsets - 1) * (n - 1)),
    }
    found = {"mean": float(mean)}
    for source, (ss, df) in squares.items():
        ss = ss if ss > 1e-24 else 0.0  # no more than rounding
        found |= {f"ss_{source}": ss, f"df_{source}": df, f"ms_{source}": ss / df if df > 0 else math.nan}
    df, df_residual = found["df_subset"], found["df_residual"]
    ms, residual = found["ms_subset"], found["ms_residual"]
    f = ms / residual if residual > 0 else math.inf if ms > 0 and residual == 0 else math.nan
    upper, lower = (1 + confidence) / 2, (1 - confidence) / 2
    # F-distributed whatever the true components are: f / (1 + n ratio). `least` and `most` bound 1 + n ratio.
    least, most = f / stats.f.ppf(upper, df, df_residual), f / stats.f.ppf(lower, df, df_residual)
    between = [
        (found["ss_subset"] - df * residual * stats.f.ppf(q, df, df_residual)) / (n * stats.chi2.ppf(q, df))
        for q in (upper, lower)
    ]
    return found | {
        "f": f,
        "p": float(stats.f.sf(f, df, df_residual)),
        "sd_subset": _root((ms - residual) / n),
        "sd_subset_low": _root(between[0]),
        "sd_subset_high": _root(between[1]),
        "sd_seed": _root((found["ms_seed"] - residual) / n_subsets),
        "sd_residual": _root(residual),
        "intraclass": _share(f, n),
        "intraclass_low": _share(least, n),
        "intraclass_high": _share(most, n),
        "reliability": _share(f, 1),
        "reliability_low": _share(least, 1),
        "reliability_high": _share(most, 1),
        "best_by_noise": expected_maximum(n_subsets) * _root(residual / n),
    }


def _root(variance: float) -> float:
    return float(np.sqrt(np.maximum(variance, 0.0)))  # a NaN stays one


def _share(f: float, n: int) -> float:
    """Share of the variance between subsets: of single students where f = 1 + n ratio, of their means where n is 1."""
    if math.isinf(f):
        return 1.0
    f = float(np.maximum(f, 1.0))
    return (f - 1) / (f - 1 + n)


@functools.cache
def expected_maximum(n: int) -> float:
    """Expected largest of n standard normal variables."""
    return float(stats.norm.expect(lambda x: x * n * stats.norm.cdf(x) ** (n - 1)))


def noise_band(n: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Interval of each of n sorted standard normal variables, smallest first, rank by rank: (n,), (n,).

    The i-th smallest of n uniform variables has a beta distribution with parameters i and n + 1 - i.
    """
    i = np.arange(1, n + 1)
    low, high = (stats.norm.ppf(stats.beta.ppf(q, i, n + 1 - i)) for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    return low, high


def true_effects(accuracy: pd.DataFrame, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """What the subsets' true means may be: draws given a complete table (S subsets x n seeds), n and S at least 2.

    Subsets are taken as exchangeable draws from one normal distribution: before any result, a named choice is as good
    as any other. Both variances are drawn first, as sums of squares over chi-square variables (generalized pivots,
    Weerahandi 1993), so that their uncertainty counts; given them, true effects are normal around the shrunken means.
    Resampling the few seeds instead would give too narrow an interval, and would draw every percentile towards one
    half.

    Returns (effects, ordered), each (draws, S): effects are deviations from the mean of all subsets; ordered ranks as
    effects do, and where a draw says that subsets do not differ, ranks them at random: every order is as good.
    """
    stream = np.random.RandomState(0)  # as in `data`: NumPy keeps this stream for good
    found = variance_components(accuracy)
    n = accuracy.shape[1]
    deviation = accuracy.mean(axis="columns").to_numpy() - found["mean"]
    residual = found["ss_residual"] / stream.chisquare(found["df_residual"], (draws, 1))
    total = found["ss_subset"] / stream.chisquare(found["df_subset"], (draws, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        trusted = np.nan_to_num(np.maximum(0.0, 1 - residual / total))
    ordered = np.sqrt(trusted) * deviation + np.sqrt(residual / n) * stream.standard_normal((draws, len(deviation)))
    return np.sqrt(trusted) * ordered, ordered


def _known(accuracy: pd.DataFrame) -> bool:
    return min(accuracy.shape) >= 2


def _percentile(values: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Of `value` (...) among `values` (S, ...), see the module."""
    return ((values < value).sum(axis=0) + 0.5 * (values == value).sum(axis=0)) / max(1, len(values))


def _means(accuracy: pd.DataFrame) -> pd.Series:
    """Over seeds, equal where they differ by rounding alone: the order of seeds must not break a tie."""
    return accuracy.mean(axis="columns").round(12)


def _to_kd(values: pd.Series, results: pd.DataFrame, measure: str, confidence: float) -> dict[str, float]:
    kd = results[results["arm"] == "kd"].set_index("seed")[measure]
    difference = (values - kd).dropna()
    found = mean_interval(difference.to_numpy(), confidence) if len(difference) else (math.nan,) * 3
    return dict(zip(("difference", "difference_low", "difference_high"), found, strict=True))


def _mean_row(values: pd.Series, results: pd.DataFrame, measure: str, confidence: float) -> dict[str, float]:
    """n, mean with its interval and the difference to kd of one arm's values by seed."""
    values = values.dropna()
    mean, low, high = mean_interval(values.to_numpy(), confidence) if len(values) else (math.nan,) * 3
    return {"n": len(values), "mean": mean, "low": low, "high": high} | _to_kd(values, results, measure, confidence)


def subset_table(results: pd.DataFrame, measure: str = "test_accuracy", confidence: float = 0.95) -> pd.DataFrame:
    """One row per hint method and subset, best mean first.

    results: see `layouts`. Columns: method, arm; layers, the depths ("3-9-15"); n (seeds), mean, low, high (t
    interval); difference, difference_low, difference_high (to `kd`, paired by seed); shrunken, the best linear
    unbiased prediction of the mean, drawn towards the mean of all subsets by 1 - reliability (Robinson 1991); rank (1
    is best, ties share the better one), percentile; noise_low, noise_high, where the mean at this place of the order
    would lie if subsets did not differ (place by place); strategies, other names of the same students, joined by ", ".
    """
    tables = []
    for method, layout in layouts(results, measure).items():
        found = variance_components(layout.complete, confidence)
        means = _means(layout.complete)
        rows = [
            {"method": method, "arm": arm, "layers": _name(layout.depths[arm])}
            | _mean_row(values, results, measure, confidence)
            | {"strategies": ", ".join(layout.strategies[arm])}
            for arm, values in layout.every.iterrows()
        ]
        table = pd.DataFrame(rows).set_index("arm", drop=False)
        table["shrunken"] = found["mean"] + found["reliability"] * (means - found["mean"])
        table["rank"] = means.rank(ascending=False, method="min").astype("Int64")
        table["percentile"] = (means.rank() - 0.5) / max(1, len(means))
        order = means.sort_values(kind="stable").index
        scale = found["sd_residual"] / math.sqrt(max(1, layout.complete.shape[1]))
        for column, quantiles in zip(("noise_low", "noise_high"), noise_band(len(means), confidence), strict=True):
            table[column] = pd.Series(found["mean"] + scale * quantiles, index=order)
        tables.append(table.loc[[*order[::-1], *table.index.difference(order, sort=False)]])
    if not tables:
        return pd.DataFrame(columns=SUBSET_COLUMNS)
    return pd.concat(tables, ignore_index=True)[SUBSET_COLUMNS]


def _name(depths: tuple[int, ...]) -> str:
    return "-".join(map(str, depths))


def placement(results: pd.DataFrame, measure: str = "test_accuracy", confidence: float = 0.95) -> pd.DataFrame:
    """Where each named choice stands among all subsets: one row per hint method and strategy, best mean first.

    results: see `layouts`. Columns: method, strategy, arm (of the same students, or its own), layers (depths; empty
    for a strategy that is no subset, such as reversed pairs: a reference), n, mean; percentile, of the mean over
    seeds; percentile_low, percentile_high, interval of the percentile that the true means would give (see
    `true_effects`; empty for a reference); seed_low, seed_median, seed_high, smallest, median and largest percentile
    in a single seed, and seed_<seed>, each of them; gain, gain_low, gain_high, by how much the best of all true means
    exceeds this one's, mean and interval. What needs a second seed or subset is empty without one, all but n and mean
    for a choice that was left out as incomplete.
    """
    accuracy = results.pivot(index="arm", columns="seed", values=measure)
    rows = []
    for method, layout in layouts(results, measure).items():
        own = results[results["method"] == method].drop_duplicates("arm")
        own = own[~own["strategy"].str.startswith(("subset_", "single_", "random_"))]
        subset_of = {strategy: arm for arm, names in layout.strategies.items() for strategy in names}
        table = layout.complete
        drawn = true_effects(table) if _known(table) else None
        for strategy, its_arm in zip(own["strategy"], own["arm"], strict=True):
            arm = subset_of.get(strategy, its_arm)
            row = {"method": method, "strategy": strategy, "arm": arm, "layers": _name(layout.depths.get(arm, ()))}
            row |= {"n": int(accuracy.loc[arm].notna().sum()), "mean": accuracy.loc[arm].mean()}
            values = accuracy.loc[arm, table.columns]
            if (strategy in subset_of and arm not in table.index) or values.isna().any() or table.empty:
                rows.append(row)
                continue
            each = _percentile(table.to_numpy(), values.to_numpy())
            row["percentile"] = float(_percentile(_means(table).to_numpy(), round(values.mean(), 12)))
            row |= {"seed_low": each.min(), "seed_median": np.median(each), "seed_high": each.max()}
            row |= {f"seed_{seed}": value for seed, value in zip(table.columns, each, strict=True)}
            if arm in table.index and drawn is not None:
                row |= _under_noise(*drawn, place=table.index.get_loc(arm), confidence=confidence)
            rows.append(row)
    found = pd.DataFrame(rows)
    seeds = [f"seed_{seed}" for seed in accuracy.columns if f"seed_{seed}" in found]
    found = found.reindex(columns=[*PLACEMENT_COLUMNS, *seeds])
    order = found["method"].map({method: i for i, method in enumerate(found["method"].unique())})
    return (
        found.assign(order=order)
        .sort_values(["order", "mean"], ascending=[True, False], kind="stable", ignore_index=True)
        .drop(columns="order")
    )


def _under_noise(effects: np.ndarray, ordered: np.ndarray, place: int, confidence: float) -> dict[str, float]:
    quantiles = [(1 - confidence) / 2, (1 + confidence) / 2]
    percentile = np.quantile(_percentile(ordered.T, ordered[:, place]), quantiles)
    gain = effects.max(axis=1) - effects[:, place]
    found = {"percentile_low": percentile[0], "percentile_high": percentile[1], "gain": gain.mean()}
    return found | dict(zip(("gain_low", "gain_high"), np.quantile(gain, quantiles), strict=True))


def landscape_facts(
    results: pd.DataFrame, measure: str = "test_accuracy", confidence: float = 0.95
) -> dict[str, dict[str, Any]]:
    """Hint method -> all numbers about its subsets together, ready for JSON (NaN: not known).

    results: see `layouts`. measure, confidence; hints (M), subsets and seeds (as compared), left_out_subsets (depths)
    and left_out_seeds; everything that `variance_components` names; best (depths of the best mean), best_lead (over
    the mean of all subsets), best_shrunken_lead; to_kd, to_kd_low, to_kd_high: mean of all subsets minus `kd`, paired
    by seed; above_kd: share of subsets with a mean above kd's; references: name -> mean of `kd` and `unaided` over
    their seeds.
    """
    means = results[results["arm"].isin(["kd", "unaided"])].groupby("arm", sort=False)[measure].mean()
    facts = {}
    for method, layout in layouts(results, measure).items():
        table = layout.complete
        found = variance_components(table, confidence)
        of_subsets = _means(table)
        best = of_subsets.idxmax() if len(of_subsets) else None
        lead = of_subsets.max() - found["mean"]
        to_kd = _to_kd(table.mean(axis="index"), results, measure, confidence)
        kd = results[(results["arm"] == "kd") & results["seed"].isin(table.columns)][measure].mean()
        facts[method] = {
            "measure": measure,
            "confidence": confidence,
            "hints": len(next(iter(layout.depths.values()))),
            "subsets": len(table),
            "seeds": table.shape[1],
            "left_out_subsets": _left_out(layout),
            "left_out_seeds": [int(seed) for seed in layout.every.columns.difference(table.columns)],
            **found,
            "best": _name(layout.depths[best]) if best else "",
            "best_lead": float(lead),
            "best_shrunken_lead": float(found["reliability"] * lead),
            **{name.replace("difference", "to_kd"): value for name, value in to_kd.items()},
            "above_kd": float((of_subsets > kd).mean()) if kd == kd else math.nan,
            "references": {arm: float(mean) for arm, mean in means.items()},
        }
    return facts


def _left_out(layout: Layout) -> list[str]:
    """Of all subsets of the layers, those not compared; one whose students all failed may have no row at all."""
    deepest, hints = max(map(max, layout.depths.values())), len(next(iter(layout.depths.values())))
    there = {layout.depths[arm] for arm in layout.complete.index}
    return [_name(d) for d in itertools.combinations(range(1, deepest + 1), hints) if d not in there]


def layer_effects(results: pd.DataFrame, measure: str = "test_accuracy", confidence: float = 0.95) -> pd.DataFrame:
    """Which layers help: per layer, the mean over subsets that have it minus the mean over those that do not.

    results: see `layouts`. One row per hint method, hint and depth. hint: "any", or which of the M hint points the
    layer is, "1" the shallowest: then it is compared with subsets that have another layer in that place. subsets: how
    many have it; n (seeds), mean, low, high: the difference, taken in each seed, with its t interval over seeds, each
    row by itself. Rows without subsets on both sides are left out. A place and its neighbors are not free of each
    other: a deep shallowest hint leaves few layers for the rest.
    """
    rows = []
    for method, layout in layouts(results, measure).items():
        table = layout.complete
        if not table.shape[1]:
            continue
        chosen = [layout.depths[arm] for arm in table.index]
        hints = {"any": chosen} | {str(i + 1): [(depths[i],) for depths in chosen] for i in range(len(chosen[0]))}
        for hint, places in hints.items():
            for depth in sorted({depth for depths in places for depth in depths}):
                has = np.array([depth in depths for depths in places])
                if has.all():
                    continue
                difference = table[has].mean() - table[~has].mean()
                mean, low, high = mean_interval(difference.to_numpy(), confidence)
                row = {"method": method, "hint": hint, "depth": depth, "subsets": int(has.sum())}
                rows.append(row | {"n": table.shape[1], "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows, columns=EFFECT_COLUMNS)


def position_curve(
    results: pd.DataFrame, layers: pd.DataFrame, measure: str = "test_accuracy", confidence: float = 0.95
) -> pd.DataFrame:
    """What one hint alone does at each depth, from the "single_<depth>" arms: one row per hint method and depth.

    results: see `layouts`; layers: the teacher's layer table (columns layer, depth). Columns: method, depth, layer, n
    (seeds), mean, low, high (t interval); difference, difference_low, difference_high (to `kd`, paired by seed).
    """
    rows = []
    name = dict(zip(layers["depth"], layers["layer"], strict=True))
    singles = results[results["strategy"].str.startswith("single_")]
    for (method, strategy), its in singles.groupby(["method", "strategy"], sort=False):
        depth = int(strategy.split("_")[1])
        row = {"method": method, "depth": depth, "layer": name[depth]}
        rows.append(row | _mean_row(its.set_index("seed")[measure], results, measure, confidence))
    return pd.DataFrame(rows, columns=POSITION_COLUMNS)


def landscape_reading(facts: Mapping[str, Mapping[str, Any]], placement: pd.DataFrame) -> dict[str, str]:
    """Hint method -> the answer in plain words, true for whatever the tables say; empty for a study without subsets.

    facts: of `landscape_facts`; placement: of the same results.
    """
    return {
        method: " ".join(_sentences(method, found, placement[placement["method"] == method]))
        for method, found in facts.items()
    }


def landscape_in_short(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Hint method -> whether the choice matters, in two sentences; facts: of `landscape_facts`."""
    return {method: " ".join(_in_short(method, found)) for method, found in facts.items()}


def _in_short(method: str, found: Mapping[str, Any]) -> Iterator[str]:
    n, sure = found["seeds"], f"{100 * found['confidence']:g} %"
    yield f"{found['subsets']} subsets of {found['hints']} layers with hint method {method}, n = {n}: {_matters(found)}"
    if found["p"] == found["p"]:
        spread = f"{100 * found['sd_subset_low']:.2f} and {_points(found['sd_subset_high'])}"
        yield f"The standard deviation of their true means lies between {spread} ({sure} interval)."


def _matters(found: Mapping[str, Any]) -> str:
    """A sentence."""
    if found["p"] != found["p"]:
        return "whether the choice matters cannot be known" + (
            ": one seed shows no noise." if found["seeds"] == 1 else "."
        )
    how_sure = f"(F test, {p_in_words(found['p'])})"
    if found["p"] < 1 - found["confidence"]:
        return f"the choice matters: the subsets differ beyond the noise of the seeds {how_sure}."
    return f"whether the choice matters stays open: no difference beyond seed noise is seen {how_sure}."


def _sentences(method: str, found: Mapping[str, Any], placed: pd.DataFrame) -> Iterator[str]:
    n, count, sure = found["seeds"], found["subsets"], f"{100 * found['confidence']:g} %"
    yield f"Hint method {method}: {count} subsets of {found['hints']} layers, {n} seed{'s' * (n != 1)} each."
    for left_out, what in ((found["left_out_subsets"], "subsets"), (found["left_out_seeds"], "seeds")):
        if left_out:
            yield f"Left out, as students are missing: {what} {', '.join(map(str, left_out))}."
    if found["to_kd_low"] == found["to_kd_low"]:
        yield f"Over all subsets, hints change accuracy by {_signed(found['to_kd'])} against kd"
        yield f"({sure} interval {_signed(found['to_kd_low'])} to {_signed(found['to_kd_high'])})."
    matters = _matters(found)
    yield matters[0].upper() + matters[1:]
    if found["p"] == found["p"]:
        spread = f"{100 * found['sd_subset_low']:.2f} to {_points(found['sd_subset_high'])}"
        lead, by_noise = _points(found["best_lead"]), _points(found["best_by_noise"])
        yield f"The true means of the subsets have a standard deviation of about {_points(found['sd_subset'])} ({sure}"
        yield f"interval {spread}), the noise of one student has {_points(found['sd_residual'])}."
        yield f"The best mean seen, {found['best']}, leads the average subset by {lead}; were there no difference, the"
        yield f"best of {count} would still lead by about {by_noise}."
        yield f"Shrunken by that noise, its lead is {_points(found['best_shrunken_lead'])}."
    for layers, rows in placed[placed["layers"] != ""].groupby("layers", sort=False):
        row, name = rows.iloc[0], f"{' = '.join(rows['strategy'])} ({layers})"
        seen, low, high = (100 * row[column] for column in ("percentile", "percentile_low", "percentile_high"))
        if seen != seen:
            yield f"{name} has no place, as students are missing."
        elif low != low:
            yield f"{name} stands at percentile {seen:.0f}, by how much noise is unknown."
        else:
            yield f"{name} stands at percentile {seen:.0f}; without seed noise it could stand anywhere from {low:.0f}"
            yield f"to {high:.0f} ({sure} interval). The best subset is better than it by about"
            yield f"{_points(row['gain'])}, by {_points(row['gain_high'])} at most (upper end of the {sure} interval)."


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f} points"


def _signed(fraction: float) -> str:
    return f"{in_points(fraction)} points"

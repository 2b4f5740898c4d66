"""What the tables of a study say: rows, sentences and counts for its report.

Nothing here knows how a number looks.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pursuhint_lib.arms import parse_method
from pursuhint_lib.comparison import best_on_validation, main_strategy
from pursuhint_lib.facts import Facts
from pursuhint_lib.params import LANDSCAPE

READINGS = {
    "better": "the whole interval lies above zero: better",
    "worse": "the whole interval lies below zero: worse",
    "includes zero": "the interval includes zero: this study cannot tell them apart",
    "unknown (one seed)": "one seed gives no interval: this study cannot tell them apart",
}
CONCLUSIONS = {  # the same in the words of one sentence, in the order of saying
    "better": "is better than",
    "worse": "is worse than",
    "includes zero": "cannot be told apart from",
    "unknown (one seed)": "has too few seeds to be compared with",
    "same layers": "chose the same layers as",
}

SELECTION = ("02_profile_layers", "03_cluster_layers")
# Measure -> (heading, kind of number, which way is better, what it says), in the order of showing.
MEASURES = {
    "top5": ("Top-5", "percent", "more", "the right class is among the five most likely"),
    "agreement": ("Agrees with teacher", "percent", "more", "gives the teacher's answer, right or wrong"),
    "agreement_wrong": (
        "Agrees where it errs",
        "percent",
        "",
        "the same, on images that the teacher gets wrong: how much of its errors the student took over",
    ),
    "kl": ("KL to teacher", "decimal", "less", "how far the student's probabilities are from the teacher's, in nats"),
    "test_loss": ("NLL", "decimal", "less", "negative log likelihood of the right class (cross entropy), in nats"),
    "loss_scaled": ("NLL, scaled", "decimal", "less", "the same after temperature scaling"),
    "ece": ("Calibration error", "percent", "less", "expected gap between how sure the student is and how often right"),
    "ece_scaled": ("Calibration error, scaled", "percent", "less", "the same after temperature scaling"),
}


def headline(facts: Facts, comparisons: Sequence[Any]) -> dict[str, Any]:
    """The rows to show first: unaided, KD, the best arm by validation, and per method the main clustered arm."""
    rows = {row.arm: row for row in facts.summary.itertuples()}
    main = main_strategy(facts.hint_points)
    answers = []
    for row in facts.summary[facts.summary["strategy"] == main].sort_values("arm").itertuples():
        own = [c for c in comparisons if c.arm == row.arm]
        sayings = [(text, [c.control for c in own if c.word == word]) for word, text in CONCLUSIONS.items()]
        answers.append({"row": row, "comparisons": own, "sayings": [(text, names) for text, names in sayings if names]})
    return {
        "unaided": rows.get("unaided"),
        "kd": rows.get("kd"),
        "best": rows.get(best_on_validation(facts.summary)),
        "gap": facts.teacher["test_accuracy"] - rows["unaided"].test_mean if "unaided" in rows else math.nan,
        "all_failed": bool(main) and facts.pairs["arm"].str.endswith(main).any(),  # asked where there is no answer
        "answers": answers,
    }


def verdict_on_choice(facts: Facts) -> dict[str, Any]:
    """Does the choice of hint points matter? The main strategy against every control, over all hint methods.

    Keys: "choice", the counts against other choices of layers; "used", those against the same layers used otherwise (in
    reverse, of a network with random weights, of another image); "number", those against choices of more or fewer
    layers; "hints", those against students without hints (see `_counts`); "n", numbers of seeds; "family", over how
    many comparisons the p values are corrected (NaN if that is not told); "answer", the word for the first: better,
    worse, mixed, uncorrected (intervals exclude zero and none survives the correction), open (all include zero), one
    seed, same layers, no control, no arm.
    """
    main = main_strategy(facts.hint_points)
    arms = facts.summary.loc[facts.summary["strategy"] == main, "arm"] if main else []
    own = facts.contrasts[facts.contrasts["arm"].isin(arms)]
    kinds = own["control"].map(lambda control: _kind(facts, main, control))
    counts = {kind: _counts(own[kinds == kind], 1 - facts.confidence) for kind in ("choice", "used", "number", "hints")}
    about = {"n": sorted(own["n"].unique().tolist()), "family": own["comparisons"].max()}
    return counts | about | {"strategy": main, "answer": _answer(counts["choice"], len(arms))}


def _kind(facts: Facts, main: str, control: str) -> str:
    without_hints = facts.summary.loc[facts.summary["strategy"] == "none", "arm"]
    if control in set(without_hints):
        return "hints"
    # "random" and the like stand for several choices, "random_0" ..., of as many layers each.
    several = (points for name, points in facts.hint_points.items() if name.startswith(f"{control}_"))
    points = facts.hint_points.get(control) or next(several, facts.hint_points[main])
    if _n_hints(points) != _n_hints(facts.hint_points[main]):
        return "number"
    otherwise = points.get("pairing", "in_order") != "in_order" or points.get("source", "trained") != "trained"
    return "used" if otherwise else "choice"


def _counts(rows: pd.DataFrame, level: float) -> dict[str, Any]:
    """How many comparisons there are and how they came out.

    all, same (the same layers were chosen), compared, one_seed; better, worse, open: by the uncorrected intervals;
    kept_better, kept_worse: those of them whose Holm p lies below `level`; corrected: whether there is a Holm p at all;
    low, middle, high: least, median and greatest mean difference; detectable: median of the detectable differences.
    """
    compared = rows[rows["word"] != "same layers"]
    kept = compared[compared["p_holm"] <= level]
    words = compared["word"].value_counts()
    return {
        "all": len(rows),
        "same": len(rows) - len(compared),
        "compared": len(compared),
        "one_seed": int(words.get("unknown (one seed)", 0)),
        "better": int(words.get("better", 0)),
        "worse": int(words.get("worse", 0)),
        "open": int(words.get("includes zero", 0)),
        "corrected": bool(compared["p_holm"].notna().any()),
        "kept_better": int((kept["mean"] > 0).sum()),
        "kept_worse": int((kept["mean"] < 0).sum()),
        "low": compared["mean"].min(),
        "middle": compared["mean"].median(),
        "high": compared["mean"].max(),
        "detectable": compared["detectable"].median(),
        "controls": list(dict.fromkeys(rows["control"])),
    }


def _answer(counts: Mapping[str, Any], arms: int) -> str:
    better, worse = (counts[f"kept_{word}" if counts["corrected"] else word] for word in ("better", "worse"))
    if not arms:
        return "no arm"
    if not counts["all"]:
        return "no control"
    if not counts["compared"]:
        return "same layers"
    if counts["one_seed"] == counts["compared"]:
        return "one seed"
    if better or worse:
        return "mixed" if better and worse else "better" if better else "worse"
    return "uncorrected" if counts["better"] or counts["worse"] else "open"


def logits_matched(facts: Facts) -> bool | None:
    """Whether students learn from the teacher's logits where their method names no other way; None if not recorded."""
    weight = facts.parameters("04_distill_students").get("kd_weight")
    return None if weight is None else weight > 0


def main_rows(facts: Facts) -> list[Any]:
    """Arms by mean test accuracy, the unaided student last."""
    table = facts.summary.sort_values("test_mean", ascending=False, kind="stable")
    return sorted(table.itertuples(), key=lambda row: row.arm == "unaided")


def by_arm(comparisons: Sequence[Any]) -> dict[str, Any]:
    """Comparisons as a table: controls as columns, arm -> control -> comparison."""
    cells: dict[str, dict[str, Any]] = {}
    for c in comparisons:
        cells.setdefault(c.arm, {})[c.control] = c
    controls = list(dict.fromkeys(c.control for c in comparisons))
    corrected = sum(c.p_holm == c.p_holm for c in comparisons)
    return {
        "controls": controls,
        "rows": cells,
        "count": sum(c.word != "same layers" for c in comparisons),
        "corrected": corrected,
        "main": [c for c in comparisons if c.family == "main"],
        "other": [c for c in comparisons if c.family != "main"],
    }


def runs_behind(facts: Facts) -> dict[str, list[str]]:
    """Arm -> MLflow run ids of its students, as far as recorded; for an arm that was not trained again, its twin's."""
    found: dict[str, list[str]] = {}
    for row in students(facts):
        found.setdefault(row["arm"], []).extend([row["run"]] if row["run"] else [])
    return found


def commits_behind(facts: Facts) -> dict[str, str]:
    """Arm -> commits at which its students were trained (7 digits, a + where there were changes), joined by blanks."""
    found: dict[str, list[str]] = {}
    for row in students(facts):
        found.setdefault(row["arm"], []).append(row["commit"])
    return {arm: " ".join(dict.fromkeys(filter(None, commits))) for arm, commits in found.items()}


def commit_of(facts: Facts, network: str) -> str:
    """Of a network's training: 7 digits, a + behind them where there were changes; "" if it is not recorded."""
    source = facts.trained_at.get(network, {"commit": "unknown", "dirty": False})
    return "" if source["commit"] == "unknown" else source["commit"][:7] + "+" * bool(source["dirty"])


def runs_of_control(facts: Facts, runs: Mapping[str, list[str]], arm: str, control: str) -> list[str]:
    """Run ids of the students that `arm` was compared with: an arm without hints, or its method's of a strategy."""
    arms = facts.summary.set_index("arm")
    method = arms["method"].get(arm)
    is_it = (arms["strategy"] == control) | arms["strategy"].str.fullmatch(rf"{re.escape(control)}(_\d+)+")
    of_method = list(arms.index[(arms["method"] == method) & is_it])
    names = of_method or [control]  # the name of an arm without hints ("kd"), or of a strategy
    return [run for name in names for run in runs.get(name, [])]


def measured(facts: Facts) -> dict[str, Any]:
    """Beyond accuracy: the measures that are there, in the order of MEASURES, and arm -> measure -> row.

    Single layers and subsets are left out where there are some: a landscape has hundreds of them.
    """
    shown = [row.arm for row in main_rows(facts) if not is_of_landscape(row.strategy)]
    cells: dict[str, dict[str, Any]] = {}
    for row in facts.measures[facts.measures["mean"].notna()].itertuples():
        cells.setdefault(row.arm, {})[row.measure] = row
    there = {name for own in cells.values() for name in own}
    temperatures = facts.results["temperature"]
    return {
        "columns": [name for name in MEASURES if name in there],
        "rows": {arm: cells[arm] for arm in shown if arm in cells},
        "left_out": len(set(cells) - set(shown)),
        "temperature_low": temperatures.min(),
        "temperature_high": temperatures.max(),
    }


def is_of_landscape(strategy: str) -> bool:
    """One of the many arms that a landscape trains, not a choice that anyone made."""
    return strategy.startswith(LANDSCAPE)


def costs(facts: Facts) -> dict[str, Any]:
    """What training and selection took. A group of arms of one seed takes each epoch together, so that an arm's seconds
    are its share: the group's, divided by its number of arms.

    arms: one row per trained arm: arm, seconds (per student; NaN where not recorded), adapter_parameters, state_bytes
    (NaN where not recorded); seconds: of all students of 04; selection: (what, seconds); notebooks: (stage, seconds) of
    02 and 03 as recorded; aside: what the notebooks 02 and 03 took, as a share of the seconds of all students.
    """
    timings = facts.training_seconds
    share = timings["seconds"] / timings.groupby(["seed", "epoch", "seconds"])["seconds"].transform("size")
    sums = timings.assign(share=share).groupby(["arm", "seed"], sort=False)["share"].sum()
    per_arm = sums.groupby("arm", sort=False).mean().rename("seconds")
    adapters = facts.adapters.set_index("arm")[["adapter_parameters", "state_bytes"]]
    summary = facts.summary[(facts.summary["same_as"] == "") & (facts.summary["arm"] != "unaided")]
    arms = summary[["arm", "method", "strategy"]].join(per_arm, on="arm").join(adapters, on="arm")
    arms = arms[arms[["seconds", "adapter_parameters", "state_bytes"]].notna().any(axis="columns")]
    stages = [(stage, facts.records.get(stage, {}).get("seconds", math.nan)) for stage in SELECTION]
    notebooks = [(stage, seconds) for stage, seconds in stages if seconds == seconds]
    total = float(sums.sum())
    return {
        "arms": list(arms.itertuples()),
        "seconds": total,
        "per_student": total / len(sums) if len(sums) else math.nan,
        "students": len(sums),
        "selection": list(facts.selection_seconds.itertuples()),
        "notebooks": notebooks,
        "aside": sum(seconds for _, seconds in notebooks) / total if total and notebooks else math.nan,
    }


def landscape(facts: Facts) -> dict[str, Any]:
    """What the landscape says: short and answers (texts, one per hint method), placements (rows of placement.csv)."""
    about = facts.landscape.values()
    texts = {"short": [one["short"] for one in about], "answers": [one["answer"] for one in about]}
    return texts | {"placements": list(facts.placement.itertuples())}


def limits(facts: Facts) -> dict[str, Any]:
    """What this study cannot say, in numbers.

    by_chance: how many of the uncorrected intervals exclude zero by chance if nothing differs; detectable: the median
    of the comparisons' detectable differences; other_teachers: how many; bootstrap_cover: of n seeds, resamples all lie
    on one side of the true mean when the seeds do, so an interval of resampled means covers it at most with probability
    1 - 2^(1 - n) (for symmetric noise).
    """
    compared = facts.contrasts[facts.contrasts["word"] != "same layers"]
    n = facts.results["seed"].nunique()
    return {
        "by_chance": len(compared) * (1 - facts.confidence),
        "detectable": compared["detectable"].median(),
        "other_teachers": len(facts.other_teachers),
        "bootstrap_cover": 1 - 2.0 ** (1 - n),
    }


def stability(facts: Facts) -> dict[str, Any]:
    """How firm the choice of layers is.

    partitions: one row per kind of comparison (between, count, mean, low, high of the adjusted Rand index, same: share
    that chose the very same hint points, shift: the largest move of a hint point, in layers); layers: metric -> layers
    that some resample chose, most often chosen first.
    """
    hints = len(facts.hint_points.get(main_strategy(facts.hint_points), {"layers": ()})["layers"])
    rows = []
    for between, own in facts.partitions.groupby("between", sort=False):
        rand = own["adjusted_rand"]
        row = {"between": between, "count": len(own), "mean": rand.mean(), "low": rand.min(), "high": rand.max()}
        rows.append(row | {"same": (own["shared"] >= hints).mean(), "shift": own["largest_shift"].max()})
    often = facts.stability[facts.stability["frequency"] > 0]
    often = often.sort_values("frequency", ascending=False, kind="stable")
    layers = {metric: list(own.itertuples()) for metric, own in often.groupby("metric", sort=False)}
    metrics = [metric for metric in dict.fromkeys(facts.stability["metric"]) if metric in layers]
    return {"partitions": rows, "layers": {metric: layers[metric] for metric in metrics}}


def setting(facts: Facts) -> dict[str, Any]:
    """Who learns what from whom, from the tables of 01 to 04."""
    students = facts.baselines[facts.baselines["model"] != "teacher"]
    unaided, aided = facts.histories.values()
    teachers = unaided["arm"].str.startswith("teacher")  # the other teachers of 01 as well
    repeats = facts.images.get("evaluation_repeats", 1)  # validation and test count each image so many times
    sizes = {name: about["images"] for name, about in facts.images["sets"].items()}
    distilled = facts.results.loc[facts.results["arm"] != "unaided", "method"]
    return {
        "data": facts.images.get("data", "not recorded"),
        "shape": facts.images["shape"],
        "classes": facts.images["classes"],
        "sets": {name: size if name == "train" else size // repeats for name, size in sizes.items()},
        "repeats": repeats,
        "student": None if students.empty else students.iloc[0],
        "teacher_epochs": unaided.loc[teachers & (unaided["epoch"] > 0), "epoch"].nunique(),  # 0: trained elsewhere
        "student_epochs": sorted({rows["epoch"].nunique() for rows in (unaided[~teachers], aided)} - {0}),
        "seeds": sorted(facts.results["seed"].unique().tolist()),
        "n_hints": sorted({_n_hints(points) for points in facts.hint_points.values()} - {0}),
        "methods": [m for m in dict.fromkeys(facts.results.loc[facts.results["strategy"] != "none", "method"])],
        "logit_losses": list(dict.fromkeys(parse_method(method).logit_loss for method in distilled)),
    }


def _n_hints(points: Mapping[str, Any]) -> int:
    """How many layers give a hint at one step."""
    return points.get("redrawn", 0) or len(points["layers"])


def chosen_layers(facts: Facts) -> list[dict[str, Any]]:
    """Per strategy its hint points with depth, the student layer they teach, how often resamples chose them too, and
    what is unusual about its hints. A strategy that draws anew at every step has no layers to show.
    """
    depth = dict(zip(facts.layers["layer"], facts.layers["depth"], strict=True))
    strategy_of = dict(zip(facts.summary["arm"], facts.summary["strategy"], strict=True))
    pairs = facts.pairs.assign(strategy=facts.pairs["arm"].map(strategy_of))
    frequency = {(f"clustered_{row.metric}", row.layer): row.frequency for row in facts.stability.itertuples()}
    rows, earlier = [], {}
    for strategy, points in facts.hint_points.items():
        redrawn, source = points.get("redrawn", 0), points.get("source", "trained")
        pairing = points.get("pairing", "in_order")
        own = _pairs_of(pairs[pairs["strategy"] == strategy], points["layers"])
        if pairing == "reversed":
            own = own[::-1]  # back to the order of the teacher's layers
        taught = [] if redrawn else list(own["student_layer"])
        hints = [
            {
                "layer": layer,
                "depth": depth.get(layer, math.nan),
                "student": student,
                "frequency": frequency.get((strategy, layer), math.nan),
            }
            for layer, student in itertools.zip_longest([] if redrawn else points["layers"], taught)
            if layer is not None
        ]
        notes = [f"{redrawn} of {len(points['layers'])} layers, drawn anew at every step"] if redrawn else []
        notes += {"untrained": ["of a network with random weights"], "shuffled": ["of another image"]}.get(source, [])
        notes += ["deepest to the shallowest student layer"] if pairing == "reversed" else []
        if points["layers"]:
            same_as = earlier.setdefault((*points["layers"], pairing, source, redrawn), strategy)
            row = {"strategy": strategy, "hints": hints, "same_as": "" if same_as == strategy else same_as}
            rows.append(row | {"note": "; ".join(notes), "subset": strategy.startswith("subset_")})
    return rows


def _pairs_of(pairs: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """The pairs of the first hint that these layers give: one of an arm's several hints may have layers of its own."""
    for _, own in pairs.groupby(["arm", "method"], sort=False):
        if sorted(own["teacher_layer"]) == sorted(layers):
            return own.sort_values("hint", kind="stable")
    return pairs[:0]


def students(facts: Facts) -> list[dict[str, Any]]:
    """Every student of notebook 05 with the run that trained it (for an arm that was not trained again, its twin's).

    first: whether it is the first of its arm. commit: see `commit_of`.
    """
    rows, seen = [], set()
    for row in facts.results.to_dict("records"):
        network = f"{row['same_as'] or row['arm']}-s{row['seed']}"
        about = {"run": facts.runs.get(network, ""), "commit": commit_of(facts, network)}
        rows.append(row | about | {"first": row["arm"] not in seen})
        seen.add(row["arm"])
    return rows


def failed(facts: Facts) -> list[tuple[str, int, int, str]]:
    """Arm and seed of students whose training broke off, in which epoch, and why."""
    history = facts.histories["04_distill_students"]
    if "status" not in history:
        return []
    failed = history[history["status"] == "failed"].drop_duplicates(["arm", "seed"])
    return list(failed.reindex(columns=["arm", "seed", "epoch", "reason"]).itertuples(index=False, name=None))

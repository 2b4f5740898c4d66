"""What the tables of a study say: rows, sentences and counts for its report.

Nothing here knows how a number looks.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pursuhint_lib.arms import parse_method
from pursuhint_lib.facts import Facts

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


def headline(facts: Facts, comparisons: Sequence[Any]) -> dict[str, Any]:
    """The rows to show first: unaided, KD, the best arm by validation, and per method the main clustered arm."""
    rows = {row.arm: row for row in facts.summary.itertuples()}
    # By name first: of arms that validation cannot tell apart, the summary's order would take the one that tested best.
    aided = facts.summary[(facts.summary["arm"] != "unaided") & (facts.summary["same_as"] == "")].sort_values("arm")
    best = aided["arm"][aided["val_mean"].idxmax()] if aided["val_mean"].notna().any() else None
    main = _main_strategy(facts.hint_points)
    answers = []
    for row in facts.summary[facts.summary["strategy"] == main].sort_values("arm").itertuples():
        own = [c for c in comparisons if c.arm == row.arm]
        sayings = [(text, [c.control for c in own if c.word == word]) for word, text in CONCLUSIONS.items()]
        answers.append({"row": row, "comparisons": own, "sayings": [(text, names) for text, names in sayings if names]})
    return {
        "unaided": rows.get("unaided"),
        "kd": rows.get("kd"),
        "best": rows.get(best),
        "gap": facts.teacher["test_accuracy"] - rows["unaided"].test_mean if "unaided" in rows else math.nan,
        "all_failed": bool(main) and facts.pairs["arm"].str.endswith(main).any(),  # asked where there is no answer
        "answers": answers,
    }


def _main_strategy(hint_points: Mapping[str, Any]) -> str:
    """The method as published: cluster centers by the study's first metric."""
    variants = ("clustered_first_", "clustered_last_", "clustered_medoid_")
    return next((name for name in hint_points if name.startswith("clustered_") and not name.startswith(variants)), "")


def main_rows(facts: Facts) -> list[Any]:
    """Arms by mean test accuracy, the unaided student last."""
    table = facts.summary.sort_values("test_mean", ascending=False, kind="stable")
    return sorted(table.itertuples(), key=lambda row: row.arm == "unaided")


def by_arm(comparisons: Sequence[Any]) -> dict[str, Any]:
    """Comparisons as a table: controls as columns, arm -> control -> comparison."""
    controls = list(dict.fromkeys(c.control for c in comparisons))
    cells = {arm: {c.control: c for c in own} for arm, own in itertools.groupby(comparisons, key=lambda c: c.arm)}
    return {"controls": controls, "rows": cells, "count": sum(c.word != "same layers" for c in comparisons)}


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
            rows.append(row | {"note": "; ".join(notes)})
    return rows


def _pairs_of(pairs: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """The pairs of the first hint that these layers give: one of an arm's several hints may have layers of its own."""
    for _, own in pairs.groupby(["arm", "method"], sort=False):
        if sorted(own["teacher_layer"]) == sorted(layers):
            return own.sort_values("hint", kind="stable")
    return pairs[:0]


def students(facts: Facts) -> list[dict[str, Any]]:
    """Every student of notebook 05 with the run that trained it (for an arm that was not trained again, its twin's)."""
    rows = facts.results.to_dict("records")
    return [row | {"run": facts.runs.get(f"{row['same_as'] or row['arm']}-s{row['seed']}", "")} for row in rows]


def failed(facts: Facts) -> list[tuple[str, int, int, str]]:
    """Arm and seed of students whose training broke off, in which epoch, and why."""
    history = facts.histories["04_distill_students"]
    if "status" not in history:
        return []
    failed = history[history["status"] == "failed"].drop_duplicates(["arm", "seed"])
    return list(failed.reindex(columns=["arm", "seed", "epoch", "reason"]).itertuples(index=False, name=None))

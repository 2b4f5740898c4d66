"""Published figures for the networks of a study, beside its own.

`literature.csv` holds test accuracies as public benchmarks print them: columns data, teacher, student (names of this
library's networks, or torchvision's), method, accuracy (fraction), runs (how many were averaged; empty where the source
does not say) and source (a key of SOURCES). A method stands there as a study writes it, but nothing is implied: "at" is
that hint alone with cross entropy, "kd+at" the hint with KD.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pursuhint_lib.arms import Objective, parse_method
from pursuhint_lib.facts import Facts
from pursuhint_lib.findings import logits_matched, main_strategy, setting
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.storage import read_table

TABLE = "literature.csv"

SOURCES = {  # key -> (in words, address)
    "RepDistiller": (
        "RepDistiller’s README, the benchmark of the CRD paper (Tian et al. 2020)",
        "https://github.com/HobbitLong/RepDistiller",
    ),
    "distillers": ("README of giakoumoglou/distillers", "https://github.com/giakoumoglou/distillers"),
    "KD++": (
        "README of Knowledge-Distillation-via-ND (KD++)",
        "https://github.com/WangYZ1608/Knowledge-Distillation-via-ND",
    ),
    "mdistiller": ("mdistiller’s README", "https://github.com/megvii-research/mdistiller"),
    "logit-standardization-KD": (
        "README of logit-standardization-KD",
        "https://github.com/sunshangquan/logit-standardization-KD",
    ),
    "DIST_KD": ("README of DIST_KD", "https://github.com/hunto/DIST_KD"),
    "torchdistill": (
        "torchdistill’s ImageNet results",
        "https://github.com/yoshitomo-matsubara/torchdistill",
    ),
    "torchvision": ("torchvision’s weights", "https://github.com/pytorch/vision"),
    "attention-transfer": ("README of attention-transfer", "https://github.com/szagoruyko/attention-transfer"),
    "ReviewKD": ("ReviewKD’s ImageNet README", "https://github.com/dvlab-research/ReviewKD"),
    "Weighted-Soft-Label-Distillation": (
        "README of Weighted-Soft-Label-Distillation",
        "https://github.com/bellymonster/Weighted-Soft-Label-Distillation",
    ),
}
# How the benchmarks train: RepDistiller's scripts for CIFAR-100, the common 100-epoch recipe for ImageNet.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "cifar100": {
        "classes": 100,
        "train": 50_000,
        "epochs": 240,
        "schedule": "paper",
        "temperature": 4.0,
        "batch_size": 64,
        "learning_rate": (0.05, 0.01),
    },
    "imagenet": {
        "classes": 1000,
        "train": 1_281_167,
        "epochs": 100,
        "schedule": "imagenet",
        "temperature": 1.0,
        "batch_size": 256,
        "learning_rate": (0.1,),
    },
}


def beside_literature(facts: Facts) -> dict[str, Any]:
    """What is published for the study's data and pair of networks, beside what the study found.

    Keys: data, teacher, student; missing: "data" or "pair" where nothing is published for it, else ""; rows: method,
    published, runs (NaN if unknown), source, address, ours (accuracy), arm (whose it is), n, difference (ours minus
    published; NaN where there are other classes, since such accuracies cannot be compared), one for every arm that
    fits, or one without an arm; differs: (what, in the benchmark, here) for what is not the same; no_kd: whether
    published hints without KD stand beside ours with it.
    """
    about = setting(facts)
    data = _benchmark(facts)
    found = {
        "data": data or about["data"],
        "teacher": facts.teacher["network"],
        "student": "" if about["student"] is None else about["student"]["network"],
    }
    table = read_table(Path(__file__).parent / TABLE)
    of_data = table[table["data"] == data]
    of_pair = of_data[(of_data["teacher"] == found["teacher"]) & (of_data["student"] == found["student"])]
    if of_pair.empty:
        return found | {"missing": "data" if of_data.empty else "pair", "rows": [], "differs": [], "no_kd": False}
    comparable = len(about["classes"]) == PROTOCOLS[data]["classes"]
    rows = []
    for published in of_pair.itertuples():
        text, address = SOURCES[published.source]
        row = {"method": published.method, "published": published.accuracy, "runs": published.runs}
        row |= {"source": text, "address": address}
        named = "kd" in published.method.split("+")
        ours_too = [] if named and logits_matched(facts) is False else _ours(facts, published.method)
        for arm, ours, n in ours_too or [("", float("nan"), 0)]:
            difference = ours - published.accuracy if comparable else float("nan")
            rows.append(row | {"arm": arm, "ours": ours, "n": n, "difference": difference})
    beside = [row for row in rows if row["arm"]]
    return found | {
        "missing": "",
        "rows": rows,
        "differs": _differences(facts, about, PROTOCOLS[data], of_pair["runs"].max()),
        "no_kd": logits_matched(facts) is not False and any(_needs_kd(row["method"]) for row in beside),
    }


def _benchmark(facts: Facts) -> str:
    """Name of the study's data in `literature.csv`, or ""."""
    data = facts.images.get("data")
    if data == "image_folder":
        return "imagenet" if len(facts.images["classes"]) == PROTOCOLS["imagenet"]["classes"] else ""
    return data if data in PROTOCOLS else ""


def _needs_kd(method: str) -> bool:
    """Whether it is a hint alone: a study's own hints always come with a logit loss."""
    return method not in ("teacher", "unaided") and not any(name in LOGIT_LOSSES for name in method.split("+"))


def _ours(facts: Facts, method: str) -> list[tuple[str, float, int]]:
    """(arm, test accuracy, seeds) of the study's own: of a hint with the layers that benchmarks take, the stage ends,
    and with the clustered ones.
    """
    if method == "teacher":
        return [("teacher", facts.teacher["test_accuracy"], 1)]
    if method == "unaided":
        rows = facts.summary[facts.summary["arm"] == "unaided"]
    else:
        wanted = parse_method(method)
        distilled = facts.summary[facts.summary["arm"] != "unaided"]
        same = distilled["method"].map(lambda name: _same(parse_method(name), wanted)).astype(bool)
        strategies = ["none", "stage_ends", main_strategy(facts.hint_points)]
        rows = distilled[same & distilled["strategy"].isin(strategies)]
    return [(row.arm, row.test_mean, row.n) for row in rows.sort_values("arm").itertuples()]


def _same(ours: Objective, published: Objective) -> bool:
    return ours.logit_loss == published.logit_loss and dict(ours.hints) == dict(published.hints)


def _differences(
    facts: Facts, about: Mapping[str, Any], protocol: Mapping[str, Any], runs: float
) -> list[tuple[str, Any, Any]]:
    own = facts.parameters("04_distill_students")
    trained = "trained for this study" if about["teacher_epochs"] else "weights from elsewhere"
    pairs = [
        ("Classes", protocol["classes"], len(about["classes"])),
        ("Training images", protocol["train"], about["sets"]["train"]),
        ("Held-out validation images", 0, about["sets"].get("validation", 0)),
        ("Epochs of a student", protocol["epochs"], max(about["student_epochs"], default=0)),
        ("Schedule", protocol["schedule"], own.get("schedule", "not recorded")),
        ("Temperature of KD", protocol["temperature"], own.get("temperature", "not recorded")),
        ("Batch size", protocol["batch_size"], own.get("batch_size", "not recorded")),
        ("Learning rate", *_rates(protocol["learning_rate"], own.get("learning_rate", "not recorded"))),
        ("Noise on the images", 0.0, own.get("noise", "not recorded")),
        ("Weights of labels and KD", "its own, by method", _logit_weights(own)),
        ("Runs averaged", "not said" if runs != runs else int(runs), len(about["seeds"])),
        ("Weight of a hint", "published, fixed", _weights(own)),
        ("Teacher", "the benchmark’s own", trained),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _rates(published: tuple[float, ...], ours: Any) -> tuple[Any, Any]:
    """What is to be set side by side: equal, if ours is one of the published ones."""
    return (ours, ours) if ours in published else (" or ".join(f"{rate:g}" for rate in published), ours)


def _logit_weights(parameters: Mapping[str, Any]) -> str:
    if "ce_weight" not in parameters:
        return "not recorded"
    return f"{parameters['ce_weight']:g} and {parameters['kd_weight']:g}, for all"


def _weights(parameters: Mapping[str, Any]) -> str:
    if "balance" not in parameters:
        return "not recorded"
    return "set by its gradient" if parameters["balance"] == "gradient" else "published, fixed"

"""Logits and runs -> numbers with intervals.

Accuracies are fractions in [0, 1]; differences of accuracies are therefore fractions too (0.01 is one point).
"""

import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, batch norm's included."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image (C, H, W) through convolutions and linear layers, by torch's own counter."""
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    model.train(was_training)
    return counter.get_total_flops() // 2


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's. logits: (N, K), labels: (N,)."""
    return float((logits.argmax(1) == labels).double().mean())


TEMPERATURES = (0.01, 100.0)  # where `fit_temperature` looks
CALIBRATION_BINS = 15
# Columns of a study's results that `average_measures` sums up.
MEASURES = ("test_accuracy", "top5", "test_loss", "agreement", "agreement_wrong", "kl", "ece", "ece_scaled")
MEASURES += ("loss_scaled",)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimizes the cross entropy of logits / T (Guo et al. 2017, section 4.2), in TEMPERATURES.

    logits: (N, K), labels: (N,), of validation images; what is scaled by T is measured on others. The cross entropy is
    convex in 1 / T, so its derivative has one root, which is searched for over log T in float64. Where there is none
    between the bounds, T is a bound: the lower one if every image is classified right (the sharper, the better, without
    end), or if all logits are equal; the upper one if the logits say less than nothing.
    """
    logits = logits.double()
    above = logits - logits.gather(1, labels[:, None])  # how far each class is above the right one

    def slope(log_temperature: float) -> float:
        """Of the cross entropy in 1 / T. Of logits relative to the right class, so that it never rounds above 0 where
        the right class is on top.
        """
        return float(((logits / math.exp(log_temperature)).softmax(1) * above).sum(1).mean())

    lower, upper = (math.log(bound) for bound in TEMPERATURES)
    if slope(lower) <= 0:
        return TEMPERATURES[0]
    if slope(upper) >= 0:
        return TEMPERATURES[1]
    return math.exp(optimize.brentq(slope, lower, upper))


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor, temperature: float) -> dict[str, float]:
    """What one network did on one set of images.

    logits, teacher_logits: (N, K), finite, of the same images in the same order; labels: (N,). temperature: of this
    network, from `fit_temperature` on other images. Computed in float64:

    accuracy, top5: share of images whose label has the largest logit, or one of the five largest (NaN for K <= 5,
        where every image would count).
    loss, loss_scaled: cross entropy in nats, of the logits and of logits / temperature.
    agreement, agreement_wrong: share of images that get the teacher's answer, of all and of those where the teacher is
        wrong (NaN if there are none).
    kl: mean over images of KL(teacher || student) in nats, at temperature 1.
    ece, ece_scaled: expected calibration error of the top label (Guo et al. 2017, eq. 3), CALIBRATION_BINS bins of
        equal width, mean absolute gap weighted by images; of the logits and of logits / temperature.
    """
    logits, teacher_logits = logits.double(), teacher_logits.double()
    answers, teacher_answers = logits.argmax(1), teacher_logits.argmax(1)
    agrees, teacher_wrong = (answers == teacher_answers).double(), teacher_answers != labels
    in_top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    divergence = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "accuracy": accuracy(logits, labels),
        "top5": float(in_top5.double().mean()) if logits.shape[1] > 5 else math.nan,
        "loss": float(F.cross_entropy(logits, labels)),
        "agreement": float(agrees.mean()),
        "agreement_wrong": float(agrees[teacher_wrong].mean()),  # of none: NaN
        "kl": float(divergence),
        "ece": _calibration_error(logits, labels),
        "ece_scaled": _calibration_error(logits / temperature, labels),
        "loss_scaled": float(F.cross_entropy(logits / temperature, labels)),
    }


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes seconds to import

    # Probabilities, because torchmetrics takes logits that happen to lie in [0, 1] for probabilities. Below 1, because
    # it gives a confidence of exactly 1 a bin of its own; this is the next smaller float32, in which it computes.
    probabilities = logits.softmax(1).clamp(max=1 - 2**-24)
    return float(multiclass_calibration_error(probabilities, labels, logits.shape[1], CALIBRATION_BINS, norm="l1"))


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval of independent values (n,). With one value the interval is unknown: NaN."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def paired_interval(a: pd.Series, b: pd.Series, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval of a - b, paired by their index (the seed). Raises ValueError when the seeds differ."""
    if set(a.index) != set(b.index):
        raise ValueError(f"seeds differ: {sorted(a.index)} against {sorted(b.index)}")
    return mean_interval((a - b.loc[a.index]).to_numpy(), confidence)


def summarize(
    results: pd.DataFrame, teacher_accuracy: float, reference: str = "kd", confidence: float = 0.95
) -> pd.DataFrame:
    """One row per arm, best mean test accuracy first.

    results: one row per arm and seed with columns arm, method, strategy, same_as, seed, val_accuracy, test_accuracy.
    Columns returned: arm, method, strategy, same_as, n (seeds), val_mean, test_mean, test_low, test_high (t interval of
    the mean), difference, difference_low, difference_high (to `reference`, paired by seed; empty for itself and for
    seeds that one of the two lacks), gap_closed (share of the gap unaided student - teacher, in means).
    """
    by_arm = {arm: rows.set_index("seed") for arm, rows in results.groupby("arm", sort=False)}
    unaided = by_arm["unaided"]["test_accuracy"].mean() if "unaided" in by_arm else float("nan")
    gap = teacher_accuracy - unaided
    table = []
    for arm, rows in by_arm.items():
        mean, low, high = mean_interval(rows["test_accuracy"], confidence)
        row = {key: rows[key].iloc[0] for key in ("method", "strategy", "same_as")}
        row = {"arm": arm} | row | {"n": len(rows), "val_mean": rows["val_accuracy"].mean()}
        row |= {"test_mean": mean, "test_low": low, "test_high": high}
        if arm != reference and reference in by_arm:
            both = rows.index.intersection(by_arm[reference].index)
            ours, theirs = rows.loc[both, "test_accuracy"], by_arm[reference].loc[both, "test_accuracy"]
            row |= dict(
                zip(
                    ("difference", "difference_low", "difference_high"),
                    paired_interval(ours, theirs, confidence),
                    strict=True,
                )
            )
        row["gap_closed"] = (mean - unaided) / gap if gap else float("nan")
        table.append(row)
    columns = ["arm", "method", "strategy", "same_as", "n", "val_mean", "test_mean", "test_low", "test_high"]
    columns += ["difference", "difference_low", "difference_high", "gap_closed"]
    return (
        pd.DataFrame(table)
        .reindex(columns=columns)
        .sort_values("test_mean", ascending=False, ignore_index=True, kind="stable")
    )


def verdict(low: float, high: float) -> str:
    """How to read an interval of a difference: "better", "worse", or "includes zero"."""
    if not low <= high:
        return "unknown (one seed)"
    return "better" if low > 0 else "worse" if high < 0 else "includes zero"


def contrast(results: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Every arm with clustered hints against KD and against the controls of its own method, paired by seed.

    results: as for `summarize`. The controls are `kd`, stage ends, uniform depth, and the mean of all random draws
    ("random"); those that a study does not have are left out. Columns: arm, control (a strategy, or "kd"), n (paired
    seeds), mean (of the difference), low, high (t interval), word (see `verdict`; "same layers" where both are the same
    students, because two strategies chose the same layers).
    """
    accuracy = results.pivot(index="seed", columns="arm", values="test_accuracy")
    arms = results.drop_duplicates("arm").set_index("arm", drop=False)
    trained = dict(zip(arms["arm"], arms["same_as"].where(arms["same_as"] != "", arms["arm"]), strict=True))
    table = []
    for arm in arms[arms["strategy"].str.startswith("clustered")].itertuples():
        own = arms[arms["method"] == arm.method]
        controls = {
            "kd": ["kd"] if "kd" in trained else [],
            "stage_ends": list(own.index[own["strategy"] == "stage_ends"]),
            "uniform": list(own.index[own["strategy"] == "uniform"]),
            "random": list(own.index[own["strategy"].str.startswith("random")]),
        }
        for control, names in controls.items():
            if not names:
                continue
            difference = (accuracy[arm.arm] - accuracy[names].mean(axis="columns", skipna=False)).dropna()
            if len(difference):
                mean, low, high = mean_interval(difference.to_numpy(), confidence)
                same = len({trained[name] for name in [arm.arm, *names]}) == 1
                word = "same layers" if same else verdict(low, high)
                row = {"arm": arm.arm, "control": control, "n": len(difference), "mean": mean, "low": low, "high": high}
                table.append(row | {"word": word})
    return pd.DataFrame(table, columns=["arm", "control", "n", "mean", "low", "high", "word"])


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

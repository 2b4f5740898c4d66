"""Logits and runs -> numbers with intervals.

Accuracies are fractions in [0, 1]; differences of accuracies are therefore fractions too (0.01 is one point).
"""

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
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


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """What one network did on one set: accuracy, loss (cross entropy, nats), agreement (same answer as the teacher).

    logits, teacher_logits: (N, K) of the same images in the same order, labels: (N,).
    """
    return {
        "accuracy": accuracy(logits, labels),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "agreement": float((logits.argmax(1) == teacher_logits.argmax(1)).double().mean()),
    }


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

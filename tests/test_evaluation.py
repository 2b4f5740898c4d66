"""Statistics against scipy and by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pursuhint_lib.evaluation import (
    accuracy,
    contrast,
    count_macs,
    count_parameters,
    mean_interval,
    paired_interval,
    score,
    summarize,
    verdict,
)
from pursuhint_lib.models import build_model


def test_accuracy_loss_and_agreement_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    found = score(logits, labels, teacher)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert accuracy(logits, labels) == found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx((right + right + wrong) / 3)
    assert found["agreement"] == pytest.approx(2 / 3)


def test_intervals_equal_scipys_t_tests():
    generator = np.random.default_rng(0)
    a, b = pd.Series(generator.normal(0.6, 0.02, 6)), pd.Series(generator.normal(0.59, 0.02, 6))
    mean, low, high = mean_interval(a.to_numpy(), 0.9)
    theirs = stats.ttest_1samp(a, 0).confidence_interval(0.9)
    assert (mean, low, high) == (pytest.approx(a.mean()), pytest.approx(theirs.low), pytest.approx(theirs.high))
    shuffled = b.sample(frac=1, random_state=1)  # pairing is by index, not by position
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_interval(a, shuffled)
    assert found == (pytest.approx((a - b).mean()), pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_a_hand_worked_interval():
    # values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027
    assert mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )


def test_one_seed_has_no_interval_and_different_seeds_are_refused():
    assert all(math.isnan(value) for value in mean_interval(np.array([0.5]))[1:])
    with pytest.raises(ValueError, match=r"\[0\] against \[1\]"):
        paired_interval(pd.Series([1.0], index=[0]), pd.Series([1.0], index=[1]))


def test_intervals_of_no_difference_cover_zero_about_95_percent_of_the_time():
    generator = np.random.default_rng(1)
    seeds = generator.normal(0, 1, (2000, 5))
    arms = seeds + generator.normal(0, 0.5, (2000, 5)), seeds + generator.normal(0, 0.5, (2000, 5))
    covered = 0
    for a, b in zip(*arms):
        _, low, high = paired_interval(pd.Series(a), pd.Series(b))
        covered += verdict(low, high) == "includes zero"
    assert 0.935 < covered / 2000 < 0.965


def results(**arms):
    rows = []
    for arm, (method, strategy, same_as, values) in arms.items():
        for seed, value in enumerate(values):
            facts = {"arm": arm, "method": method, "strategy": strategy, "same_as": same_as, "seed": seed}
            rows.append(facts | {"val_accuracy": value, "test_accuracy": value})
    return pd.DataFrame(rows)


TABLE = results(
    unaided=("none", "none", "", [0.50, 0.52]),
    kd=("kd", "none", "", [0.54, 0.56]),
    at_uniform=("at", "uniform", "", [0.55, 0.57]),
    at_random_0=("at", "random_0", "", [0.53, 0.53]),
    at_random_1=("at", "random_1", "", [0.55, 0.59]),
    at_clustered_x=("at", "clustered_x", "at_uniform", [0.55, 0.57]),
    at_clustered_y=("at", "clustered_y", "", [0.58, 0.62]),
)


def test_the_summary_by_hand():
    table = summarize(TABLE, teacher_accuracy=0.61).set_index("arm")
    assert table.index[0] == "at_clustered_y" and table.index[-1] == "unaided"
    row = table.loc["at_clustered_y"]
    assert row["test_mean"] == pytest.approx(0.60) and row["difference"] == pytest.approx(0.05) and row["n"] == 2
    assert row["gap_closed"] == pytest.approx((0.60 - 0.51) / (0.61 - 0.51))
    half = stats.t.ppf(0.975, 1) * np.std([0.04, 0.06], ddof=1) / 2**0.5
    assert (row["difference_low"], row["difference_high"]) == (pytest.approx(0.05 - half), pytest.approx(0.05 + half))
    assert table.loc["kd", ["difference", "difference_low"]].isna().all()


def test_contrasts_are_to_kd_and_the_controls_of_the_same_method_and_know_the_same_layers():
    table = contrast(TABLE).set_index(["arm", "control"])
    assert list(table.loc["at_clustered_y"].index) == ["kd", "uniform", "random"]
    assert table.loc[("at_clustered_y", "random"), "mean"] == pytest.approx(0.60 - 0.55)
    assert table.loc[("at_clustered_x", "uniform"), "word"] == "same layers"
    assert table.loc[("at_clustered_x", "kd"), "mean"] == pytest.approx(0.01)


def test_the_words_for_intervals():
    assert [verdict(*i) for i in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (math.nan, math.nan))] == [
        "better",
        "worse",
        "includes zero",
        "unknown (one seed)",
    ]


def test_sizes_of_a_published_network():
    network = build_model("resnet20", 100)
    assert count_parameters(network) == 278_324
    assert round(count_macs(network, (3, 32, 32)) / 1e6, 2) == 40.82

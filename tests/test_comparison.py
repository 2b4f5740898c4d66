"""Statistics by hand, against scipy, and in simulated studies without a difference."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pursuhint_lib.comparison import (
    CONTRAST_COLUMNS,
    MEASURES,
    MINUS,
    SUMMARY_COLUMNS,
    Difference,
    average_measures,
    best_on_validation,
    bootstrap_interval,
    contrast,
    detectable_difference,
    difference_in_words,
    holm,
    main_strategy,
    mean_interval,
    paired_difference,
    paired_interval,
    summarize,
    verdict,
)

MAIN = "clustered_x"


# ---- One set of paired differences ----


def test_a_hand_worked_interval():
    # values 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027
    assert mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )


def test_a_hand_worked_set_of_differences():
    found = paired_difference(np.array([3, 1, 2]))
    # Mean 2, sd 1, so t = 2 sqrt(3). With 2 degrees of freedom p = 1 - t / sqrt(2 + t^2) = 1 - sqrt(12 / 14).
    assert (found.n, found.mean) == (3, 2) and found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    # The correction for m = 2 is Gamma(1) / (sqrt(1) Gamma(1/2)) = 1 / sqrt(pi).
    assert found.effect == pytest.approx(2 / math.sqrt(math.pi))
    # The percentile for n = 3 is Phi(-sqrt(3/2) 4.3027) < 1e-6; the smallest mean, 1, has a probability of 1/27.
    assert (found.boot_low, found.boot_high) == (1, 3)


def test_intervals_and_p_values_equal_scipys_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = pd.Series(generator.normal(0.6, 0.02, 6)), pd.Series(generator.normal(0.59, 0.02, 6))
    mean, low, high = mean_interval(a.to_numpy(), 0.9)
    theirs = stats.t.interval(0.9, 5, loc=a.mean(), scale=stats.sem(a))
    assert (mean, low, high) == (pytest.approx(a.mean()), pytest.approx(theirs[0]), pytest.approx(theirs[1]))
    shuffled = b.sample(frac=1, random_state=1)  # pairing is by index, not by position
    test = stats.ttest_rel(a, b)
    theirs = test.confidence_interval(0.95)
    found = paired_interval(a, shuffled)
    assert found == (pytest.approx((a - b).mean()), pytest.approx(theirs.low), pytest.approx(theirs.high))
    whole = paired_difference(a - b)
    assert (whole.mean, whole.low, whole.high) == pytest.approx(found) and whole.p == pytest.approx(test.pvalue)


def test_the_effect_is_the_mean_in_standard_deviations_without_the_bias_of_few_seeds():
    # n = 5: the correction is Gamma(2) / (sqrt(2) Gamma(3/2)) = sqrt(2 / pi)
    values = np.array([-1.0, 0, 1, 2, 8])  # mean 2, squares of deviations 9 + 4 + 1 + 0 + 36 = 50
    assert paired_difference(values).effect == pytest.approx(2 / math.sqrt(50 / 4) * math.sqrt(2 / math.pi))
    effects = [paired_difference(row).effect for row in np.random.default_rng(2).normal(0.7, 1, (500, 5))]
    assert np.mean(effects) == pytest.approx(0.7, abs=0.08)  # uncorrected it would be 0.88


def test_one_seed_has_no_interval_and_different_seeds_are_refused():
    assert all(math.isnan(value) for value in mean_interval(np.array([0.5]))[1:])
    with pytest.raises(ValueError, match=r"\[0\] against \[1\]"):
        paired_interval(pd.Series([1.0], index=[0]), pd.Series([1.0], index=[1]))


def test_too_few_or_equal_differences_give_sane_numbers_without_a_warning(recwarn):
    nothing, one = paired_difference(np.array([])), paired_difference(np.array([0.2]))
    assert nothing.n == 0 and all(math.isnan(value) for value in nothing[1:])
    assert one[:2] == (1, 0.2) and all(math.isnan(value) for value in one[2:])
    assert math.isnan(paired_difference(np.array([1.0, 2.0])).effect)
    zeros = paired_difference(np.array([0.0, -0.0, 0.0]))
    assert zeros[:6] == (3, 0, 0, 0, 0, 0) and (zeros.p, zeros.detectable) == (1, 0) and math.isnan(zeros.effect)
    assert paired_difference(np.array([-0.5] * 4)) == (4, *[-0.5] * 5, -math.inf, 0, 0)
    # 0.3 - 0.2, 0.2 - 0.1, 0.1 - 0: equal differences of accuracies, but for the last digit
    rounded = paired_difference(np.array([0.3, 0.2, 0.1]) - np.array([0.2, 0.1, 0.0]))
    assert rounded == (3, *[pytest.approx(0.1)] * 5, math.inf, 0, 0)
    assert paired_difference(np.array([1e-17, 1e-17])).p == 1
    assert not recwarn.list


def test_the_bootstrap_interval_of_five_by_hand():
    # The percentile is Phi(-sqrt(5/4) 2.776) = 0.00095. Of the 3125 resamples one is all smallest (0.00032) and five
    # hold it four times and the second once: up to these it is 6/3125 = 0.00192. So the end is (4 x 0 + 1) / 5.
    values = np.array([4.0, 0, 8, 1, 2])
    assert bootstrap_interval(values) == pytest.approx(((4 * 0 + 1) / 5, (4 * 8 + 4) / 5))
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    tail = stats.norm.cdf(-math.sqrt(5 / 4) * stats.t.ppf(0.975, 4))
    assert bootstrap_interval(values) == pytest.approx(
        tuple(np.quantile(means, [tail, 1 - tail], method="inverted_cdf"))
    )


def test_equal_values_in_any_order_give_the_same_bootstrap_interval_to_the_last_digit():
    values = np.random.default_rng(3).normal(0, 1, 7)
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])


@pytest.mark.parametrize(("n", "confidence"), [(2, 0.95), (3, 0.99), (5, 0.95), (5, 0.8), (12, 0.9), (200, 0.95)])
def test_the_detectable_difference_has_80_percent_power_by_the_noncentral_t(n, confidence, recwarn):
    bound = stats.t.ppf((1 + confidence) / 2, n - 1)
    shift = detectable_difference(n, 3.0, confidence) / 3.0 * math.sqrt(n)
    wrong_side = stats.nct.cdf(-bound, n - 1, shift)
    wrong_side = 0 if math.isnan(wrong_side) else wrong_side  # scipy has no number for a probability this small
    assert stats.nct.sf(bound, n - 1, shift) + wrong_side == pytest.approx(0.8, abs=1e-8)
    assert not recwarn.list


def test_a_paired_t_test_finds_the_detectable_difference_in_80_percent_of_simulated_studies():
    true = detectable_difference(5, 2.0)
    p = stats.ttest_1samp(np.random.default_rng(4).normal(true, 2.0, (40_000, 5)), 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.01)
    # the whole set of differences takes its own spread: sd sqrt(50/4)
    assert paired_difference(np.array([-1.0, 0, 1, 2, 8])).detectable == pytest.approx(true / 2 * math.sqrt(50 / 4))


def test_the_words_for_intervals():
    assert [verdict(*i) for i in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (math.nan, math.nan))] == [
        "better",
        "worse",
        "includes zero",
        "unknown (one seed)",
    ]


# ---- Many comparisons ----


def test_holm_by_hand():
    # sorted 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04 but not below 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # two p values, as NaN does not count: 0.3 x 2, then 0.9 x 1
    assert holm([math.nan, 0.9, 0.3]) == pytest.approx([math.nan, 0.9, 0.6], nan_ok=True)
    assert list(holm([0.6, 0.7])) == [1, 1] and list(holm([])) == []
    assert holm([math.nan]) == pytest.approx([math.nan], nan_ok=True)


@pytest.mark.parametrize("seed", range(5))
def test_holm_equals_the_closed_test_that_rejects_what_bonferroni_rejects_in_every_subset(seed):
    p = np.random.default_rng(seed).random(6).round(1) ** 2  # some are equal
    subsets = [list(s) for size in range(1, 7) for s in itertools.combinations(range(6), size)]
    closed = [min(1, max(len(s) * p[s].min() for s in subsets if i in s)) for i in range(6)]
    assert holm(p) == pytest.approx(closed)


# ---- Studies without any difference ----


@pytest.mark.parametrize("n", [5, 10])
def test_t_intervals_of_no_difference_cover_zero_about_95_percent_of_the_time(n):
    generator = np.random.default_rng(n)
    seeds = generator.normal(0, 1, (4000, n))
    arms = (seeds + generator.normal(0, 0.5, (4000, n)) for _ in range(2))
    covered = [verdict(*paired_interval(pd.Series(a), pd.Series(b))[1:]) == "includes zero" for a, b in zip(*arms)]
    assert 0.94 < np.mean(covered) < 0.96


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.71, 0.79), (5, 0.89, 0.95), (12, 0.92, 0.97)])
def test_bootstrap_intervals_of_no_difference_cover_zero_as_often_as_they_say(n, least, most):
    found = map(bootstrap_interval, np.random.default_rng(n).normal(0, 1, (500, n)))
    assert least < np.mean([low <= 0 <= high for low, high in found]) < most


def test_in_at_most_5_percent_of_studies_without_a_difference_does_any_arm_survive_holms_correction():
    students = np.random.default_rng(6).normal(0, 1, (4000, 9, 5))  # studies, kd and 8 arms, seeds
    p = stats.ttest_rel(students[:, 1:], students[:, :1], axis=2).pvalue
    assert np.mean([(holm(row) < 0.05).any() for row in p]) < 0.058
    assert np.mean((p < 0.05).any(axis=1)) > 0.15  # uncorrected


# ---- In words ----


def test_a_comparison_is_told_with_what_it_could_have_found_or_whether_it_survives_the_correction():
    open_end = Difference(5, 0.004, -0.008, 0.016, -0.005, 0.012, 0.4, 0.4, 0.0172)
    assert difference_in_words(open_end, 0.95, 0.9, 12) == (
        f"+0.40 points, 95\u202f% interval {MINUS}0.80 to +1.60 (n = 5 paired seeds): the interval includes zero; "
        "a true difference of 1.72 points would have been found with 80\u202f% probability"
    )
    worse = Difference(3, -0.02, -0.03, -0.01, -0.025, -0.015, -4.0, 0.01, 0.01)
    said = f"{MINUS}2.00 points, 90\u202f% interval {MINUS}3.00 to {MINUS}1.00 (n = 3 paired seeds): the interval "
    assert difference_in_words(worse, 0.9, 0.0814, 12) == (
        said + "excludes zero, which survives Holm's correction over 12 comparisons (p = 0.081)"
    )
    assert difference_in_words(worse, 0.9, 0.12, 12) == (
        said + "excludes zero, which does not survive Holm's correction over 12 comparisons (p = 0.120)"
    )
    assert difference_in_words(worse, 0.9, 0.0002, 1).endswith(
        "survives Holm's correction over 1 comparison (p < 0.001)"
    )


def test_one_seed_and_the_same_students_are_told_as_what_they_are():
    one = paired_difference(np.array([-0.00001]))
    assert difference_in_words(one, 0.95, math.nan, 0) == "0.00 points (n = 1 paired seed): one seed gives no interval"
    study = results(4, kd=("kd", "none"), at_y=("at", "uniform"), at_x=("at", MAIN, "at_y"))
    row = list(contrast(study, MAIN).itertuples())[1]
    assert (row.control, row.word) == ("uniform", "same layers")
    said = difference_in_words(row, 0.95, row.p_holm, row.comparisons)
    assert said == "the same students: there is nothing to compare"


# ---- The arms of a study ----


def table(**arms):
    """arm = (method, strategy, same_as, test accuracy of each seed; None where it is missing)."""
    rows = []
    for arm, (method, strategy, same_as, values) in arms.items():
        for seed, value in enumerate(values):
            facts = {"arm": arm, "method": method, "strategy": strategy, "same_as": same_as, "seed": seed}
            rows.append(facts | {"val_accuracy": value, "test_accuracy": value})
    return pd.DataFrame(rows).dropna(ignore_index=True)


def results(seeds, **arms):
    """arm = (method, strategy[, same_as]), with made-up accuracies."""
    generator = np.random.default_rng(8)
    values = {}
    for arm, (_, _, *same_as) in arms.items():
        values[arm] = values[same_as[0]] if same_as else list(generator.normal(0.6, 0.02, seeds))
    return table(**{arm: (*of[:2], "".join(of[2:]), values[arm]) for arm, of in arms.items()})


TABLE = table(
    unaided=("none", "none", "", [0.50, 0.52]),
    kd=("kd", "none", "", [0.54, 0.56]),
    at_uniform=("at", "uniform", "", [0.55, 0.57]),
    at_random_0=("at", "random_0", "", [0.53, 0.53]),
    at_random_1=("at", "random_1", "", [0.55, 0.59]),
    at_clustered_x=("at", "clustered_x", "at_uniform", [0.55, 0.57]),
    at_clustered_y=("at", "clustered_y", "", [0.58, 0.62]),
)


def test_the_summary_by_hand():
    found = summarize(TABLE, teacher_accuracy=0.61).set_index("arm")
    assert found.index[0] == "at_clustered_y" and found.index[-1] == "unaided"
    row = found.loc["at_clustered_y"]
    assert row["test_mean"] == pytest.approx(0.60) and row["difference"] == pytest.approx(0.05) and row["n"] == 2
    assert row["gap_closed"] == pytest.approx((0.60 - 0.51) / (0.61 - 0.51))
    half = stats.t.ppf(0.975, 1) * np.std([0.04, 0.06], ddof=1) / 2**0.5
    assert (row["difference_low"], row["difference_high"]) == (pytest.approx(0.05 - half), pytest.approx(0.05 + half))
    assert row["p"] == pytest.approx(stats.ttest_rel([0.58, 0.62], [0.54, 0.56]).pvalue)
    assert found["reading"].to_dict() == {
        "at_clustered_y": "includes zero",
        "at_random_1": "includes zero",
        "at_uniform": "better",  # 0.01 and 0.01: no spread
        "at_clustered_x": "better",
        "kd": "",
        "at_random_0": "includes zero",
        "unaided": "worse",
    }
    differences = ["difference", "difference_low", "boot_low", "effect", "p", "p_holm", "detectable"]
    assert found.loc["kd", differences].isna().all()
    assert ["arm", *found.columns] == SUMMARY_COLUMNS


def test_the_summary_corrects_over_each_set_of_students_once():
    found = summarize(TABLE, teacher_accuracy=0.61).set_index("arm")
    once = found.drop(index=["kd", "at_clustered_x"])  # five arms
    assert list(once["p_holm"]) == list(holm(once["p"]))
    columns = ["difference", "difference_low", "boot_high", "p", "p_holm", "reading"]
    assert found.loc["at_clustered_x", columns].equals(found.loc["at_uniform", columns])


def test_the_subsets_of_a_landscape_do_not_weigh_on_the_choices_that_were_made():
    subsets = TABLE[TABLE["arm"] == "at_uniform"].assign(strategy="subset_1_2", same_as="")
    noise = np.random.default_rng(0).normal(0, 0.01, (9, len(subsets)))
    many = [
        subsets.assign(arm=f"at_subset_{i}", test_accuracy=subsets["test_accuracy"] + own)
        for i, own in enumerate(noise)
    ]
    alone = summarize(TABLE, teacher_accuracy=0.61).set_index("arm")["p_holm"]
    beside = summarize(pd.concat([TABLE, *many]), teacher_accuracy=0.61).set_index("arm")
    assert beside["p_holm"].reindex(alone.index).equals(alone)
    landscape = beside[beside["strategy"] == "subset_1_2"]
    assert len(landscape) == 9 and list(landscape["p_holm"]) == list(holm(landscape["p"]))


def test_the_students_of_the_reference_under_another_name_have_no_difference():
    with_twin = results(4, kd=("kd", "none"), at_x=("at", MAIN), kd_again=("kd", "none", "kd"))
    found = summarize(with_twin, 0.9).set_index("arm")
    assert found["p"].notna().to_dict() == {"kd": False, "kd_again": False, "at_x": True}
    assert found.loc["kd_again", "reading"] == "" and found.loc["at_x", "p_holm"] == found.loc["at_x", "p"]
    without = summarize(with_twin[with_twin["arm"] == "at_x"], 0.9)
    assert without["difference"].isna().all() and list(without["reading"]) == [""]


def test_pairs_are_of_the_seeds_that_both_arms_have_and_rows_may_come_in_any_order():
    gaps = table(
        kd=("kd", "none", "", [0.50, None, 0.52, 0.55, None]),
        at_uniform=("at", "uniform", "", [None, 0.90, 0.51, 0.52, 0.54]),
        at_clustered_x=("at", MAIN, "", [0.53, 0.58, None, 0.57, None]),
    )
    row = summarize(gaps, 0.9).set_index("arm").loc["at_clustered_x"]
    assert row["n"] == 3 and row["difference"] == pytest.approx((0.03 + 0.02) / 2)  # seeds 0 and 3
    against = contrast(gaps, MAIN).set_index("control")
    assert dict(against["n"]) == {"kd": 2, "uniform": 2}
    assert against.loc["uniform", "mean"] == pytest.approx((-0.32 + 0.05) / 2)  # seeds 1 and 3
    shuffled = gaps.groupby("arm", sort=False, group_keys=False)[gaps.columns].apply(lambda of: of[::-1])
    pd.testing.assert_frame_equal(contrast(shuffled, MAIN), contrast(gaps, MAIN), check_exact=True)
    columns = ["difference", "difference_low", "boot_low", "p", "p_holm"]
    pd.testing.assert_frame_equal(summarize(shuffled, 0.9)[columns], summarize(gaps, 0.9)[columns], check_exact=True)
    draws = table(
        at_random_0=("at", "random_0", "", [0.50, 0.50]),
        at_random_1=("at", "random_1", "", [0.54, None]),
        at_clustered_x=("at", MAIN, "", [0.55, 0.90]),
    )
    (row,) = contrast(draws, MAIN).itertuples()  # a seed that lacks a draw would be the mean of other arms
    assert (row.n, row.mean) == (1, pytest.approx(0.55 - 0.52))
    apart = table(kd=("kd", "none", "", [0.5, None]), at_clustered_x=("at", MAIN, "", [None, 0.6]))
    assert contrast(apart, MAIN).empty and summarize(apart, 0.9)["difference"].isna().all()


def test_contrasts_are_to_kd_and_the_controls_of_the_same_method_and_know_the_same_layers():
    found = contrast(TABLE, MAIN)
    assert list(found.columns) == CONTRAST_COLUMNS
    found = found.set_index(["arm", "control"])
    assert list(found.loc["at_clustered_y"].index) == ["kd", "uniform", "random"]
    assert found.loc[("at_clustered_y", "random"), "mean"] == pytest.approx(0.60 - 0.55)
    same = found.loc[("at_clustered_x", "uniform")]
    assert same["word"] == "same layers" and same[["p", "p_holm", "effect", "detectable"]].isna().all()
    assert found.loc[("at_clustered_x", "kd"), "mean"] == pytest.approx(0.01)


def test_the_main_choice_meets_every_control_that_the_study_has():
    strategies = ["stage_ends", "random_0", "random_1", "clustered_x", "clustered_y", "clustered_first_x", "reversed"]
    strategies += ["all_to_last", "single_1", "single_2", "subset_1_2", "subset_1_3", "untrained", "redrawn"]
    arms = {f"{m}_{s}": (m, s) for m in ("at", "wsld+at") for s in strategies}
    study = results(3, unaided=("none", "none"), kd=("kd", "none"), wsld=("wsld", "none"), **arms)
    found = contrast(study, MAIN)
    own = ["stage_ends", "random", "clustered_first_x", "reversed", "all_to_last", "single", "subset", "untrained"]
    own += ["redrawn"]
    others = [control for control in own if not control.startswith("clustered")]
    controls = found.groupby("arm")["control"].agg(list)
    assert controls["at_clustered_x"] == ["kd", *own]
    assert controls["wsld+at_clustered_x"] == ["kd", "wsld", *own]
    assert controls["at_clustered_y"] == controls["at_clustered_first_x"] == ["kd", *others]
    assert found.groupby("family")["arm"].unique().map(list).to_dict() == {
        "main": ["at_clustered_x", "wsld+at_clustered_x"],
        "other": ["at_clustered_y", "at_clustered_first_x", "wsld+at_clustered_y", "wsld+at_clustered_first_x"],
    }
    mean = study.groupby("arm")["test_accuracy"].mean()
    row = found.set_index(["arm", "control"]).loc[("wsld+at_clustered_x", "subset")]
    subsets = (mean["wsld+at_subset_1_2"] + mean["wsld+at_subset_1_3"]) / 2
    assert row["mean"] == pytest.approx(mean["wsld+at_clustered_x"] - subsets)
    for _, rows in found.groupby("family"):
        assert list(rows["p_holm"]) == list(holm(rows["p"])) and set(rows["comparisons"]) == {len(rows)}


def test_a_comparison_of_the_same_students_counts_once_and_one_with_itself_not_at_all():
    study = results(
        4,
        kd=("kd", "none"),
        at_uniform=("at", "uniform"),
        at_last=("at", "last"),
        at_single_1=("at", "single_1", "at_last"),
        at_clustered_x=("at", "clustered_x"),
        at_clustered_y=("at", "clustered_y", "at_uniform"),
        at_clustered_z=("at", "clustered_z", "at_uniform"),
    )
    found = contrast(study, MAIN).set_index(["arm", "control"])
    main, y, z = (found.loc[f"at_clustered_{name}"] for name in "xyz")
    # kd, uniform, last; the only single layer is the last
    assert set(main["comparisons"]) == {3} and main.loc["single", "p_holm"] == main.loc["last", "p_holm"]
    assert list(main["p_holm"])[:3] == list(holm(main["p"][:3]))
    # y and z are the students of uniform: kd and last are left to compare with, once
    assert set(y["comparisons"]) == set(z["comparisons"]) == {2} and y.equals(z)
    assert y["word"]["uniform"] == "same layers" and math.isnan(y["p_holm"]["uniform"])


def test_a_study_without_clustered_arms_or_with_one_seed_has_contrasts_with_the_same_columns():
    nothing = contrast(TABLE[~TABLE["strategy"].str.startswith("clustered")], MAIN)
    assert nothing.empty and list(nothing.columns) == CONTRAST_COLUMNS
    one = contrast(TABLE[TABLE["seed"] == 0], MAIN)
    assert set(one.loc[one["control"] == "kd", "word"]) == {"unknown (one seed)"} and one["p_holm"].isna().all()
    assert set(one["comparisons"]) == {0}


def test_the_main_choice_is_the_first_that_takes_cluster_centers():
    names = ["uniform", "clustered_first_x", "clustered_medoid_x", "clustered_x", "clustered_y", "clustered_last_x"]
    assert main_strategy(names) == "clustered_x" and main_strategy(["uniform", "clustered_last_x"]) == ""


def test_validation_chooses_and_test_has_no_say_where_it_cannot():
    rows = [("z", 0.5, 0.9, ""), ("a", 0.5 - 1e-16, 0.1, ""), ("twin", 0.8, 0.9, "z"), ("unaided", 0.9, 0.9, "")]
    summary = pd.DataFrame(rows, columns=["arm", "val_mean", "test_mean", "same_as"])
    assert best_on_validation(summary) == "a"
    assert best_on_validation(summary.assign(same_as=np.nan).iloc[:2]) == "a"
    assert best_on_validation(summary.iloc[2:]) == ""


def measured(**arms):
    """arm -> one number per seed; every measure is that number and its own place in MEASURES."""
    return pd.DataFrame(
        {"arm": arm, "seed": seed} | {measure: value + i for i, measure in enumerate(MEASURES)}
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    )


def test_measures_are_averaged_with_intervals_arm_by_arm():
    table = average_measures(measured(kd=[1.0, 2.0, 3.0], unaided=[4.0]), 0.9)
    assert list(table.columns) == ["arm", "measure", "n", "mean", "low", "high"]
    assert list(table["arm"]) == ["kd"] * len(MEASURES) + ["unaided"] * len(MEASURES)
    assert list(table["measure"]) == [*MEASURES, *MEASURES]
    row = table.iloc[MEASURES.index("kl")]
    half = stats.t.ppf(0.95, 2) / 3**0.5
    place = MEASURES.index("kl")
    assert row[["n", "mean", "low", "high"]].tolist() == pytest.approx(
        [3, 2 + place, 2 + place - half, 2 + place + half]
    )
    assert table[table["arm"] == "unaided"]["low"].isna().all()


def test_a_measure_that_has_no_value_has_no_row_and_seeds_without_one_do_not_count():
    results = measured(kd=[1.0, 2.0, 3.0], unaided=[4.0, 5.0, 6.0]).assign(top5=math.nan)
    results.loc[0, "agreement_wrong"] = math.nan
    table = average_measures(results).set_index(["measure", "arm"])
    assert "top5" not in table.index.get_level_values("measure") and len(table) == 2 * (len(MEASURES) - 1)
    assert table.loc[("agreement_wrong", "kd"), "n"] == 2 and table.loc[("agreement_wrong", "unaided"), "n"] == 3

"""The landscape by hand, against scipy, and on made-up studies whose truth is known."""

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pursuhint_lib import landscape, plots
from pursuhint_lib.landscape import (
    expected_maximum,
    landscape_facts,
    landscape_in_short,
    landscape_reading,
    layer_effects,
    noise_band,
    placement,
    position_curve,
    subset_table,
    true_effects,
    variance_components,
)

LAYERS = pd.DataFrame({"layer": [f"block{i}" for i in range(1, 6)], "stage": [1, 1, 2, 2, 2], "depth": [1, 2, 3, 4, 5]})


def made(truth, noise=0.0, seeds=3, method="at", generator=None):
    """A study with every pair of five layers; truth: depths -> true mean. Uniform and both clustered are 2-4."""
    generator = generator or np.random.default_rng(0)
    offsets = 0.01 * np.arange(seeds)

    def values(mean):
        return mean + offsets + noise * generator.normal(size=seeds)

    rows = []

    def add(arm, its_method, strategy, same_as, accuracies):
        facts = {"arm": arm, "method": its_method, "strategy": strategy, "same_as": same_as}
        rows.extend(facts | {"seed": seed, "test_accuracy": value} for seed, value in enumerate(accuracies))

    subsets = {depths: values(truth(depths)) for depths in itertools.combinations(range(1, 6), 2)}
    add("unaided", "none", "none", "", values(0.4))
    add("kd", "kd", "none", "", values(0.5))
    add(f"{method}_uniform", method, "uniform", "", subsets[2, 4])
    for metric in ("r2_cca", "linear_cka"):
        add(f"{method}_clustered_{metric}", method, f"clustered_{metric}", f"{method}_uniform", subsets[2, 4])
    add(f"{method}_reversed", method, "reversed", "", values(0.45))
    for depth in range(1, 6):
        add(f"{method}_single_{depth}", method, f"single_{depth}", "", values(0.5 + 0.01 * depth))
    for depths, accuracies in subsets.items():
        name = "subset_" + "_".join(map(str, depths))
        add(f"{method}_{name}", method, name, f"{method}_uniform" if depths == (2, 4) else "", accuracies)
    return pd.DataFrame(rows)


def by_sum(depths):
    return 0.5 + 0.01 * sum(depths)


def two_way(generator, between, noise, subsets=20, seeds=5):
    truth = between * generator.normal(size=subsets)
    table = truth[:, None] + generator.normal(size=(1, seeds)) + noise * generator.normal(size=(subsets, seeds))
    return truth, pd.DataFrame(table)


def test_a_hand_worked_table_of_three_subsets_and_two_seeds():
    # means 2, 6, 4 of the subsets, 7/3 and 17/3 of the seeds, 4 of all; squares about it 9+1+0+16+4+4 = 34
    found = variance_components(pd.DataFrame([[1.0, 3.0], [4.0, 8.0], [2.0, 6.0]]))
    assert [found[f"ss_{source}"] for source in ("subset", "seed", "residual")] == pytest.approx([16, 50 / 3, 4 / 3])
    assert [found[f"df_{source}"] for source in ("subset", "seed", "residual")] == [2, 1, 2]
    assert found["f"] == pytest.approx(12) and found["p"] == pytest.approx(1 / 13)  # F(2, 2): p = 1 / (1 + f)
    assert found["sd_subset"] == pytest.approx(math.sqrt((8 - 2 / 3) / 2))
    assert found["sd_seed"] == pytest.approx(math.sqrt((50 / 3 - 2 / 3) / 3))
    assert found["sd_residual"] == pytest.approx(math.sqrt(2 / 3))
    # The components again: share of students, and of means over both seeds
    assert found["intraclass"] == pytest.approx((22 / 6) / (22 / 6 + 2 / 3))
    assert found["reliability"] == pytest.approx((22 / 6) / (22 / 6 + 1 / 3))
    # F(2, 2) has quantiles q / (1 - q), 39 and 1/39: 12/39 < 1 is cut off, 12 * 39 is not
    assert (found["intraclass_low"], found["intraclass_high"]) == pytest.approx((0, 467 / 469))
    assert (found["reliability_low"], found["reliability_high"]) == pytest.approx((0, 467 / 468))


def test_sums_of_squares_add_up_and_two_subsets_give_the_paired_t_test():
    table = np.random.default_rng(0).normal(size=(2, 7))
    found = variance_components(pd.DataFrame(table))
    total = found["ss_subset"] + found["ss_seed"] + found["ss_residual"]
    assert total == pytest.approx(((table - table.mean()) ** 2).sum())
    paired = stats.ttest_rel(*table)
    assert found["f"] == pytest.approx(paired.statistic**2) and found["p"] == pytest.approx(paired.pvalue)


def test_what_a_seed_does_to_all_subsets_alike_changes_only_the_seeds_component():
    table = np.random.default_rng(0).normal(size=(6, 4))
    plain = variance_components(pd.DataFrame(table))
    moved = variance_components(pd.DataFrame(table + np.array([0.0, 5.0, -3.0, 9.0])))
    for name in ("f", "p", "sd_subset", "sd_subset_high", "sd_residual", "reliability", "best_by_noise"):
        assert moved[name] == pytest.approx(plain[name]), name
    assert moved["sd_seed"] > plain["sd_seed"] + 1


def test_with_one_seed_or_one_subset_nothing_about_noise_is_known():
    for shape in ((5, 1), (1, 5)):
        found = variance_components(pd.DataFrame(np.random.default_rng(0).normal(size=shape)))
        unknown = ("f", "p", "sd_subset", "sd_subset_low", "sd_residual", "intraclass", "reliability_high")
        assert all(math.isnan(found[name]) for name in unknown), shape


def test_without_a_subset_effect_the_f_test_rejects_five_percent_and_means_are_not_reliable():
    generator = np.random.default_rng(2)
    found = [variance_components(two_way(generator, 0, 1)[1]) for _ in range(1500)]
    p = [each["p"] for each in found]
    assert 0.035 < np.mean(np.array(p) < 0.05) < 0.065
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.median([each["reliability"] for each in found]) < 0.1
    lead = [two_way(generator, 0, 1)[1].mean(axis=1) for _ in range(1500)]
    assert found[0]["best_by_noise"] / found[0]["sd_residual"] == pytest.approx(
        np.mean([means.max() - means.mean() for means in lead]), rel=0.03
    )


def test_known_components_are_recovered_and_their_intervals_cover_about_95_percent():
    generator = np.random.default_rng(3)
    found = pd.DataFrame([variance_components(two_way(generator, 0.5, 1)[1]) for _ in range(1500)])
    assert (found["ms_subset"] - found["ms_residual"]).mean() / 5 == pytest.approx(0.25, rel=0.05)
    assert found["ms_residual"].mean() == pytest.approx(1, rel=0.02)
    for name, true in (("intraclass", 0.2), ("reliability", 0.25 / 0.45), ("sd_subset", 0.5)):
        covered = ((found[f"{name}_low"] <= true) & (true <= found[f"{name}_high"])).mean()
        assert 0.935 < covered < (0.985 if name == "sd_subset" else 0.965), name


def test_expected_maximum_and_noise_band_of_sorted_normals():
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi))
    drawn = np.sort(np.random.default_rng(4).normal(size=(20000, 6)), axis=1)
    low, high = noise_band(6, 0.9)
    assert low == pytest.approx(np.quantile(drawn, 0.05, axis=0), abs=0.04)
    assert high == pytest.approx(np.quantile(drawn, 0.95, axis=0), abs=0.04)
    assert stats.norm.cdf([noise_band(1)[0][0], noise_band(1)[1][0]]) == pytest.approx([0.025, 0.975])


@pytest.mark.parametrize(("between", "widest"), [(0.0, 0.95), (0.3, 0.9), (1.0, 0.6), (4.0, 0.2)])
def test_intervals_of_percentile_and_gain_cover_the_truth_about_95_percent_of_the_time(between, widest):
    generator, inside, gained, widths, repeats = np.random.default_rng(5), 0, 0, [], 400
    for _ in range(repeats):
        # Equal truths have no order: any is as good, as for subsets that differ by next to nothing.
        truth, table = two_way(generator, between or 1e-9, 1)
        found = landscape._under_noise(*true_effects(table, 500), place=0, confidence=0.95)
        inside += found["percentile_low"] <= ((truth < truth[0]).sum() + 0.5) / 20 <= found["percentile_high"]
        gained += found["gain_low"] <= truth.max() - truth[0] + 1e-8 and truth.max() - truth[0] <= found["gain_high"]
        widths.append(found["percentile_high"] - found["percentile_low"])
    assert inside / repeats > 0.92 and gained / repeats > 0.92  # of 20 places, few intervals end exactly where asked
    assert np.mean(widths) < widest


def test_without_noise_the_percentile_is_known_exactly_and_with_noise_alone_not_at_all():
    truth, table = two_way(np.random.default_rng(6), 1, 1e-9)
    found = landscape._under_noise(*true_effects(table), place=3, confidence=0.95)
    exact = stats.percentileofscore(truth, truth[3], kind="mean") / 100
    assert (found["percentile_low"], found["percentile_high"]) == pytest.approx((exact, exact))
    assert found["gain"] == pytest.approx(truth.max() - truth[3], rel=1e-6)
    alike = pd.DataFrame(np.random.default_rng(7).permuted(np.tile(np.arange(20.0), (5, 1)), axis=1).T)
    alike = alike - alike.mean(axis=1).to_numpy()[:, None]  # the means agree, the seeds do not
    found = landscape._under_noise(*true_effects(alike), place=3, confidence=0.95)
    assert found["percentile_low"] < 0.06 and found["percentile_high"] > 0.94 and found["gain"] == 0


def test_a_fixed_subsets_percentile_is_uniform_when_subsets_do_not_differ():
    generator = np.random.default_rng(8)
    seen = []
    for _ in range(80):
        table = placement(made(lambda depths: 0.5, noise=0.01, generator=generator)).set_index("strategy")
        seen.append(table.loc["clustered_r2_cca", "percentile"])
    counts = pd.Series(seen).value_counts()
    assert len(counts) == 10 and stats.chisquare(counts).pvalue > 0.01


def test_subsets_are_ranked_compared_with_kd_and_known_by_their_other_names():
    table = subset_table(made(by_sum))
    assert list(table.columns) == landscape.SUBSET_COLUMNS and len(table) == 10
    assert list(table["layers"])[:2] == ["4-5", "3-5"] and list(table["rank"]) == [1, 2, 3, 3, 5, 5, 7, 7, 9, 10]
    scores = [stats.percentileofscore(table["mean"].round(12), mean, "mean") / 100 for mean in table["mean"].round(12)]
    assert list(table["percentile"]) == pytest.approx(scores)
    named = table.set_index("layers")["strategies"]
    assert named["2-4"] == "uniform, clustered_r2_cca, clustered_linear_cka" and (named.drop("2-4") == "").all()
    best = table.iloc[0]
    assert best["mean"] == pytest.approx(0.6) and best["difference"] == pytest.approx(0.09 + 0.01 - 0.01 + 0.0)


def test_shrunken_means_are_drawn_to_the_mean_by_what_is_not_reliable():
    results = made(by_sum, noise=0.02)
    table, found = subset_table(results), landscape_facts(results)["at"]
    assert 0 < found["reliability"] < 1
    slope = (table["shrunken"] - found["mean"]) / (table["mean"] - found["mean"])
    assert slope.to_numpy() == pytest.approx(found["reliability"])
    assert found["best_shrunken_lead"] == pytest.approx(table["shrunken"].max() - found["mean"])


def test_the_order_in_which_a_study_chose_does_not_matter():
    results = made(by_sum, noise=0.01)
    turned = results.copy()  # the subset was trained, the uniform choice is the same
    chain = {
        "at_uniform": "at_subset_2_4",
        "at_clustered_r2_cca": "at_subset_2_4",
        "at_clustered_linear_cka": "at_subset_2_4",
    }
    turned["same_as"] = turned["arm"].map(chain).fillna("")
    pd.testing.assert_frame_equal(subset_table(turned), subset_table(results))
    pd.testing.assert_frame_equal(placement(turned), placement(results))


def test_placement_names_every_choice_and_shows_reversed_pairs_as_a_reference():
    table = placement(made(by_sum)).set_index("strategy")
    assert set(table.index) == {"uniform", "clustered_r2_cca", "clustered_linear_cka", "reversed"}
    clustered = table.loc["clustered_r2_cca"]
    assert (clustered["layers"], clustered["arm"]) == ("2-4", "at_subset_2_4")
    # sums of pairs of 1..5 are 3 4 5 5 6 6 7 7 8 9: four below 6, two at it
    assert [clustered[c] for c in ("percentile", "seed_low", "seed_median", "seed_high", "seed_2")] == [0.5] * 5
    backwards = table.loc["reversed"]
    assert backwards["layers"] == "" and backwards["percentile"] == 0 and math.isnan(backwards["percentile_low"])


def test_a_failed_student_costs_its_subset_and_a_missing_seed_costs_the_seed():
    results = made(by_sum, noise=0.01)
    gone = (results["arm"] == "at_subset_1_3") & (results["seed"] == 1)
    failed = results.copy()
    failed.loc[gone, "test_accuracy"] = math.nan
    for broken in (failed, results[~gone]):
        found, table = landscape_facts(broken)["at"], subset_table(broken).set_index("layers")
        assert (found["subsets"], found["seeds"], found["left_out_subsets"]) == (9, 3, ["1-3"])
        assert table.loc["1-3", "n"] == 2 and pd.isna(table.loc["1-3", "rank"]) and len(table) == 10
        assert set(table["rank"].dropna()) <= set(range(1, 10))
        assert (
            "Left out, as students are missing: subsets 1-3."
            in landscape_reading({"at": found}, placement(broken))["at"]
        )
    half = results[~((results["seed"] == 2) & results["arm"].isin([f"at_subset_{d}_5" for d in (1, 2, 3, 4)]))]
    found = landscape_facts(half)["at"]
    assert (found["subsets"], found["seeds"], found["left_out_seeds"]) == (10, 2, [2])
    never = results[results["arm"] != "at_subset_1_3"]
    assert landscape_facts(never)["at"]["left_out_subsets"] == ["1-3"]


def test_a_named_choice_with_a_failed_student_has_no_place_and_the_answer_says_so():
    results = made(by_sum, noise=0.01)
    its = ["at_uniform", "at_clustered_r2_cca", "at_clustered_linear_cka", "at_subset_2_4"]
    results = results[~(results["arm"].isin(its) & (results["seed"] == 0))]
    table = placement(results).set_index("strategy")
    assert math.isnan(table.loc["uniform", "percentile"]) and table.loc["uniform", "n"] == 2
    answer = landscape_reading(landscape_facts(results), placement(results))["at"]
    assert "uniform = clustered_r2_cca = clustered_linear_cka (2-4) has no place" in answer


def test_a_layers_effect_by_hand():
    # truth 0.5 + 0.01 * sum: pairs with layer 5 have sums 6 7 8 9, those without 3 4 5 5 6 7
    table = layer_effects(made(by_sum)).set_index(["hint", "depth"])
    assert table.loc[("any", 5), "mean"] == pytest.approx(0.01 * (7.5 - 5))
    assert table.loc[("2", 5), "mean"] == pytest.approx(0.01 * (7.5 - 5))
    assert table.loc[("1", 1), "mean"] == pytest.approx(0.01 * (18 / 4 - 42 / 6))
    assert table.loc[("any", 5), "subsets"] == 4 and ("1", 5) not in table.index and ("2", 1) not in table.index
    assert (table["high"] - table["low"]).abs().max() < 1e-12  # every seed says the same


def test_layer_effects_of_no_difference_cover_zero_about_95_percent_of_the_time():
    generator = np.random.default_rng(9)
    tables = [layer_effects(made(lambda d: 0.5, noise=0.01, seeds=5, generator=generator)) for _ in range(60)]
    rows = pd.concat(tables)
    assert 0.92 < ((rows["low"] <= 0) & (rows["high"] >= 0)).mean() < 0.98


def test_the_position_curve_is_that_of_the_single_hints_paired_with_kd():
    results = made(by_sum, noise=0.01)
    table = position_curve(results, LAYERS)
    assert list(table["depth"]) == [1, 2, 3, 4, 5] and list(table["layer"]) == list(LAYERS["layer"])
    values = results.pivot(index="seed", columns="arm", values="test_accuracy")
    theirs = stats.ttest_rel(values["at_single_3"], values["kd"]).confidence_interval()
    row = table.iloc[2]
    assert (row["difference_low"], row["difference_high"]) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    assert row["mean"] == pytest.approx(values["at_single_3"].mean()) and row["n"] == 3


def test_methods_are_handled_apart():
    one, other = (
        made(by_sum, noise=0.01),
        made(lambda d: 0.5, noise=0.01, method="vid", generator=np.random.default_rng(1)),
    )
    both = pd.concat([one, other[other["method"] == "vid"]], ignore_index=True)
    table = subset_table(both)
    pd.testing.assert_frame_equal(table[table["method"] == "at"], subset_table(one))
    assert len(table) == 20 and list(landscape_facts(both)) == ["at", "vid"]
    assert landscape_facts(both)["at"] == landscape_facts(one)["at"]
    assert set(placement(both)["method"]) == {"at", "vid"}


def test_a_study_without_subsets_gives_empty_tables_and_no_answer():
    results = made(by_sum)
    results = results[~results["strategy"].str.startswith(("subset_", "single_"))]
    for table, columns in (
        (subset_table(results), landscape.SUBSET_COLUMNS),
        (placement(results), landscape.PLACEMENT_COLUMNS),
        (layer_effects(results), landscape.EFFECT_COLUMNS),
        (position_curve(results, LAYERS), landscape.POSITION_COLUMNS),
    ):
        assert table.empty and list(table.columns) == columns
    assert landscape_facts(results) == {} == landscape_reading({}, placement(results))


def test_the_answer_follows_what_the_numbers_say():
    def answer(results):
        return landscape_reading(landscape_facts(results), placement(results))["at"]

    assert "The choice matters" in answer(made(by_sum, noise=0.001))
    for noise, says in ((0.001, "the choice matters"), (10, "stays open")):
        short = landscape_in_short(landscape_facts(made(by_sum, noise=noise)))["at"]
        assert says in short and "standard deviation of their true means" in short
    assert "stays open" in answer(made(lambda d: 0.5, noise=0.01))
    one = answer(made(by_sum, noise=0.01, seeds=1))
    assert "cannot be known: one seed shows no noise" in one and "noise is unknown" in one and "nan" not in one
    assert "2-4" in one and "anywhere from" not in one
    assert "nan" not in answer(made(lambda d: 0.5, seeds=2))  # no noise and no difference at all


def test_names_in_the_landscape_meet_neither_each_other_nor_the_frame():
    results = made(by_sum, noise=0.01, seeds=4)
    rows = results["arm"].isin(["at_subset_1_2", "at_subset_4_5", "at_subset_3_5"])
    more = results[rows].assign(same_as=results["arm"])
    more["strategy"] = "a_strategy_with_a_long_name_" + more["arm"].str[-3:]
    results = pd.concat([results, more.assign(arm="at_" + more["strategy"])], ignore_index=True)
    with plt.rc_context(plots.STYLE):
        figure, ax = plt.subplots(figsize=(7.5, 4.6))
    plots.landscape(ax, subset_table(results), placement(results), {"kd": 0.5, "unaided": 0.4})
    figure.draw_without_rendering()
    texts = [text for text in ax.texts if "percentile" in text.get_text()]
    assert len(texts) == 4
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = figure.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)
    plt.close(figure)


def test_one_seed_is_drawn_too():
    results = made(by_sum, noise=0.01, seeds=1)
    figure, axes = plt.subplots(1, 5)
    plots.landscape(axes[0], subset_table(results), placement(results), {"kd": 0.5})
    plots.position_curve(axes[1], position_curve(results, LAYERS), LAYERS, {"kd": 0.5})
    plots.layer_effects(axes[2:], layer_effects(results), LAYERS)
    figure.draw_without_rendering()
    assert len(axes[0].collections[-1].get_offsets()) == 10 and "noise" not in axes[0].get_title(loc="left")
    assert [ax.get_title() or ax.get_title(loc="left") for ax in axes[2:]][0] == "as any hint"
    plt.close(figure)

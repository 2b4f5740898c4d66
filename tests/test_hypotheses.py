"""What a study says of the claims that were written down before it: by made-up results whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pursuhint_lib.hypotheses import CLAIMS, NEAR, hypothesis_table, judge_hypotheses

NONE = pd.DataFrame(columns=["a", "b", "largest_shift", "between"])
POINTS = {
    name: {"layers": layers, "pairing": "in_order", "source": "trained", "redrawn": 0}
    for name, layers in {"stage_ends": ["c"], "uniform": ["b"], "random_0": ["a"], "clustered_r2_cca": ["d"]}.items()
}
POINTS |= {"reversed": POINTS["clustered_r2_cca"] | {"pairing": "reversed"}}
POINTS |= {"shuffled": POINTS["clustered_r2_cca"] | {"source": "shuffled"}}
POINTS |= {"single_1": POINTS["uniform"], "redrawn": POINTS["uniform"] | {"redrawn": 3}}


def results(points, seeds=8, spread=0.0005, same_as=None):
    """Arms -> what they are above 60 %, in points; `spread` is the noise of a difference."""
    random = np.random.default_rng(3)
    shared = random.normal(0, 0.02, seeds)  # of the seed: pairing takes it out
    rows = []
    for arm, above in points.items():
        method, _, strategy = arm.partition("_")
        values = 0.6 + above / 100 + shared + random.normal(0, spread, seeds)
        about = {"arm": arm, "method": method, "strategy": strategy or "none", "same_as": (same_as or {}).get(arm, "")}
        rows += [about | {"seed": seed, "test_accuracy": value} for seed, value in enumerate(values)]
    return pd.DataFrame(rows)


def answers(points, logits_matched=True, partitions=NONE, **others):
    judged = judge_hypotheses(results(points, **others), POINTS, partitions, logits_matched)
    assert [one.name for one in judged] == list(CLAIMS)
    return {one.name: one for one in judged}


def test_hints_of_any_layers_are_better_than_none_only_if_every_choice_is():
    both = {"kd": 0, "at_uniform": 1, "at_random_0": 2}
    assert answers(both, logits_matched=False)["H1"].answer == "holds"
    worse = answers(both | {"at_stage_ends": -1}, logits_matched=False)["H1"]
    assert worse.answer == "does not hold"
    assert [part.answer for part in worse.parts] == ["holds", "holds", "does not hold"]
    assert answers(both | {"at_stage_ends": 0}, logits_matched=False, spread=0.01)["H1"].answer == "open"


def test_the_difference_of_a_part_is_paired_by_seed_and_its_interval_is_students():
    data = results({"kd": 0, "at_uniform": 1}, spread=0.004)
    (part,) = judge_hypotheses(data, POINTS, NONE, False)[0].parts
    wide = data.pivot(index="seed", columns="arm", values="test_accuracy")
    interval = stats.ttest_rel(wide["at_uniform"], wide["kd"]).confidence_interval(0.95)
    assert (part.difference.low, part.difference.high) == pytest.approx((interval.low, interval.high))


def test_controls_are_no_choices_of_layers():
    odd = {"kd": 0, "at_uniform": 1, "at_reversed": -5, "at_shuffled": -5, "at_single_1": -5, "at_redrawn": -5}
    assert [part.what for part in answers(odd, logits_matched=False)["H1"].parts] == ["at_uniform, minus labels alone"]
    (part,) = answers(odd)["H2"].parts
    assert part.difference.mean == pytest.approx(0.01, abs=0.001)


def test_a_method_that_matches_logits_in_another_way_is_not_judged_against_kd():
    assert answers({"kd": 0, "dkd+at_uniform": 9})["H2"].answer == "not run"


def test_whether_the_logits_are_matched_decides_which_of_two_claims_a_study_can_answer():
    arms = {"kd": 0, "at_uniform": 0.1}
    matched, alone, unknown = (answers(arms, logits_matched=value) for value in (True, False, None))
    assert (matched["H1"].answer, matched["H2"].answer) == ("not run", "holds")
    assert (alone["H1"].answer, alone["H2"].answer) == ("holds", "not run")
    assert unknown["H1"].answer == unknown["H2"].answer == "not run"
    assert matched["H1"].why and alone["H2"].why and unknown["H1"].why


def test_hints_that_add_more_than_half_a_point_beside_the_logits_are_against_the_second_claim():
    assert answers({"kd": 0, "at_uniform": 2})["H2"].answer == "does not hold"
    assert answers({"kd": 0, "at_uniform": 0.4}, spread=0.005)["H2"].answer == "open"
    assert answers({"kd": 0, "at_uniform": -2})["H2"].answer == "holds"


def test_likeness_needs_the_whole_interval_near_zero():
    near = {"kd": 0, "at_uniform": 1, "at_clustered_r2_cca": 1.1}
    assert answers(near)["H3"].answer == "holds"
    assert answers(near, spread=0.01)["H3"].answer == "open"
    assert answers(near | {"at_clustered_r2_cca": 3})["H3"].answer == "does not hold"
    assert answers(near | {"at_clustered_r2_cca": -1})["H3"].answer == "does not hold"
    part = answers(near)["H3"].parts[0].difference
    assert -NEAR < part.low and part.high < NEAR


def test_the_same_layers_are_no_evidence():
    same = {"at_clustered_r2_cca": "at_uniform"}
    assert answers({"kd": 0, "at_uniform": 1, "at_clustered_r2_cca": 1}, same_as=same)["H3"].answer == "same layers"


def test_reversed_pairs_are_judged_by_the_difference_of_two_differences():
    arms = {"kd": 0, "at_clustered_r2_cca": 1, "at_reversed": -2}
    alone = answers(arms)["H4"]
    assert alone.answer == "not run" and alone.parts[0].answer == "holds" and "fitnet" in alone.why
    more = arms | {"fitnet_clustered_r2_cca": 1, "fitnet_reversed": 0}
    assert answers(more)["H4"].answer == "holds"
    assert answers(more)["H4"].parts[1].difference.mean == pytest.approx(-0.02, abs=0.001)
    assert answers(more | {"fitnet_reversed": -6})["H4"].answer == "does not hold"
    assert answers(more | {"at_reversed": 3})["H4"].answer == "does not hold"


def partitions(measures, centering, fewer):
    rows = [("r2_cca", "linear_cka", measures, "measures"), ("r2_cca", "r2_cca_uncentered", centering, "measures")]
    rows += [("whole", "128 0", fewer, "fewer images, with all")]
    return pd.DataFrame(rows, columns=NONE.columns)


@pytest.mark.parametrize(
    ("shifts", "answer"),
    [((1, 0, 2), "holds"), ((3, 0, 2), "does not hold"), ((1, 1, 1), "open"), ((1, 2, 1), "does not hold")],
)
def test_shifts_of_hint_points_are_counted_in_layers(shifts, answer):
    found = answers({"kd": 0}, partitions=partitions(*shifts))["H5"]
    assert found.answer == answer and found.parts[0].shift == max(shifts[:2])
    assert "before_activation" in found.why


def test_the_table_has_a_row_for_every_part_and_for_every_claim():
    judged = judge_hypotheses(results({"kd": 0, "at_uniform": 1, "fitnet_uniform": 1}), POINTS, NONE, True)
    table = hypothesis_table(judged)
    assert list(table["hypothesis"]) == ["H1", "H2", "H2", "H3", "H4", "H5"]
    assert table.loc[table["hypothesis"] == "H2", "n"].tolist() == [8, 8]

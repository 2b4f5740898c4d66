"""How firm a choice is: tables small enough to check by eye."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from pursuhint_lib.choices import (
    choice_frequencies,
    choose_number,
    embed_layers,
    from_pairs,
    partition_agreement,
    score_cluster_numbers,
    to_pairs,
)
from pursuhint_lib.hints import METHODS, LayerClustering

LAYERS = [f"layer{i}" for i in range(9)]


def groups(*of_layer, within=0.9, between=0.1):
    """Layers alike within their group, and not between groups."""
    group = np.array(of_layer)
    values = np.where(group[:, None] == group[None, :], within, between)
    np.fill_diagonal(values, 1.0)
    names = [f"layer{i}" for i in range(len(group))]
    return pd.DataFrame(values, index=names, columns=names)


def blocks(within=0.9, between=0.1):
    """Three blocks of three alike layers."""
    return groups(0, 0, 0, 1, 1, 1, 2, 2, 2, within=within, between=between)


def noisy(n, seed):
    noise = np.random.default_rng(seed).uniform(0, 1, (n, n))
    values = (noise + noise.T) / 2
    np.fill_diagonal(values, 1)
    names = [f"layer{i}" for i in range(n)]
    return pd.DataFrame(values, index=names, columns=names)


def long(*tables, metric="m"):
    return pd.concat([to_pairs(table).assign(metric=metric, resample=i) for i, table in enumerate(tables)])


# ---- Similarities as pairs ----


def test_pairs_are_the_upper_triangle_in_order_of_depth():
    table = pd.DataFrame([[1, 0.3, 0.2], [0.3, 1, 0.6], [0.2, 0.6, 1]], index=list("cab"), columns=list("cab"))
    pairs = to_pairs(table)
    assert list(pairs.columns) == ["layer_a", "layer_b", "similarity"] and list(pairs.index) == [0, 1, 2]
    assert pairs.to_numpy().tolist() == [["c", "a", 0.3], ["c", "b", 0.2], ["a", "b", 0.6]]


@pytest.mark.parametrize("n", [1, 2, 5, 54])
def test_pairs_and_table_are_two_forms_of_the_same(n):
    table = noisy(n, seed=n)
    pairs = to_pairs(table)
    assert len(pairs) == n * (n - 1) // 2
    back = from_pairs(pairs, list(table.index))
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    pd.testing.assert_frame_equal(to_pairs(back), pairs, check_exact=True)
    shuffled = pairs.sample(frac=1, random_state=0).assign(metric="m", resample=3)
    pd.testing.assert_frame_equal(from_pairs(shuffled, list(table.index)), table, check_exact=True)


def test_pairs_keep_their_value_on_the_way_through_a_file(tmp_path):
    table = noisy(7, seed=1)
    to_pairs(table).to_csv(tmp_path / "pairs.csv", index=False)
    back = from_pairs(pd.read_csv(tmp_path / "pairs.csv"), list(table.index))
    pd.testing.assert_frame_equal(back, table, check_exact=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: p.drop(index=4), "pairs lack 'layer1' and 'layer3'"),
        (lambda p: p.iloc[:0], "pairs lack 'layer0' and 'layer1'"),
        (lambda p: pd.concat([p, p.iloc[[4]]]), "pairs hold 'layer1' and 'layer3' more than once"),
        (lambda p: p.replace("layer3", "layer9"), "pairs name layer 'layer9', which is none of the 4 layers"),
        (
            lambda p: p.rename(columns={"layer_a": "layer_b", "layer_b": "layer_a"}),
            "pairs hold 'layer1' before 'layer0': layer_a must be the shallower",
        ),
        (lambda p: p.replace("layer3", "layer2"), "pairs hold 'layer2' before 'layer2'"),
    ],
)
def test_pairs_that_are_no_table_are_refused_in_one_line(change, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        from_pairs(change(to_pairs(noisy(4, seed=0))), LAYERS[:4])
    assert "\n" not in str(error.value)


def test_a_table_whose_lower_half_or_diagonal_would_be_lost_gives_no_pairs():
    table = blocks()
    with pytest.raises(ValueError, match="'layer0' and 'layer1' is 0.5 and 0.9: it must be symmetric"):
        to_pairs(table.mask(np.triu(np.ones((9, 9), dtype=bool), 1), 0.5))
    with pytest.raises(ValueError, match="similarity of 'layer4' with itself is 0.0: it must be 1"):
        to_pairs(table.mask(np.diag(np.arange(9) == 4), 0))


# ---- Layers as points ----


def test_layers_as_points_keep_their_distances_when_two_dimensions_can():
    places = np.array([[0.0, 0.0], [0.3, 0.1], [0.5, 0.4], [0.9, 0.2]])
    distance = np.linalg.norm(places[:, None] - places[None, :], axis=2)
    table = pd.DataFrame(1 - distance, index=list("abcd"), columns=list("abcd"))
    points = embed_layers(table)
    found = points[["x", "y"]].to_numpy()
    assert np.linalg.norm(found[:, None] - found[None, :], axis=2) == pytest.approx(distance, abs=1e-6)
    assert list(points["layer"]) == list("abcd") and (found[0] <= found[-1]).all()


# ---- How many clusters ----


@pytest.mark.parametrize("method", METHODS)
def test_the_silhouette_peaks_at_the_number_of_blocks_and_distances_fall(method):
    scores = score_cluster_numbers(blocks(), method=method).set_index("n_clusters")
    assert scores["silhouette"].idxmax() == 3
    # a layer's mean distance to its own block is 0.1, to the others 0.9: silhouette (0.9 - 0.1) / 0.9
    assert scores.loc[3, "silhouette"] == pytest.approx(0.8 / 0.9)
    # in each block one layer is the center (distance 0), two lie 0.1 from it
    assert scores.loc[3, "within_distance"] == pytest.approx(2 / 3 * 0.1)
    assert list(scores.index) == list(range(2, 9))
    assert scores["stability"].isna().all()


@pytest.mark.parametrize(
    ("n_layers", "largest", "numbers"), [(9, 4, [2, 3, 4]), (4, 8, [2, 3]), (2, 8, []), (9, 1, [])]
)
def test_numbers_of_clusters_end_at_the_largest_or_below_the_number_of_layers(n_layers, largest, numbers):
    scores = score_cluster_numbers(noisy(n_layers, seed=0), largest=largest)
    assert list(scores["n_clusters"]) == numbers
    assert list(scores.columns) == ["n_clusters", "silhouette", "within_distance", "stability"]


def test_one_cluster_of_equal_layers_has_no_silhouette():
    with pytest.warns(UserWarning, match="clusters are empty"):
        scores = score_cluster_numbers(groups(0, 0, 0, 0, within=1.0))
    assert scores["silhouette"].isna().all() and (scores["within_distance"] == 0).all()


# Clusters {0,1,2} {3,4,5}, {0,1} {2,3,4,5} and {0} {1,2,3,4,5}. Pairs of layers that are together in both, together in
# the first, together in the second: a = 4, b = 6, c = 7 for the first two. Of all 15 pairs chance gives b c / 15 = 2.8;
# adjusted Rand (a - 2.8) / ((b + c) / 2 - 2.8) = 1.2 / 3.7. The others: a, b, c = 4, 6, 10 (chance 4) and 6, 7, 10
# (chance 14 / 3).
HALVES, AFTER_TWO, AFTER_ONE = groups(0, 0, 0, 1, 1, 1), groups(0, 0, 1, 1, 1, 1), groups(0, 1, 1, 1, 1, 1)
RAND = {"halves, after_two": 1.2 / 3.7, "halves, after_one": 0, "after_two, after_one": (6 - 14 / 3) / (8.5 - 14 / 3)}


def test_stability_is_the_mean_agreement_of_resamples_with_the_whole():
    resamples = long(HALVES, AFTER_TWO, AFTER_ONE, HALVES)
    scores = score_cluster_numbers(HALVES, resamples, largest=3).set_index("n_clusters")
    expected = (1 + RAND["halves, after_two"] + RAND["halves, after_one"] + 1) / 4
    assert scores.loc[2, "stability"] == pytest.approx(expected)
    same = score_cluster_numbers(HALVES, long(HALVES, HALVES))
    assert (same["stability"] == 1).all()
    # Resamples change nothing else.
    pd.testing.assert_frame_equal(same.drop(columns="stability"), score_cluster_numbers(HALVES).iloc[:, :3])


def test_resamples_of_two_metrics_at_once_are_refused():
    both = pd.concat([long(HALVES, metric="r2_cca"), long(HALVES, metric="linear_cka")])
    with pytest.raises(ValueError, match="'layer0' and 'layer1' more than once: they must be one sample of one metric"):
        score_cluster_numbers(HALVES, both)


def scores_of(*rows):
    return pd.DataFrame(rows, columns=["n_clusters", "silhouette", "stability"])


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ([(2, 0.5, 0.9), (3, 0.6, 0.9), (4, 0.7, 0.7)], 3),  # four has the largest silhouette and is not stable
        ([(2, 0.5, 0.9), (3, 0.6, 0.8), (4, 0.7, 0.7)], 3),  # exactly enough is enough
        ([(2, 0.5, 0.9), (3, 0.6, 0.9), (4, 0.6, 1.0)], 3),  # equal silhouettes: the smaller, be it less stable
        ([(4, 0.6, 1.0), (3, 0.6, 0.9), (2, 0.5, 0.9)], 3),  # in whatever order
        ([(2, 0.5, 0.1), (3, 0.6, 0.2), (4, 0.4, 0.3)], 4),  # none is stable: the most stable
        ([(4, 0.4, 0.3), (3, 0.6, 0.3), (2, 0.5, 0.1)], 3),  # of equals the smaller
        ([(2, 0.5, np.nan), (3, 0.7, np.nan), (4, 0.7, np.nan)], 3),  # no stability: the silhouette
        ([(2, np.nan, 1.0), (3, 0.2, 0.9), (4, np.nan, 1.0)], 3),  # without a silhouette, no candidate
        ([(2, np.nan, 1.0), (3, 0.2, 0.1), (4, 0.3, 0.05)], 3),
    ],
)
def test_the_number_of_clusters_is_chosen_by_the_stated_rule(rows, number):
    found = choose_number(scores_of(*rows))
    assert found == number and type(found) is int


def test_how_stable_is_enough_can_be_said():
    scores = scores_of((2, 0.5, 0.9), (3, 0.6, 0.8), (4, 0.7, 0.7))
    assert [choose_number(scores, enough) for enough in (0.95, 0.85, 0.75, 0.65)] == [2, 2, 3, 4]


@pytest.mark.parametrize("rows", [[], [(2, np.nan, 1.0), (3, np.nan, 1.0)]])
def test_without_any_silhouette_no_number_is_chosen(rows):
    with pytest.raises(ValueError, match=f"none of {len(rows)} numbers of clusters has a silhouette"):
        choose_number(scores_of(*rows))


def test_the_number_of_blocks_is_found_with_and_without_resamples():
    assert choose_number(score_cluster_numbers(blocks())) == 3
    assert choose_number(score_cluster_numbers(blocks(), long(blocks(0.8, 0.2), blocks(0.9, 0.3)))) == 3


# ---- How firm ----


def test_frequencies_count_the_resamples_that_chose_a_layer():
    # Clusters {0,1,2} {3,4,5} {6,7,8}: middles 1, 4, 7. With layer 3 in the first block: {0,1,2,3} {4,5} {6,7,8}:
    # middles floor(6/4) = 1, floor(9/2) = 4, 7. With {0,1} {2,3,4,5} {6,7,8}: 0, floor(14/4) = 3, 7.
    third = groups(0, 0, 0, 0, 1, 1, 2, 2, 2)
    fourth = groups(0, 0, 1, 1, 1, 1, 2, 2, 2)
    resamples = pd.concat([long(blocks(), blocks(), third, fourth), long(fourth, metric="n")])
    found = choice_frequencies(resamples, LAYERS, 3)
    assert list(found.columns) == ["metric", "layer", "frequency"]
    assert list(found["metric"]) == ["m"] * 9 + ["n"] * 9 and list(found["layer"]) == LAYERS * 2
    assert found["frequency"].tolist()[:9] == [0.25, 0.75, 0, 0.25, 0.75, 0, 0, 1, 0]
    assert found["frequency"].tolist()[9:] == [1, 0, 0, 1, 0, 0, 0, 1, 0]


def test_agreement_is_worked_out_for_every_two_tables():
    # Centers in mid-depth: {0,1,2} {3,4,5}: 1, 4; {0,1} {2,3,4,5}: 0, floor(14/4) = 3; {0} {1,2,3,4,5}: 0, 3.
    found = partition_agreement({"halves": HALVES, "after_two": AFTER_TWO, "after_one": AFTER_ONE}, 2)
    assert list(found.columns) == ["a", "b", "adjusted_rand", "shared", "largest_shift"]
    assert (found["a"] + ", " + found["b"]).tolist() == list(RAND)
    assert found["adjusted_rand"].tolist() == pytest.approx(list(RAND.values()))
    assert found["shared"].tolist() == [0, 0, 2]
    assert found["largest_shift"].tolist() == [1, 1, 0]


def test_the_largest_shift_is_of_hint_points_in_order_and_of_any_size():
    # {0,1} {2,3} {4,...,8}: centers 0, 2, 6; blocks of three: 1, 4, 7.
    found = partition_agreement({"early": groups(0, 0, 1, 1, 2, 2, 2, 2, 2), "even": blocks()}, 3, "contiguous")
    assert found["largest_shift"].tolist() == [2] and found["shared"].tolist() == [0]


def test_one_table_has_nothing_to_agree_with():
    assert partition_agreement({"alone": blocks()}, 3).empty
    assert list(partition_agreement({}, 3).columns) == ["a", "b", "adjusted_rand", "shared", "largest_shift"]


def test_tables_of_different_layers_are_refused_in_one_line():
    other = blocks().set_axis(LAYERS[::-1], axis=0).set_axis(LAYERS[::-1], axis=1)
    with pytest.raises(ValueError, match="tables 'r2_cca' and 'depth' are of different layers") as error:
        partition_agreement({"r2_cca": blocks(), "depth": other}, 3)
    assert "\n" not in str(error.value)


def test_every_clustering_is_done_by_the_method_asked_for():
    one, other = noisy(12, seed=0), noisy(12, seed=1)
    layers, partitions = list(one.index), set()
    for method in METHODS:
        a, b = (LayerClustering(3, method).fit(table) for table in (one, other))
        partitions.add(tuple(a.labels_))
        expected = adjusted_rand_score(a.labels_, b.labels_)
        agreement = partition_agreement({"one": one, "other": other}, 3, method).iloc[0]
        assert agreement["adjusted_rand"] == pytest.approx(expected)
        assert agreement["largest_shift"] == np.abs(a.center_indices_ - b.center_indices_).max()
        frequency = choice_frequencies(long(one), layers, 3, method).set_index("layer")["frequency"]
        assert list(frequency.index[frequency > 0]) == a.hint_points_
        scores = score_cluster_numbers(one, long(other), method=method).set_index("n_clusters").loc[3]
        assert scores["stability"] == pytest.approx(expected)
        assert scores["silhouette"] == pytest.approx(
            silhouette_score(1 - one.to_numpy(), a.labels_, metric="precomputed")
        )
    assert len(partitions) == len(METHODS)  # a table on which they differ

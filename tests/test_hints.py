"""Clusters, hint points and pairs, against examples small enough to work out by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score, pairwise_distances
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from pursuhint_lib.hints import (
    METHODS,
    PAIRING_RULES,
    SOURCES,
    STRATEGIES,
    HintPair,
    HintPoints,
    LayerClustering,
    checked_similarity,
    name_choices,
    pair_layers,
    seed_indices,
    select_all,
    select_hint_points,
)


def table(values):
    names = [f"block.{i}" for i in range(len(values))]
    return pd.DataFrame(np.array(values, dtype=float), index=names, columns=names)


def names(*indices):
    return [f"block.{i}" for i in indices]


def layer_table(*sizes, prefix="block"):
    """A layer table of stages with these numbers of layers."""
    n = sum(sizes)
    return pd.DataFrame(
        {
            "layer": [f"{prefix}.{i}" for i in range(n)],
            "stage": np.repeat(np.arange(len(sizes)) + 1, sizes),
            "depth": np.arange(n) + 1,
            "stage_end": np.isin(np.arange(n) + 1, np.cumsum(sizes)),
        }
    )


def noisy(n, seed):
    """A symmetric table without any structure."""
    noise = np.random.default_rng(seed).uniform(0, 1, (n, n))
    values = (noise + noise.T) / 2
    np.fill_diagonal(values, 1)
    return values


def by_depth(n):
    depth = np.arange(n)
    return table(1 - np.abs(depth[:, None] - depth) / (n - 1))


# Layers 0-3 and layers 4-5 are alike, but layer 3 is a little more like the very last layer than like the very first.
TWO_GROUPS = [
    [1.0, 0.9, 0.8, 0.4, 0.2, 0.1],
    [0.9, 1.0, 0.9, 0.7, 0.3, 0.2],
    [0.8, 0.9, 1.0, 0.8, 0.4, 0.3],
    [0.4, 0.7, 0.8, 1.0, 0.6, 0.5],
    [0.2, 0.3, 0.4, 0.6, 1.0, 0.9],
    [0.1, 0.2, 0.3, 0.5, 0.9, 1.0],
]

# Layers 0-2 and layers 3-5 are alike, but layer 0 is more like layer 4 than like layer 1.
CYCLE = [
    [1.0, 0.5, 0.8, 0.2, 0.6, 0.2],
    [0.5, 1.0, 0.8, 0.2, 0.2, 0.2],
    [0.8, 0.8, 1.0, 0.2, 0.2, 0.2],
    [0.2, 0.2, 0.2, 1.0, 0.8, 0.8],
    [0.6, 0.2, 0.2, 0.8, 1.0, 0.8],
    [0.2, 0.2, 0.2, 0.8, 0.8, 1.0],
]


# ---- The published rule ----


@pytest.mark.parametrize(
    ("n_layers", "n_clusters", "seeds"),
    [
        (18, 3, (0, 8, 17)),
        (54, 3, (0, 26, 53)),
        (15, 3, (0, 7, 14)),
        (16, 4, (0, 5, 10, 15)),
        (6, 1, (2,)),
        (1, 1, (0,)),
    ],
)
def test_the_seeds_are_the_published_ones(n_layers, n_clusters, seeds):
    assert seed_indices(n_layers, n_clusters) == seeds


def test_two_rounds_by_hand():
    # Centers 0, 5: layer 3 joins 5 (0.5 > 0.4)  -> {0,1,2} {3,4,5}; middles floor(3/3) = 1, floor(12/3) = 4.
    # Centers 1, 4: layer 3 joins 1 (0.7 > 0.6)  -> {0,1,2,3} {4,5}; middles floor(6/4) = 1, floor(9/2) = 4: at rest.
    found = LayerClustering(n_clusters=2).fit(table(TWO_GROUPS))
    assert found.labels_.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.center_indices_.tolist() == [1, 4]
    assert found.hint_points_ == names(1, 4)
    assert found.n_rounds_ == 2
    assert found.cycle_ == [] and found.contiguous_ and found.n_breaks_ == 0


def test_a_cycle_is_reported_and_its_best_round_is_taken():
    # Centers 0, 5: {0,1,2} {3,4,5}                       -> 1, 4
    # Centers 1, 4: 0 joins 4 (0.6 > 0.5): {1,2} {0,3,4,5} -> floor(3/2) = 1, floor(12/4) = 3
    # Centers 1, 3: 0 joins 1 (0.5 > 0.2): {0,1,2} {3,4,5} -> 1, 4: seen before.
    # Total distance to the center: (1, 4): 0.4 + 0.2 + 0.2 + 0.2 = 1.0;  (1, 3): 0.5 + 0.2 + 0.2 + 0.2 = 1.1.
    found = LayerClustering(n_clusters=2).fit(table(CYCLE))
    assert found.cycle_ == [[1, 4], [1, 3]]
    assert found.n_rounds_ == 3
    assert found.hint_points_ == names(1, 4)
    assert found.labels_.tolist() == [1, 0, 0, 1, 1, 1]  # 0 is the cluster of center 1
    assert not found.contiguous_ and found.n_breaks_ == 1


def test_ties_go_to_the_first_cluster_and_the_shallower_layer():
    # All alike: 1, 2 and 3 tie between centers 0 and 4, so {0,1,2,3} {4}; middle floor(6/4) = 1.
    assert LayerClustering(2).fit(table(0.5 + 0.5 * np.eye(5))).center_indices_.tolist() == [1, 4]
    # {0,2} and {1,3}: middles 1 and 2, each between its two members; the shallower is taken.
    even_and_odd = [[1, 0, 0.9, 0.1], [0, 1, 0.1, 0.9], [0.9, 0.1, 1, 0], [0.1, 0.9, 0, 1]]
    found = LayerClustering(2).fit(table(even_and_odd))
    assert found.center_indices_.tolist() == [0, 1]
    assert found.labels_.tolist() == [0, 1, 0, 1] and found.n_breaks_ == 2


def test_depth_alone_gives_even_thirds():
    found = LayerClustering(3).fit(by_depth(54))
    assert found.contiguous_
    assert np.abs(found.center_indices_ - [8, 26, 44]).max() <= 4


@pytest.mark.parametrize("n_layers", [1, 5, 6])
def test_one_cluster_is_represented_by_the_middle_layer(n_layers):
    found = LayerClustering(n_clusters=1).fit(table(np.eye(n_layers)))
    assert found.hint_points_ == names((n_layers - 1) // 2)
    assert found.labels_.tolist() == [0] * n_layers and found.contiguous_


def test_as_many_clusters_as_layers_name_every_layer():
    for method in METHODS:
        assert LayerClustering(6, method=method).fit(table(TWO_GROUPS)).hint_points_ == names(*range(6))


def test_equal_layers_leave_clusters_empty_which_is_said_and_harms_nothing():
    with pytest.warns(UserWarning, match="2 of 3 clusters are empty"):
        found = LayerClustering(3, representative="last").fit(table(np.ones((5, 5))))
    # Seeds 0, 2, 4: all layers join 0, whose middle is 2; the empty clusters keep 2 and 4.
    assert found.center_indices_.tolist() == [2, 2, 4]
    assert found.hint_points_ == names(2, 4, 4)
    assert found.contiguous_


def test_clusters_are_numbered_by_the_depth_of_their_centers():
    generator = np.random.default_rng(0)
    breaks = cycles = 0
    for _ in range(200):
        noise = generator.uniform(0, 1, (12, 12))
        similarity = by_depth(12) * 0.5 + (noise + noise.T) / 4
        np.fill_diagonal(values := similarity.to_numpy(copy=True), 1)
        found = LayerClustering(3).fit(table(values))
        assert (np.diff(found.center_indices_) > 0).all()
        assert found.labels_[found.center_indices_].tolist() == [0, 1, 2]
        assert found.hint_points_ == names(*found.center_indices_)
        runs = 1 + (np.diff(found.labels_) != 0).sum()
        assert found.contiguous_ == (runs == 3) and found.n_breaks_ == runs - 3
        breaks += not found.contiguous_
        cycles += bool(found.cycle_)
    assert breaks > 10 and cycles > 10  # noisy tables do both, so both paths were taken


@pytest.mark.parametrize(
    ("representative", "expected"), [("center", (1, 4)), ("medoid", (1, 4)), ("first", (0, 4)), ("last", (3, 5))]
)
def test_the_representative_changes_the_layer_and_not_the_clusters(representative, expected):
    # Medoid of {0,1,2,3}: totals of distances 0.9, 0.5, 0.5, 1.1; layers 1 and 2 tie in exact arithmetic.
    similarity = np.array(TWO_GROUPS)
    similarity[0, 1] = similarity[1, 0] = 0.95  # 1 wins: 0.45
    found = LayerClustering(2, representative=representative).fit(table(similarity))
    assert found.hint_points_ == names(*expected)
    assert found.labels_.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.center_indices_.tolist() == [1, 4]


# ---- The other methods ----


def test_average_linkage_merges_the_closest_clusters_first():
    # Points on a line at 0, 1, 2, 10, 11, 30: three groups whatever the linkage.
    position = np.array([0, 1, 2, 10, 11, 30])
    similarity = table(1 - np.abs(position[:, None] - position) / 30)
    found = LayerClustering(3, method="average_linkage").fit(similarity)
    assert found.labels_.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.hint_points_ == names(1, 3, 5)


def test_average_linkage_may_join_layers_that_are_not_neighbors():
    similarity = table([[1, 0.1, 0.9, 0.1], [0.1, 1, 0.1, 0.8], [0.9, 0.1, 1, 0.1], [0.1, 0.8, 0.1, 1]])
    assert LayerClustering(2, method="average_linkage").fit(similarity).labels_.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 4, 8])
def test_contiguous_finds_the_best_split_of_all(n_clusters):
    for seed in range(40):
        values = noisy(8, seed)
        if seed % 2:  # a few layers are like many: they attract, but only within their own run
            values = np.where(values > 0.6, 0.95, 0.05 * values)
            np.fill_diagonal(values, 1)

        def total(cuts):
            edges = [0, *cuts, 8]
            return sum((1 - values[a:b, a:b]).sum(0).min() for a, b in itertools.pairwise(edges))

        best = min(itertools.combinations(range(1, 8), n_clusters - 1), key=total)
        found = LayerClustering(n_clusters, method="contiguous").fit(table(values))
        assert found.contiguous_
        assert found.labels_.tolist() == [sum(cut <= i for cut in best) for i in range(8)]


def test_contiguous_takes_the_shallowest_start_of_the_last_run_among_equals():
    # All alike: a run of r layers costs (r - 1) / 2, so every split costs the same. The last run starts as shallow as
    # it can, at layer 2, and so does the one before it.
    found = LayerClustering(3, method="contiguous").fit(table(0.5 + 0.5 * np.eye(6)))
    assert found.labels_.tolist() == [0, 1, 2, 2, 2, 2]


def total_distance(values, centers):
    return sum(min(1 - values[i, c] for c in centers) for i in range(len(values)))


def test_kmedoids_rests_on_the_medoids_of_groups_that_need_not_be_neighbors():
    # Points on a line: the groups are 0, 1, 2 and 10, 11, 12 and 30, in mixed order; each has its medoid in its middle.
    position = np.array([10, 0, 2, 12, 1, 30, 11])
    found = LayerClustering(3, method="kmedoids").fit(table(1 - np.abs(position[:, None] - position) / 30))
    assert found.hint_points_ == names(4, 5, 6)  # 1, 30, 11
    assert found.labels_.tolist() == [2, 0, 0, 2, 0, 1, 2]
    assert found.cycle_ == [] and found.n_rounds_ == 1 and not found.contiguous_


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 4])
def test_kmedoids_finds_the_best_medoids_of_all_where_there_are_groups(n_clusters):
    group = np.arange(12) % n_clusters
    for seed in range(10):
        values = np.where(group[:, None] == group, 0.6, 0.1) + 0.3 * noisy(12, seed)
        np.fill_diagonal(values, 1)
        best = min(itertools.combinations(range(12), n_clusters), key=lambda centers: total_distance(values, centers))
        found = LayerClustering(n_clusters, method="kmedoids").fit(table(values))
        assert found.center_indices_.tolist() == list(best)


def test_a_layer_between_two_medoids_joins_the_shallower():
    # Layers 0 and 2 are like 1; layers 4, 6 and 7 are like 5, which is found first; layer 3 is as near to 1 as to 5.
    values = np.full((8, 8), 0.1)
    for center, members in ((1, [0, 2]), (5, [4, 6, 7])):
        values[center, members] = values[members, center] = 0.9
        values[center, 3] = values[3, center] = 0.5
    np.fill_diagonal(values, 1)
    found = LayerClustering(2, method="kmedoids").fit(table(values))
    assert found.hint_points_ == names(1, 5) and found.labels_.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_kmedoids_ends_where_no_exchange_of_one_medoid_helps():
    n_best = 0
    for seed in range(100):
        values = noisy(12, seed)
        found = LayerClustering(3, method="kmedoids").fit(table(values))
        centers = found.center_indices_.tolist()
        total = total_distance(values, centers)
        for out, new in itertools.product(centers, set(range(12)) - set(centers)):
            assert total <= total_distance(values, {*centers, new} - {out}) + 1e-12
        assert found.labels_.tolist() == [max(range(3), key=lambda k: values[i, centers[k]]) for i in range(12)]
        medoids = LayerClustering(3, method="kmedoids", representative="medoid").fit(table(values)).hint_points_
        assert medoids == found.hint_points_ == names(*centers)
        best = min(total_distance(values, c) for c in itertools.combinations(range(12), 3))
        n_best += total < best + 1e-12
    assert 70 < n_best < 100  # a rest is often the best of all and not always


def test_kmedoids_draws_nothing_at_random():
    before = np.random.get_state()
    found = {tuple(LayerClustering(5, method="kmedoids").fit(table(noisy(30, 0))).hint_points_) for _ in range(20)}
    assert len(found) == 1
    assert str(np.random.get_state()) == str(before)  # the library's own default start draws from it


@pytest.mark.filterwarnings("error")
def test_kmedoids_gives_equal_layers_clusters_of_their_own_where_there_are_too_many():
    found = LayerClustering(3, method="kmedoids").fit(table(np.ones((5, 5))))
    assert found.hint_points_ == names(0, 1, 2)
    assert found.labels_.tolist() == [0, 1, 2, 0, 0]
    pairs = np.kron(np.eye(2), np.ones((2, 2)))  # two pairs of equal layers
    found = LayerClustering(3, method="kmedoids").fit(table(pairs))
    assert sorted(found.labels_.tolist()) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])
    assert total_distance(pairs, found.center_indices_) == 0


# ---- The estimator's contract ----


def test_fitting_leaves_the_parameters_and_the_table_alone():
    estimator = LayerClustering(n_clusters=2, method="contiguous", representative="last")
    similarity = table(TWO_GROUPS)
    assert estimator.fit(similarity) is estimator
    assert similarity.equals(table(TWO_GROUPS))
    assert estimator.get_params() == {"n_clusters": 2, "method": "contiguous", "representative": "last"}
    copy = clone(estimator).set_params(representative="first")
    assert not hasattr(copy, "labels_")
    assert copy.fit_predict(similarity).tolist() == [0, 0, 0, 0, 1, 1]
    assert copy.hint_points_ == names(0, 4)


NOT_SQUARE = "the check fits 50 points of 2 features; samples and features of a similarity are both the layers"


@pytest.mark.filterwarnings("ignore:.*clusters are empty")
@parametrize_with_checks(
    [LayerClustering(method=method) for method in METHODS],
    expected_failed_checks=lambda estimator: {"check_clustering": NOT_SQUARE},
    xfail_strict=True,
)
def test_every_method_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("method", METHODS)
def test_points_in_groups_are_told_apart_as_that_check_asks(method):
    points, group = make_blobs(50, random_state=1)
    if method == "contiguous":  # which can only tell apart what follows one another
        points, group = points[group.argsort()], np.sort(group)
    similarity = 1 - pairwise_distances(points) / 30
    estimator = LayerClustering(3, method=method)
    labels = estimator.fit_predict(similarity)
    assert adjusted_rand_score(group, labels) > 0.4
    assert labels.dtype == np.int64 and set(labels) == {0, 1, 2}
    assert (estimator.fit(similarity.tolist()).labels_ == labels).all()


def test_the_constructor_keeps_its_arguments_and_does_nothing_else():
    assert vars(LayerClustering(4, "kmedoids", "last")) == {
        "n_clusters": 4,
        "method": "kmedoids",
        "representative": "last",
    }
    wrong = LayerClustering(n_clusters=-1, method="none such", representative=None)  # refused when fitting, not before
    assert wrong.get_params() == {"n_clusters": -1, "method": "none such", "representative": None}
    assert repr(LayerClustering()) == "LayerClustering()"
    assert repr(LayerClustering(5, method="contiguous")) == "LayerClustering(method='contiguous', n_clusters=5)"
    assert get_tags(LayerClustering()).input_tags.pairwise


def test_a_table_gives_the_names_of_its_features_and_an_array_only_their_number():
    of_table = LayerClustering(2).fit(table(TWO_GROUPS))
    assert of_table.n_features_in_ == 6
    assert of_table.feature_names_in_.tolist() == of_table.layers_ == names(*range(6))
    for values in (np.array(TWO_GROUPS), TWO_GROUPS):
        of_array = LayerClustering(2).fit(values)
        assert of_array.n_features_in_ == 6 and not hasattr(of_array, "feature_names_in_")
        assert of_array.layers_ == ["0", "1", "2", "3", "4", "5"] and of_array.hint_points_ == ["1", "4"]
        assert of_array.labels_.tolist() == of_table.labels_.tolist()


def test_a_second_fit_forgets_the_first():
    estimator = LayerClustering(2).fit(table(CYCLE))
    assert estimator.cycle_
    estimator.fit(np.array(TWO_GROUPS)[:5, :5])
    assert estimator.cycle_ == [] and estimator.layers_ == list("01234") and len(estimator.labels_) == 5
    assert not hasattr(estimator, "feature_names_in_")


def test_numbered_rows_are_those_of_the_columns_and_other_labels_must_agree():
    similarity = table(TWO_GROUPS)
    layers, values = checked_similarity(similarity.reset_index(drop=True))
    assert layers == names(*range(6)) and values.tolist() == TWO_GROUPS
    assert checked_similarity(pd.DataFrame(TWO_GROUPS))[0] == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="5 rows and 6 columns"):
        checked_similarity(similarity.iloc[:5].reset_index(drop=True))
    with pytest.raises(ValueError, match="row 1 beside column 'block.0'"):
        checked_similarity(similarity.set_axis(range(1, 7), axis=0))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (None, "similarity is a NoneType of 0 dimensions: it must be a square table or array"),
        ("r2_cca", "similarity is a str of 0 dimensions"),
        ([1.0, 0.5], "similarity is a list of 1 dimensions"),
        (pd.Series([1.0]), "similarity is a Series of 1 dimensions"),
        (np.ones((2, 2, 2)), "similarity is a ndarray of 3 dimensions"),
        (np.ones((2, 3)), "similarity has 2 rows and 3 columns: it must be square"),
        (np.array([[1, np.nan], [np.nan, 1]]), "similarity contains NaN"),
        (np.array([[1, 0.5], [0.4, 1]]), "similarity of '0' and '1' is 0.5 and 0.4: it must be symmetric"),
        (np.array([["a", "b"], ["c", "d"]]), "could not convert string to float: .*'a'"),
    ],
)
def test_arrays_that_are_no_similarity_are_refused_in_one_line(wrong, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        LayerClustering(1).fit(wrong)
    assert "\n" not in str(error.value)


def test_a_sparse_table_is_refused():
    with pytest.raises(TypeError, match="[Ss]parse"):
        LayerClustering(2).fit(csr_array(np.eye(4)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.iloc[:5], "5 rows and 6 columns"),
        (lambda s: s.iloc[:0, :0], "0 rows and 0 columns"),
        (lambda s: s[names(1, 0, 2, 3, 4, 5)], "row 'block.0' beside column 'block.1'"),
        (lambda s: s.set_axis(["a"] * 6, axis=0).set_axis(["a"] * 6, axis=1), "names layer 'a' twice"),
        (lambda s: 1 - s, "0 on the diagonal: these are distances; pass 1 - distance"),
        (lambda s: s.replace(0.6, np.nan), "'block.3' and 'block.4' is nan and nan: it must be finite"),
        (lambda s: s - np.triu(np.full((6, 6), 0.1), 5), "'block.5' is 0.0 and 0.1: it must be symmetric"),
    ],
)
def test_tables_that_are_no_similarity_are_refused_in_one_line(change, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        LayerClustering(2).fit(change(table(TWO_GROUPS)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [
        ({"n_clusters": 7}, "n_clusters is 7: it must be from 1 to 6"),
        ({"n_clusters": 0}, "n_clusters is 0"),
        ({"n_clusters": 2.0}, "n_clusters is 2.0: it must be a whole number from 1 to 6"),
        ({"n_clusters": True}, "n_clusters is True: it must be a whole number"),
        ({"method": "pursuit"}, "method 'pursuit' is unknown: did you mean 'pursuhint'"),
        ({"representative": "centre"}, "representative 'centre' is unknown: did you mean 'center'"),
    ],
)
def test_impossible_parameters_are_refused_when_fitting(parameters, complaint):
    with pytest.raises(ValueError, match=complaint):
        LayerClustering(**parameters).fit(table(TWO_GROUPS))


# ---- Strategies ----


@pytest.mark.parametrize(
    ("stages", "n_hints", "one_based"),
    [
        ((18, 18, 18), 3, [9, 27, 45]),
        ((3, 4, 6, 3), 4, [2, 6, 10, 14]),
        ((6, 6, 6), 3, [3, 9, 15]),
        ((5, 5, 5), 3, [3, 8, 13]),
        ((4, 3), 3, [1, 3, 6]),  # groups 1-2, 3-4, 5-7
        ((2, 2), 1, [2]),
    ],
)
def test_uniform_takes_the_middles_of_equal_groups(stages, n_hints, one_based):
    points = select_hint_points("uniform", None, layer_table(*stages), n_hints)
    assert points == HintPoints("uniform", names(*(i - 1 for i in one_based)))


@pytest.mark.parametrize(
    ("stages", "n_hints", "one_based"),
    [
        ((18, 18, 18), 3, [18, 36, 54]),
        ((3, 4, 6, 3), 4, [3, 7, 13, 16]),
        ((3, 4, 6, 3), 3, [7, 13, 16]),  # stages ceil(4/3), ceil(8/3), 4
        ((3, 4, 6, 3), 2, [7, 16]),
        ((3, 4, 6, 3), 1, [16]),
        ((3, 4, 6, 3), 5, [3, 7, 10, 13, 16]),  # the stage of six has the most layers: ends of its halves
        ((4, 4), 3, [4, 6, 8]),  # of equal stages the deeper one is split
        ((1, 2), 3, [1, 2, 3]),
    ],
)
def test_stage_ends_serve_any_number_of_hints(stages, n_hints, one_based):
    points = select_hint_points("stage_ends", None, layer_table(*stages), n_hints)
    assert points.layers == names(*(i - 1 for i in one_based))


def test_random_hint_points_are_a_sorted_seeded_draw_over_all_layers():
    layers = layer_table(4, 4, 4)
    draws = [select_hint_points("random", None, layers, 3, seed) for seed in range(60)]
    depth = {layer: i for i, layer in enumerate(layers["layer"])}
    for draw in draws:
        places = [depth[layer] for layer in draw.layers]
        assert len(set(places)) == 3 and places == sorted(places)
    assert {layer for draw in draws for layer in draw.layers} == set(layers["layer"])
    assert len({tuple(draw.layers) for draw in draws}) > 30
    assert select_hint_points("random", None, layers, 3, 7) == draws[7]


def test_none_gives_no_hint_points_whatever_their_number():
    for n_hints in (0, 3, 99):
        assert len(select_hint_points("none", None, layer_table(3, 3), n_hints)) == 0


@pytest.mark.parametrize(
    ("strategy", "expected", "more"),
    [
        ("clustered", (1, 4), {}),
        ("clustered_medoid", (2, 4), {}),
        ("clustered_first", (0, 4), {}),
        ("clustered_last", (3, 5), {}),
        ("reversed", (1, 4), {"pairing": "reversed"}),
        ("untrained", (1, 4), {"source": "untrained"}),
        ("shuffled", (1, 4), {"source": "shuffled"}),
    ],
)
def test_strategies_with_clusters_are_the_layer_clustering(strategy, expected, more):
    similarity = np.array(TWO_GROUPS)
    similarity[2, 3] = similarity[3, 2] = 0.95  # medoid of {0,1,2,3}: totals 0.9, 0.5, 0.35, 0.95
    points = select_hint_points(strategy, table(similarity), layer_table(3, 3), 2)
    assert points == HintPoints(strategy, names(*expected), labels=[0, 0, 0, 0, 1, 1], **more)


@pytest.mark.parametrize(("n_layers", "middle"), [(1, 0), (6, 2), (7, 3), (54, 26)])
def test_one_teacher_layer_can_serve_every_student_point(n_layers, middle):
    layers, n_hints = layer_table(n_layers), min(3, n_layers)
    last = select_hint_points("all_to_last", None, layers, n_hints)
    assert last == HintPoints("all_to_last", names(n_layers - 1) * n_hints)
    assert select_hint_points("all_to_middle", None, layers, n_hints).layers == names(middle) * n_hints


def test_single_layers_are_counted_by_depth_whatever_the_number_of_hints():
    layers = layer_table(3, 3)
    for n_hints in (1, 3, 99):
        alone = [select_hint_points("single", None, layers, n_hints, seed) for seed in range(6)]
        assert alone == [HintPoints("single", names(i)) for i in range(6)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_subsets_are_counted_in_lexicographic_order(size):
    layers = layer_table(3, 3)
    found = [select_hint_points("subset", None, layers, size, seed).layers for seed in range(math.comb(6, size))]
    assert found == [names(*depths) for depths in itertools.combinations(range(6), size)]


def test_a_subset_is_found_without_listing_those_before_it():
    layers = layer_table(54)
    last = math.comb(54, 27) - 1  # 1.9 * 10^15
    assert select_hint_points("subset", None, layers, 27, last).layers == names(*range(27, 54))
    assert select_hint_points("subset", None, layers, 27, last - 1).layers == names(26, *range(28, 54))


def test_last_is_the_deepest_layer_alone_for_the_students_last_stage_end():
    points = select_hint_points("last", None, layer_table(3, 3), 2)
    assert points == HintPoints("last", names(5))
    assert pair_layers(points, layer_table(3, 3), layer_table(1, 2)) == [HintPair(*names(5), *names(2))]


def test_hints_that_are_redrawn_name_the_pool_and_the_size_of_a_draw():
    points = select_hint_points("redrawn", None, layer_table(3, 3), 2)
    assert points == HintPoints("redrawn", names(*range(6)), redrawn=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_answers_to_one_signature_with_plain_values(strategy):
    points = select_hint_points(strategy, by_depth(6), layer_table(2, 2, 2), n_hints=3, seed=1)
    assert len(points) == {"none": 0, "last": 1, "single": 1, "redrawn": 6}.get(strategy, 3)
    assert points.strategy == strategy
    assert all(type(layer) is str for layer in points.layers)
    assert points.labels is None or all(type(label) is int for label in points.labels)
    assert points.pairing in PAIRING_RULES and points.source in SOURCES
    assert type(points.redrawn) is int and (points.redrawn > 0) == (strategy == "redrawn")


def test_impossible_selections_are_refused_in_one_line():
    layers = layer_table(3, 3)
    with pytest.raises(ValueError, match="strategy 'stage_end' is unknown: did you mean 'stage_ends'"):
        select_hint_points("stage_end", None, layers, 2)
    for strategy in set(STRATEGIES) - {"none", "last", "single"}:
        for n_hints in (0, 7):
            with pytest.raises(ValueError, match=f"n_hints is {n_hints}: it must be from 1 to 6"):
                select_hint_points(strategy, table(TWO_GROUPS), layers, n_hints)
    for seed in (-1, 6):
        with pytest.raises(ValueError, match=f"seed is {seed}: there are 6 layers, numbered from 0 to 5"):
            select_hint_points("single", None, layers, 1, seed)
    for seed in (-1, 20):
        with pytest.raises(ValueError, match=f"seed is {seed}: there are 20 subsets of 3 out of 6 layers, .* 0 to 19"):
            select_hint_points("subset", None, layers, 3, seed)
    with pytest.raises(ValueError, match=r"block.0 .. block.5 \(6\) and the layer table of block.0 .. block.6 \(7\)"):
        select_hint_points("clustered", table(TWO_GROUPS), layer_table(3, 4), 2)
    with pytest.raises(ValueError, match="similarity is a NoneType"):
        select_hint_points("clustered", None, layers, 2)
    with pytest.raises(ValueError, match="stage_end is false for the last layer, 'block.4'"):
        select_hint_points("stage_ends", None, layers.iloc[:5], 2)
    with pytest.raises(ValueError, match="n_hints is 7"):
        select_all(["subset"], {"depth": by_depth(6)}, layers, 7, 1, 0)


# ---- A whole study's choices ----


SIMILARITIES = {"r2_cca": table(TWO_GROUPS), "depth": by_depth(6)}


def test_a_study_chooses_under_the_names_that_its_arms_carry():
    strategies = [name for name in STRATEGIES if name not in ("single", "subset")]
    chosen = select_all(strategies, SIMILARITIES, layer_table(3, 3), 2, random_draws=2, seed=5)
    assert list(chosen) == [
        "none",
        "stage_ends",
        "last",
        "uniform",
        "random_0",
        "random_1",
        "clustered_r2_cca",
        "clustered_depth",
        "clustered_medoid_r2_cca",
        "clustered_first_r2_cca",
        "clustered_last_r2_cca",
        "reversed",
        "all_to_last",
        "all_to_middle",
        "untrained",
        "shuffled",
        "redrawn",
    ]
    assert all(points.strategy == name for name, points in chosen.items())
    for draw in range(2):
        assert (
            chosen[f"random_{draw}"].layers == select_hint_points("random", None, layer_table(3, 3), 2, 5 + draw).layers
        )
    # The main metric is the first; of depth alone the halves are {0,1,2} {3,4,5}, with other labels.
    for name in ("clustered_r2_cca", "reversed", "untrained", "shuffled", "clustered_first_r2_cca"):
        assert chosen[name].labels == [0, 0, 0, 0, 1, 1]
    assert chosen["clustered_depth"].labels == [0, 0, 0, 1, 1, 1]
    assert (chosen["reversed"].pairing, chosen["untrained"].source, chosen["redrawn"].redrawn) == (
        "reversed",
        "untrained",
        2,
    )


def test_a_study_takes_every_layer_alone_and_every_subset():
    chosen = select_all(["single", "subset"], SIMILARITIES, layer_table(3, 3), 3, random_draws=0, seed=99)
    assert len(chosen) == 6 + 20
    for depth in range(1, 7):
        assert chosen[f"single_{depth}"] == HintPoints(f"single_{depth}", names(depth - 1))
    for a, b, c in itertools.combinations(range(1, 7), 3):
        assert chosen[f"subset_{a}_{b}_{c}"] == HintPoints(f"subset_{a}_{b}_{c}", names(a - 1, b - 1, c - 1))


def test_choices_are_named_before_a_similarity_is_known():
    named = name_choices(["single", "random", "clustered", "clustered_last", "last"], ["a", "b"], 2, 9, 2)
    assert named == {
        "single_1": ("single", "a", 0),
        "single_2": ("single", "a", 1),
        "random_0": ("random", "a", 0),
        "random_1": ("random", "a", 1),
        "clustered_a": ("clustered", "a", 0),
        "clustered_b": ("clustered", "b", 0),
        "clustered_last_a": ("clustered_last", "a", 0),
        "last": ("last", "a", 0),
    }
    strategies = [name for name in STRATEGIES]
    named = name_choices(strategies, list(SIMILARITIES), 6, 2, 3)
    assert list(named) == list(select_all(strategies, SIMILARITIES, layer_table(3, 3), 2, 3, seed=0))
    with pytest.raises(ValueError, match="n_hints is 7"):
        name_choices(["subset"], ["a"], 6, 7, 1)


# ---- Pairs ----


def student_points(student, n_hints, pairing="in_order"):
    teacher = layer_table(6, 6, 6)
    pairs = pair_layers(HintPoints("test", names(*range(n_hints)), pairing=pairing), teacher, student)
    assert [pair.teacher_layer for pair in pairs] == names(*range(n_hints))
    return [int(pair.student_layer.removeprefix("student.")) for pair in pairs]


def test_the_first_hint_point_goes_with_the_first_stage_end():
    student = layer_table(2, 2, 2, prefix="student")
    pairs = pair_layers(HintPoints("test", names(2, 8, 14)), layer_table(6, 6, 6), student)
    assert pairs == [
        HintPair("block.2", "student.1"),
        HintPair("block.8", "student.3"),
        HintPair("block.14", "student.5"),
    ]


def test_a_student_with_more_or_fewer_stages_still_gets_a_point_per_hint():
    student = layer_table(2, 2, 2, 2, prefix="student")
    assert student_points(student, 4) == [1, 3, 5, 7]
    assert student_points(student, 3) == [3, 5, 7]
    assert student_points(student, 1) == [7]
    assert student_points(student, 5) == [1, 3, 5, 6, 7]
    assert student_points(layer_table(1, 1, 1, prefix="student"), 3) == [0, 1, 2]


def test_reversed_pairs_use_the_same_points_in_the_other_order():
    student = layer_table(2, 2, 2, prefix="student")
    assert student_points(student, 3, "reversed") == [5, 3, 1]


def test_pairs_follow_depth_and_not_the_order_of_the_list():
    student = layer_table(2, 2, prefix="student")
    for order in ((9, 10), (10, 9)):  # by name, "block.10" would come first
        pairs = pair_layers(HintPoints("test", names(*order)), layer_table(6, 6), student)
        assert [pair.teacher_layer for pair in pairs] == names(9, 10)


def test_one_teacher_layer_may_serve_every_student_point():
    pairs = pair_layers(HintPoints("all_to_one", names(5, 5)), layer_table(3, 3), layer_table(1, 1, prefix="student"))
    assert pairs == [HintPair("block.5", "student.0"), HintPair("block.5", "student.1")]


def test_pairs_carry_whose_features_they_show():
    teacher, student = layer_table(3, 3), layer_table(1, 1, prefix="student")
    for source in SOURCES:
        pairs = pair_layers(HintPoints("test", names(1, 4), source=source), teacher, student)
        assert pairs == [HintPair("block.1", "student.0", source), HintPair("block.4", "student.1", source)]
    assert HintPair("a", "b") == HintPair("a", "b", "trained")


def test_a_single_hint_goes_to_the_end_of_the_student():
    student = layer_table(2, 2, 2, prefix="student")
    for layer in range(6):
        pairs = pair_layers(HintPoints("single_1", names(layer)), layer_table(3, 3), student)
        assert pairs == [HintPair(f"block.{layer}", "student.5")]


def test_redrawn_hints_pair_every_layer_of_the_pool_with_every_student_point():
    student = layer_table(2, 2, 2, prefix="student")
    pool = HintPoints("redrawn", names(3, 1, 0, 2), redrawn=3, source="shuffled")
    pairs = pair_layers(pool, layer_table(2, 2), student)
    assert len(pairs) == 4 * 3
    for i, j in itertools.product(range(4), range(3)):
        assert pairs[i * 3 + j] == HintPair(f"block.{i}", f"student.{(1, 3, 5)[j]}", "shuffled")
    # The number of student points is that of the draw and not of the pool, which may be larger than the student.
    assert len(pair_layers(HintPoints("redrawn", names(*range(54)), redrawn=2), layer_table(54), student)) == 108


def test_no_hint_points_make_no_pairs():
    for pairing in PAIRING_RULES:
        assert pair_layers(HintPoints("none", [], pairing=pairing), layer_table(3), layer_table(2)) == []


def test_impossible_pairs_are_refused_in_one_line():
    teacher, student = layer_table(6, 6), layer_table(1, 1, prefix="student")
    for points, complaint in (
        (HintPoints("test", names(0, 1, 2)), "3 hint points for a student of 2 candidate layers"),
        (HintPoints("test", names(*range(6)), redrawn=3), "3 hint points for a student of 2 candidate layers"),
        (HintPoints("test", names(0, 1), redrawn=3), "strategy 'test' redraws 3 of 2 layers: draw fewer"),
        (HintPoints("test", names(12)), "teacher layer of strategy 'test' 'block.12' is unknown: did you mean"),
        (
            HintPoints("test", names(0), pairing="reverse"),
            "pairing of strategy 'test' 'reverse' is unknown: did you mean 'reversed'",
        ),
        (
            HintPoints("test", names(0), source="shuffle"),
            "source of strategy 'test' 'shuffle' is unknown: did you mean 'shuffled'",
        ),
    ):
        with pytest.raises(ValueError, match=complaint) as error:
            pair_layers(points, teacher, student)
        assert "\n" not in str(error.value)

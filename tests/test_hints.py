"""Clusters, hint points and pairs, against examples small enough to work out by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from pursuhint_lib.hints import (
    METHODS,
    PAIRING_RULES,
    STRATEGIES,
    HintPair,
    HintPoints,
    LayerClustering,
    pair_layers,
    seed_indices,
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


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 4])
def test_contiguous_finds_the_best_split_of_all(n_clusters):
    noise = np.random.default_rng(n_clusters).uniform(0, 1, (8, 8))
    values = (noise + noise.T) / 2
    np.fill_diagonal(values, 1)

    def total(cuts):
        edges = [0, *cuts, 8]
        return sum((1 - values[a:b, a:b]).sum(0).min() for a, b in itertools.pairwise(edges))

    best = min(itertools.combinations(range(1, 8), n_clusters - 1), key=total)
    found = LayerClustering(n_clusters, method="contiguous").fit(table(values))
    assert found.contiguous_
    assert found.labels_.tolist() == [sum(cut <= i for cut in best) for i in range(8)]


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.to_numpy(), "similarity is a ndarray: it must be a DataFrame"),
        (lambda s: s.iloc[:5], "5 rows and 6 columns"),
        (lambda s: s.iloc[:0, :0], "0 rows and 0 columns"),
        (lambda s: s[names(1, 0, 2, 3, 4, 5)], "row 'block.0' beside column 'block.1'"),
        (lambda s: s.set_axis(["a"] * 6, axis=0).set_axis(["a"] * 6, axis=1), "names layer 'a' twice"),
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
    ("strategy", "expected"), [("clustered", (1, 4)), ("clustered_first", (0, 4)), ("clustered_last", (3, 5))]
)
def test_clustered_strategies_are_the_layer_clustering(strategy, expected):
    points = select_hint_points(strategy, table(TWO_GROUPS), layer_table(3, 3), 2)
    assert points == HintPoints(strategy, names(*expected), labels=[0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_answers_to_one_signature_with_plain_values(strategy):
    points = select_hint_points(strategy, by_depth(6), layer_table(2, 2, 2), n_hints=3, seed=1)
    assert len(points) == (0 if strategy == "none" else 3)
    assert all(type(layer) is str for layer in points.layers)
    assert points.labels is None or all(type(label) is int for label in points.labels)


def test_impossible_selections_are_refused_in_one_line():
    layers = layer_table(3, 3)
    with pytest.raises(ValueError, match="strategy 'stage_end' is unknown: did you mean 'stage_ends'"):
        select_hint_points("stage_end", None, layers, 2)
    for strategy in ("stage_ends", "uniform", "random", "clustered"):
        with pytest.raises(ValueError, match="n_hints is 7: it must be from 1 to 6"):
            select_hint_points(strategy, table(TWO_GROUPS), layers, 7)
    with pytest.raises(ValueError, match=r"block.0 .. block.5 \(6\) and the layer table of block.0 .. block.6 \(7\)"):
        select_hint_points("clustered", table(TWO_GROUPS), layer_table(3, 4), 2)
    with pytest.raises(ValueError, match="similarity is a NoneType"):
        select_hint_points("clustered", None, layers, 2)
    with pytest.raises(ValueError, match="stage_end is false for the last layer, 'block.4'"):
        select_hint_points("stage_ends", None, layers.iloc[:5], 2)


# ---- Pairs ----


def student_points(student, n_hints, rule="stage_ends"):
    teacher = layer_table(6, 6, 6)
    pairs = pair_layers(HintPoints("test", names(*range(n_hints))), teacher, student, rule)
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


def test_no_hint_points_make_no_pairs():
    for rule in PAIRING_RULES:
        assert pair_layers(HintPoints("none", []), layer_table(3), layer_table(2), rule) == []


def test_impossible_pairs_are_refused_in_one_line():
    teacher, student = layer_table(6, 6), layer_table(1, 1, prefix="student")
    with pytest.raises(ValueError, match="3 hint points for a student of 2 candidate layers"):
        pair_layers(HintPoints("test", names(0, 1, 2)), teacher, student)
    with pytest.raises(ValueError, match="teacher layer of strategy 'test' 'block.12' is unknown: did you mean"):
        pair_layers(HintPoints("test", names(12)), teacher, student)
    with pytest.raises(ValueError, match="pairing rule 'reverse' is unknown: did you mean 'reversed'"):
        pair_layers(HintPoints("test", names(0)), teacher, student, "reverse")

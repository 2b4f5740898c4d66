"""How firm a choice is: tables small enough to check by eye; and the choices of a whole study under their names."""

import numpy as np
import pandas as pd
import pytest
import torch

from pursuhint_lib.choices import choice_frequencies, embed_layers, score_cluster_numbers
from pursuhint_lib.hints import LayerClustering, select_all
from pursuhint_lib.similarity import LayerProfile, cross_similarity, linear_cka

LAYERS = [f"layer{i}" for i in range(9)]


def blocks(within=0.9, between=0.1):
    """Three blocks of three equal layers."""
    group = np.arange(9) // 3
    values = np.where(group[:, None] == group[None, :], within, between)
    np.fill_diagonal(values, 1.0)
    return pd.DataFrame(values, index=LAYERS, columns=LAYERS)


def test_the_silhouette_peaks_at_the_number_of_blocks_and_distances_fall():
    scores = score_cluster_numbers(blocks()).set_index("n_clusters")
    assert scores["silhouette"].idxmax() == 3
    # a layer's mean distance to its own block is 0.1, to the others 0.9: silhouette (0.9 - 0.1) / 0.9
    assert scores.loc[3, "silhouette"] == pytest.approx(0.8 / 0.9)
    # in each block one layer is the center (distance 0), two lie 0.1 from it
    assert scores.loc[3, "within_distance"] == pytest.approx(2 / 3 * 0.1)
    assert list(scores.index) == list(range(2, 9))


def test_layers_as_points_keep_their_distances_when_two_dimensions_can():
    places = np.array([[0.0, 0.0], [0.3, 0.1], [0.5, 0.4], [0.9, 0.2]])
    distance = np.linalg.norm(places[:, None] - places[None, :], axis=2)
    table = pd.DataFrame(1 - distance, index=list("abcd"), columns=list("abcd"))
    points = embed_layers(table)
    found = points[["x", "y"]].to_numpy()
    assert np.linalg.norm(found[:, None] - found[None, :], axis=2) == pytest.approx(distance, abs=1e-6)
    assert list(points["layer"]) == list("abcd") and (found[0] <= found[-1]).all()


def long(table, metric, resample):
    rows = table.rename_axis("layer_a").reset_index().melt("layer_a", var_name="layer_b", value_name="similarity")
    return rows.assign(metric=metric, resample=resample)


def test_frequencies_count_the_resamples_that_chose_a_layer():
    swapped = blocks().to_numpy().copy()
    swapped[3, :], swapped[:, 3] = swapped[0, :].copy(), swapped[:, 0].copy()  # layer3 moves to the first block
    swapped[3, 3] = 1.0
    swapped = pd.DataFrame(swapped, index=LAYERS, columns=LAYERS)
    resamples = pd.concat([long(blocks(), "m", 0), long(blocks(), "m", 1), long(swapped, "m", 2)])
    table = choice_frequencies(resamples, LAYERS, 3).set_index("layer")["frequency"]
    chosen = [LayerClustering(3).fit(t).hint_points_ for t in (blocks(), blocks(), swapped)]
    for layer in LAYERS:
        assert table[layer] == pytest.approx(sum(layer in points for points in chosen) / 3)
    assert table.sum() == pytest.approx(3) and table["layer1"] > 0.6


def test_a_study_chooses_under_the_names_that_its_arms_carry():
    layers = pd.DataFrame({"layer": LAYERS, "stage_end": [i % 3 == 2 for i in range(9)]})
    similarities = {"r2_cca": blocks(), "linear_cka": blocks(0.8, 0.3)}
    strategies = ["stage_ends", "uniform", "random", "clustered", "clustered_last"]
    chosen = select_all(strategies, similarities, layers, 3, 2, 0)
    assert list(chosen) == [
        "stage_ends",
        "uniform",
        "random_0",
        "random_1",
        "clustered_r2_cca",
        "clustered_linear_cka",
        "clustered_last_r2_cca",
    ]
    assert chosen["clustered_r2_cca"].layers == chosen["uniform"].layers == ["layer1", "layer4", "layer7"]
    assert chosen["clustered_last_r2_cca"].layers == chosen["stage_ends"].layers == ["layer2", "layer5", "layer8"]
    assert chosen["random_0"].layers != chosen["random_1"].layers
    assert all(points.strategy == name for name, points in chosen.items())


def test_cross_similarity_is_linear_cka_of_every_pair():
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(30, width, generator=generator) for name, width in (("a", 4), ("b", 6), ("c", 3))}
    teacher = LayerProfile.from_features({name: features[name] for name in "ab"})
    student = LayerProfile.from_features({"c": features["c"], "a": features["a"]})
    table = cross_similarity(teacher, student)
    assert table.loc["a", "a"] == pytest.approx(1.0)
    assert table.loc["b", "c"] == pytest.approx(float(linear_cka(features["b"], features["c"])))
    with pytest.raises(ValueError, match="30 and 20 images"):
        cross_similarity(teacher, student.subset(range(20)))

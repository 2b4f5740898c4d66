"""How firm a choice of layers is.

A clustering always gives an answer. These functions ask whether another number of clusters would be more natural, how
often other images would have chosen the same layers, and draw the layers as points. Tables in, tables out.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.manifold import ClassicalMDS
from sklearn.metrics import silhouette_score

from pursuhint_lib.hints import LayerClustering


def embed_layers(similarity: pd.DataFrame) -> pd.DataFrame:
    """Layers as points in the plane whose distances are as near as can be to 1 - similarity (classical scaling).

    similarity: labelled (L, L) with L >= 2. Returns columns layer, x, y. The signs are fixed so that the first layer
    lies left of and below the last, which makes pictures of equal tables equal.
    """
    points = ClassicalMDS(n_components=2, metric="precomputed").fit_transform(1 - similarity.to_numpy())
    points = points * np.where(points[-1] < points[0], -1.0, 1.0)
    return pd.DataFrame({"layer": list(similarity.index), "x": points[:, 0], "y": points[:, 1]})


def score_cluster_numbers(similarity: pd.DataFrame, largest: int = 8) -> pd.DataFrame:
    """Quality of the published clustering for every number of clusters from 2 to `largest` (less, with few layers).

    Columns: n_clusters, silhouette (mean, in [-1, 1]; Rousseeuw 1987), within_distance (mean distance 1 - similarity
    of a layer to the center of its cluster). NaN silhouette where all layers fell into one cluster.
    """
    distance = (1 - similarity.to_numpy()).clip(min=0)
    np.fill_diagonal(distance, 0)
    rows = []
    for n_clusters in range(2, min(largest, len(distance) - 1) + 1):
        clustering = LayerClustering(n_clusters).fit(similarity)
        labels, centers = clustering.labels_, clustering.center_indices_
        several = 2 <= len(set(labels)) < len(labels)
        rows.append(
            {
                "n_clusters": n_clusters,
                "silhouette": float(silhouette_score(distance, labels, metric="precomputed"))
                if several
                else float("nan"),
                "within_distance": float(distance[np.arange(len(labels)), centers[labels]].mean()),
            }
        )
    return pd.DataFrame(rows, columns=["n_clusters", "silhouette", "within_distance"])


def choice_frequencies(resamples: pd.DataFrame, layers: Sequence[str], n_hints: int) -> pd.DataFrame:
    """How often each layer is a hint point when the clustering is repeated on every resample.

    resamples: columns metric, resample, layer_a, layer_b, similarity (every ordered pair). layers: L names by depth.
    Returns columns metric, layer, frequency (share of that metric's resamples), a row per metric and layer.
    """
    rows = []
    for metric, of_metric in resamples.groupby("metric", sort=False):
        chosen = pd.Series(0, index=list(layers))
        for _, pairs in of_metric.groupby("resample"):
            table = pairs.pivot(index="layer_a", columns="layer_b", values="similarity").loc[list(layers), list(layers)]
            chosen[LayerClustering(n_hints).fit(table).hint_points_] += 1
        frequency = chosen / of_metric["resample"].nunique()
        rows += [{"metric": metric, "layer": layer, "frequency": value} for layer, value in frequency.items()]
    return pd.DataFrame(rows, columns=["metric", "layer", "frequency"])

"""How firm a choice of layers is.

A clustering always gives an answer. These functions ask whether another number of clusters would be more natural, how
often other images would have chosen the same layers, whether another measure or teacher would have, and draw the layers
as points. Tables in, tables out.

Many similarities of one teacher stand in one long table, a row per pair of layers: columns metric, one that tells the
samples apart (here `resample`), layer_a, layer_b, similarity, where layer_a is the shallower of the two.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from sklearn.manifold import ClassicalMDS
from sklearn.metrics import adjusted_rand_score, silhouette_score

from pursuhint_lib.hints import LayerClustering, checked_similarity

# ---- Similarities as pairs ----


def to_pairs(similarity: pd.DataFrame) -> pd.DataFrame:
    """The upper triangle of a similarity table (L, L) as rows; `from_pairs` is the way back.

    Returns columns layer_a, layer_b, similarity: L (L - 1) / 2 rows, layer_a shallower than layer_b, in order of depth
    of layer_a, then of layer_b. Raises ValueError for what `checked_similarity` refuses, and for a diagonal that is not
    one, which would be lost.
    """
    layers, values = checked_similarity(similarity)
    for layer, value in zip(layers, values.diagonal()):
        if value != 1:
            raise ValueError(f"similarity of {layer!r} with itself is {value}: it must be 1")
    a, b = np.triu_indices(len(layers), 1)
    names = pd.Series(layers)
    return pd.DataFrame({"layer_a": names[a].array, "layer_b": names[b].array, "similarity": values[a, b]})


def from_pairs(pairs: pd.DataFrame, layers: Sequence[str]) -> pd.DataFrame:
    """The similarity table (L, L) of which `pairs` is the upper triangle: labelled, symmetric, of unit diagonal.

    pairs: one row per pair in any order, columns layer_a, layer_b, similarity; others are not looked at. layers: L
    names in order of depth. Raises ValueError, naming the layers, for a pair that is missing, given twice, given deeper
    layer first, or of a layer that is not among `layers`.
    """
    layers = list(layers)
    depth = {layer: i for i, layer in enumerate(layers)}
    for layer in pd.concat([pairs["layer_a"], pairs["layer_b"]]).unique():
        if layer not in depth:
            raise ValueError(f"pairs name layer {layer!r}, which is none of the {len(layers)} layers asked for")
    a, b = (pairs[side].map(depth).to_numpy(dtype=int) for side in ("layer_a", "layer_b"))
    given = np.zeros((len(layers), len(layers)), dtype=int)
    np.add.at(given, (a, b), 1)
    for wrong, text in (
        (np.tril(given) > 0, "pairs hold {!r} before {!r}: layer_a must be the shallower one"),
        (given > 1, "pairs hold {!r} and {!r} more than once: they must be one sample of one metric"),
        (np.triu(given == 0, 1), "pairs lack {!r} and {!r}: every two layers must be there"),
    ):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise ValueError(text.format(layers[i], layers[j]))
    values = np.eye(len(layers))
    values[a, b] = values[b, a] = pairs["similarity"]
    return pd.DataFrame(values, index=layers, columns=layers)


# ---- Layers as points ----


def embed_layers(similarity: pd.DataFrame) -> pd.DataFrame:
    """Layers as points in the plane whose distances are as near as can be to 1 - similarity (classical scaling).

    similarity: labelled (L, L) with L >= 2. Returns columns layer, x, y. The signs are fixed so that the first layer
    lies left of and below the last, which makes pictures of equal tables equal.
    """
    points = ClassicalMDS(n_components=2, metric="precomputed").fit_transform(1 - similarity.to_numpy())
    points = points * np.where(points[-1] < points[0], -1.0, 1.0)
    return pd.DataFrame({"layer": list(similarity.index), "x": points[:, 0], "y": points[:, 1]})


# ---- How many clusters, and how firm ----


def score_cluster_numbers(
    similarity: pd.DataFrame, resamples: pd.DataFrame | None = None, largest: int = 8, method: str = "pursuhint"
) -> pd.DataFrame:
    """Quality of the clustering for every number of clusters from 2 to `largest` (at most L - 1).

    similarity: labelled (L, L). resamples: long table of one metric, columns resample, layer_a, layer_b, similarity.
    method: of `LayerClustering`, for all clusterings alike.
    Columns: n_clusters; silhouette (mean, in [-1, 1]; Rousseeuw 1987), NaN where all layers fell into one cluster;
    within_distance (mean distance 1 - similarity of a layer to the center of its cluster); stability (mean adjusted
    Rand index, Hubert & Arabie 1985, of the whole table's clusters with those of each resample), NaN without resamples.
    """
    distance = (1 - similarity.to_numpy()).clip(min=0)
    np.fill_diagonal(distance, 0)
    tables = [] if resamples is None else _resampled(resamples, similarity.index)
    rows = []
    for n_clusters in range(2, min(largest, len(distance) - 1) + 1):
        clustering = LayerClustering(n_clusters, method)
        labels, centers = clustering.fit(similarity).labels_, clustering.center_indices_
        several = len(set(labels)) > 1
        agreements = [adjusted_rand_score(labels, clustering.fit(table).labels_) for table in tables]
        rows.append(
            {
                "n_clusters": n_clusters,
                "silhouette": silhouette_score(distance, labels, metric="precomputed") if several else np.nan,
                "within_distance": distance[np.arange(len(labels)), centers[labels]].mean(),
                "stability": np.mean(agreements) if agreements else np.nan,
            }
        )
    return pd.DataFrame(rows, columns=["n_clusters", "silhouette", "within_distance", "stability"])


def choose_number(scores: pd.DataFrame, enough: float = 0.8) -> int:
    """The number of clusters that the scores speak for, by a rule that is fixed before they are seen.

    1. Of the numbers with a stability of at least `enough`, the one with the largest silhouette.
    2. If none is that stable, the most stable.
    3. Where no stability is known, the one with the largest silhouette.
    The smallest of equals. A number without a silhouette is no candidate.

    scores: of `score_cluster_numbers`. Raises ValueError where no number has a silhouette.
    """
    candidates = scores.dropna(subset="silhouette").sort_values("n_clusters").set_index("n_clusters")
    if candidates.empty:
        raise ValueError(f"none of {len(scores)} numbers of clusters has a silhouette: there is nothing to choose by")
    stable = candidates[candidates["stability"] >= enough]
    if candidates["stability"].isna().all():
        return int(candidates["silhouette"].idxmax())
    return int(candidates["stability"].idxmax() if stable.empty else stable["silhouette"].idxmax())


def choice_frequencies(
    resamples: pd.DataFrame, layers: Sequence[str], n_hints: int, method: str = "pursuhint"
) -> pd.DataFrame:
    """How often each layer is a hint point when the clustering is repeated on every resample.

    resamples: long table, columns metric, resample, layer_a, layer_b, similarity. layers: L names by depth.
    Returns columns metric, layer, frequency (share of that metric's resamples), a row per metric and layer.
    """
    rows = []
    for metric, of_metric in resamples.groupby("metric", sort=False):
        tables = _resampled(of_metric, layers)
        chosen = pd.Series(0, index=list(layers))
        for table in tables:
            chosen[LayerClustering(n_hints, method).fit(table).hint_points_] += 1
        frequency = chosen / len(tables)
        rows += [{"metric": metric, "layer": layer, "frequency": value} for layer, value in frequency.items()]
    return pd.DataFrame(rows, columns=["metric", "layer", "frequency"])


def _resampled(resamples: pd.DataFrame, layers: Sequence[str]) -> list[pd.DataFrame]:
    return [from_pairs(pairs, layers) for _, pairs in resamples.groupby("resample")]


def partition_agreement(tables: Mapping[str, pd.DataFrame], n_clusters: int, method: str = "pursuhint") -> pd.DataFrame:
    """How much the clusters of every two similarities of the same layers have in common.

    tables: name -> labelled (L, L), for example of several metrics, resamples, numbers of images or teachers.
    A row per pair of names, in their order; columns a, b, adjusted_rand (of the cluster labels: 1 is equal, 0 is what
    chance gives; Hubert & Arabie 1985), shared (number of hint points in common), largest_shift (how many layers the
    i-th hint point by depth moves at most).
    Raises ValueError where two tables differ in layers.
    """
    fits = {name: LayerClustering(n_clusters, method).fit(table) for name, table in tables.items()}
    rows = []
    for (a, one), (b, other) in combinations(fits.items(), 2):
        if one.layers_ != other.layers_:
            raise ValueError(f"tables {a!r} and {b!r} are of different layers: they must be of the same, in one order")
        rows.append(
            {
                "a": a,
                "b": b,
                "adjusted_rand": adjusted_rand_score(one.labels_, other.labels_),
                "shared": len(set(one.hint_points_) & set(other.hint_points_)),
                "largest_shift": int(np.abs(one.center_indices_ - other.center_indices_).max()),
            }
        )
    return pd.DataFrame(rows, columns=["a", "b", "adjusted_rand", "shared", "largest_shift"])

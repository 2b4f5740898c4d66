"""From a table of layer similarities to hint points, and from hint points to pairs with student layers.

`LayerClustering` is the method; `select_hint_points` gives it and every control one signature; `pair_layers` says
which student layer looks at which hint point. A layer table (`features.layer_table`) lists layers in execution order,
so row i is the layer of depth i + 1; indices here are 0-based. Letters: L candidate layers, K clusters, M hint points.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import Tags, check_array
from sklearn.utils.validation import validate_data

# ---- Clustering methods: (distance (L, L), n_clusters) -> Partition ----


class Partition(NamedTuple):
    """labels: (L,) cluster of each layer; centers: (K,) layer index of each cluster, in the same numbering."""

    labels: np.ndarray
    centers: np.ndarray
    cycle: list[list[int]]  # centers of every round of a cycle; empty if the method came to rest
    n_rounds: int


def _pursuhint(distance: np.ndarray, n_clusters: int) -> Partition:
    """Evenly spaced seed layers; each layer joins its most similar center; a new center is the member in mid-depth.

    The rule of the method's public code. It minimizes nothing, so it can run in circles instead of coming to rest. The
    next centers follow from the present ones alone: the first repeat tells a rest (of period 1) from a cycle. Of a
    cycle we take the round whose centers are closest to the layers, sum_i min_k d(i, center_k), the earliest of equals.
    """
    centers = seed_indices(len(distance), n_clusters)
    rounds: list[tuple[int, ...]] = []
    while centers not in rounds:
        rounds.append(centers)
        labels = _nearest_center(distance, centers)
        members = [np.flatnonzero(labels == k) for k in range(n_clusters)]
        centers = tuple(_mid_depth(of) if len(of) else center for of, center in zip(members, centers))
    cycle = rounds[rounds.index(centers) :]
    best = min(cycle, key=lambda centers: distance[:, centers].min(1).sum())
    return Partition(
        labels=_nearest_center(distance, best),
        centers=np.array(best),
        cycle=[sorted(centers) for centers in cycle] if len(cycle) > 1 else [],
        n_rounds=len(rounds),
    )


def seed_indices(n_layers: int, n_clusters: int) -> tuple[int, ...]:
    """Where "pursuhint" starts: int(t (L - 1) / (K - 1)), t = 0..K-1. One cluster starts, and rests, in the middle."""
    if n_clusters == 1:
        return ((n_layers - 1) // 2,)
    return tuple(t * (n_layers - 1) // (n_clusters - 1) for t in range(n_clusters))


def _nearest_center(distance: np.ndarray, centers: Sequence[int] | np.ndarray) -> np.ndarray:
    """(L,) cluster numbers; ties go to the lowest."""
    return distance[:, centers].argmin(1)


def _mid_depth(members: np.ndarray) -> int:
    """The member whose index is nearest to floor(mean index); the shallower of two that are as near."""
    return int(members[np.abs(members - members.sum() // len(members)).argmin()])


def _average_linkage(distance: np.ndarray, n_clusters: int) -> Partition:
    """Merge the two clusters of least mean distance until `n_clusters` are left."""
    if len(distance) == 1:
        return _settled(np.zeros(1, dtype=int), 1)
    tree = linkage(squareform(distance, checks=False), "average")
    # "maxclust" cuts by height and leaves fewer clusters where merges tie; following the tree gives exactly K.
    merged = {i: [i] for i in range(len(distance))}
    for step, (a, b) in enumerate(tree[: len(distance) - n_clusters, :2].astype(int)):
        merged[len(distance) + step] = merged.pop(a) + merged.pop(b)
    labels = np.empty(len(distance), dtype=int)
    for k, members in enumerate(merged.values()):
        labels[members] = k
    return _settled(labels, n_clusters)


def _contiguous(distance: np.ndarray, n_clusters: int) -> Partition:
    """The split of the depth axis into K runs of layers with the least total distance of layers to their run's medoid.

    Exact, by dynamic programming over where the last run starts; the shallower start among equals.
    """
    n = len(distance)
    cost = np.full((n, n + 1), np.inf)  # cost[a, b]: layers a..b-1 as one run
    for a in range(n):
        totals = distance[a:, a:].cumsum(0)  # [i, m]: total distance of layers a..a+i to layer a+m
        inside = np.tri(n - a, dtype=bool)  # m <= i: the medoid is a layer of the run
        cost[a, a + 1 :] = np.where(inside, totals, np.inf).min(1)
    best = np.full(n + 1, np.inf)  # best[b]: layers 0..b-1, at first in no runs, then in one, two, ...
    best[0] = 0
    starts = []
    for _ in range(n_clusters):
        totals = best[:n, None] + cost  # [a, b]: the last run is a..b-1
        starts.append(totals.argmin(0))
        best = totals.min(0)
    labels, b = np.empty(n, dtype=int), n
    for k in reversed(range(n_clusters)):
        labels[starts[k][b] : b] = k
        b = starts[k][b]
    return _settled(labels, n_clusters)


def _kmedoids(distance: np.ndarray, n_clusters: int) -> Partition:
    """Partitioning around medoids (Kaufman & Rousseeuw 1987): start by BUILD, then the best swap while one helps.

    Lowers sum_i min_k d(i, medoid_k) to a local minimum: no exchange of one medoid for another layer lowers it further.
    Centers are the medoids, the shallowest of equals. Nothing is random.
    """
    import kmedoids  # a compiled library that only this method needs

    start = list(kmedoids.pam_build(distance, n_clusters).medoids.astype(int))
    # BUILD stops where another medoid gains nothing, as with layers that are exactly equal: the shallowest fill up.
    start += [i for i in range(len(distance)) if i not in start][: n_clusters - len(start)]
    medoids = np.sort(kmedoids.pam(distance, np.array(start)).medoids.astype(int))
    labels = _nearest_center(distance, medoids)
    labels[medoids] = np.arange(n_clusters)  # also where two medoids are exactly equal
    # Of two layers either is the medoid. To take the other changes no cluster: where it did, a swap would have helped.
    centers = np.array([_medoid(np.flatnonzero(labels == k), distance) for k in range(n_clusters)])
    return Partition(labels, centers, cycle=[], n_rounds=1)


def _medoid(members: np.ndarray, distance: np.ndarray) -> int:
    """The member with the least total distance to the members; the shallower of equals."""
    return int(members[distance[np.ix_(members, members)].sum(0).argmin()])


def _settled(labels: np.ndarray, n_clusters: int) -> Partition:
    """A partition of a method that has no centers of its own: they are the members in mid-depth."""
    centers = np.array([_mid_depth(np.flatnonzero(labels == k)) for k in range(n_clusters)])
    return Partition(labels, centers, cycle=[], n_rounds=1)


METHODS: dict[str, Callable[[np.ndarray, int], Partition]] = {
    "pursuhint": _pursuhint,
    "kmedoids": _kmedoids,
    "average_linkage": _average_linkage,
    "contiguous": _contiguous,
}

# ---- Representatives: (members, center, distance) -> layer index ----

REPRESENTATIVES: dict[str, Callable[[np.ndarray, int, np.ndarray], int]] = {
    "center": lambda members, center, distance: int(center),
    "medoid": lambda members, center, distance: _medoid(members, distance),
    "first": lambda members, center, distance: int(members[0]),
    "last": lambda members, center, distance: int(members[-1]),
}


class LayerClustering(ClusterMixin, BaseEstimator):
    """Clusters of alike layers, and one hint point for each: the layer-selection step of PURSUhInT (arXiv 2103.00053).

    A scikit-learn clusterer of a precomputed similarity: samples and features are both the L layers.

    n_clusters: K, at most the number of layers.
    method: "pursuhint" is the published rule, read from the method's public code; "kmedoids", "average_linkage" and
        "contiguous" are there to tell what the rule adds.
    representative: the layer that stands for its cluster. "center" is the method's own: the member in mid-depth, and
        for "kmedoids" the medoid; "medoid" has the least total distance to the members; "first" and "last" are the
        shallowest and deepest member.

    Learnt by `fit`, cluster 0 being the one with the shallowest center:
    layers_: names of the L layers, as in the table; "0", "1", ... for a plain array.
    n_features_in_: L. feature_names_in_: (L,) names of the layers, only for a table whose labels are all strings.
    labels_: (L,) cluster of each layer.
    center_indices_: (K,) 0-based index of each cluster's center, ascending.
    hint_points_: K layer names in order of depth.
    n_rounds_: rounds until the centers repeated.
    cycle_: [] when the centers came to rest, else the sorted centers of each round of the cycle. The result is then the
        round with the least total distance of layers to their center.
    n_breaks_, contiguous_: label changes along depth beyond the fewest possible, and whether there are none.

    Example:
        >>> LayerClustering(n_clusters=3).fit(profile.similarity("r2_cca")).hint_points_
    """

    def __init__(self, n_clusters: int = 3, method: str = "pursuhint", representative: str = "center"):
        self.n_clusters = n_clusters
        self.method = method
        self.representative = representative

    def fit(self, similarity: pd.DataFrame | np.ndarray, y: None = None) -> "LayerClustering":
        """Cluster the layers of a symmetric similarity (L, L), see `checked_similarity`; distance is 1 - similarity.

        Deterministic. Warns where a cluster is left empty, as happens when layers are exactly equal; it then keeps its
        center, as published, and the same layer may be named twice.
        y is ignored, as in every scikit-learn clusterer.
        Raises ValueError for what is no similarity, for an unknown method or representative, and for n_clusters outside
        1..L.
        """
        layers, values = checked_similarity(similarity)
        distance = 1 - values
        if self.method not in METHODS:
            raise ValueError(_unknown("method", self.method, METHODS))
        if self.representative not in REPRESENTATIVES:
            raise ValueError(_unknown("representative", self.representative, REPRESENTATIVES))
        _check_count("n_clusters", self.n_clusters, len(distance))

        validate_data(self, similarity, skip_check_array=True)  # sets n_features_in_ and feature_names_in_, no more
        self.layers_ = layers
        labels, centers, self.cycle_, self.n_rounds_ = METHODS[self.method](distance, self.n_clusters)
        by_depth = np.argsort(centers, kind="stable")
        self.labels_ = np.argsort(by_depth)[labels]  # old number -> rank of its center
        self.center_indices_ = centers[by_depth]
        members = [np.flatnonzero(self.labels_ == k) for k in range(self.n_clusters)]
        empty = sum(len(of) == 0 for of in members)
        if empty:
            text = f"{empty} of {self.n_clusters} clusters are empty: some layers are exactly equal"
            warnings.warn(text, stacklevel=2)
        represent = REPRESENTATIVES[self.representative]
        points = [represent(of, c, distance) if len(of) else int(c) for of, c in zip(members, self.center_indices_)]
        self.hint_points_ = [self.layers_[i] for i in sorted(points)]
        self.n_breaks_ = int((np.diff(self.labels_) != 0).sum()) - (self.n_clusters - empty - 1)
        self.contiguous_ = self.n_breaks_ == 0
        return self

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags


def checked_similarity(similarity: pd.DataFrame | np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of the L layers, and their similarities as float64 (L, L).

    similarity: a table with the same layers as rows and columns, in order of depth; rows that are only numbered, 0 to
    L - 1, are taken to be those of the columns. Or a plain square array: its layers are named "0" to "L - 1".
    Raises ValueError, naming the layers, where it is not square, finite, symmetric and labelled alike on both sides.
    """
    ndim = similarity.ndim if hasattr(similarity, "ndim") else np.asarray(similarity).ndim
    if ndim != 2:
        kind = type(similarity).__name__
        raise ValueError(f"similarity is a {kind} of {ndim} dimensions: it must be a square table or array (L, L)")
    if not isinstance(similarity, pd.DataFrame):
        similarity = pd.DataFrame(check_array(similarity, dtype=np.float64, input_name="similarity"))
        similarity = similarity.rename(index=str, columns=str)
    rows, columns = list(similarity.index), list(similarity.columns)
    if rows == list(range(len(columns))):
        rows = columns
    if not rows or len(rows) != len(columns):
        raise ValueError(f"similarity has {len(rows)} rows and {len(columns)} columns: it must be square and not empty")
    for row, column in zip(rows, columns):
        if row != column:
            raise ValueError(f"similarity has row {row!r} beside column {column!r}: both must list the same layers")
    if len(set(rows)) < len(rows):
        raise ValueError(f"similarity names layer {similarity.columns[similarity.columns.duplicated()][0]!r} twice")
    values = similarity.to_numpy(dtype=float)
    for wrong, why in (
        (~np.isfinite(values), "it must be finite"),
        (~np.isclose(values, values.T, rtol=0, atol=1e-8), "it must be symmetric"),
    ):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise ValueError(f"similarity of {rows[i]!r} and {rows[j]!r} is {values[i, j]} and {values[j, i]}: {why}")
    if len(rows) > 1 and not values.diagonal().any() and values.any():
        raise ValueError("similarity is 0 on the diagonal: these are distances; pass 1 - distance")
    return rows, values


def _check_count(what: str, count: int, limit: int) -> None:
    if not isinstance(count, numbers.Integral) or isinstance(count, bool):
        raise ValueError(f"{what} is {count!r}: it must be a whole number from 1 to {limit}")
    if not 1 <= count <= limit:
        raise ValueError(f"{what} is {count}: it must be from 1 to {limit}, the number of candidate layers")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, 1, cutoff=0)[0]
    return f"{what} {name!r} is unknown: did you mean {nearest!r}? Known: {', '.join(known)}"


# ---- Hint points: the method and its controls under one signature ----


SOURCES = (
    "trained",  # the teacher's features of the same image
    "untrained",  # those of the same network with random weights: structure without knowledge
    "shuffled",  # the trained teacher's features of another image of the batch: a hint that does not fit
)


@dataclass(frozen=True)
class HintPoints:
    """The teacher layers that give hints.

    strategy: a name of `STRATEGIES`, or the caller's own.
    layers: M layer names in order of depth, a name more than once if it gives several hints; the pool to draw from if
        hints are redrawn.
    labels: cluster of every candidate layer, where the strategy has clusters.
    pairing: which student point each of them serves, a key of `PAIRING_RULES`.
    source: whose features they show, one of `SOURCES`.
    redrawn: if above 0, so many of `layers` are drawn anew at every step.
    """

    strategy: str
    layers: list[str]
    labels: list[int] | None = None
    pairing: str = "in_order"
    source: str = "trained"
    redrawn: int = 0

    def __len__(self) -> int:
        return len(self.layers)


def select_hint_points(
    strategy: str, similarity: pd.DataFrame | None, layers: pd.DataFrame, n_hints: int, seed: int = 0
) -> HintPoints:
    """Choose `n_hints` of the teacher's layers.

    strategy: one of `STRATEGIES`:
        "none"             no layer: the student learns from labels and logits alone
        "stage_ends"       the last layer of each stage; see `stage_points` for other numbers of stages
        "last"             the last layer alone
        "uniform"          the middles of n_hints equal groups along depth
        "random"           layers drawn without replacement by `seed`
        "clustered"        the method: centers of clusters of alike layers (`LayerClustering`)
        "clustered_medoid", "clustered_first", "clustered_last"     another layer of each of the same clusters
        "reversed"         the layers of "clustered", the deepest paired with the shallowest student point
        "all_to_last", "all_to_middle"      one teacher layer, the last or the middle one, for every student point
        "single"           one layer alone, always for the student's last stage end: number `seed`, from 0 by depth
        "subset"           number `seed` of all n_hints-subsets of the layers, in lexicographic order, counted from 0
        "untrained", "shuffled"     the layers of "clustered", with features of that source (`SOURCES`)
        "redrawn"          n_hints of all layers, drawn anew at every step
    similarity: labelled (L, L) table; only strategies with clusters look at it, the others take None as well.
    layers: the teacher's layer table, columns `layer` and `stage_end`, in execution order.
    n_hints: M, from 1 to L; "none", "last" and "single" ignore it.
    Raises ValueError for an unknown strategy, an impossible n_hints, a seed beyond the layers or subsets it counts, or
    a similarity of other layers than the table's.
    """
    if strategy not in STRATEGIES:
        raise ValueError(_unknown("strategy", strategy, STRATEGIES))
    if strategy not in ("none", "last", "single"):
        _check_count("n_hints", n_hints, len(layers))
    rule = STRATEGIES[strategy]
    indices, labels = rule.choose(_Request(similarity, layers, n_hints, seed))
    redrawn = n_hints if rule.redrawn else 0
    return HintPoints(strategy, _named(layers, indices), labels, rule.pairing, rule.source, redrawn)


class _Request(NamedTuple):
    """What a strategy may look at; most need only a part of it."""

    similarity: pd.DataFrame | None
    layers: pd.DataFrame
    n_hints: int
    seed: int


def _none(request: _Request) -> tuple[list[int], None]:
    return [], None


def _stage_ends(request: _Request) -> tuple[list[int], None]:
    return stage_points(request.layers, request.n_hints), None


def _last(request: _Request) -> tuple[list[int], None]:
    return [len(request.layers) - 1], None


def _uniform(request: _Request) -> tuple[list[int], None]:
    edges = [g * len(request.layers) // request.n_hints for g in range(request.n_hints + 1)]
    # Group a..b-1 has its middle at floor((a + b - 1) / 2): the method's own rule, applied to equal groups.
    return [(a + b - 1) // 2 for a, b in itertools.pairwise(edges)], None


def _random(request: _Request) -> tuple[list[int], None]:
    drawn = np.random.default_rng(request.seed).choice(len(request.layers), request.n_hints, replace=False)
    return sorted(drawn.tolist()), None


def _clustered(request: _Request, representative: str = "center") -> tuple[list[int], list[int]]:
    clustering = LayerClustering(request.n_hints, representative=representative).fit(request.similarity)
    expected = list(request.layers["layer"])
    if clustering.layers_ != expected:
        raise ValueError(
            f"similarity is of layers {_shown(clustering.layers_)} and the layer table of {_shown(expected)}: "
            "both must list the same layers in the same order"
        )
    return [expected.index(layer) for layer in clustering.hint_points_], clustering.labels_.tolist()


def _all_to_last(request: _Request) -> tuple[list[int], None]:
    return [len(request.layers) - 1] * request.n_hints, None


def _all_to_middle(request: _Request) -> tuple[list[int], None]:
    return [(len(request.layers) - 1) // 2] * request.n_hints, None


def _single(request: _Request) -> tuple[list[int], None]:
    _check_seed(request.seed, len(request.layers), "layers")
    return [request.seed], None


def _subset(request: _Request) -> tuple[list[int], None]:
    n, size = len(request.layers), request.n_hints
    _check_seed(request.seed, math.comb(n, size), f"subsets of {size} out of {n} layers")
    chosen, passed, layer = [], 0, 0
    while len(chosen) < size:
        # So many subsets go on with `layer`; they follow those that go on with a shallower one.
        ahead = math.comb(n - layer - 1, size - len(chosen) - 1)
        if request.seed < passed + ahead:
            chosen.append(layer)
        else:
            passed += ahead
        layer += 1
    return chosen, None


def _check_seed(seed: int, count: int, what: str) -> None:
    if not 0 <= seed < count:
        raise ValueError(f"seed is {seed}: there are {count} {what}, numbered from 0 to {count - 1}")


def _every_layer(request: _Request) -> tuple[list[int], None]:
    return list(range(len(request.layers))), None


def _shown(names: list[str]) -> str:
    return f"{names[0]} .. {names[-1]} ({len(names)})"


class _Strategy(NamedTuple):
    """choose: layer indices in order of depth, and clusters. The other fields are those of `HintPoints`."""

    choose: Callable[[_Request], tuple[list[int], list[int] | None]]
    pairing: str = "in_order"
    source: str = "trained"
    redrawn: bool = False


STRATEGIES: dict[str, _Strategy] = {
    "none": _Strategy(_none),
    "stage_ends": _Strategy(_stage_ends),
    "last": _Strategy(_last),
    "uniform": _Strategy(_uniform),
    "random": _Strategy(_random),
    "clustered": _Strategy(_clustered),
    "clustered_medoid": _Strategy(functools.partial(_clustered, representative="medoid")),
    "clustered_first": _Strategy(functools.partial(_clustered, representative="first")),
    "clustered_last": _Strategy(functools.partial(_clustered, representative="last")),
    "reversed": _Strategy(_clustered, pairing="reversed"),
    "all_to_last": _Strategy(_all_to_last),
    "all_to_middle": _Strategy(_all_to_middle),
    "single": _Strategy(_single),
    "subset": _Strategy(_subset),
    "untrained": _Strategy(_clustered, source="untrained"),
    "shuffled": _Strategy(_clustered, source="shuffled"),
    "redrawn": _Strategy(_every_layer, redrawn=True),
}


def _named(layers: pd.DataFrame, indices: list[int]) -> list[str]:
    names = layers["layer"].tolist()
    return [names[i] for i in indices]


def stage_points(table: pd.DataFrame, n_points: int) -> list[int]:
    """Indices of `n_points` layers at stage ends, for any number S of stages.

    As many points as stages: the last layer of each. Fewer: stage ends spread evenly and ending at the last, the i-th
    at stage ceil(i S / M) (of four stages, three points take 2, 3 and 4). More: every stage end, and the points left
    over go one by one to the stage with the most layers per point (the deeper of equals); the points of a stage are the
    ends of equal groups of its layers.
    Raises ValueError for n_points outside 1..L, or a table whose last layer does not end a stage.
    """
    _check_count("the number of points at stage ends", n_points, len(table))
    stops = np.flatnonzero(table["stage_end"].to_numpy(dtype=bool)) + 1
    if len(stops) == 0 or stops[-1] != len(table):
        last = table["layer"].iloc[-1]
        raise ValueError(f"column stage_end is false for the last layer, {last!r}: it must end a stage")
    n_stages = len(stops)
    if n_points <= n_stages:
        return [int(stops[-(-i * n_stages // n_points) - 1]) - 1 for i in range(1, n_points + 1)]
    starts = np.concatenate([[0], stops[:-1]])
    sizes = stops - starts
    points = np.ones(n_stages, dtype=int)
    while points.sum() < n_points:
        points[n_stages - 1 - (sizes / points)[::-1].argmax()] += 1
    return [
        int(start + (g + 1) * size // count) - 1
        for start, size, count in zip(starts, sizes, points)
        for g in range(count)
    ]


def select_all(
    strategies: Sequence[str],
    similarities: Mapping[str, pd.DataFrame],
    layers: pd.DataFrame,
    n_hints: int,
    random_draws: int,
    seed: int,
) -> dict[str, HintPoints]:
    """The hint points of every strategy of a study, under the names that its arms carry: those of `name_choices`.

    similarities: metric -> labelled table, the main metric first. Random draws are seeded by `seed`, `seed` + 1, ...
    Raises ValueError as `select_hint_points` does.
    """
    chosen = {}
    choices = name_choices(strategies, list(similarities), len(layers), n_hints, random_draws)
    for name, (strategy, metric, number) in choices.items():
        at = seed + number if strategy == "random" else number
        points = select_hint_points(strategy, similarities[metric], layers, n_hints, at)
        chosen[name] = dataclasses.replace(points, strategy=name)
    return chosen


class Choice(NamedTuple):
    """One choice of hint points. number: of the draw, layer or subset where a strategy makes several, from 0."""

    strategy: str
    metric: str
    number: int = 0


def name_choices(
    strategies: Sequence[str], metrics: Sequence[str], n_layers: int, n_hints: int, random_draws: int
) -> dict[str, Choice]:
    """Name -> choice of hint points, for all that the strategies of a study give. Looks at no layer and no similarity.

    metrics: the main one first. "clustered" is done with every metric ("clustered_r2_cca"), its other representatives
    with the main one ("clustered_first_r2_cca"), "random" `random_draws` times ("random_0"), "single" once for every
    layer ("single_1", the depth counted from 1), "subset" for every subset ("subset_3_9_15", the depths); the others
    stand under their own name, with clusters by the main metric where they have some.
    Raises ValueError for "subset" with n_hints outside 1..n_layers.
    """
    main, choices = metrics[0], {}
    for strategy in strategies:
        if strategy == "random":
            choices |= {f"random_{draw}": Choice(strategy, main, draw) for draw in range(random_draws)}
        elif strategy == "single":
            choices |= {f"single_{i + 1}": Choice(strategy, main, i) for i in range(n_layers)}
        elif strategy == "subset":
            _check_count("n_hints", n_hints, n_layers)
            subsets = itertools.combinations(range(1, n_layers + 1), n_hints)
            names = ("_".join(map(str, (strategy, *depths))) for depths in subsets)
            choices |= {name: Choice(strategy, main, i) for i, name in enumerate(names)}
        elif strategy == "clustered":
            choices |= {f"clustered_{metric}": Choice(strategy, metric) for metric in metrics}
        elif strategy.startswith("clustered_"):
            choices[f"{strategy}_{main}"] = Choice(strategy, main)
        else:
            choices[strategy] = Choice(strategy, main)
    return choices


# ---- Pairs ----


@dataclass(frozen=True)
class HintPair:
    """A student layer and the teacher layer whose features it is to match; `source`: whose features, see `SOURCES`."""

    teacher_layer: str
    student_layer: str
    source: str = "trained"


PAIRING_RULES: dict[str, Callable[[list[int]], list[int]]] = {
    "in_order": lambda points: points,  # i-th hint point with the i-th student point
    "reversed": lambda points: points[::-1],  # the same points, deepest first: a control
}


def pair_layers(hint_points: HintPoints, teacher_table: pd.DataFrame, student_table: pd.DataFrame) -> list[HintPair]:
    """Pair the i-th hint point with the i-th student point, both in order of depth.

    Student points are the student's stage ends, by the rule of `stage_points` where it has more or fewer stages than
    there are hint points; pairing "reversed" pairs the deepest hint point with the shallowest.
    A hint point named twice stays two pairs. No hint points, no pairs.
    Where M of a pool of L layers are redrawn: every layer of the pool with every student point, L x M pairs, pool layer
    major: layer i of the pool with student point j is pair i M + j, all counted from 0.
    Raises ValueError for an unknown pairing or source, a hint point that is no layer of the teacher, a pool smaller
    than what is drawn from it, or a student with fewer candidate layers than hint points.
    """
    strategy = f"strategy {hint_points.strategy!r}"
    if hint_points.pairing not in PAIRING_RULES:
        raise ValueError(_unknown(f"pairing of {strategy}", hint_points.pairing, PAIRING_RULES))
    if hint_points.source not in SOURCES:
        raise ValueError(_unknown(f"source of {strategy}", hint_points.source, SOURCES))
    known = {layer: depth for depth, layer in enumerate(teacher_table["layer"])}
    for layer in hint_points.layers:
        if layer not in known:
            raise ValueError(_unknown(f"teacher layer of {strategy}", layer, known))
    if hint_points.redrawn > len(hint_points):
        raise ValueError(f"{strategy} redraws {hint_points.redrawn} of {len(hint_points)} layers: draw fewer")
    if not hint_points.layers:
        return []
    n_points = hint_points.redrawn or len(hint_points)
    if n_points > len(student_table):
        raise ValueError(
            f"{n_points} hint points for a student of {len(student_table)} candidate layers: use fewer hints"
        )
    teacher_layers = sorted(hint_points.layers, key=known.__getitem__)
    points = PAIRING_RULES[hint_points.pairing](stage_points(student_table, n_points))
    combine = itertools.product if hint_points.redrawn else zip
    pairs = combine(teacher_layers, _named(student_table, points))
    return [HintPair(*pair, hint_points.source) for pair in pairs]

"""Every similarity against a second implementation of its published formula, pairwise and in a profile's table.

The references are written from the papers in NumPy and SciPy, in float64 and in the N x N, QR or SVD form, for two
matrices at a time: they share neither code nor shape with the library. They are held in turn to other textbook forms.

- linear and RBF CKA, R^2_CCA: Kornblith et al. 2019, arXiv 1905.00414; bandwidth and the uncentered R^2_CCA as in
  PURSUhInT's public code.
- unbiased HSIC: Song et al. 2012, JMLR 13; as debiased CKA in Nguyen et al. 2020, arXiv 2010.15327, equation 3.
- SVCCA: Raghu et al. 2017, arXiv 1706.05806; PWCCA: Morcos et al. 2018, arXiv 1806.05759.
- Procrustes: Williams et al. 2021, arXiv 2110.14739; Ding et al. 2021, arXiv 2108.01661 (distance 2 - 2 * similarity).
"""

import itertools
import math
import warnings
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes, qr, sqrtm, subspace_angles
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import cdist
from sklearn.cross_decomposition import CCA

from pursuhint_lib.profiling import LayerProfile, cross_similarity
from pursuhint_lib.similarity import linear_cka, procrustes, pwcca, r2_cca, rbf_cka, svcca

# ---- The references ----


def centered(z):
    z = z - z[0]  # first: what is constant becomes exactly zero, and a far offset costs no digits
    return z - z.mean(0)


def double_centered(k):
    return k - k.mean(0) - k.mean(1)[:, None] + k.mean()


def ratio(shared, own_x, own_y):
    """0 where one side has nothing of its own, so where 0/0 would stand."""
    return shared / math.sqrt(own_x * own_y) if own_x > 0 and own_y > 0 else 0.0


def reference_cka(k, l):
    """Biased HSIC of two N x N kernels, tr(KHLH), normalized."""
    k, l = double_centered(k), double_centered(l)
    return ratio((k * l).sum(), (k * k).sum(), (l * l).sum())


def linear_kernel(z):
    z = centered(z)
    return z @ z.T


def rbf_kernel(z, bandwidth=1.0):
    distances = cdist(z, z, "sqeuclidean")
    median = np.median(distances)
    return np.exp(-distances / (2 * bandwidth**2 * median)) if median > 0 else np.ones_like(distances)


def reference_linear_cka(x, y):
    return reference_cka(linear_kernel(x), linear_kernel(y))


def reference_rbf_cka(x, y, bandwidth=1.0):
    return reference_cka(rbf_kernel(x, bandwidth), rbf_kernel(y, bandwidth))


def unbiased_hsic(k, l):
    """Song et al. 2012, equation 5: the three terms over the kernels with their diagonals set to zero."""
    n = len(k)
    k, l = (m * (1 - np.eye(n)) for m in (k, l))
    trace = (k * l).sum()
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * k.sum(0) @ l.sum(0)
    return (trace + sums - rows) / (n * (n - 3))


def unclamped_debiased_cka(x, y):
    k, l = linear_kernel(x), linear_kernel(y)
    return ratio(unbiased_hsic(k, l), unbiased_hsic(k, k), unbiased_hsic(l, l))


def reference_debiased_cka(x, y):
    return max(0.0, unclamped_debiased_cka(x, y))


def orthonormal_span(z):
    """QR with column pivoting: the first columns span all, the rest is rounding."""
    q, r, _ = qr(z, mode="economic", pivoting=True)
    size = abs(np.diag(r))
    return q[:, size > 1e-9 * size[0]]


def canonical(x, y):
    """The min(rank) canonical correlations, and the variates of either side, N x min(rank), of unit norm."""
    q_x, q_y = orthonormal_span(x), orthonormal_span(y)
    u, correlations, v = np.linalg.svd(q_x.T @ q_y, full_matrices=False)
    return correlations.clip(0, 1), q_x @ u, q_y @ v.T


def reference_r2_cca(x, y):
    correlations, _, _ = canonical(centered(x), centered(y))
    return (correlations**2).mean() if correlations.size else 0.0


def reference_r2_cca_uncentered(x, y):
    correlations, _, _ = canonical(x, y)
    return (correlations**2).mean() if correlations.size else 0.0


def main_directions(z, variance):
    """The representation in the fewest of its principal directions that hold this share of its variance."""
    u, singular, _ = np.linalg.svd(centered(z), full_matrices=False)
    held = np.cumsum(singular**2) / (singular**2).sum()
    n_kept = int((held < variance).sum()) + 1
    return u[:, :n_kept] * singular[:n_kept]


def reference_svcca(x, y, variance=0.99):
    if not (centered(x).any() and centered(y).any()):
        return 0.0
    return canonical(main_directions(x, variance), main_directions(y, variance))[0].mean()


def reference_pwcca(x, y):
    """Morcos et al. weight by one side; here both sides are asked and the two answers averaged."""
    x, y = centered(x), centered(y)
    correlations, variates_x, variates_y = canonical(x, y)
    if not correlations.size:
        return 0.0
    by_x = abs(variates_x.T @ x).sum(1)
    by_y = abs(variates_y.T @ y).sum(1)
    return (np.average(correlations, weights=by_x) + np.average(correlations, weights=by_y)) / 2


def reference_procrustes(x, y):
    """The best overlap of one with the rotated other: SciPy finds the rotation, zeros make the widths equal."""
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(centered(z), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    rotation, _ = orthogonal_procrustes(x, y)
    return ratio(((x @ rotation) * y).sum(), (x**2).sum(), (y**2).sum())


# name in a profile -> (pairwise function of the library, reference)
PAIRS = {
    "linear_cka": (linear_cka, reference_linear_cka),
    "linear_cka_debiased": (partial(linear_cka, debiased=True), reference_debiased_cka),
    "rbf_cka": (rbf_cka, reference_rbf_cka),
    "r2_cca": (r2_cca, reference_r2_cca),
    "r2_cca_uncentered": (partial(r2_cca, centered=False), reference_r2_cca_uncentered),
    "svcca": (svcca, reference_svcca),
    "pwcca": (pwcca, reference_pwcca),
    "procrustes": (procrustes, reference_procrustes),
}
every_metric = pytest.mark.parametrize("metric", PAIRS)
CENTERED = [metric for metric in PAIRS if metric != "r2_cca_uncentered"]


def library(metric, x, y):
    value = PAIRS[metric][0](torch.from_numpy(x), torch.from_numpy(y))
    assert value.shape == () and value.dtype == torch.float64
    return value.item()


def library_table(metric, layers):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*images for up to.*")  # wide layers: CCA is 1 by definition
        return LayerProfile.from_features({k: torch.from_numpy(z) for k, z in layers.items()}).similarity(metric)


def agrees(expected):
    return pytest.approx(expected, rel=1e-8, abs=1e-11)  # abs: debiased CKA is a difference of terms near 1


# ---- Inputs: families of layers of the same images ----


def random_rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def growing_layers(rng, n, widths, shared=4, noise=1.0):
    """Layers that share some of their directions, each to another degree: no two canonical correlations are alike."""
    latent = rng.normal(size=(n, shared)) * np.linspace(2, 0.5, shared)
    return {
        f"layer{i}": latent @ rng.normal(size=(shared, d)) + noise * (1 + i / 3) * rng.normal(size=(n, d))
        for i, d in enumerate(widths)
    }


def independent(rng):
    return {f"layer{i}": rng.normal(size=(120, d)) for i, d in enumerate((6, 9, 6))}


def ill_conditioned(rng):
    """Condition numbers near 1e3 in no particular axes, and layers whose scales differ by 1e5."""
    layers = growing_layers(rng, 200, (7, 12, 5, 12), noise=0.5)
    for i, (name, z) in enumerate(layers.items()):
        u, singular, v = np.linalg.svd(z, full_matrices=False)
        stretch = np.geomspace(1, 1e-3, z.shape[1]) * singular[0] / singular * 10 ** (2.5 * i - 5)
        z = (u * singular * rng.permutation(stretch)) @ v
        layers[name] = z + z.std(0)
    return layers


def unequal_channels(rng):
    layers = growing_layers(rng, 150, (6, 9, 4))
    return {name: z * rng.permutation(np.geomspace(0.05, 20, z.shape[1])) for name, z in layers.items()}


def offset(rng):
    layers = growing_layers(rng, 200, (8, 5, 11))
    return {name: z + 60 * rng.normal(size=z.shape[1]) for name, z in layers.items()}


def rectified(rng):
    """As after a ReLU: no negative values, common offset, channels that are silent for most images or for all."""
    layers = {name: (z - 0.5).clip(0) for name, z in growing_layers(rng, 250, (12, 16, 9)).items()}
    layers["layer0"][:, 3] = 0
    layers["layer1"][:, 5] = (layers["layer1"][:, 5] - 4).clip(0)
    return layers


def rank_deficient(rng):
    a, b, c, d, e = growing_layers(rng, 90, (6, 7, 5, 4, 6)).values()
    dead = np.zeros((90, 3))
    return {
        "duplicated": np.hstack([a, a[:, :4], a[:, :1]]),
        "dependent": np.hstack([b @ rng.normal(size=(7, 4)), b]),
        "dead": np.hstack([dead, c, dead]),
        "stuck": np.hstack([d, np.full((90, 1), 0.1)]),  # 0.1 has no exact mean; uncentered it is a direction
        "all of it": np.hstack([e + 2, e[:, :2] + 2, (e + 2) @ rng.normal(size=(6, 3)), dead]),
    }


def wide(rng):
    """Fewer images than channels, on one side or both: CCA of what spans all images is 1, SVCCA is not."""
    layers = growing_layers(rng, 60, (80, 100, 9), shared=5, noise=0.15)
    layers["layer1"] = layers["layer1"] + 3
    return layers


def wide_of_low_rank(rng):
    """More channels than images, yet few directions: CCA has something to say."""
    layers = growing_layers(rng, 64, (6, 8, 5))
    return {name: z @ rng.normal(size=(z.shape[1], 70 + 20 * i)) for i, (name, z) in enumerate(layers.items())}


def narrow(rng):
    return growing_layers(rng, 101, (1, 1, 4, 1))


def four_images(rng):
    return growing_layers(rng, 4, (1, 2, 1))


def several_chunks(rng):
    """More images than are looked at in one step (1024), and not a multiple of it."""
    return {name: z + 3 for name, z in growing_layers(rng, 3000, (24, 10)).items()}


FAMILIES = {
    make.__name__: make
    for make in (
        independent,
        ill_conditioned,
        unequal_channels,
        offset,
        rectified,
        rank_deficient,
        wide,
        wide_of_low_rank,
        narrow,
        four_images,
        several_chunks,
    )
}
every_family = pytest.mark.parametrize("family", FAMILIES)
SMALL = [family for family in FAMILIES if family != "several_chunks"]


@cache
def family_layers(family):
    return FAMILIES[family](np.random.default_rng(sorted(FAMILIES).index(family)))


@cache
def reference_table(metric, family):
    layers = family_layers(family)
    return {(a, b): PAIRS[metric][1](layers[a], layers[b]) for a, b in itertools.combinations(layers, 2)}


# ---- The references are what they are called ----


@pytest.mark.parametrize("family", SMALL)
def test_the_reference_ckas_are_those_of_distances(family):
    """Centered, a Gram matrix is -1/2 of the squared distances; so is its unbiased version (Szekely & Rizzo 2014)."""
    layers = family_layers(family)

    def u_centered(z):
        d = -cdist(z, z, "sqeuclidean") / 2
        n = len(d)
        d = d - d.sum(0) / (n - 2) - d.sum(1)[:, None] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        return d * (1 - np.eye(n))

    for a, b in itertools.combinations(layers.values(), 2):
        expected = reference_cka(cdist(a, a, "sqeuclidean"), cdist(b, b, "sqeuclidean"))
        assert reference_linear_cka(a, b) == pytest.approx(expected, rel=1e-9)
        k, l = u_centered(a), u_centered(b)
        expected = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
        assert unclamped_debiased_cka(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_reference_unbiased_hsic_is_the_mean_over_all_four_different_images():
    rng = np.random.default_rng(0)
    k, l = (linear_kernel(z) for z in growing_layers(rng, 7, (3, 2)).values())
    fours = itertools.permutations(range(7), 4)
    terms = [k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q] for i, j, q, r in fours]
    assert unbiased_hsic(k, l) == pytest.approx(np.mean(terms), rel=1e-12)


@pytest.mark.parametrize("family", SMALL)
def test_the_reference_canonical_correlations_are_principal_angles_and_overlaps_of_projections(family):
    for a, b in itertools.combinations(family_layers(family).values(), 2):
        a, b = centered(a), centered(b)
        correlations, h_a, h_b = canonical(a, b)
        spans = [np.linalg.svd(z)[0][:, : np.linalg.matrix_rank(z, rtol=1e-8)] for z in (a, b)]
        np.testing.assert_allclose(np.cos(subspace_angles(*spans))[::-1], correlations, atol=1e-9)
        projections = [z @ np.linalg.pinv(z, rcond=1e-8) for z in (a, b)]
        assert (correlations**2).sum() == pytest.approx((projections[0] * projections[1]).sum(), rel=1e-8)
        # The variates are eigenvectors of projecting there and back; the squared correlations are the eigenvalues.
        for h, (first, second) in ((h_a, projections), (h_b, projections[::-1])):
            np.testing.assert_allclose(first @ (second @ h), h * correlations**2, atol=1e-8)


def test_the_reference_canonical_correlations_are_those_of_scikit_learn():
    x, y = growing_layers(np.random.default_rng(1), 200, (3, 4)).values()
    a, b = CCA(n_components=3, scale=False, max_iter=5000, tol=1e-12).fit_transform(x, y)
    expected = [np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(canonical(centered(x), centered(y))[0], expected, atol=1e-6)


@pytest.mark.parametrize("family", SMALL)
def test_the_reference_procrustes_is_the_nuclear_norm_and_the_fidelity_of_the_kernels(family):
    for a, b in itertools.combinations(family_layers(family).values(), 2):
        a, b = (centered(z) / np.linalg.norm(centered(z)) for z in (a, b))
        expected = np.linalg.norm(b.T @ a, "nuc")
        assert reference_procrustes(a, b) == pytest.approx(expected, rel=1e-9)
        values, vectors = np.linalg.eigh(a @ a.T)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        values = np.linalg.eigvalsh(root @ (b @ b.T) @ root)
        assert expected == pytest.approx(np.sqrt(values.clip(0)).sum(), rel=1e-5)  # roots of rounding, 1e-8 each


# ---- The library against the references ----


@every_metric
@every_family
def test_the_pairwise_function_and_the_table_are_the_published_formula(metric, family):
    """PWCCA is not defined by its formula where canonical correlations are equal: any rotation of their variates is as
    good, and weights them otherwise. So no family has ties, but for `wide`: there all are 1, and so is every mean."""
    layers = family_layers(family)
    table = library_table(metric, layers)
    assert list(table.index) == list(table.columns) == list(layers)
    for (a, b), expected in reference_table(metric, family).items():
        assert library(metric, layers[a], layers[b]) == agrees(expected), (a, b)
        assert library(metric, layers[b], layers[a]) == agrees(expected), (b, a)
        assert table.loc[a, b] == agrees(expected), ("table", a, b)
        assert table.loc[b, a] == table.loc[a, b]


@every_metric
def test_the_families_tell_the_metrics_apart(metric):
    """Were all answers 0 or 1, or the same for two metrics, agreement would say little."""
    values = {
        other: np.concatenate([list(reference_table(other, family).values()) for family in FAMILIES]) for other in PAIRS
    }
    assert ((values[metric] > 0.05) & (values[metric] < 0.95)).mean() > 0.75
    for other in PAIRS:
        assert other == metric or abs(values[other] - values[metric]).max() > 0.02, other


def test_the_table_of_two_networks_is_the_pairwise_linear_cka():
    layers = {name: torch.from_numpy(z) for name, z in family_layers("rank_deficient").items()}
    teacher = LayerProfile.from_features({name: layers[name] for name in ("duplicated", "dead", "stuck")})
    student = LayerProfile.from_features({name: layers[name] for name in ("all of it", "dependent")})
    table = cross_similarity(teacher, student)
    assert table.shape == (3, 2)
    for a, b in itertools.product(teacher.layers, student.layers):
        assert table.loc[a, b] == agrees(reference_linear_cka(layers[a].numpy(), layers[b].numpy())), (a, b)


@pytest.mark.parametrize("metric", CENTERED)
def test_features_far_from_zero_lose_no_digits(metric):
    rng = np.random.default_rng(2)
    layers = {name: z + 1e5 * (1 + i) for i, (name, z) in enumerate(growing_layers(rng, 130, (6, 4, 9)).items())}
    table = library_table(metric, layers)
    for a, b in itertools.combinations(layers, 2):
        expected = PAIRS[metric][1](layers[a], layers[b])
        assert library(metric, layers[a], layers[b]) == agrees(expected)
        assert table.loc[a, b] == agrees(expected)


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("family", ["ill_conditioned", "rectified", "wide"])
def test_svcca_keeps_the_fewest_directions_that_hold_the_variance(family, variance):
    layers = family_layers(family)
    for a, b in itertools.combinations(layers.values(), 2):
        value = svcca(torch.from_numpy(a), torch.from_numpy(b), variance=variance).item()
        assert value == agrees(reference_svcca(a, b, variance))


@pytest.mark.parametrize("bandwidth", [0.3, 0.5, 2.0])
def test_rbf_cka_has_its_bandwidth_in_units_of_the_median(bandwidth):
    x, y, _ = family_layers("rectified").values()
    value = rbf_cka(torch.from_numpy(x), torch.from_numpy(y), bandwidth=bandwidth).item()
    assert value == agrees(reference_rbf_cka(x, y, bandwidth))
    assert abs(value - reference_rbf_cka(x, y)) > 1e-3


# ---- Answers on paper ----


def orthonormal_images(n, d):
    """d columns with mean 0 and norm 1 at right angles: waves around a circle of n images."""
    angles = 2 * np.pi * np.arange(n)[:, None] / n
    frequencies = np.arange(1, (d + 1) // 2 + 1)
    waves = np.stack([np.cos(angles * frequencies), np.sin(angles * frequencies)], 2).reshape(n, -1)
    return waves[:, :d] * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("r2_cca", lambda s: 1 / 2),  # of two directions one is shared, however loud
        ("svcca", lambda s: 1 / 2 if 1 / (s**2 + 1) > 0.01 else 1),  # unless the other is within the last hundredth
        ("pwcca", lambda s: s / (s + 1)),
        ("procrustes", lambda s: s**2 / (s**2 + 1)),
        ("linear_cka", lambda s: s**4 / (s**4 + 1)),
    ],
)
@pytest.mark.parametrize("loudness", [0.5, 1, 3, 9.9, 10, 30])
def test_one_shared_direction_of_two(metric, expected, loudness):
    shared, own, other = orthonormal_images(48, 3).T
    x = np.stack([loudness * shared, own], 1)
    y = np.stack([other, loudness * shared], 1)
    assert library(metric, x, y) == pytest.approx(expected(loudness), abs=1e-9)
    assert library_table(metric, {"x": x + 2, "y": 5 * y}).loc["x", "y"] == pytest.approx(expected(loudness), abs=1e-9)


@pytest.mark.parametrize(
    ("metric", "power"), [("linear_cka", 2), ("r2_cca", 2), ("svcca", 1), ("pwcca", 1), ("procrustes", 1)]
)
def test_of_one_channel_each_only_the_correlation_counts(metric, power):
    layers = family_layers("narrow")
    x, y = layers["layer0"], layers["layer1"]
    expected = abs(np.corrcoef(x[:, 0], y[:, 0])[0, 1]) ** power
    assert library(metric, x, y) == agrees(expected)
    assert library_table(metric, layers).loc["layer0", "layer1"] == agrees(expected)


def test_procrustes_is_what_scipy_leaves_over():
    x, y = growing_layers(np.random.default_rng(3), 70, (5, 5)).values()
    _, _, disparity = scipy_procrustes(x, y)
    assert library("procrustes", x, y) == pytest.approx(math.sqrt(1 - disparity), rel=1e-10)


def test_the_procrustes_distance_is_the_least_over_all_rotations():
    rng = np.random.default_rng(4)
    x, y = (centered(z) / np.linalg.norm(centered(z)) for z in growing_layers(rng, 50, (4, 4)).values())
    least = 2 - 2 * library("procrustes", x, y)
    root = sqrtm(y.T @ x @ x.T @ y).real  # polar decomposition, without an SVD
    best = x.T @ y @ np.linalg.inv(root)
    assert np.linalg.norm(x @ best - y) ** 2 == pytest.approx(least, rel=1e-9)
    assert all(np.linalg.norm(x @ random_rotation(rng, 4) - y) ** 2 > least for _ in range(200))


# ---- RBF CKA: the median is that of all N x N distances ----


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([0.0, 2.0], 2.0),  # of 0, 0, 4, 4
        # 4 zeros, then twice each of 1, 4, 9, 49, 81, 100: entries 8 and 9 of 16 are 4 and 9.
        ([0.0, 1.0, 3.0, 10.0], 6.5),
        # 5 zeros, then twice each of 1, 4, 9, 49, 81 and so on: entry 13 of 25 is the second 49.
        ([0.0, 1.0, 3.0, 10.0, 31.0], 49.0),
        # Two pairs of repeated rows: 9 zeros, then 8 ones; entry 13 of 25.
        ([0.0, 0.0, 1.0, 1.0, 5.0], 1.0),
    ],
)
def test_rbf_cka_by_hand(points, median):
    x = np.array(points)[:, None]
    y = np.random.default_rng(5).normal(size=(len(points), 2))
    assert np.median((x - x.T) ** 2) == median
    expected = reference_cka(np.exp(-((x - x.T) ** 2) / (2 * median)), rbf_kernel(y))
    assert library("rbf_cka", x, y) == agrees(expected)
    assert library_table("rbf_cka", {"x": x, "y": y}).loc["x", "y"] == agrees(expected)


def few_values(rng, n):
    """Whole numbers: the same distance thousands of times, at the median too."""
    return rng.integers(0, 3, size=(n, 4)).astype(float)


def heavy_tails(rng, n):
    """Distances over some ten orders of magnitude."""
    return rng.standard_cauchy(size=(n, 3))


def repeated_rows(rng, n):
    return rng.normal(size=(n, 4))[rng.integers(0, n // 5, size=n)]


def two_crowds(rng, n):
    """Half of the distances tiny, half large: the median falls in or beside the gap."""
    return 1e-3 * rng.normal(size=(n, 2)) + 100.0 * (np.arange(n) % 2)[:, None]


def silent_for_many(rng, n):
    """Just under half of all pairs coincide: the median is the first distance that is not 0, or near it."""
    z = rng.normal(size=(n, 3))
    z[: int(n * math.sqrt(0.498))] = 0
    return z[rng.permutation(n)]


@pytest.mark.parametrize("make", [few_values, heavy_tails, repeated_rows, two_crowds, silent_for_many])
@pytest.mark.parametrize("n", [40, 41, 1023, 1025, 2050])  # one tile and several; even and odd
def test_rbf_cka_is_exact_for_every_number_of_images_and_kind_of_distances(make, n):
    rng = np.random.default_rng(n)
    x = make(rng, n)
    y = x[:, :2] + rng.normal(size=(n, 2))
    assert np.median(cdist(x, x, "sqeuclidean")) > 0
    expected = reference_rbf_cka(x, y)
    assert library("rbf_cka", x, y) == agrees(expected)
    assert library_table("rbf_cka", {"x": x, "y": y}).loc["x", "y"] == agrees(expected)


@pytest.mark.parametrize("n", [41, 2050])
def test_where_most_pairs_coincide_the_mean_distance_stands_in_for_the_median(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 3))
    x[: n * 3 // 4] = 0
    distances = cdist(x, x, "sqeuclidean")
    assert np.median(distances) == 0
    expected = reference_cka(np.exp(-distances / (2 * distances.mean())), rbf_kernel(y))
    assert library("rbf_cka", x, y) == agrees(expected)
    assert library_table("rbf_cka", {"x": x, "y": y}).loc["x", "y"] == agrees(expected)


# ---- What theory says must not matter, and what must ----


@pytest.fixture
def pair():
    x, y, _ = growing_layers(np.random.default_rng(6), 100, (7, 5, 6)).values()
    return x * np.linspace(0.5, 3, 7), y


@every_metric
def test_scale_changes_nothing(metric, pair):
    x, y = pair
    for factor in (1e-6, 0.3, -1.0, 1e6):
        assert library(metric, factor * x, y) == pytest.approx(library(metric, x, y), rel=1e-9)
        assert library(metric, x, factor * y) == pytest.approx(library(metric, x, y), rel=1e-9)


@pytest.mark.parametrize("metric", CENTERED)
def test_shift_changes_nothing(metric, pair):
    x, y = pair
    for shift in (30.0, np.linspace(-100, 100, 7)):
        assert library(metric, x + shift, y) == pytest.approx(library(metric, x, y), rel=1e-9)
    assert library(metric, x, y - 1e3) == pytest.approx(library(metric, x, y), rel=1e-8)


def test_shift_changes_the_uncentered_r2_cca(pair):
    x, y = pair
    assert abs(library("r2_cca_uncentered", x + 5, y + 5) - library("r2_cca_uncentered", x, y)) > 0.05


@pytest.mark.parametrize("metric", [metric for metric in PAIRS if metric != "pwcca"])
def test_rotation_of_either_side_changes_nothing(metric, pair):
    rng = np.random.default_rng(7)
    x, y = pair
    expected = library(metric, x, y)
    assert library(metric, x @ random_rotation(rng, 7), y) == pytest.approx(expected, rel=1e-9)
    assert library(metric, x, y @ random_rotation(rng, 5)) == pytest.approx(expected, rel=1e-9)


def test_pwcca_sees_a_rotation_but_no_permutation_or_sign_of_channels(pair):
    """Its weights are sums of absolute values over the channels, and those depend on the axes."""
    rng = np.random.default_rng(8)
    x, y = pair
    expected = library("pwcca", x, y)
    rotated = [library("pwcca", x @ random_rotation(rng, 7), y) for _ in range(10)]
    assert max(abs(value - expected) for value in rotated) > 0.01
    renamed = x[:, rng.permutation(7)] * rng.choice([-1, 1], 7)
    assert library("pwcca", renamed, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("metric", ["r2_cca", "r2_cca_uncentered"])
def test_cca_ignores_every_invertible_map_of_either_side(metric, pair):
    rng = np.random.default_rng(9)
    x, y = pair
    expected = library(metric, x, y)
    for _ in range(5):
        map_x = random_rotation(rng, 7) * np.geomspace(1, 1e-2, 7) @ random_rotation(rng, 7)
        map_y = rng.normal(size=(5, 5)) + 3 * np.eye(5)
        assert library(metric, x @ map_x, y @ map_y) == pytest.approx(expected, rel=1e-9)
    quiet = np.geomspace(1, 1e-6, 7)  # channel by channel, a map may be far worse conditioned than features can be
    assert library(metric, x * quiet, y) == pytest.approx(expected, rel=1e-9)
    assert library_table(metric, {"x": x * quiet, "y": y}).loc["x", "y"] == pytest.approx(expected, rel=1e-9)


def test_the_mean_canonical_correlation_ignores_every_invertible_map_of_either_side(pair):
    rng = np.random.default_rng(10)
    x, y = (torch.from_numpy(z) for z in pair)
    map_x = torch.from_numpy(random_rotation(rng, 7) * np.geomspace(1, 1e-2, 7) @ random_rotation(rng, 7))
    mean_cca = svcca(x, y, variance=1.0).item()  # all directions kept
    assert mean_cca == agrees(canonical(centered(pair[0]), centered(pair[1]))[0].mean())
    assert svcca(x @ map_x, y, variance=1.0).item() == pytest.approx(mean_cca, rel=1e-9)


@pytest.mark.parametrize("metric", [metric for metric in PAIRS if not metric.startswith("r2_cca")])
def test_the_others_see_which_directions_are_loud(metric, pair):
    x, y = pair
    hushed = x @ (np.linalg.svd(centered(x))[2].T * np.geomspace(1e-2, 1, 7))
    assert abs(library(metric, hushed, y) - library(metric, x, y)) > 0.01


@every_metric
def test_the_same_shuffle_of_both_sides_changes_nothing_and_of_one_side_destroys_it(metric, pair):
    order = np.random.default_rng(11).permutation(100)
    x, y = pair
    assert library(metric, x[order], y[order]) == pytest.approx(library(metric, x, y), rel=1e-10)
    assert library(metric, x[order], y) < library(metric, x, y) - 0.05


@every_metric
@pytest.mark.parametrize("family", SMALL)
def test_every_answer_is_symmetric_within_0_and_1_and_1_with_itself(metric, family):
    layers = family_layers(family)
    table = library_table(metric, layers).to_numpy()
    assert (table == table.T).all() and (table.diagonal() == 1).all()
    assert table.min() >= 0 and table.max() <= 1
    for a, b in itertools.product(layers, layers):
        value = library(metric, layers[a], layers[b])
        assert 0 <= value <= 1
        assert value == pytest.approx(library(metric, layers[b], layers[a]), rel=1e-10)
        assert a != b or value == pytest.approx(1, abs=1e-10)


@every_metric
def test_constant_features_resemble_nothing(metric):
    rng = np.random.default_rng(12)
    layers = growing_layers(rng, 50, (4, 3))
    # Uncentered, a constant is a direction like any other: there only zeros resemble nothing.
    value = 0.0 if metric == "r2_cca_uncentered" else 0.1
    layers |= {"constant": np.full((50, 3), value), "constant too": np.full((50, 2), -7 * value)}
    table = library_table(metric, layers)
    for a, b in itertools.combinations(layers, 2):
        if "constant" in a + b:
            assert library(metric, layers[a], layers[b]) == table.loc[a, b] == table.loc[b, a] == 0
    assert library(metric, layers["constant"], layers["constant"]) == 0
    assert (np.diag(table) == 1).all()
    rest = library_table(metric, {name: layers[name] for name in ("layer0", "layer1")})
    assert table.loc["layer0", "layer1"] == pytest.approx(rest.loc["layer0", "layer1"], rel=1e-12)


# ---- Debiased CKA: why it exists ----


def test_debiased_cka_of_independent_features_is_near_0_where_the_biased_one_is_not():
    rng = np.random.default_rng(13)
    draws = [(rng.normal(size=(24, 30)), rng.normal(size=(24, 40))) for _ in range(100)]
    biased = [library("linear_cka", x, y) for x, y in draws]
    debiased = [library("linear_cka_debiased", x, y) for x, y in draws]
    unclamped = [unclamped_debiased_cka(x, y) for x, y in draws]
    assert min(biased) > 0.5
    assert np.mean(debiased) < 0.03  # not quite 0: a negative estimate counts as 0
    assert abs(np.mean(unclamped)) < 4 * np.std(unclamped) / 10
    assert 0.3 < np.mean(np.array(debiased) == 0) < 0.7  # about every second estimate is negative
    np.testing.assert_allclose(debiased, np.clip(unclamped, 0, None), atol=1e-11)


def test_debiased_cka_does_not_depend_on_how_many_images_were_looked_at():
    """Few images make the biased one large; the debiased one stays near the value of all images."""
    rng = np.random.default_rng(14)
    x, y = growing_layers(rng, 4000, (30, 40), noise=4).values()
    of_all = library("linear_cka", x, y)
    few = [rng.permutation(4000)[:32] for _ in range(60)]
    biased = np.mean([library("linear_cka", x[rows], y[rows]) for rows in few])
    debiased = np.mean([library("linear_cka_debiased", x[rows], y[rows]) for rows in few])
    assert library("linear_cka_debiased", x, y) == pytest.approx(of_all, abs=0.02)
    assert abs(debiased - of_all) < 0.1 < 0.15 < biased - of_all


def test_debiased_cka_needs_four_images():
    x, y = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="4|four"):
        linear_cka(x, y, debiased=True)
    with pytest.raises(ValueError, match="4|four"):
        LayerProfile.from_features({"x": x, "y": y}).similarity("linear_cka_debiased")


@pytest.mark.parametrize("n", [4, 20, 300])
def test_debiased_cka_of_layers_that_one_image_alone_wakes_is_0(n):
    """Such a kernel has nothing but its diagonal left, once centered for debiasing: 0/0, which is 0, not rounding."""
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = np.zeros((n, 3)), np.zeros((n, 2))
        x[rng.integers(n)], y[rng.integers(n)] = rng.normal(size=3), rng.normal(size=2)
        layers = {"x": x + rng.normal(size=3), "y": y, "z": rng.normal(size=(n, 4))}
        table = library_table("linear_cka_debiased", layers)
        for a, b in itertools.combinations(layers, 2):
            assert library("linear_cka_debiased", layers[a], layers[b]) == table.loc[a, b] == 0, (a, b)

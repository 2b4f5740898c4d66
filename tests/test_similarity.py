"""The similarities are what the papers say. `test_similarity_references.py` holds them against other formulas."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from sklearn.cross_decomposition import CCA

from pursuhint_lib.similarity import linear_cka, r2_cca, rbf_cka, svcca

PAIRWISE = {"linear_cka": linear_cka, "rbf_cka": rbf_cka, "r2_cca": r2_cca}
every_metric = pytest.mark.parametrize("similarity", PAIRWISE.values(), ids=PAIRWISE.keys())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def related(n=80, widths=(5, 8), seed=0):
    """Two representations that share some of their directions."""
    generator = seeded(seed)
    shared = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return [
        shared @ torch.randn(4, d, generator=generator, dtype=torch.float64)
        + torch.randn(n, d, generator=generator, dtype=torch.float64)
        for d in widths
    ]


def rotation(d, seed=1):
    return torch.linalg.qr(torch.randn(d, d, generator=seeded(seed), dtype=torch.float64)).Q


# ---- Independent formulas ----


def gram_cka(k, l):
    """The textbook form: biased HSIC with the centering matrix written out."""
    h = np.eye(len(k)) - 1 / len(k)
    hsic = lambda a, b: np.trace(a @ h @ b @ h)  # noqa: E731
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def test_linear_cka_is_the_n_by_n_gram_form():
    x, y = related()
    expected = gram_cka(x.numpy() @ x.numpy().T, y.numpy() @ y.numpy().T)
    assert 0.05 < expected < 0.95
    assert linear_cka(x, y).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [40, 41])  # an even and an odd number of matrix entries: two rules for the median
@pytest.mark.parametrize("bandwidth", [1.0, 0.5])
def test_rbf_cka_is_the_gram_form_with_the_median_of_the_full_distance_matrix(n, bandwidth):
    def gram(z):
        distances = squareform(pdist(z.numpy(), "sqeuclidean"))
        return np.exp(-distances / (2 * bandwidth**2 * np.median(distances)))

    x, y = related(n)
    assert rbf_cka(x, y, bandwidth=bandwidth).item() == pytest.approx(gram_cka(gram(x), gram(y)), abs=1e-12)


@pytest.mark.parametrize("centered", [True, False])
def test_r2_cca_is_the_published_qr_form_at_full_rank(centered):
    x, y = (z + 2 for z in related())
    columns = [z.numpy() - centered * z.numpy().mean(0) for z in (x, y)]
    q_x, q_y = (np.linalg.qr(z)[0] for z in columns)
    expected = np.linalg.norm(q_y.T @ q_x) ** 2 / min(x.shape[1], y.shape[1])
    assert 0.05 < expected < 0.95
    assert r2_cca(x, y, centered=centered).item() == pytest.approx(expected, abs=1e-12)


def test_r2_cca_is_the_mean_squared_canonical_correlation_of_scikit_learn():
    x, y = related(200, (3, 4))
    a, b = CCA(n_components=3, scale=False, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] ** 2 for i in range(3)])
    assert r2_cca(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_one_feature_each_is_the_squared_correlation():
    x, y = related(60, (1, 1))
    expected = np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2
    assert linear_cka(x, y).item() == pytest.approx(expected, abs=1e-12)
    assert r2_cca(x, y).item() == pytest.approx(expected, abs=1e-12)


# ---- What must not matter, and what must ----


@every_metric
def test_a_representation_is_fully_similar_to_itself_and_the_answer_is_a_float64_scalar(similarity):
    x, _ = related()
    value = similarity(x.float(), x.float())
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(1, abs=1e-12)


@every_metric
def test_rotation_scale_shift_and_side_change_nothing(similarity):
    x, y = related()
    expected = similarity(x, y).item()
    for changed in (x @ rotation(5), 7 * x, x + 30, x + torch.arange(5.0)):
        assert similarity(changed, y).item() == pytest.approx(expected, abs=1e-10)
    assert similarity(y, x).item() == pytest.approx(expected, abs=1e-12)


@every_metric
def test_the_order_of_images_matters_only_between_the_two_sides(similarity):
    x, y = related()
    order = torch.randperm(len(x), generator=seeded(2))
    assert similarity(x[order], y[order]).item() == pytest.approx(similarity(x, y).item(), abs=1e-12)
    assert abs(similarity(x[order], y).item() - similarity(x, y).item()) > 0.02


def test_r2_cca_ignores_every_invertible_map_and_linear_cka_does_not():
    x, y = related()
    mixed = x @ (torch.randn(5, 5, generator=seeded(3), dtype=torch.float64) + 2 * torch.eye(5))
    mixed[:, 0] *= 1e-6  # a quiet channel counts as much as a loud one
    assert r2_cca(mixed, y).item() == pytest.approx(r2_cca(x, y).item(), abs=1e-8)
    assert abs(linear_cka(mixed, y) - linear_cka(x, y)) > 0.01


def test_only_the_uncentered_r2_cca_sees_a_common_offset():
    x, y = (torch.randn(2000, 4, generator=seeded(i), dtype=torch.float64) for i in range(2))
    assert r2_cca(x + 5, y + 5) < 0.02
    # The two share one of their four directions, the constant one.
    assert r2_cca(x + 5, y + 5, centered=False).item() == pytest.approx(1 / 4, abs=0.02)


@every_metric
def test_a_large_offset_costs_no_accuracy(similarity):
    x, y = related()
    assert similarity(1e4 + x, y - 1e4).item() == pytest.approx(similarity(x, y).item(), abs=1e-9)


@every_metric
def test_dead_channels_change_nothing(similarity):
    x, y = related()
    dead = torch.full((len(x), 3), 0.1, dtype=torch.float64)  # 0.1 has no exact mean: its rounding must not count
    dead[:, 0] = 0
    assert similarity(torch.cat([x, dead], 1), y).item() == pytest.approx(similarity(x, y).item(), abs=1e-12)


@every_metric
def test_constant_features_resemble_nothing(similarity):
    x, _ = related()
    constant = torch.full((len(x), 4), 0.1, dtype=torch.float64)
    assert similarity(x, constant).item() == 0
    assert similarity(constant, constant).item() == 0


def test_r2_cca_of_dependent_channels_is_that_of_their_span():
    x, y = related()
    dependent = torch.cat([x, x @ torch.randn(5, 4, generator=seeded(4), dtype=torch.float64)], 1)  # 9 channels, rank 5
    assert r2_cca(dependent, y).item() == pytest.approx(r2_cca(x, y).item(), abs=1e-10)
    in_float32 = r2_cca(dependent.float(), y.float())  # what rounding leaves of the four is cut off as well
    assert in_float32.item() == pytest.approx(r2_cca(x, y).item(), abs=1e-5)


def test_wide_inputs_give_a_defined_answer():
    x, y = related(10, (30, 40))
    assert linear_cka(x, y).item() == pytest.approx(gram_cka((x @ x.T).numpy(), (y @ y.T).numpy()), abs=1e-12)
    assert r2_cca(x, y).item() == pytest.approx(1, abs=1e-10)  # 9 directions of 10 centered images: both span them all


def test_rbf_cka_survives_a_layer_that_is_silent_for_most_images():
    x, y = related()
    silent = x.clamp(min=0) * (torch.arange(len(x)) >= 70)[:, None]
    value = rbf_cka(silent, y)
    distances = squareform(pdist(silent.numpy(), "sqeuclidean"))
    other = squareform(pdist(y.numpy(), "sqeuclidean"))
    assert np.median(distances) == 0
    expected = gram_cka(np.exp(-distances / (2 * distances.mean())), np.exp(-other / (2 * np.median(other))))
    assert value.item() == pytest.approx(expected, abs=1e-12)


@every_metric
@pytest.mark.parametrize(
    ("x", "y", "complaint"),
    [
        (torch.zeros(4, 2), torch.zeros(5, 2), "x has 4 rows and y 5"),
        (torch.zeros(1, 2), torch.zeros(1, 2), "two or more"),
        (torch.zeros(4, 2, 3), torch.zeros(4, 2), r"shape \(4, 2, 3\)"),
        (torch.zeros(4, 2), torch.full((4, 2), torch.nan), "y holds values that are not finite"),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(similarity, x, y, complaint):
    with pytest.raises(ValueError, match=complaint):
        similarity(x, y)


def test_svcca_keeps_all_of_several_equal_directions_or_none():
    # Ten directions of equal variance: nine of them hold less than 95 %, and which nine would be anybody's guess.
    x = torch.linalg.qr(torch.randn(60, 10, generator=seeded(4), dtype=torch.float64)).Q
    y = x[:, :5] + 0.5 * torch.randn(60, 5, generator=seeded(5), dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.qr(x).Q
    rotated = svcca(x @ rotation(10), y, variance=0.85).item()
    assert svcca(x, y, variance=0.85).item() == pytest.approx(rotated, abs=1e-9)


def test_arrays_are_taken_as_tensors_and_complex_numbers_are_refused():
    x, y = related()
    assert linear_cka(x.numpy(), y.numpy()) == linear_cka(x, y)
    with pytest.raises(ValueError, match="x is complex"):
        linear_cka(x + 1j, y)

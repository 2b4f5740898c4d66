"""The similarities are what the papers say, and a profile gives the same numbers for all pairs in one pass."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.distance import pdist, squareform
from sklearn.cross_decomposition import CCA

from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.hints import LayerClustering
from pursuhint_lib.similarity import METRICS, LayerProfile, linear_cka, pool_features, profile_layers, r2_cca, rbf_cka

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


# ---- Profiles ----


class FakeTeacher:
    """Shows stored features; an "image" is the number of its row. Observes in the reverse of the order of `layers`."""

    def __init__(self, features):
        self.features = features
        self.layers = list(features)
        self.looks = 0

    def observe(self, images):
        self.looks += len(images)
        features = {name: self.features[name][images] for name in reversed(self.layers)}
        return SimpleNamespace(logits=None, features=features)


def batches(n, size):
    return [SimpleNamespace(images=rows) for rows in torch.arange(n).split(size)]


@pytest.fixture
def features():
    """Four layers of three kinds that grow out of one another, with dead channels, offsets and unlike scales."""
    generator = seeded(5)
    stem = torch.randn(300, 6, generator=generator).relu()
    maps = (stem @ torch.randn(6, 8 * 4, generator=generator)).relu().reshape(300, 8, 2, 2)
    maps[:, 3] = 0
    tokens = 40 + 0.1 * torch.randn(300, 3, 5, generator=generator) + 0.1 * stem[:, None, :5]
    head = 1e3 * (maps.mean((2, 3)) @ torch.randn(8, 7, generator=generator)).relu()
    return {"stem": stem, "block.0": maps, "block.1": tokens, "head": head}


@pytest.mark.parametrize("metric", PAIRWISE)
def test_a_profile_gives_the_pairwise_numbers_for_all_pairs(features, metric):
    profile = profile_layers(FakeTeacher(features), batches(300, 64))
    table = profile.similarity(metric)
    for a in profile.layers:
        for b in profile.layers:
            expected = PAIRWISE[metric](pool_features(features[a]), pool_features(features[b])).item()
            assert table.loc[a, b] == pytest.approx(expected, abs=1e-8), (a, b)


def test_the_uncentered_profile_is_the_uncentered_pairwise_r2_cca(features):
    profile = profile_layers(FakeTeacher(features), batches(300, 64))
    expected = r2_cca(profile.pooled("stem"), profile.pooled("block.1"), centered=False).item()
    assert profile.similarity("r2_cca_uncentered").loc["stem", "block.1"] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("metric", METRICS)
def test_every_table_is_labelled_symmetric_within_0_and_1_and_has_a_unit_diagonal(features, metric):
    table = profile_layers(FakeTeacher(features), batches(300, 64)).similarity(metric)
    assert list(table.index) == list(table.columns) == ["stem", "block.0", "block.1", "head"]
    values = table.to_numpy()
    assert (values == values.T).all() and (values.diagonal() == 1).all()
    assert values.min() >= 0 and values.max() <= 1


def test_each_image_is_looked_at_once_and_its_maps_are_averaged_over_positions(features):
    teacher = FakeTeacher(features)
    profile = profile_layers(teacher, batches(300, 64))
    assert teacher.looks == profile.n_images == 300
    torch.testing.assert_close(profile.pooled("block.0"), features["block.0"].flatten(2).mean(2))
    torch.testing.assert_close(profile.pooled("block.1"), features["block.1"].mean(1))
    assert profile.pooled("head").equal(features["head"])
    assert repr(profile) == "LayerProfile(4 layers, 300 images, 26 channels)"


def test_the_first_minute_with_a_real_teacher():
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4)]
    model = torch.nn.Sequential(*convolutions, torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5))
    images = torch.randn(1100, 3, 4, 4)
    teacher = FrozenTeacher(model, ["0", "1", "2", "3"])
    profile = profile_layers(teacher, [SimpleNamespace(images=part) for part in images.split(250)])
    table = profile.similarity("linear_cka")
    with torch.no_grad():
        first = model[0](images)
        third = model[2](model[1](first))
    expected = linear_cka(first.mean((2, 3)), third.mean((2, 3))).item()
    assert table.loc["0", "2"] == pytest.approx(expected, abs=1e-6)
    assert len(LayerClustering(n_clusters=2).fit(table).hint_points_) == 2


def test_half_precision_features_are_pooled_in_float32():
    ones = torch.ones(2, 1, 64, 64, dtype=torch.bfloat16)
    ones[1, 0, 0, 0] = 3
    assert pool_features(ones).dtype == torch.float32
    assert pool_features(ones)[1].item() == pytest.approx(1 + 2 / 4096, rel=1e-6)  # bfloat16 would say 1


def test_batch_size_does_not_change_a_single_bit(features):
    many = {name: f.repeat(8, *[1] * (f.ndim - 1)) for name, f in features.items()}  # 2400 images: three chunks
    whole = profile_layers(FakeTeacher(many), batches(2400, 2400))
    for size in (7, 1024, 1500):
        profile = profile_layers(FakeTeacher(many), batches(2400, size))
        assert profile.n_images == 2400
        assert profile.mean.equal(whole.mean) and profile.scatter.equal(whole.scatter)
        assert profile.features.equal(whole.features)


def test_the_moments_are_those_of_numpy_even_far_from_zero():
    x = 1e4 + 1e-2 * torch.randn(3000, 5, generator=seeded(6), dtype=torch.float64)
    profile = LayerProfile.from_features({"a": x[:, :2], "b": x[:, 2:]})
    expected = np.cov(x.numpy() - 1e4, rowvar=False) * 2999
    np.testing.assert_allclose(profile.scatter.numpy(), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(profile.mean.numpy(), x.numpy().mean(0), rtol=1e-14)


def test_the_order_of_images_does_not_matter_to_a_profile(features):
    order = torch.randperm(300, generator=seeded(7))
    plain = LayerProfile.from_features(features)
    shuffled = LayerProfile.from_features({name: f[order] for name, f in features.items()})
    for metric in METRICS:
        pd.testing.assert_frame_equal(shuffled.similarity(metric), plain.similarity(metric), atol=1e-10, rtol=0)


def test_a_constant_layer_has_similarity_0_to_others_and_1_to_itself(features):
    features["dead"] = torch.full((300, 4, 2, 2), 0.1)
    profile = LayerProfile.from_features(features)
    for metric in ("r2_cca", "linear_cka", "rbf_cka"):
        table = profile.similarity(metric)
        assert (table.loc["dead"].drop("dead") == 0).all()
        assert table.loc["dead", "dead"] == 1
        assert table.notna().all(axis=None)


def test_depth_similarity_falls_linearly_with_distance():
    four = LayerProfile.from_features({name: torch.randn(9, 2, generator=seeded(8)) for name in "abcd"})
    np.testing.assert_allclose(four.similarity("depth").loc["a"], [1, 2 / 3, 1 / 3, 0])
    one = LayerProfile.from_features({"a": torch.randn(9, 2, generator=seeded(8))}).similarity("depth")
    assert one.loc["a", "a"] == 1


def test_rbf_cka_looks_at_a_seeded_share_of_the_images(features):
    profile = LayerProfile.from_features(features)
    rows = torch.randperm(300, generator=seeded(9))[:100].sort().values
    capped = profile.similarity("rbf_cka", rbf_images=100, seed=9)
    pd.testing.assert_frame_equal(capped, profile.subset(rows).similarity("rbf_cka"), atol=1e-12, rtol=0)
    assert not capped.equals(profile.similarity("rbf_cka", rbf_images=100, seed=10))
    assert profile.similarity("r2_cca", rbf_images=100).equals(profile.similarity("r2_cca"))


def test_a_subset_is_the_profile_of_those_images_alone(features):
    profile = LayerProfile.from_features(features)
    mask = torch.arange(300) % 3 == 0
    alone = LayerProfile.from_features({name: f[mask] for name, f in features.items()})
    for subset in (profile.subset(mask), profile.subset(range(0, 300, 3))):
        assert subset.n_images == 100
        assert subset.similarity("linear_cka").equals(alone.similarity("linear_cka"))


def test_a_resample_is_a_seeded_half_without_repeats(features):
    profile = LayerProfile.from_features(features)
    half, again = (profile.resample(seeded(11)) for _ in range(2))
    assert half.n_images == 150 and half.features.equal(again.features)
    assert len(half.features.unique(dim=0)) == len(profile.features[:150].unique(dim=0)) == 150
    assert not half.features.equal(profile.resample(seeded(12)).features)
    numbered = LayerProfile.from_features({"number": torch.arange(300.0)[:, None]})
    assert (numbered.resample(seeded(11)).features.diff(dim=0) > 0).all()  # images keep their order


def test_without_kept_features_the_moment_metrics_still_work(features):
    lean = profile_layers(FakeTeacher(features), batches(300, 64), keep_features=False)
    full = profile_layers(FakeTeacher(features), batches(300, 64))
    assert lean.features is None
    for metric in ("r2_cca", "linear_cka", "depth"):
        assert lean.similarity(metric).equals(full.similarity(metric))
    for needs_them in (
        lambda: lean.similarity("rbf_cka"),
        lambda: lean.subset([0, 1]),
        lambda: lean.resample(seeded()),
        lambda: lean.pooled("stem"),
    ):
        with pytest.raises(ValueError, match="keep_features=True"):
            needs_them()


def test_too_few_images_for_cca_are_said_aloud(features):
    with pytest.warns(UserWarning, match="8 images for up to 8 channels"):
        table = LayerProfile.from_features(features).subset(range(8)).similarity("r2_cca")
    assert table.loc["block.0", "head"] == pytest.approx(1, abs=1e-8)


def test_errors_name_what_is_wrong_and_what_is_there(features):
    profile = LayerProfile.from_features(features)
    with pytest.raises(ValueError, match="metric 'linear_kca' is unknown: did you mean 'linear_cka'"):
        profile.similarity("linear_kca")
    with pytest.raises(ValueError, match="layer 'block0' is unknown: did you mean 'block.0'"):
        profile.pooled("block0")
    with pytest.raises(ValueError, match="batches gave 0 images"):
        profile_layers(FakeTeacher(features), [])
    with pytest.raises(ValueError, match="fraction is 0"):
        profile.resample(seeded(), fraction=0)
    with pytest.raises(ValueError, match="'a': 3, 'b': 4"):
        LayerProfile.from_features({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})
    features["block.1"][17, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 'block.1' gives features that are not finite"):
        profile_layers(FakeTeacher(features), batches(300, 64))

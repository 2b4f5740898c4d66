"""One pass over the images gives the pairwise numbers for all layers, whatever is kept of it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pursuhint_lib import profiling
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.hints import LayerClustering
from pursuhint_lib.moments import Moments
from pursuhint_lib.profiling import METRICS, LayerProfile, cross_similarity, pool_features, profile_layers
from pursuhint_lib.similarity import linear_cka, procrustes, pwcca, r2_cca, rbf_cka, svcca

PAIRWISE = {
    "r2_cca": r2_cca,
    "r2_cca_uncentered": lambda x, y: r2_cca(x, y, centered=False),
    "svcca": svcca,
    "pwcca": pwcca,
    "linear_cka": linear_cka,
    "linear_cka_debiased": lambda x, y: linear_cka(x, y, debiased=True),
    "rbf_cka": rbf_cka,
    "procrustes": procrustes,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class FakeTeacher:
    """Shows stored features; an "image" is the number of its row. It names its layers not in the order they run."""

    def __init__(self, features):
        self.features = features
        self.layers = list(reversed(features))
        self.looks = 0

    def observe(self, images, *, reduce):
        self.looks += len(images)
        features = {name: reduce(self.features[name][images]) for name in self.features}
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
    head += 10 * torch.randn(300, 7, generator=generator)  # no two canonical correlations are equal: PWCCA needs that
    return {"stem": stem, "block.0": maps, "block.1": tokens, "head": head}


def test_every_metric_but_depth_has_a_pairwise_definition():
    assert set(METRICS) == {*PAIRWISE, "depth"}


@pytest.mark.parametrize("metric", PAIRWISE)
def test_a_profile_gives_the_pairwise_numbers_for_all_pairs(features, metric):
    profile = profile_layers(FakeTeacher(features), batches(300, 64))
    table = profile.similarity(metric)
    for a in profile.layers:
        for b in profile.layers:
            expected = PAIRWISE[metric](pool_features(features[a]), pool_features(features[b])).item()
            assert table.loc[a, b] == pytest.approx(expected, abs=1e-8), (a, b)


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
    assert repr(profile) == "LayerProfile(4 layers, 300 images, 26 features, features of 300 kept)"


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


def test_layers_stand_in_the_order_in_which_they_run_however_they_were_named(features):
    teacher = FakeTeacher(features)
    assert teacher.layers == ["head", "block.1", "block.0", "stem"]
    assert profile_layers(teacher, batches(300, 64)).layers == ["stem", "block.0", "block.1", "head"]


def test_batches_may_be_what_a_data_loader_gives(features):
    plain = profile_layers(FakeTeacher(features), batches(300, 64)).similarity("linear_cka")
    rows = torch.arange(300)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows, rows), batch_size=64)
    for other in (loader, rows.split(64)):
        assert profile_layers(FakeTeacher(features), other).similarity("linear_cka").equals(plain)


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
        assert profile.moments.mean.equal(whole.moments.mean)
        assert profile.moments.scatter.equal(whole.moments.scatter)
        assert profile.features.equal(whole.features)


def test_the_moments_are_those_of_numpy_even_far_from_zero():
    x = 1e4 + 1e-2 * torch.randn(3000, 5, generator=seeded(6), dtype=torch.float64)
    profile = LayerProfile.from_features({"a": x[:, :2], "b": x[:, 2:]})
    expected = np.cov(x.numpy() - 1e4, rowvar=False) * 2999
    np.testing.assert_allclose(profile.moments.scatter.numpy(), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(profile.moments.mean.numpy(), x.numpy().mean(0), rtol=1e-14)


def test_the_order_of_images_does_not_matter_to_a_profile(features):
    order = torch.randperm(300, generator=seeded(7))
    plain = LayerProfile.from_features(features)
    shuffled = LayerProfile.from_features({name: f[order] for name, f in features.items()})
    for metric in METRICS:
        pd.testing.assert_frame_equal(shuffled.similarity(metric), plain.similarity(metric), atol=1e-10, rtol=0)


def test_a_constant_layer_has_similarity_0_to_others_and_1_to_itself(features):
    features["dead"] = torch.full((300, 4, 2, 2), 0.1)
    profile = LayerProfile.from_features(features)
    for metric in PAIRWISE:
        table = profile.similarity(metric)
        if metric != "r2_cca_uncentered":  # to which a constant is a direction like any other
            assert (table.loc["dead"].drop("dead") == 0).all()
        assert table.loc["dead", "dead"] == 1
        assert table.notna().all(axis=None)


def test_depth_similarity_falls_linearly_with_distance():
    four = LayerProfile.from_features({name: torch.randn(9, 2, generator=seeded(8)) for name in "abcd"})
    np.testing.assert_allclose(four.similarity("depth").loc["a"], [1, 2 / 3, 1 / 3, 0])
    one = LayerProfile.from_features({"a": torch.randn(9, 2, generator=seeded(8))}).similarity("depth")
    assert one.loc["a", "a"] == 1


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
    lean = profile_layers(FakeTeacher(features), batches(300, 64), keep_images=0)
    full = profile_layers(FakeTeacher(features), batches(300, 64))
    assert lean.features is None
    for metric in [metric for metric in METRICS if metric != "rbf_cka"]:
        assert lean.similarity(metric).equals(full.similarity(metric))
    for needs_them in (
        lambda: lean.similarity("rbf_cka"),
        lambda: lean.subset([0, 1]),
        lambda: lean.resample(seeded()),
        lambda: lean.pooled("stem"),
    ):
        with pytest.raises(ValueError, match="keep_images"):
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
    with pytest.raises(ValueError, match="rows that are not among the 300 kept"):
        profile.subset([5, 300])
    with pytest.raises(ValueError, match="leaves 0 images"):
        profile.subset([])
    with pytest.raises(ValueError, match="chunks is -1"):
        profile_layers(FakeTeacher(features), batches(300, 64), chunks=-1)
    with pytest.raises(ValueError, match="captures no layers"):
        profile_layers(FakeTeacher({}), batches(300, 64))
    with pytest.raises(TypeError, match="Linear, which cannot observe: pass FrozenTeacher"):
        profile_layers(torch.nn.Linear(2, 2), batches(300, 64))
    with pytest.raises(ValueError, match="rbf_cka needs the features of two images"):
        profile_layers(FakeTeacher(features), batches(300, 64), keep_images=1).similarity("rbf_cka")
    features["block.1"][17, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 'block.1' gives features that are not finite"):
        profile_layers(FakeTeacher(features), batches(300, 64))


# ---- What is kept ----


@pytest.mark.parametrize(
    "kind", [lambda x: (x, x), lambda x: {"pixel_values": x}, lambda x: x], ids=["tuple", "dict", "x"]
)
def test_images_are_found_in_batches_of_every_form(features, kind):
    rows = [kind(part) for part in torch.arange(300).split(64)]
    assert profile_layers(FakeTeacher(features), rows).features.equal(
        profile_layers(FakeTeacher(features), batches(300, 64)).features
    )


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(4, 3, 6, 6, dtype=torch.uint8), "the teacher fails on images uint8 (4, 3, 6, 6): "),
        (torch.zeros(3, 6, 6), "the teacher fails on images float32 (3, 6, 6): "),
        (np.zeros((4, 3, 6, 6)), "a batch is ndarray, which has no images"),
    ],
)
def test_images_that_the_teacher_cannot_take_are_one_line(images, says):
    teacher = FrozenTeacher(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)), ["0"])
    with pytest.raises((TypeError, ValueError)) as error:
        profile_layers(teacher, [images])
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_features_may_be_arrays(features):
    arrays = {layer: rows.numpy() for layer, rows in features.items()}
    assert LayerProfile.from_features(arrays).features.equal(LayerProfile.from_features(features).features)


def test_beyond_the_images_to_keep_a_uniform_sample_stays(features):
    features = {name: f.repeat(10, *[1] * (f.ndim - 1)) for name, f in features.items()}
    features["number"] = torch.arange(3000.0)[:, None]
    full = profile_layers(FakeTeacher(features), batches(3000, 250))
    some = profile_layers(FakeTeacher(features), batches(3000, 250), keep_images=400)
    assert some.similarity("r2_cca").equals(full.similarity("r2_cca"))  # moments are always of all
    kept = some.pooled("number")[:, 0]
    assert kept.tolist() == some.images.tolist() and (kept.diff() > 0).all() and len(kept) == 400
    again = profile_layers(FakeTeacher(features), batches(3000, 99), keep_images=400)
    other = profile_layers(FakeTeacher(features), batches(3000, 250), keep_images=400, seed=1)
    assert again.images.tolist() == some.images.tolist() != other.images.tolist()
    pd.testing.assert_frame_equal(some.similarity("rbf_cka"), full.subset(kept.long()).similarity("rbf_cka"))
    with pytest.raises(ValueError, match=r"features of all 3000 images \(400 were kept\).*keep_images=3000.*chunks=16"):
        some.resample(seeded())


def test_every_image_is_as_likely_to_be_kept_as_any_other():
    counts = np.zeros(60)
    for seed in range(2000):
        sample = profiling._Sample(20, seed)
        for start in range(0, 60, 25):
            sample.add(torch.arange(start, min(start + 25, 60))[:, None])
        rows, images = sample.finish()
        assert rows[:, 0].tolist() == images.tolist()
        counts[images] += 1
    # Each count is binomial(2000, 1/3): standard deviation 21.
    assert counts.sum() == 2000 * 20 and abs(counts - 2000 / 3).max() < 5 * 21


def test_moments_per_chunk_resample_without_any_features(features):
    many = {name: f.repeat(14, *[1] * (f.ndim - 1)) for name, f in features.items()}  # 4200 images: five chunks
    for f in many.values():
        f += 0.3 * f.std() * torch.randn(f.shape, generator=seeded(3))
    lean = profile_layers(FakeTeacher(many), batches(4200, 250), keep_images=0, chunks=3)
    plain = LayerProfile.from_features(many)
    part_of = profiling._part_of(np.arange(4200), 3)
    assert [part.n for part in lean.parts] == np.bincount(part_of).tolist()
    whole = lean.resample(seeded(), fraction=1.0)
    drawn = sorted(torch.randperm(3, generator=seeded(4))[:2].tolist())
    half = lean.resample(seeded(4), fraction=2 / 3)
    alone = plain.subset(torch.from_numpy(np.isin(part_of, drawn)))
    for metric in [metric for metric in METRICS if metric != "rbf_cka"]:
        pd.testing.assert_frame_equal(whole.similarity(metric), plain.similarity(metric), atol=1e-9, rtol=0)
        pd.testing.assert_frame_equal(half.similarity(metric), alone.similarity(metric), atol=1e-9, rtol=0)
    assert "3 chunks" in repr(lean)
    sampled = profile_layers(FakeTeacher(many), batches(4200, 250), keep_images=900, chunks=3)
    sampled = sampled.resample(seeded(4), 2 / 3)
    assert set(part_of[sampled.images]) == set(drawn) and 300 < len(sampled.features) == len(sampled.images) < 900
    rows = torch.from_numpy(sampled.images)
    pd.testing.assert_frame_equal(sampled.similarity("rbf_cka"), plain.subset(rows).similarity("rbf_cka"))


def test_images_are_dealt_to_chunks_without_regard_to_their_order():
    part_of = profiling._part_of(np.arange(48_000), 16)
    by_class = np.stack([np.bincount(rows, minlength=16) for rows in part_of.reshape(16, 3000)])  # sorted by class
    # Each count is binomial(3000, 1/16): mean 187.5, standard deviation 13.3.
    assert abs(by_class - 187.5).max() < 5 * 13.3 and 10 < by_class.std() < 17
    assert abs(np.corrcoef(part_of[:-1], part_of[1:])[0, 1]) < 0.03


def test_the_squared_norms_are_moved_to_the_mean_of_all_rows():
    rows = torch.randn(500, 5, generator=seeded(1), dtype=torch.float64) + 7
    rows[:100] += 3  # the first rows, around which they are taken, are unlike the rest
    moments = Moments([2, 3])
    for chunk in rows.split(100):
        moments.add(chunk)
    centered = rows - rows.mean(0)
    norms = torch.stack([centered[:, :2].square().sum(1), centered[:, 2:].square().sum(1)])
    torch.testing.assert_close(moments.norm_products(), norms @ norms.T, rtol=1e-12, atol=0)


def test_moments_that_cannot_fit_are_refused_before_the_work(features, monkeypatch):
    monkeypatch.setattr(profiling.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 8 * 30**2 + 1}.get)
    teacher = FakeTeacher(features)
    assert profile_layers(teacher, batches(300, 64)).n_images == 300  # 26 features and 4 norms just fit
    teacher.looks = 0
    with pytest.raises(ValueError, match="joint moments of 26 features.*fewer chunks"):
        profile_layers(teacher, batches(300, 64), chunks=2)
    assert teacher.looks == 64


# ---- Pooling on a grid ----


def test_a_grid_keeps_where_a_channel_fires_and_a_small_map_keeps_all_it_has():
    maps = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    expected = maps.reshape(2, 3, 2, 2, 2, 3).mean((3, 5)).flatten(1)
    torch.testing.assert_close(pool_features(maps, 2), expected)
    assert pool_features(maps, 9).equal(maps.flatten(1))
    assert pool_features(maps[:, :, :1, :1], 4).equal(maps[:, :, 0, 0])
    assert pool_features(maps[:, :, 0, 0], 4).equal(maps[:, :, 0, 0])  # vectors have no positions
    assert pool_features(maps.bfloat16(), 2).dtype == torch.float32


def test_tokens_on_a_grid_are_a_square_map_without_their_class_token():
    maps = torch.randn(2, 5, 4, 4, generator=seeded(2))
    tokens = maps.flatten(2).transpose(1, 2)  # (B, 16, 5)
    with_class = torch.cat([torch.full((2, 1, 5), 100.0), tokens], dim=1)
    for features in (tokens, with_class):
        torch.testing.assert_close(pool_features(features, 2), pool_features(maps, 2))
    torch.testing.assert_close(pool_features(tokens), maps.mean((2, 3)))
    with pytest.raises(ValueError, match="14 tokens are no square map"):
        pool_features(tokens[:, :14], 2)
    with pytest.raises(ValueError, match="grid is 0"):
        pool_features(maps, 0)


def test_a_profile_on_a_grid_compares_maps_cell_by_cell(features):
    plain = profile_layers(FakeTeacher(features), batches(300, 64))
    grid = profile_layers(FakeTeacher(features | {"block.1": features["block.1"][:, :1]}), batches(300, 64), grid=2)
    assert grid.widths == [6, 32, 5, 7] and plain.widths == [6, 8, 5, 7]
    x, y = features["block.0"].flatten(1), features["head"]
    assert grid.similarity("linear_cka").loc["block.0", "head"] == pytest.approx(linear_cka(x, y).item(), abs=1e-8)


# ---- Two networks ----


def test_cross_similarity_is_linear_cka_of_every_pair():
    widths = {"a": 4, "b": 6, "c": 3}
    features = {name: 5 + torch.randn(30, width, generator=seeded(width)) for name, width in widths.items()}
    features["c"][:, 1] = 2  # dead
    teacher = LayerProfile.from_features({name: features[name] for name in "ab"})
    student = LayerProfile.from_features({"c": features["c"], "a": features["a"]})
    table = cross_similarity(teacher, student)
    assert table.loc["a", "a"] == pytest.approx(1.0)
    for t in "ab":
        for s in "ca":
            assert table.loc[t, s] == pytest.approx(float(linear_cka(features[t], features[s])), abs=1e-12)
    with pytest.raises(ValueError, match="30 and 20 images"):
        cross_similarity(teacher, student.subset(range(20)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", METRICS)
def test_a_profile_gives_the_same_numbers_on_a_gpu(features, metric):
    profile = LayerProfile.from_features(features)
    pd.testing.assert_frame_equal(profile.to("cuda").similarity(metric), profile.similarity(metric), atol=1e-10, rtol=0)

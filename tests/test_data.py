"""Images in, batches out: every random draw is pinned by its arguments, and both sources of a data set agree."""

import io
import os
import re
import struct
import urllib.error
import zlib

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import ExifTags, Image

from pursuhint_lib import data
from pursuhint_lib.data import (
    Batches,
    ImageSet,
    balanced_subset,
    channel_stats,
    hold_out,
    list_image_folder,
    load_images,
    read_image,
)
from pursuhint_lib.folders import FolderBatches, load_folders


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Caches and downloads of a test stay in its own folder."""
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PURSUHINT_DATA", raising=False)
    return tmp_path / "home"


def random_set(n=30, channels=3, height=6, width=5, n_classes=3, seed=0):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (n, channels, height, width), dtype=np.uint8)
    labels = torch.arange(n) % n_classes
    return ImageSet(torch.from_numpy(images), labels, [f"class {k}" for k in range(n_classes)])


def plain_batches(image_set, batch_size=8, **options):
    """Batches whose images are image / 255, so that tests can see pixels."""
    return Batches(image_set, batch_size, mean=[0.0] * image_set.channels, std=[1.0] * image_set.channels, **options)


def all_of(iterator):
    """A pass as three tensors: images, labels, index."""
    return [torch.cat(parts) for parts in zip(*iterator, strict=True)]


def same_pass(first, second):
    return all(torch.equal(a, b) for a, b in zip(all_of(first), all_of(second), strict=True))


def write_folder(folder, images_by_split, suffix=".png"):
    """images_by_split: {"train": {"cat": uint8 (N, H, W, 3)}}, one file per image."""
    for split, by_class in images_by_split.items():
        for class_name, images in by_class.items():
            (folder / split / class_name).mkdir(parents=True)
            for position, image in enumerate(images):
                Image.fromarray(image).save(folder / split / class_name / f"{position:03d}{suffix}")
    return folder


def random_photographs(n_train=4, n_test=2, size=32, names=("apple", "bear", "cloud")):
    random = np.random.default_rng(1)
    return {
        split: {name: random.integers(0, 256, (n, size, size, 3), dtype=np.uint8) for name in names}
        for split, n in (("train", n_train), ("test", n_test))
    }


def message_of(error):
    text = str(error.value)
    assert "\n" not in text, "an error is one line"
    return text


# --- ImageSet --------------------------------------------------------------------------------------------------------


def test_an_image_set_is_indexed_by_mask_positions_and_slice():
    images = random_set()
    positions = torch.tensor([7, 2, 2])
    mask = images.labels == 1
    assert torch.equal(images[positions].images, images.images[[7, 2, 2]])
    assert torch.equal(images[mask].labels, torch.ones(10, dtype=torch.int64))
    assert torch.equal(images[3:9:2].images, images.images[[3, 5, 7]])
    assert images[mask].classes == images.classes
    assert len(images[mask]) == 10 and images.channels == 3
    with pytest.raises(TypeError, match="image_set.images"):
        images[0]


def test_an_image_set_shows_itself_in_one_line():
    assert repr(random_set()) == "ImageSet(30 images of 3x6x5, 3 classes: class 0, class 1, class 2)"
    assert repr(random_set(n_classes=5)).endswith("5 classes: class 0, class 1, class 2, ...)")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, "uint8"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "N, C, H, W"),
        ({"labels": torch.tensor([0])}, "one per image"),
        ({"labels": torch.tensor([0, 1], dtype=torch.int32)}, "int64"),
        ({"labels": torch.tensor([0, 2])}, "0..1"),
        ({"labels": torch.tensor([-1, 0])}, "-1..0"),
        ({"classes": ["a", "a"]}, "distinct"),
    ],
)
def test_an_image_set_that_does_not_fit_together_is_refused(change, named):
    fine = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, 1]), "classes": ["a", "b"]}
    ImageSet(**fine)
    with pytest.raises(ValueError) as error:
        ImageSet(**{**fine, **change})
    assert named in message_of(error)


def test_the_digest_tells_images_labels_names_shape_and_order_apart():
    images = random_set(n=6, height=4, width=4)
    same = ImageSet(images.images.clone(), images.labels.clone(), list(images.classes))
    pixel = images.images.clone()
    pixel[3, 1, 2, 0] += 1
    others = [
        ImageSet(pixel, images.labels, images.classes),
        ImageSet(images.images, images.labels.flip(0), images.classes),
        ImageSet(images.images, images.labels, ["class 0", "class 1", "class two"]),
        ImageSet(images.images.reshape(6, 3, 2, 8), images.labels, images.classes),
        images[torch.arange(6).flip(0)],
        images[:5],
    ]
    assert same.digest == images.digest and len(images.digest) == 64
    assert len({images.digest, *(other.digest for other in others)}) == 7
    channels_last = ImageSet(images.images.to(memory_format=torch.channels_last), images.labels, images.classes)
    assert channels_last.digest == images.digest, "how an image lies in memory is not what it is"


def test_repeated_images_come_image_major():
    images = random_set(n=4)
    repeated = images.repeated(3)
    assert torch.equal(repeated.images, images.images[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
    assert repeated.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="not 0"):
        images.repeated(0)


# --- splits, subsets, statistics -------------------------------------------------------------------------------------


def as_rows(image_set):
    return {image.numpy().tobytes() for image in image_set.images}


def test_held_out_images_are_balanced_disjoint_and_fixed_by_the_seed():
    images = random_set(n=31)
    rest, held = hold_out(images, 4, seed=5)
    assert held.labels.bincount().tolist() == [4, 4, 4]
    assert len(rest) == 31 - 12
    assert not as_rows(rest) & as_rows(held) and as_rows(rest) | as_rows(held) == as_rows(images)
    torch.manual_seed(123), np.random.seed(123)
    again_rest, again_held = hold_out(images, 4, seed=5)
    assert (again_rest.digest, again_held.digest) == (rest.digest, held.digest)
    assert hold_out(images, 4, seed=6)[1].digest != held.digest


def test_both_parts_of_a_split_keep_the_order_of_the_set():
    images = ImageSet(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1), torch.arange(40) % 2, ["a", "b"])
    for part in hold_out(images, 5, seed=0):
        values = part.images.flatten().tolist()
        assert values == sorted(values)


def test_a_class_too_small_to_hold_out_is_named():
    images = random_set()[torch.tensor([0, 3, 6, 1, 4, 2, 5, 8])]  # classes of 3, 2 and 3
    with pytest.raises(ValueError) as error:
        hold_out(images, 2, seed=0)
    assert "'class 1' has 2 images" in message_of(error)


def test_a_balanced_subset_is_even_nested_and_of_the_size_asked():
    images = random_set(n=60, n_classes=4)
    small, large = balanced_subset(images, 10, seed=3), balanced_subset(images, 22, seed=3)
    assert len(small) == 10 and sorted(small.labels.bincount().tolist()) == [2, 2, 3, 3]
    assert len(large) == 22 and as_rows(small) < as_rows(large)
    assert balanced_subset(images, 10, seed=3).digest == small.digest
    assert balanced_subset(images, 10, seed=4).digest != small.digest
    assert balanced_subset(images, 1000, seed=3).digest == images.digest


def test_a_class_that_runs_out_is_made_up_for_by_the_others():
    few = random_set(n=60, n_classes=3)
    few = few[torch.cat([torch.where(few.labels == 0)[0][:2], torch.where(few.labels > 0)[0]])]
    assert balanced_subset(few, 12, seed=0).labels.bincount().tolist() == [2, 5, 5]


def test_channel_statistics_equal_float64_ones():
    images = random_set(n=17, channels=2)
    reference = images.images.numpy().astype(np.float64) / 255
    mean, std = channel_stats(images)
    assert mean.dtype == std.dtype == torch.float64
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), rtol=1e-13)


# --- Batches ---------------------------------------------------------------------------------------------------------

EVERYTHING = {"crop_padding": 2, "flip": True, "noise": 0.3, "shuffle": True}


def test_a_pass_depends_on_seed_and_epoch_alone():
    batches = plain_batches(random_set(), seed=4, **EVERYTHING)
    torch.manual_seed(0)
    first = all_of(batches.epoch(3))
    torch.manual_seed(99), np.random.seed(99)
    half_read = batches.epoch(3)
    next(half_read), next(batches.epoch(7))
    again = all_of(plain_batches(random_set(), seed=4, **EVERYTHING).epoch(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_passes_read_side_by_side_do_not_disturb_each_other():
    batches = plain_batches(random_set(), **EVERYTHING)
    left, right = zip(*zip(batches.epoch(1), batches.epoch(2), strict=True), strict=True)
    assert same_pass(left, batches.epoch(1)) and same_pass(right, batches.epoch(2))


def test_batches_leave_the_global_random_state_alone():
    torch.manual_seed(1), np.random.seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    all_of(plain_batches(random_set(), **EVERYTHING).epoch(0))
    hold_out(random_set(), 1, seed=0)
    assert torch.equal(torch.get_rng_state(), before) and np.random.get_state()[1].tolist() == numpy_before


@pytest.mark.parametrize("option", [{"shuffle": True}, {"crop_padding": 2}, {"flip": True}, {"noise": 0.1}])
def test_each_draw_changes_with_the_epoch_and_with_the_seed(option):
    images = random_set()
    passes = [all_of(plain_batches(images, seed=s, **option).epoch(e))[0] for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(passes[i], passes[j])


def test_turning_one_augmentation_off_leaves_the_others_as_they_were():
    images = random_set()
    with_all, without_flip = (
        all_of(plain_batches(images, **{**EVERYTHING, "flip": flip}).epoch(2)) for flip in (True, False)
    )
    assert torch.equal(with_all[2], without_flip[2])
    equal = (with_all[0] == without_flip[0]).flatten(1).all(1)
    assert 5 < equal.sum() < 25, "about half of 30 images are upright in both, with equal crop and noise"


def test_without_augmentation_images_are_normalized_in_order():
    images = random_set()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    batches = Batches(images, 8, mean=mean, std=std)
    reference = (images.images.numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    out, labels, index = all_of(batches)
    np.testing.assert_allclose(out, reference, rtol=0, atol=2e-6)
    assert torch.equal(labels, images.labels) and index.tolist() == list(range(30))
    assert [len(batch.labels) for batch in batches] == [8, 8, 8, 6] and len(batches) == 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_batches_are_float32_and_channels_last(channels, options):
    for images, labels, index in plain_batches(random_set(channels=channels), **options):
        assert images.dtype == torch.float32 and images.shape[1:] == (channels, 6, 5)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == index.dtype == torch.int64 and len(images) == len(labels) == len(index)


def test_a_shuffled_pass_holds_every_image_once_with_its_own_label():
    images = random_set(n_classes=7)
    out, labels, index = all_of(plain_batches(images, shuffle=True).epoch(1))
    assert sorted(index.tolist()) == list(range(30)) and index.tolist() != list(range(30))
    assert torch.equal(labels, images.labels[index])
    assert torch.equal((out * 255).round().to(torch.uint8), images.images[index])


def test_crop_and_flip_give_a_window_of_the_padded_image():
    """Slow reference: each image equals exactly one of all windows, mirrored or not, of its zero-padded original."""
    padding, images = 2, random_set(n=200)
    out, _, index = all_of(plain_batches(images, batch_size=16, crop_padding=padding, flip=True, shuffle=True).epoch(1))
    seen = []
    for image, position in zip((out * 255).round().to(torch.uint8).numpy(), index.tolist(), strict=True):
        padded = np.pad(images.images[position].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        matches = []
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                window = padded[:, top : top + 6, left : left + 5]
                matches += [(top, left, 0)] * np.array_equal(window, image)
                matches += [(top, left, 1)] * np.array_equal(window[:, :, ::-1], image)
        assert len(matches) == 1
        seen += matches
    top, left, mirrored = np.array(seen).T
    assert set(top) == set(left) == {0, 1, 2, 3, 4} and len(set(seen)) > 40
    assert 70 < mirrored.sum() < 130
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.25 and abs(np.corrcoef(top, mirrored)[0, 1]) < 0.25


def test_flip_alone_mirrors_left_to_right():
    images = random_set(n=40)
    out, _, index = all_of(plain_batches(images, flip=True))
    originals = images.images[index] / 255.0
    upright = (out - originals).abs().flatten(1).amax(1) < 1e-6
    mirrored = (out - originals.flip(3)).abs().flatten(1).amax(1) < 1e-6
    assert torch.equal(upright, ~mirrored) and 8 < mirrored.sum() < 32


def test_noise_is_gaussian_on_the_unit_scale_before_normalization_and_not_clipped():
    images = random_set(n=400, channels=1, height=8, width=8)
    quiet, noisy = (
        all_of(Batches(images, 64, mean=[0.3], std=[0.25], noise=noise))[0].double() for noise in (0.0, 0.5)
    )
    drawn = (noisy - quiet) * 0.25  # back to the [0, 1] scale
    n = drawn.numel()
    assert abs(drawn.mean()) < 4 * 0.5 / n**0.5
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / (2 * n) ** 0.5
    assert abs((drawn.abs() < 0.5).double().mean() - 0.6827) < 0.015  # one sigma of a Gaussian
    pixels = noisy * 0.25 + 0.3
    assert pixels.min() < -0.5 and pixels.max() > 1.5
    correlation = np.corrcoef(drawn.flatten(1).numpy().T) - np.eye(64)
    assert np.abs(correlation).max() < 0.25, "pixels are independent"


def test_noise_of_an_evaluation_is_fixed_and_differs_between_repeats_of_an_image():
    images = random_set(n=5).repeated(2)
    batches = plain_batches(images, batch_size=10, noise=0.2)
    assert same_pass(batches, batches) and same_pass(batches, batches.epoch(0))
    (batch,) = batches
    assert not torch.equal(batch.images[0], batch.images[1])


def test_a_last_training_batch_of_one_image_is_dropped():
    images = random_set(n=17)
    assert [len(batch.index) for batch in plain_batches(images, shuffle=True)] == [8, 8]
    assert len(plain_batches(images, shuffle=True)) == 2
    assert [len(batch.index) for batch in plain_batches(images)] == [8, 8, 1] and len(plain_batches(images)) == 3
    assert len(plain_batches(random_set(n=18), shuffle=True)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"mean": [0.5]}, "one value per channel"),
        ({"std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"crop_padding": -1}, "crop_padding"),
        ({"image_set": random_set()[:0]}, "0 images"),
        ({"image_set": random_set()[:1], "shuffle": True}, "1 images"),
    ],
)
def test_batches_refuse_what_makes_no_sense(change, named):
    fine = {"image_set": random_set(), "batch_size": 8, "mean": [0.0] * 3, "std": [1.0] * 3}
    with pytest.raises(ValueError) as error:
        Batches(**{**fine, **change})
    assert named in message_of(error)


def test_a_negative_epoch_or_seed_is_refused_at_once():
    with pytest.raises(ValueError, match="not -1"):
        plain_batches(random_set()).epoch(-1)
    with pytest.raises(ValueError, match="not -3"):
        hold_out(random_set(), 1, seed=-3)


# --- load_images -----------------------------------------------------------------------------------------------------


def test_digits_are_scaled_split_by_class_and_the_same_for_every_seed():
    from sklearn.datasets import load_digits

    sets = load_images("digits")
    train, test = sets["train"], sets["test"]
    assert len(train) + len(test) == 1797 and train.images.shape[1:] == (1, 8, 8)
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert (share - 0.3).abs().max() < 0.003
    assert train.classes == test.classes == list("0123456789")
    source = load_digits()
    scaled = np.round(source.images * 255 / 16).astype(np.uint8)
    expected = sorted((image.tobytes(), label) for image, label in zip(scaled, source.target, strict=True))
    pairs = [pair for part in (train, test) for pair in zip(part.images.numpy(), part.labels.tolist(), strict=True)]
    assert sorted((image.tobytes(), label) for image, label in pairs) == expected
    assert load_images("digits", seed=9)["test"].digest == test.digest


def test_test_images_are_repeated_and_training_images_are_not():
    once, thrice = load_images("digits"), load_images("digits", test_repeats=3)
    assert thrice["test"].digest == once["test"].repeated(3).digest
    assert thrice["train"].digest == once["train"].digest


def test_a_class_subset_is_drawn_by_the_seed_and_relabeled_in_class_order():
    every = load_images("digits")
    some = load_images("digits", n_classes=4, seed=2)
    classes = some["train"].classes
    assert len(classes) == 4 and classes == sorted(classes) and some["test"].classes == classes
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            original = every[split].images[every[split].labels == int(name)]
            assert torch.equal(some[split].images[some[split].labels == label], original)
    assert load_images("digits", n_classes=4, seed=2)["test"].digest == some["test"].digest
    assert len({tuple(load_images("digits", n_classes=4, seed=seed)["train"].classes) for seed in range(5)}) > 1
    with pytest.raises(ValueError) as error:
        load_images("digits", n_classes=11)
    assert "1..10" in message_of(error)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "cifar1000"}, "did you mean 'cifar100'"),
        ({"name": "imagenet"}, "known are digits"),
        ({"name": "image_folder"}, "needs image_size"),
        ({"name": "digits", "image_size": 16}, "must be 0 for digits"),
        ({"name": "digits", "test_repeats": 0}, "not 0"),
    ],
)
def test_an_impossible_request_is_refused_in_one_line(arguments, named):
    with pytest.raises(ValueError) as error:
        load_images(**arguments)
    assert named in message_of(error)


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR-100 shrunk to 3 classes of 4 + 2 images; torchvision's copy holds them in another order."""
    photographs = random_photographs()
    photographs["train"]["bear"][1] = photographs["train"]["bear"][0]  # CIFAR-100 holds equal images too
    monkeypatch.setitem(data._CIFAR, "cifar100", data._Cifar("CIFAR100", 3, {"train": 4, "test": 2}))

    class ShuffledCifar:
        url, filename = "https://example.org/cifar.tar.gz", "cifar.tar.gz"
        roots = []

        def __init__(self, root, train, download):
            print("Downloading, loudly")
            by_class = photographs["train" if train else "test"]
            order = np.random.default_rng(8).permutation(len(by_class) * len(by_class["bear"]))
            self.data = np.concatenate(list(by_class.values()))[order]
            self.targets = np.repeat(range(3), len(by_class["bear"]))[order].tolist()
            self.classes = list(by_class)
            self.roots.append(root)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", ShuffledCifar)
    return photographs, ShuffledCifar


def test_a_folder_and_torchvision_give_the_same_cifar(small_cifar, tmp_path, own_home, capfd):
    photographs, stand_in = small_cifar
    from_folder = load_images("cifar100", write_folder(tmp_path / "pngs", photographs))
    assert not stand_in.roots
    from_torchvision = load_images("cifar100")
    assert set(stand_in.roots) == {own_home / "data"} and capfd.readouterr() == ("", "")
    for split in ("train", "test"):
        assert from_folder[split].digest == from_torchvision[split].digest
        assert from_folder[split].classes == ["apple", "bear", "cloud"]
    bears = from_folder["train"].images[from_folder["train"].labels == 1]
    expected = {image.transpose(2, 0, 1).tobytes() for image in photographs["train"]["bear"]}
    assert len(bears) == 4 and {bear.numpy().tobytes() for bear in bears} == expected


def test_the_folder_may_come_from_the_environment(small_cifar, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pngs", small_cifar[0])
    named = load_images("cifar100", folder)
    monkeypatch.setenv("PURSUHINT_DATA", str(folder))
    assert load_images("cifar100")["train"].digest == named["train"].digest


def test_a_relative_folder_hangs_below_the_home(small_cifar, own_home):
    write_folder(own_home / "mine", small_cifar[0])
    assert len(load_images("cifar100", "mine")["train"]) == 12


def test_a_named_folder_that_is_not_there_is_an_error_and_nothing_is_downloaded(small_cifar, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        load_images("cifar100", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message_of(error) and "data_folder" in message_of(error)
    monkeypatch.setenv("PURSUHINT_DATA", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError) as error:
        load_images("cifar100")
    assert "nothing" in message_of(error) and "PURSUHINT_DATA" in message_of(error)
    assert not small_cifar[1].roots and not (tmp_path / "nowhere").exists()


def test_a_download_that_fails_says_what_was_tried_and_how_to_help(monkeypatch, own_home, capfd):
    def no_network(self):
        print("Downloading, loudly")
        raise urllib.error.URLError("no network\nat all")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    for name in ("cifar10", "cifar100"):
        with pytest.raises(FileNotFoundError) as error:
            load_images(name)
        text = message_of(error)
        for part in (name, str(own_home / "data"), "no network", "train/<class>", "data_folder", "PURSUHINT_DATA"):
            assert part in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("train/bear/003.png", "train/bear holds 3 images, expected 4"),
        ("test/cloud", "test holds 2 classes, expected 3"),
        ("test", "test holds 0 classes, expected 3"),
    ],
)
def test_an_incomplete_cifar_folder_says_what_is_there_and_what_is_expected(small_cifar, tmp_path, removed, named):
    folder = write_folder(tmp_path / "pngs", small_cifar[0])
    (folder / removed).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError) as error:
        load_images("cifar100", folder)
    assert named in message_of(error) and str(folder) in message_of(error)


def test_cifar_images_of_another_size_are_refused(small_cifar, tmp_path):
    folder = write_folder(tmp_path / "pngs", random_photographs(size=16))
    with pytest.raises(ValueError) as error:
        load_images("cifar100", folder)
    assert "is 16x16 pixels, expected 32x32" in message_of(error)


# --- image folders and the cache -------------------------------------------------------------------------------------


def test_an_image_folder_is_resized_by_its_shorter_side_and_center_cropped(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:, 10:30], wide[:, 30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    folder = write_folder(tmp_path / "own", {"train": {"wide": [wide], "high": [wide.transpose(1, 0, 2)]}})
    write_folder(folder, {"test": {"wide": [wide]}})
    sets = load_images("image_folder", folder, image_size=10)
    assert sets["train"].classes == sets["test"].classes == ["high", "wide"]
    assert sets["train"].labels.tolist() == [0, 1] and sets["test"].labels.tolist() == [1]
    assert sets["test"].images.shape == (1, 3, 10, 10)
    center = sets["train"].images[:, :, 2:8, 2:8]
    assert (center[:, 1] == 255).all() and not center[:, [0, 2]].any(), "the green middle is what remains"


def test_an_image_folder_reads_gray_and_other_suffixes_from_val_and_passes_over_the_rest(tmp_path):
    folder = write_folder(tmp_path / "own", {"train": {"a": [np.full((8, 8), 90, np.uint8)]}}, suffix=".BMP")
    write_folder(folder, {"val": {"a": [np.full((8, 8, 3), 40, np.uint8)]}}, suffix=".jpg")
    (folder / "train" / "a" / "notes.txt").write_text("not an image")
    (folder / "train" / "a" / "._000.png").write_bytes(b"left by an archive")
    (folder / "train" / ".hidden").mkdir()
    sets = load_images("image_folder", folder, image_size=8)
    assert sets["train"].images.shape == (1, 3, 8, 8) and (sets["train"].images == 90).all()
    assert len(sets["test"]) == 1 and (sets["test"].images.int() - 40).abs().max() <= 2


def put(path, image=None):
    """An image file, 8x8 and black if not given, with the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8))).save(path)


def test_images_in_subfolders_of_a_class_belong_to_it_and_what_is_passed_over_is_counted_in_one_line(tmp_path, caplog):
    for name in ("train/a/1.png", "train/a/2019/may/2.png", "train/b/images/1.png", "train/3.png", "test/a/1.png"):
        put(tmp_path / name)
    for name in ("train/b/boxes.txt", "train/a/2019/boxes.txt", "train/a/.trash", "val"):
        (tmp_path / name).mkdir() if name == "val" else (tmp_path / name).write_text("")
    put(tmp_path / "val" / "a" / "1.png")
    sets = load_images("image_folder", tmp_path, image_size=8)
    assert sets["train"].labels.tolist() == [0, 0, 1] and len(sets["test"]) == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"images of {tmp_path}: 5 passed over (2 *.txt, 1 hidden, "
        "1 in val/, as test/ is the test set, 1 outside the folders of classes)"
    )


def test_a_test_folder_without_classes_leaves_its_place_to_val(tmp_path, caplog):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "test/1.png", "test/images/2.png"):
        put(tmp_path / name)
    sets = load_images("image_folder", tmp_path, image_size=8)
    assert len(sets["train"]) == 2 and sets["test"].labels.tolist() == [0]
    assert "2 passed over (2 in test/, as val/ is the test set)" in caplog.text


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path, caplog):
    for name in ("n1", "n2"):
        put(tmp_path / "train" / name / "images" / f"{name}_0.JPEG")
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("")
    for number in range(4):
        put(tmp_path / "val" / "images" / f"val_{number}.JPEG", Image.new("RGB", (8, 8), (60 * number,) * 3))
        put(tmp_path / "test" / "images" / f"test_{number}.JPEG")
    table = "val_0.JPEG\tn2\t0\t0\t9\t9\nval_1.JPEG\tn1\t0\t0\t9\t9\nval_2.JPEG\tn2\t0\t0\t9\t9\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(table)
    sets = load_images("image_folder", tmp_path, image_size=8)
    assert sets["train"].classes == ["n1", "n2"] and sets["train"].labels.tolist() == [0, 1]
    assert sets["test"].labels.tolist() == [0, 1, 1]
    assert [round(float(image.float().mean()) / 60) for image in sets["test"].images] == [1, 0, 2]
    assert "(4 in test/, as val/ is the test set, 2 *.txt, 1 outside the folders of classes)" in caplog.text


@pytest.mark.parametrize(
    ("link", "to", "says"),
    [
        ("train/b", "b", "train/b cannot be read (Too many levels of symbolic links)"),
        ("train/b", "gone", "train/b cannot be read (No such file or directory)"),
        ("train/a/up", "..", "train/a/up is a link to a folder that it lies in"),
        ("train/a/2.png", "gone.png", "train/a/2.png cannot be read (No such file or directory)"),
    ],
)
def test_a_link_that_leads_nowhere_or_in_a_circle_is_named(tmp_path, link, to, says):
    put(tmp_path / "train" / "a" / "1.png"), put(tmp_path / "test" / "a" / "1.png")
    (tmp_path / link).symlink_to(to)
    with pytest.raises(ValueError) as error:
        load_images("image_folder", tmp_path, image_size=8)
    assert says in message_of(error)


def test_linked_folders_are_read_and_two_classes_may_share_one(tmp_path):
    put(tmp_path / "elsewhere" / "1.png"), put(tmp_path / "test" / "a" / "1.png")
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / name).symlink_to(tmp_path / "elsewhere")
    assert load_images("image_folder", tmp_path, image_size=8)["train"].labels.tolist() == [0, 1]


def test_a_class_name_that_is_not_utf8_is_text_all_the_same(tmp_path):
    for split in (b"train", b"test"):
        os.makedirs(os.fsencode(tmp_path) + b"/" + split + b"/caf\xe9")
        Image.new("RGB", (8, 8)).save(os.fsencode(tmp_path) + b"/" + split + b"/caf\xe9/1.png")
    sets = load_images("image_folder", tmp_path, image_size=8)
    assert sets["train"].classes == ["caf\\xe9"] and len(sets["test"]) == 1
    (file,) = list_image_folder(tmp_path, 0, 0)[0]["train"]["caf\\xe9"]
    (tmp_path / file.path).write_bytes(b"")
    with pytest.raises(ValueError) as error:
        load_images("image_folder", tmp_path, image_size=8)
    assert "caf\\xe9" in message_of(error).encode().decode()


@pytest.mark.parametrize("table", ["1.png\tb\n2.png\ta\n", "file,label\n1.png,b\n", "gone.png\tc\n"])
def test_a_table_of_classes_that_are_folders_or_of_no_file_that_is_there_is_passed_over_and_counted(
    tmp_path, caplog, table
):
    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png", "val/b/2.png"):
        put(tmp_path / name)
    (tmp_path / "val" / "val_annotations.txt").write_text(table)
    assert load_images("image_folder", tmp_path, image_size=8)["test"].labels.tolist() == [0, 1, 1]
    assert "1 passed over (1 val_annotations.txt, as folders are the classes)" in caplog.text


def test_two_classes_of_one_name_as_text_are_refused(tmp_path):
    for name in (b"\xe9", b"\\xe9"):
        os.makedirs(os.fsencode(tmp_path) + b"/train/" + name)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError) as error:
        load_images("image_folder", tmp_path, image_size=8)
    assert r"train holds 2 classes whose name as text is \xe9: rename one" in message_of(error)


def test_a_class_name_of_two_lines_is_one_line(tmp_path):
    put(tmp_path / "test" / "a\nb" / "1.png")
    (tmp_path / "train" / "a\nb").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        load_images("image_folder", tmp_path, image_size=8)
    assert r"train/a\nb holds no images" in message_of(error)


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jp2", "avif", "webp", "pbm", "tif"])
def test_a_format_that_pillow_reads_is_read_by_any_suffix_of_it(tmp_path, suffix):
    if Image.registered_extensions().get(f".{suffix.lower()}") not in Image.SAVE:
        pytest.skip("this Pillow was built without it")
    for split in ("train", "test"):
        put(tmp_path / split / "a" / f"1.{suffix}", Image.new("1" if suffix == "pbm" else "RGB", (8, 8), "white"))
    assert (load_images("image_folder", tmp_path, image_size=8)["train"].images > 250).all()


def test_a_file_that_pillow_would_run_a_program_for_is_not_opened_whatever_its_suffix(tmp_path):
    (tmp_path / "1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="1.png cannot be used .cannot identify image file"):
        read_image(tmp_path / "1.png")


RAMP = np.tile(np.linspace(0, 1, 8), (8, 1))


def png_of_16_bits(color, channels):
    """A PNG file of 16 bits a channel, which Pillow cannot write in color. color: PNG's number of the kind."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    values = np.repeat((RAMP * 4095).astype(">u2")[..., None], channels, 2)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 8, 8, 16, color, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def said_to_be_deep(suffix, before, byte):
    """A file of 8 bits whose header says more: what Pillow cannot write. byte: what follows `before` in the header."""
    if f".{suffix}" not in Image.registered_extensions():
        return b""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, Image.registered_extensions()[f".{suffix}"])
    content = file.getvalue().replace(b"\x03\x08\x08\x08", b"\x03\x0a\x0a\x0a")  # AVIF says it twice
    return re.sub(b"(" + before + b").", lambda found: found[1] + byte, content, count=1, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("png", (RAMP * 65535).astype(np.uint16)),
        ("tif", (RAMP * 65535).astype(np.uint16)),
        ("tif", (RAMP * 1000).astype(np.int32)),
        ("tif", RAMP.astype(np.float32)),
        ("pgm", (RAMP * 65535).astype(np.uint16)),
        ("png", png_of_16_bits(2, 3)),
        ("png", png_of_16_bits(4, 2)),
        ("png", png_of_16_bits(6, 4)),
        ("ppm", b"P6 8 8 4095\n" + bytes(8 * 8 * 3 * 2)),
        ("ppm", b"P3 8 8 256\n" + b"9 " * 8 * 8 * 3),
        ("jp2", said_to_be_deep("jp2", rb"\xff\x4f\xff\x51.{38}", b"\x0b")),
        ("avif", said_to_be_deep("avif", rb"av1C..", b"\x4c")),
    ],
    ids="16 bits png,16 bits tif,32 bits,float,16 bits pgm,rgb,gray and alpha,rgba,ppm,plain ppm,jp2,avif".split(","),
)
def test_more_than_eight_bits_a_channel_are_refused_in_memory_and_on_disk(tmp_path, suffix, content):
    if isinstance(content, bytes) and not content:
        pytest.skip("this Pillow was built without it")
    for split in ("train", "test"):
        path = tmp_path / split / "a" / f"1.{suffix}"
        path.parent.mkdir(parents=True)
        path.write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(path)
    on_disk = FolderBatches(load_folders(tmp_path, image_size=8)["train"], 1, mean=[0.5] * 3, std=[0.2] * 3)
    for look in (lambda: load_images("image_folder", tmp_path, image_size=8), lambda: list(on_disk)):
        with pytest.raises(ValueError) as error:
            look()
        assert "1." + suffix in message_of(error) and "more than 8 bits a channel" in message_of(error)


def test_what_is_transparent_lies_on_white_and_what_is_turned_stands_upright_and_both_are_said(tmp_path, caplog):
    half = np.full((8, 8, 4), 255, np.uint8)
    half[..., :3], half[:, 4:, 3] = 100, 0
    upright = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).convert("RGB")
    palette = upright.quantize(4)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(half).save(tmp_path / split / "a" / "0.png")
        Image.fromarray(half[:, :4]).save(tmp_path / split / "a" / "1.png")  # has the channel, and is opaque
        upright.rotate(90).save(tmp_path / split / "a" / "2.png", exif=exif)
        upright.rotate(90).save(tmp_path / split / "a" / "3.tif", exif=exif)
        upright.save(tmp_path / split / "a" / "4.png", exif=b"Exif\0\0damaged")
        palette.save(tmp_path / split / "a" / "5.png", transparency=int(palette.getpixel((0, 0))))
        upright.save(tmp_path / split / "a" / "6.gif", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    in_memory = load_images("image_folder", tmp_path, image_size=8)["train"].images
    (record,) = caplog.records
    assert record.getMessage() == (
        f"images of {tmp_path}: of 14, 2 first of several frames, 4 transparent, laid on white, "
        "4 turned upright by their EXIF data"
    )
    load_images("image_folder", tmp_path, image_size=8)  # from the cache
    assert [again.getMessage() for again in caplog.records] == [record.getMessage()] * 2
    assert (in_memory[0, :, :, 4:] == 255).all() and (in_memory[0, :, :, :4] == 100).all()
    assert (in_memory[1] == 100).all() and (in_memory[5, :, 0, 0] == 255).all()
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert all(torch.equal(in_memory[i], expected) for i in (2, 3, 4))
    caplog.clear()
    on_disk = load_folders(tmp_path, image_size=8)["train"]
    first = on_disk[:1].images
    assert (first[0, :, :, 5:] == 255).all() and (first[0, :, :, :2] == 100).all()
    assert caplog.records[-1].getMessage() == f"images of {tmp_path}: of 1, 1 transparent, laid on white"


def test_classes_of_an_image_folder_that_are_not_chosen_are_not_decoded(tmp_path):
    folder = write_folder(tmp_path / "own", random_photographs(size=8))
    chosen = load_images("image_folder", folder, image_size=8, n_classes=2)["train"].classes
    (left_out,) = {"apple", "bear", "cloud"} - set(chosen)
    (folder / "train" / left_out / "000.png").write_bytes(b"damaged")
    sets = load_images("image_folder", folder, image_size=8, n_classes=2)
    assert sets["test"].classes == chosen and sets["train"].labels.bincount().tolist() == [4, 4]


def test_an_image_folder_without_its_parts_is_refused(tmp_path):
    folder = write_folder(tmp_path / "own", {"train": {"a": [np.zeros((8, 8, 3), np.uint8)]}})
    with pytest.raises(FileNotFoundError) as error:
        load_images("image_folder", folder, image_size=8)
    assert "test/<class>/*" in message_of(error)
    write_folder(folder, {"test": {"b": [np.zeros((8, 8, 3), np.uint8)]}})
    with pytest.raises(ValueError) as error:
        load_images("image_folder", folder, image_size=8)
    assert "'b'" in message_of(error) and str(folder / "train") in message_of(error)
    (folder / "test" / "b").rename(folder / "test" / "a")
    (folder / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        load_images("image_folder", folder, image_size=8)
    assert str(folder / "train" / "empty") in message_of(error)


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: b"not a picture", lambda png: png[: len(png) // 2]])
def test_a_damaged_image_is_named(tmp_path, damage):
    folder = write_folder(tmp_path / "own", random_photographs(size=16))
    victim = folder / "train" / "bear" / "002.png"
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ValueError) as error:
        load_images("image_folder", folder, image_size=16)
    assert str(victim) in message_of(error)


@pytest.fixture
def decoded(monkeypatch):
    """The paths decoded so far."""
    paths, decode = [], data._decoded_image

    def counted(path, *arguments):
        paths.append(path)
        return decode(path, *arguments)

    monkeypatch.setattr(data, "_decoded_image", counted)
    return paths


def digests(sets):
    return [sets["train"].digest, sets["test"].digest]


def test_a_folder_is_decoded_once(tmp_path, decoded):
    folder = write_folder(tmp_path / "own", random_photographs(size=8))
    first = digests(load_images("image_folder", folder, image_size=8))
    assert len(decoded) == 18
    assert digests(load_images("image_folder", folder, image_size=8)) == first
    assert len(decoded) == 18
    load_images("image_folder", folder, image_size=4)
    assert len(decoded) == 36
    assert digests(load_images("image_folder", folder, image_size=8)) == first
    assert len(decoded) == 36, "each size has a cache of its own"


def gray_folder(folder, gray):
    """Uncompressed images whose names, sizes and times are those of every other such folder."""
    for name in ("train/a/0.ppm", "train/b/0.ppm", "test/a/0.ppm"):
        put(folder / name, Image.new("RGB", (8, 8), (gray,) * 3))
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))
    return folder


def test_a_folder_is_never_given_the_pixels_of_another_with_equal_listing(tmp_path):
    for gray in (200, 40):
        sets = load_images("image_folder", gray_folder(tmp_path / str(gray), gray), image_size=8)
        assert (sets["train"].images == gray).all()
    assert len({load_folders(tmp_path / name, image_size=8)["train"].digest for name in ("200", "40")}) == 2
    (tmp_path / "40").rename(tmp_path / "gone")
    (tmp_path / "200").rename(tmp_path / "40")
    assert (load_images("image_folder", tmp_path / "40", image_size=8)["train"].images == 200).all()


def test_a_changed_file_is_seen(tmp_path, decoded):
    folder = write_folder(tmp_path / "own", random_photographs(size=8))
    first = digests(load_images("image_folder", folder, image_size=8))
    changed = folder / "test" / "apple" / "000.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(changed)
    second = digests(load_images("image_folder", folder, image_size=8))
    assert second[0] == first[0] and second[1] != first[1]
    os.utime(changed, ns=(1, 1))
    load_images("image_folder", folder, image_size=8)
    assert len(decoded) == 3 * 18


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "other arrays"])
def test_a_damaged_cache_is_decoded_again(tmp_path, own_home, decoded, damage, caplog):
    folder = write_folder(tmp_path / "own", random_photographs(size=8))
    first = digests(load_images("image_folder", folder, image_size=8))
    (cache,) = (own_home / "data" / "cache").iterdir()
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "other arrays":
        np.savez(cache, changed=[], **dict.fromkeys(("train", "test"), np.zeros((1, 3, 8, 8), np.uint8)))
    else:
        cache.write_bytes({"cut": content[:500], "one bit": content, "empty": b""}[damage])
    assert digests(load_images("image_folder", folder, image_size=8)) == first
    assert len(decoded) == 36 and len(caplog.records) == 1 and str(cache) in caplog.text
    assert digests(load_images("image_folder", folder, image_size=8)) == first and len(decoded) == 36


def test_a_folder_larger_than_the_memory_is_refused_before_decoding(tmp_path, decoded):
    folder = write_folder(tmp_path / "own", random_photographs(size=8))
    with pytest.raises(ValueError) as error:
        load_images("image_folder", folder, image_size=10_000_000)
    assert "GiB" in message_of(error) and "n_classes" in message_of(error) and not decoded


def test_sets_under_different_streams_are_given_different_noise():
    images = random_set(20, channels=1, width=6)
    options = {"mean": [0.5], "std": [0.25], "noise": 0.5, "seed": 3}
    one, again, other = (next(iter(Batches(images, 20, **options, stream=s))).images for s in ("test", "test", "probe"))
    assert torch.equal(one, again) and not torch.allclose(one, other)

"""Images that stay on disk: the same choices, the same protocol, the same bytes whatever decodes them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from pursuhint_lib import folders
from pursuhint_lib.data import Batches, balanced_subset, channel_stats, hold_out, load_images, read_image
from pursuhint_lib.folders import FolderBatches, FolderSet, evaluation_view, load_folders, training_view
from pursuhint_lib.learners import Supervised, seeded
from pursuhint_lib.models import state_hash
from pursuhint_lib.params import TrainTeacher
from pursuhint_lib.storage import REPOSITORY
from pursuhint_lib.study import fixed_batches, probe_batches, study_images, training_batches, training_facts
from pursuhint_lib.training import Schedule, fit

SIZE = 16
CPU = torch.device("cpu")
CLASSES = ("apple", "bär", "cloud")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """9, 8 and 7 training images of three classes and 2 test images each, in several sizes, gray ones among them."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, counts in (("train", (9, 8, 7)), ("test", (2, 2, 2))):
        for name, count in zip(CLASSES, counts):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = generator.integers(20, 50, 2)
                shape = (height, width) if i == 1 else (height, width, 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def train(folder):
    return load_folders(folder, image_size=SIZE)["train"]


def batches_of(folder_set, batch_size=7, **options):
    return FolderBatches(folder_set, batch_size, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], **options)


def training(folder_set, batch_size=7, **options):
    options = {"crop": True, "flip": True, "shuffle": True, "seed": 3, "stream": "train"} | options
    return batches_of(folder_set, batch_size, **options)


def whole(batches):
    """Images, labels and index of a pass, each in one tensor."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def by_image(batches):
    """Images of a pass in the order of the set."""
    images, _, index = whole(batches)
    return images[index.argsort()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(whole(first), whole(second), strict=True))


# --- the set ---------------------------------------------------------------------------------------------------------


def test_a_set_lists_what_load_images_reads_in_the_same_order(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    in_memory, on_disk = load_images("image_folder", folder, image_size=SIZE), load_folders(folder, image_size=SIZE)
    for split in ("train", "test"):
        assert torch.equal(in_memory[split].labels, on_disk[split].labels)
        assert in_memory[split].classes == on_disk[split].classes == list(CLASSES)
        assert in_memory[split].image_shape == on_disk[split].image_shape == (3, SIZE, SIZE)
        assert all(on_disk[split].path(i).is_file() for i in range(len(on_disk[split])))
    two = load_folders(folder, image_size=SIZE, n_classes=2, seed=1)["train"]
    assert two.classes == load_images("image_folder", folder, image_size=SIZE, n_classes=2, seed=1)["train"].classes
    assert "24 images" in repr(on_disk["train"]) and "\n" not in repr(on_disk["train"])


def test_held_out_and_balanced_images_are_those_that_are_chosen_in_memory(folder, train, tmp_path, monkeypatch):
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    in_memory = load_images("image_folder", folder, image_size=SIZE)["train"]
    positions = {path: i for i, path in enumerate(train.paths.tolist())}
    pairs = [*zip(hold_out(train, 2, 5), hold_out(in_memory, 2, 5))]
    pairs += [(balanced_subset(train, 11, 5), balanced_subset(in_memory, 11, 5))]
    for chosen, expected in pairs:
        rows = torch.tensor([positions[path] for path in chosen.paths.tolist()])
        assert torch.equal(in_memory.images[rows], expected.images)
        assert torch.equal(chosen.labels, expected.labels) and len(chosen) == len(expected)


def test_a_set_is_indexed_by_mask_positions_and_slice_and_its_digest_tells_them_apart(train):
    mask = train.labels == 1
    for which in (mask, mask.nonzero().squeeze(1), slice(9, 17)):
        assert train[which].paths.tolist() == train.paths[9:17].tolist() and train[which].digest == train[mask].digest
    assert (train[mask].labels == 1).all() and train[mask].sizes.tolist() == train.sizes[9:17].tolist()
    relabeled = FolderSet(train.folder, train.paths, train.sizes, train.labels.flip(0), train.classes, SIZE)
    resized = FolderSet(train.folder, train.paths, train.sizes, train.labels, train.classes, SIZE + 1)
    rewritten = FolderSet(train.folder, train.paths, train.sizes + 1, train.labels, train.classes, SIZE)
    digests = {of.digest for of in (train, train[1:], train[:-1], relabeled, resized, rewritten)}
    assert len(digests) == 6
    with pytest.raises(TypeError, match="mask"):
        train[0]


# --- what networks see -----------------------------------------------------------------------------------------------


def test_an_evaluation_equals_pillow_and_torchvision(train):
    reference = v2.Compose(
        [
            v2.Resize(round(SIZE * 256 / 224)),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]),
        ]
    )
    expected = torch.stack([reference(Image.open(train.path(i)).convert("RGB")) for i in range(len(train))])
    images, labels, index = whole(batches_of(train))
    assert torch.allclose(images, expected, atol=1e-5)
    assert torch.equal(labels, train.labels) and torch.equal(index, torch.arange(len(train)))
    first = next(iter(batches_of(train)))
    assert first.images.dtype == torch.float32 and first.images.is_contiguous(memory_format=torch.channels_last)


def test_at_224_pixels_the_shorter_side_is_256():
    wide = Image.new("RGB", (600, 300))
    assert evaluation_view(wide, 224).size == (224, 224)
    columns = np.arange(512, dtype=np.uint8)  # columns that tell where they were, 0..255 twice
    marked = Image.fromarray(np.broadcast_to(columns, (256, 512)).copy()).convert("RGB")
    assert np.array_equal(np.asarray(evaluation_view(marked, 224))[0, :, 0], columns[144 : 144 + 224])


def test_a_training_view_is_a_part_of_the_image_with_the_area_and_proportion_of_the_recipe():
    # A picture of its own coordinates: where a view starts and ends can be read off it.
    height, width = 200, 240
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, x], 2))
    shares, proportions, middles = [], [], []
    for seed in range(400):
        view = np.asarray(training_view(image, 64, torch.Generator().manual_seed(seed)), dtype=float)
        tall, wide = (np.ptp(view[..., c].mean(axis)) * 64 / 63 for c, axis in ((0, 1), (1, 0)))
        shares.append(tall * wide / (height * width))
        proportions.append(wide / tall)
        middles.append((view[..., 0].mean() / height, view[..., 1].mean() / width))
    assert 0.07 < min(shares) < 0.15 and 0.85 < max(shares) <= 1.03
    assert 0.70 < min(proportions) < 0.82 and 1.22 < max(proportions) < 1.43
    assert np.abs(np.mean(middles, 0) - 0.5).max() < 0.03 and np.std(middles, 0).min() > 0.08


def test_an_image_too_slim_for_any_part_gives_its_middle():
    slim = np.zeros((400, 12, 3), np.uint8)
    slim[192:208] = 255
    view = np.asarray(training_view(Image.fromarray(slim), 32, torch.Generator().manual_seed(0)))
    assert view.min() == 255  # 16 x 12 pixels, 4:3


def test_flips_are_mirror_images_of_about_half(train):
    plain, flipped = by_image(batches_of(train)), by_image(batches_of(train, flip=True))
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped)])
    assert 6 <= mirrored.sum() <= 18
    assert torch.equal(plain[~mirrored], flipped[~mirrored])


# --- passes ----------------------------------------------------------------------------------------------------------


def test_a_pass_is_the_same_whatever_number_of_processes_decodes_it(train):
    alone = training(train)
    for loaders in (1, 2):
        assert equal(alone.epoch(1), training(train, loaders=loaders).epoch(1))


def test_what_happens_to_an_image_depends_on_seed_epoch_and_the_image_and_not_on_its_batch(train):
    expected = by_image(training(train).epoch(2))
    assert torch.equal(expected, by_image(training(train, 5).epoch(2)))
    assert torch.equal(expected, by_image(training(train, shuffle=False).epoch(2)))
    for other in (training(train).epoch(3), training(train, seed=4).epoch(2), training(train, stream="b").epoch(2)):
        images = by_image(other)
        assert sum(torch.equal(a, b) for a, b in zip(expected, images)) <= 1


def test_two_images_of_a_batch_are_not_cropped_and_flipped_alike(train):
    copies = train[torch.zeros(12, dtype=torch.int64)]
    for option in ("crop", "flip"):
        images = by_image(batches_of(copies, 12, **{option: True}))
        different = {image.numpy().tobytes() for image in images}
        assert len(different) == (12 if option == "crop" else 2)


def test_every_image_comes_once_with_its_label_in_an_order_of_the_epoch(train):
    orders = []
    for epoch in (0, 1):
        _, labels, index = whole(training(train).epoch(epoch))
        assert sorted(index.tolist()) == list(range(len(train))) and torch.equal(labels, train.labels[index])
        orders.append(index.tolist())
    assert orders[0] != orders[1] != sorted(orders[1])


def test_the_order_is_that_of_batches_in_memory(train):
    plain = Batches(train.in_memory(), 7, mean=[0] * 3, std=[1] * 3, shuffle=True, seed=3, stream="train")
    for epoch in (0, 4):
        expected = [batch.index.tolist() for batch in plain.epoch(epoch)]
        assert [batch.index.tolist() for batch in training(train).epoch(epoch)] == expected


def test_passes_read_side_by_side_or_left_early_do_not_disturb_each_other(train):
    batches = training(train, loaders=1)
    first, second = batches.epoch(0), batches.epoch(0)
    next(first)
    assert equal(second, training(train).epoch(0))
    first.close()
    assert equal(batches.epoch(0), training(train).epoch(0))


def test_the_global_random_state_is_left_alone(train):
    for loaders in (0, 1):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        list(training(train, loaders=loaders))
        assert torch.equal(before, torch.get_rng_state())


def test_a_last_training_batch_of_one_image_is_dropped(train):
    images = train[:15]
    assert [len(batch.index) for batch in training(images)] == [7, 7] and len(training(images)) == 2
    assert [len(batch.index) for batch in batches_of(images)] == [7, 7, 1] and len(batches_of(images)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"loaders": -1}, "loaders"),
        ({"std": [1.0, 0.0, 1.0]}, "above 0"),
        ({"mean": [0.5]}, "one value per channel"),
    ],
)
def test_what_makes_no_sense_is_refused(train, change, named):
    with pytest.raises(ValueError, match=named):
        FolderBatches(**{"folder_set": train, "batch_size": 7, "mean": [0.0] * 3, "std": [1.0] * 3} | change)
    with pytest.raises(ValueError, match="0 images"):
        batches_of(train[:0])
    with pytest.raises(ValueError, match="not -1"):
        training(train).epoch(-1)


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_damaged_image_is_named_in_one_line(folder, train, tmp_path, loaders):
    content = train.path(3).read_bytes()
    damaged = tmp_path / "train" / "apple" / "3.png"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content[: len(content) // 2])
    for name in ("train/apple/0.png", "val/apple/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(train.path(0).read_bytes())
    broken = load_folders(tmp_path, image_size=SIZE)["train"]
    with pytest.raises(ValueError) as error:
        list(batches_of(broken, loaders=loaders))
    assert str(damaged) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="3.png"):
        broken.in_memory()


READER = """
import itertools, signal, sys
from pursuhint_lib.folders import FolderBatches, load_folders
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in a shell's background
train = load_folders(sys.argv[1], image_size=16)["train"]
batches = FolderBatches(train, 2, mean=[0.5] * 3, std=[0.2] * 3, shuffle=True, crop=True, loaders=2)
for epoch in itertools.count():
    for batch in batches.epoch(epoch):
        print("reading", flush=True)
"""


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_an_interrupted_reader_leaves_no_process_behind(folder, how):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", READER, str(folder)]
    reader = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert reader.stdout.readline() == "reading\n"
    children = psutil.Process(reader.pid).children(recursive=True)
    deadline = time.monotonic() + 30
    while not children:  # between two passes there are none for a moment
        assert time.monotonic() < deadline
        children = psutil.Process(reader.pid).children(recursive=True)
    if how == "kill":
        reader.kill()
    else:
        os.killpg(reader.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, said = reader.communicate(timeout=300)
    assert how == "kill" or said.count("KeyboardInterrupt") == 1
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive


# --- a study on it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def params(folder, home):
    return TrainTeacher(
        study="toy",
        data="image_folder",
        data_folder=str(folder),
        image_size=SIZE,
        streaming=True,
        loaders=0,
        noise=0,
        crop_padding=0,
        flip=True,
        validation_per_class=2,
    )


def test_a_study_trains_on_crops_and_evaluates_on_centers_of_images_on_disk(params):
    images = study_images(params)
    assert [len(of) for of in (images.train, images.validation, images.test)] == [18, 6, 6]
    assert images.shape == (3, SIZE, SIZE)
    mean, std = channel_stats(images.train.in_memory())
    assert torch.equal(images.mean, mean) and torch.equal(images.std, std)
    train = training_batches(params, images, 4, 1, CPU)
    assert isinstance(train, FolderBatches) and train.crop and train.flip and train.shuffle and train.seed == 1
    for fixed in (fixed_batches(params, images, "test", CPU), probe_batches(params, images, 6, CPU)):
        assert isinstance(fixed, FolderBatches) and not (fixed.crop or fixed.flip or fixed.shuffle)
    facts = images.facts()["sets"]
    assert facts["train"] == {"images": 18, "digest": images.train.digest}


def test_the_statistics_that_torchvisions_weights_expect_are_used_where_asked_for(params):
    images = study_images(params.model_copy(update={"channel_statistics": "imagenet"}))
    assert images.mean.tolist() == [0.485, 0.456, 0.406] and images.std.tolist() == [0.229, 0.224, 0.225]


def test_a_part_of_a_batch_is_what_it_is_in_the_whole_and_no_other_image_is_decoded(train, monkeypatch):
    decoded = []
    monkeypatch.setattr(folders, "read_image", lambda path: decoded.append(path) or read_image(path))
    whole = list(training(train).epoch(2))
    decoded.clear()
    parts = list(training(train).epoch(2, lambda images: slice(images // 2, images)))
    assert [len(batch.labels) for batch in whole] == [7, 7, 7, 3] and len(decoded) == 4 + 4 + 4 + 2
    for batch, part in zip(whole, parts, strict=True):
        first = len(batch.labels) // 2
        assert all(torch.equal(of[first:], own) for of, own in zip(batch, part, strict=True))
    assert [len(batch.labels) for batch in training(train).epoch(2, lambda images: slice(0, images - 3))] == [4, 4, 4]


def test_keys_of_trained_networks_name_streaming_only_where_it_is_on_and_loaders_never(params):
    images = study_images(params)
    facts = training_facts(params, images, "resnet8_w4", CPU, torch.float32)
    assert facts["disturbance"]["streaming"] is True
    assert facts == training_facts(params.model_copy(update={"loaders": 7}), images, "resnet8_w4", CPU, torch.float32)
    off = params.model_copy(update={"streaming": False})
    before = {"noise", "crop_padding", "flip", "split_seed"}
    assert set(training_facts(off, images, "resnet8_w4", CPU, torch.float32)["disturbance"]) == before


def test_training_that_was_interrupted_ends_with_the_bytes_of_one_that_was_not(params, tmp_path):
    images = study_images(params)

    def train(loaders, stop_after=None):
        with seeded(0):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            model.append(nn.Linear(4, 3))

        def stop(epoch, _rows):
            if epoch == stop_after:
                raise InterruptedError

        streamed = params.model_copy(update={"loaders": loaders})
        fit(
            {"net": Supervised(model)},
            training_batches(streamed, images, 4, 0, CPU),
            Schedule("imagenet", 3, 0.1),
            validation=fixed_batches(streamed, images, "validation", CPU),
            checkpoint=tmp_path / f"{'stopped' if stop_after else loaders}.ckpt",
            on_epoch=stop,
        )
        return state_hash(model)

    with pytest.raises(InterruptedError):
        train(loaders=2, stop_after=1)
    (tmp_path / "stopped.ckpt").rename(tmp_path / "1.ckpt")
    assert train(loaders=1) == train(loaders=0)

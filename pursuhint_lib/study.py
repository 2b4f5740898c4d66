"""A study's images and batches, as its parameters say.

Notebooks 01, 02, 04 and 05 must agree on what is trained on, chosen by and tested with; they all ask here.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pursuhint_lib import arithmetic
from pursuhint_lib.data import Batches, BatchSource, ImageSet, balanced_subset, channel_stats, hold_out, load_images
from pursuhint_lib.folders import IMAGENET_MEAN, IMAGENET_STD, FolderBatches, FolderSet, load_folders
from pursuhint_lib.learners import seeded
from pursuhint_lib.models import build_model
from pursuhint_lib.params import Images, StudentTraining

STATISTICS_IMAGES = 2000  # channel means of photographs are then known to about 0.003
FIXED_BATCH_SIZE = 250  # one for all: noise is drawn batch by batch


@dataclass(frozen=True)
class StudyImages:
    """Three sets of images that share none, in memory or all on disk. mean and std: (C,), on the [0, 1] scale, what
    images are normalized with.
    """

    train: ImageSet | FolderSet
    validation: ImageSet | FolderSet
    test: ImageSet | FolderSet
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        return self.train.image_shape

    def facts(self) -> dict:
        """Sizes, classes, channel statistics and content hashes, for the record."""
        sets = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "shape": list(self.shape),
            "classes": self.train.classes,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "sets": {name: {"images": len(images), "digest": images.digest} for name, images in sets.items()},
        }


def study_images(params: Images) -> StudyImages:
    """Load the images of a study and split them. Validation comes from the training images, never from the test images.

    Channel statistics are those of all training images; where these stay on disk, of STATISTICS_IMAGES of them, drawn
    evenly from the classes by `split_seed`. Raises what `data.load_images` and `data.hold_out` raise.
    """
    if params.streaming:
        loaded = load_folders(
            params.data_folder, image_size=params.image_size, n_classes=params.n_classes, seed=params.split_seed
        )
    else:
        loaded = load_images(
            params.data,
            params.data_folder,
            n_classes=params.n_classes,
            image_size=params.image_size,
            test_repeats=params.evaluation_repeats,
            seed=params.split_seed,
        )
    train, validation = hold_out(loaded["train"], params.validation_per_class, params.split_seed)
    if params.channel_statistics == "imagenet":
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
    elif params.streaming:
        mean, std = channel_stats(balanced_subset(train, STATISTICS_IMAGES, params.split_seed).in_memory())
    else:
        mean, std = channel_stats(train)
    if not params.streaming:  # without noise, which streaming does not have, there is nothing to repeat
        validation = validation.repeated(params.evaluation_repeats)
    return StudyImages(train, validation, loaded["test"], mean, std)


def training_batches(
    params: Images, images: StudyImages, batch_size: int, seed: int, device: torch.device
) -> BatchSource:
    """Shuffled, augmented batches of the training images; the order and every draw depend on (seed, epoch) alone."""
    if params.streaming:
        return FolderBatches(
            images.train,
            batch_size,
            mean=images.mean,
            std=images.std,
            crop=True,
            flip=params.flip,
            shuffle=True,
            seed=seed,
            stream="train",
            loaders=params.loaders,
            device=device,
        )
    return Batches(
        images.train,
        batch_size,
        mean=images.mean,
        std=images.std,
        crop_padding=params.crop_padding,
        flip=params.flip,
        noise=params.noise,
        shuffle=True,
        seed=seed,
        stream="train",
        device=device,
    )


def fixed_batches(params: Images, images: StudyImages, which: str, device: torch.device) -> BatchSource:
    """Batches of `which` ("validation" or "test") in their own order, not augmented, with noise that never changes."""
    return _fixed(params, images, getattr(images, which), which, device)


def probe_batches(params: Images, images: StudyImages, size: int, device: torch.device) -> BatchSource:
    """The images that layers are compared on: a seeded, class-balanced subset of the training images, not augmented."""
    return _fixed(params, images, balanced_subset(images.train, size, params.split_seed), "probe", device)


def _fixed(
    params: Images, images: StudyImages, which: ImageSet | FolderSet, stream: str, device: torch.device
) -> BatchSource:
    if params.streaming:
        return FolderBatches(
            which, FIXED_BATCH_SIZE, mean=images.mean, std=images.std, loaders=params.loaders, device=device
        )
    return Batches(
        which,
        FIXED_BATCH_SIZE,
        mean=images.mean,
        std=images.std,
        noise=params.noise,
        seed=params.split_seed,
        stream=stream,
        device=device,
    )


def fresh_network(name: str, images: StudyImages, seed: int) -> nn.Module:
    """A network for the study's images with initial weights drawn from `seed` alone."""
    with seeded(seed):
        return build_model(name, len(images.train.classes), channels=images.shape[0])


def training_facts(
    params: StudentTraining, images: StudyImages, network: str, device: torch.device, dtype: torch.dtype
) -> dict:
    """What decides a trained network besides its own recipe: images, disturbance, batches, arithmetic. For
    `arms.training_key`. network: its name. Of several processes that train it, the parameters tell how many
    threads each has.
    """
    disturbance = {key: getattr(params, key) for key in ("noise", "crop_padding", "flip", "split_seed")}
    if params.streaming:  # named only then, so that networks trained on images in memory keep their keys
        disturbance["streaming"] = True
    computed = arithmetic.facts(_shell(network, len(images.train.classes), images.shape[0]), device, dtype)
    if params.processes > 1:  # named only then, as streaming
        computed |= {"threads": max(1, params.threads // params.processes), "processes": params.processes}
        computed["sync_batch_norm"] = params.sync_batch_norm
    facts = {"images": images.facts(), "disturbance": disturbance, "batch_size": params.batch_size}
    return facts | {"arithmetic": computed}


@functools.cache
def _shell(network: str, classes: int, channels: int) -> nn.Module:
    """A network without weights."""
    with torch.device("meta"):
        return build_model(network, classes, channels=channels)

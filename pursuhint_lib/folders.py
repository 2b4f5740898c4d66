"""Images that stay on disk.

A `FolderSet` is the list of an image folder's files; `FolderBatches` decodes them anew in every pass, in processes
beside the training, so that memory does not grow with the number of images. They stand where `data.ImageSet` and
`data.Batches` stand for sets that fit in memory: `hold_out` and `balanced_subset` choose the same images of both.

Letters: N images, B batch, C channels, H W space, K classes, S side of the square that networks see.
"""

import functools
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pursuhint_lib.data import (
    Batch,
    BatchSource,
    ImageFile,
    ImageSet,
    Part,
    checked_statistics,
    count_batches,
    data_folder,
    list_image_folder,
    read_image,
    say_changed,
    seeded_generator,
    shuffled_order,
)
from pursuhint_lib.storage import sample_hash

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what torchvision's weights were trained with, on the [0, 1] scale
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_TRIES = 10


@dataclass(frozen=True, eq=False, repr=False)
class FolderSet:
    """Labeled images on disk, to be seen as squares of one size.

    folder: where they are. paths: (N,) file names below it, as NumPy bytes: processes that decode share them, which
    they would not share as Python strings. sizes: (N,) int64, bytes of each file. labels: (N,) int64, positions in
    `classes`. image_size: S. `folder_set[which]` is the FolderSet of those images, for a boolean mask (N,), a tensor of
    positions or a slice.
    """

    folder: Path
    paths: np.ndarray
    sizes: Tensor
    labels: Tensor
    classes: list[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: Tensor | slice) -> "FolderSet":
        if isinstance(which, int):
            raise TypeError("a FolderSet is indexed by a mask, positions or a slice")
        paths = self.paths[which if isinstance(which, slice) else which.numpy()]
        return FolderSet(self.folder, paths, self.sizes[which], self.labels[which], self.classes, self.image_size)

    def __repr__(self) -> str:
        return f"FolderSet({len(self)} images below {self.folder}, {len(self.classes)} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as networks see it."""
        return 3, self.image_size, self.image_size

    def path(self, position: int) -> Path:
        """The file of one image."""
        return self.folder / os.fsdecode(self.paths[position])

    @property
    def images(self) -> Tensor:
        """(N, C, S, S) uint8 as in an evaluation, decoded at every look: for a few images.

        Raises ValueError, one line, that names a file that `data.read_image` refuses; logs `data.say_changed`.
        """
        changed: list[str] = []

        def decode(position: int) -> np.ndarray:
            return np.asarray(evaluation_view(read_image(self.path(position), changed), self.image_size))

        images = np.empty((len(self), self.image_size, self.image_size, 3), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for position, view in enumerate(pool.map(decode, range(len(self)))):
                images[position] = view
        say_changed(self.folder, len(self), changed)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def in_memory(self) -> ImageSet:
        """The same images, decoded as in an evaluation: for a few. Raises what `images` raises."""
        return ImageSet(self.images, self.labels, self.classes)

    @functools.cached_property
    def digest(self) -> str:
        """Hex sha256 of names and sizes of the files, content of some, labels, class names, S, and Pillow's version:
        its decoders may change by a bit. One file of many that changed but kept its size may not be noticed here.
        """
        header = {"image_size": self.image_size, "classes": self.classes, "pillow": PIL.__version__}
        digest = hashlib.sha256(json.dumps(header).encode())
        names = self.paths.tolist()
        digest.update(b"\n".join(names))
        for values in (self.sizes, self.labels):
            digest.update(np.ascontiguousarray(values.numpy(), dtype="<i8"))
        digest.update(sample_hash(self.folder, names).encode())
        return digest.hexdigest()


def load_folders(
    folder: str | Path = "", *, image_size: int, n_classes: int = 0, seed: int = 0
) -> dict[str, FolderSet]:
    """List an image folder: ``{"train": FolderSet, "test": FolderSet}``, both with the same classes.

    As `data.load_images` of ``image_folder``, but nothing is decoded. Images come sorted by class, then by name.
    Raises ValueError or FileNotFoundError, one line, as there.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be the side of the images in pixels, not {image_size}")
    folder = data_folder(folder)
    files, classes = list_image_folder(folder, n_classes, seed)
    return {split: _folder_set(folder, by_class, classes, image_size) for split, by_class in files.items()}


def _folder_set(folder: Path, by_class: dict[str, list[ImageFile]], classes: list[str], image_size: int) -> FolderSet:
    label = {name: position for position, name in enumerate(classes)}
    flat = [(os.fsencode(file.path), file.size, label[name]) for name, found in by_class.items() for file in found]
    paths, sizes, labels = zip(*flat, strict=True)
    return FolderSet(folder, np.array(paths), torch.tensor(sizes), torch.tensor(labels), classes, image_size)


def evaluation_view(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to size * 256 / 224, the center cropped to size x size (Krizhevsky et al. 2012)."""
    transforms = _transforms()
    return transforms.center_crop(transforms.resize(image, [round(size * 256 / 224)]), [size, size])


def training_view(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """A part of the image drawn at random and resized to size x size (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    The part has 8 to 100 % of the area and sides in a proportion of 3:4 to 4:3, uniform in its logarithm, as in
    torchvision's RandomResizedCrop. Of ten such shapes the first that fits into the image is taken; where none does,
    the largest one in the center with a proportion within those limits.
    """
    share, slant = torch.rand(2, _CROP_TRIES, generator=generator, dtype=torch.float64)
    place = torch.rand(2, generator=generator, dtype=torch.float64)
    area = image.width * image.height * (0.08 + 0.92 * share)
    proportion = (4 / 3) ** (2 * slant - 1)  # width : height
    widths, heights = (area * proportion).sqrt().round(), (area / proportion).sqrt().round()
    fits = (1 <= widths) & (widths <= image.width) & (1 <= heights) & (heights <= image.height)
    if fits.any():
        first = int(fits.int().argmax())
        width, height = int(widths[first]), int(heights[first])
        top = int(place[0] * (image.height - height + 1))
        left = int(place[1] * (image.width - width + 1))
    else:
        width = min(image.width, max(1, round(image.height * 4 / 3)))
        height = min(image.height, max(1, round(image.width * 4 / 3)))
        top, left = (image.height - height) // 2, (image.width - width) // 2
    return _transforms().resized_crop(image, top, left, height, width, [size, size])


def _transforms() -> ModuleType:
    """torchvision's, imported where images are on disk: it takes longer than torch, and no other study needs it."""
    return importlib.import_module("torchvision.transforms.v2.functional")


class FolderBatches(BatchSource):
    """Normalized batches of a FolderSet, decoded anew in every pass: what `data.Batches` is for images in memory.

    ``for batch in batches.epoch(e)`` is one pass, ``for batch in batches`` is ``epoch(0)``, the pass for evaluation.
    The order depends on (seed, epoch) and is that of `Batches`; crop and flip of an image depend on (seed, epoch,
    position of the image in the set), whatever the batch size and the number of processes.

    folder_set: N images, kept as `.image_set`.
    mean, std: (C,) each on the [0, 1] scale; images come out as (image / 255 - mean) / std.
    crop: `training_view` of each image; without it, `evaluation_view`.
    flip: mirror each image left to right with probability 1/2.
    stream, shuffle: as in `Batches`; a last batch of a single image is dropped when shuffled.
    loaders: processes that decode, each two batches ahead; with 0, this process decodes when a batch is asked for. They
        live as long as a pass is read, and end with it or with this process, however it ends.

    A pass raises ValueError, one line that names the file, for an image that `data.read_image` refuses; it does not log
    `data.say_changed`, as `FolderSet.images` does. Raises ValueError, in one line, for an empty set or a value that
    makes no sense.
    """

    def __init__(
        self,
        folder_set: FolderSet,
        batch_size: int,
        *,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        crop: bool = False,
        flip: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        stream: str = "",
        loaders: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        count_batches(len(folder_set), batch_size, shuffle)
        if loaders < 0:
            raise ValueError(f"loaders must be 0 or more, not {loaders}")
        channels, height, width = folder_set.image_shape
        mean, std = checked_statistics(mean, std, channels)
        self.image_set = folder_set
        self.batch_size = batch_size
        self.crop = crop
        self.flip = flip
        self.shuffle = shuffle
        self.seed = seed
        self.stream = stream
        self.loaders = loaders
        self.device = torch.device(device)
        _transforms()  # now, and not in each process that decodes
        # (H*W*C,) each, laid out like an image, as in `Batches`.
        self._scale, self._shift = (
            values.float().repeat(height * width).to(self.device) for values in (1 / (255 * std), -mean / std)
        )

    def epoch(self, epoch: int, part: Part | None = None) -> Iterator[Batch]:
        """See `BatchSource.epoch`. Only the images that are wanted are decoded."""
        n = len(self.image_set)
        order = shuffled_order(n, self.seed, epoch, self.stream) if self.shuffle else torch.arange(n)
        indices = list(order.split(self.batch_size))[: len(self)]
        if part:
            indices = [own for own in (index[part(len(index))] for index in indices) if len(own)]
        purposes = [self.stream + purpose for purpose, on in (("crop", self.crop), ("flip", self.flip)) if on]
        for purpose in purposes:
            seeded_generator(purpose, self.seed, epoch)  # refuses impossible numbers here, not in a process
        loader = DataLoader(
            _Decoded(self, epoch),
            batch_size=None,  # `indices` are batches already
            sampler=indices,
            num_workers=min(self.loaders, len(indices)),
            # A process that starts as a copy of this one starts at once, and shares the list of files.
            multiprocessing_context="fork" if self.loaders and sys.platform == "linux" else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # torch draws a seed for the processes; not from the global generator
        )

        def batches() -> Iterator[Batch]:
            channels, height, width = self.image_set.image_shape
            for index, pixels in zip(indices, loader, strict=True):
                if isinstance(pixels, str):
                    raise ValueError(pixels)
                pixels = pixels.to(self.device, non_blocking=True).view(len(index), -1).float()  # (B, H*W*C)
                images = torch.addcmul(self._shift, pixels, self._scale).view(-1, height, width, channels)
                labels = self.image_set.labels[index]
                yield Batch(images.permute(0, 3, 1, 2), labels.to(self.device), index.to(self.device))

        return batches()


class _Decoded:
    """What a loading process knows: one pass over a set, batch by batch."""

    def __init__(self, batches: FolderBatches, epoch: int) -> None:
        self.image_set, self.crop, self.flip = batches.image_set, batches.crop, batches.flip
        self.seed, self.epoch, self.stream = batches.seed, epoch, batches.stream

    def __getitem__(self, index: Tensor) -> Tensor | str:
        """(B, S, S, C) uint8 of the images at `index` (B,); or what is wrong with one of them.

        An exception would reach the reader of the batches with the process's traceback around its one line.
        """
        try:
            return torch.from_numpy(np.stack([np.asarray(self._view(position)) for position in index.tolist()]))
        except ValueError as error:
            return str(error)

    def _view(self, position: int) -> Image.Image:
        image, size = read_image(self.image_set.path(position)), self.image_set.image_size
        if self.crop:
            generator = seeded_generator(self.stream + "crop", self.seed, self.epoch, position)
            image = training_view(image, size, generator)
        else:
            image = evaluation_view(image, size)
        if self.flip:
            generator = seeded_generator(self.stream + "flip", self.seed, self.epoch, position)
            if torch.randint(2, (), generator=generator):
                image = _transforms().horizontal_flip(image)
        return image

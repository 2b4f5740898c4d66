"""Images in, batches out.

`load_images` reads a data set into two `ImageSet`s of uint8 images, "train" and "test"; `hold_out` takes validation or
probe images from the training set, so the test set stays closed until the last notebook; `Batches` puts a set on the
device as one uint8 tensor and yields normalized float batches.

Everything drawn at random depends on the arguments alone, never on the global random state. What decides *which* images
are used (splits, subsets) comes from NumPy's `RandomState`, whose stream is frozen for good; what happens to them in an
epoch (order, crop, flip, noise) comes from a `torch.Generator` seeded by (seed, epoch).

Letters: N images, B batch, C channels, H W space, K classes.
"""

import contextlib
import difflib
import hashlib
import http.client
import io
import json
import logging
import os
import re
import socket
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from pursuhint_lib import storage
from pursuhint_lib.errors import first_line

DATA_SETS = ("digits", "cifar10", "cifar100", "image_folder")
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # none runs a program to decode
GROUND = "white"  # what shows through where an image is transparent

_DIGITS_TEST_SHARE = 0.3
_DIGITS_SPLIT_SEED = 0
_DOWNLOAD_TIMEOUT = 30  # seconds of silence; a closed network must end in an error, not in a wait for ever
_DECODE_CHUNK = 128  # images per task of the thread pool
_DEEP = re.compile("^[IF]|;16[BLN]")  # in Pillow's mode and raw modes of an image: more than 8 bits a channel
# What Pillow makes 8 bits of: where a file's bytes tell the depth of the first channel, and the bits set only above 8.
_DEPTH = {
    "JPEG2000": (re.compile(rb"\xff\x4f\xff\x51.{38}(.)", re.DOTALL), 0x78),  # Ssiz of the SIZ marker: bits - 1
    "AVIF": (re.compile(rb"av1C..(.)", re.DOTALL), 0x40),  # high_bitdepth of the AV1 configuration
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labeled images of one size, in memory.

    images: (N, C, H, W) uint8. labels: (N,) int64, positions in `classes`. classes: K distinct names.
    `image_set[which]` is the ImageSet of those images, for a boolean mask (N,), a tensor of positions or a slice.
    The tensors are shared, not copied: treat them as read-only (`digest` is computed once).

    Raises ValueError when the three do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 (N, C, H, W), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(self.images)},), one per image, "
                f"not {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes must be distinct names, at least one, not {_shortened(self.classes)}")
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"labels must lie in 0..{len(self.classes) - 1} ({len(self.classes)} classes), "
                f"not {int(self.labels.min())}..{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: Tensor | slice) -> "ImageSet":
        if isinstance(which, int):
            raise TypeError("an ImageSet is indexed by a mask, positions or a slice; one image is image_set.images[i]")
        return ImageSet(self.images[which], self.labels[which], self.classes)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[1:]))
        return f"ImageSet({len(self)} images of {size}, {len(self.classes)} classes: {_shortened(self.classes)})"

    @property
    def channels(self) -> int:
        """C: 1 for gray images, 3 for RGB."""
        return self.images.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.images.shape[1:])

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of shape, class names, labels and images, in that order: equal digests mean equal sets."""
        header = json.dumps({"shape": list(self.images.shape), "classes": self.classes})
        digest = hashlib.sha256(header.encode())
        digest.update(np.ascontiguousarray(self.labels.cpu().numpy(), dtype="<i8"))
        digest.update(np.ascontiguousarray(self.images.cpu().numpy()))
        return digest.hexdigest()

    def repeated(self, times: int) -> "ImageSet":
        """Each image `times` times, image-major: image 0 `times` times, then image 1, and so on.

        An evaluation under noise then averages over `times` draws per image (`Batches`, `noise`).
        """
        if times < 1:
            raise ValueError(f"an image can be repeated 1 time or more, not {times}")
        if times == 1:
            return self
        return ImageSet(self.images.repeat_interleave(times, 0), self.labels.repeat_interleave(times), self.classes)


# ----------------------------------------------------------------------------------------------------
# Reading data sets


def load_images(
    name: str,
    folder: str | Path = "",
    *,
    n_classes: int = 0,
    image_size: int = 0,
    test_repeats: int = 1,
    seed: int = 0,
) -> dict[str, ImageSet]:
    """Read a data set: ``{"train": ImageSet, "test": ImageSet}``, both with the same classes.

    name: ``digits`` (8x8 gray, ships with scikit-learn), ``cifar10``, ``cifar100``, or ``image_folder`` for your own.
    folder: where the images are; empty means ``$PURSUHINT_DATA``, and without that the home's ``data/``. A relative
        folder hangs below the home (`storage.home`). A folder that is named must be there. Digits read no folder.
        CIFAR is read from ``train/<class>/*.png`` and ``test/<class>/*.png``; where neither folder exists,
        torchvision's copy is used, and downloaded first if need be. Both give the same ImageSet, bit for bit.
        `image_folder` is read from ``train/<class>/*`` and ``test/<class>/*``, see `list_image_folder`.
    n_classes: 0 for all classes, else that many, drawn by `seed`, relabeled 0..n-1 in class order.
    image_size: for `image_folder`, and needed there: the shorter side is resized to it and the center is cropped.
    test_repeats: how often each test image occurs (`ImageSet.repeated`), for several draws of noise per image.
    seed: draws the classes, nothing else.

    Images come sorted by class: take `balanced_subset` to look at a few. Folders are decoded once (see `read_image`)
    and cached in ``data/cache/`` below the home, until a file is added, removed or changed.

    Raises ValueError for an unknown name, an impossible number or a damaged image, FileNotFoundError when the images
    are not there, not complete, or cannot be downloaded; each with one line.
    """
    if name not in DATA_SETS:
        nearest = difflib.get_close_matches(name, DATA_SETS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown data set {name!r}: {hint}known are {', '.join(DATA_SETS)}")
    if name == "image_folder" and image_size < 1:
        raise ValueError(f"image_folder needs image_size, the side of its images in pixels, not {image_size}")
    if name != "image_folder" and image_size != 0:
        raise ValueError(f"image_size must be 0 for {name}, which has a size of its own, not {image_size}")
    if name == "image_folder":
        folder = data_folder(folder)
        files, classes = list_image_folder(folder, n_classes, seed)
        sets = _decoded_sets("image_folder", folder, files, classes, image_size, resize=True)
    else:
        sets = _load_digits() if name == "digits" else _load_cifar(name, data_folder(folder))
        chosen = _choose_classes(sets["train"].classes, n_classes, seed)
        sets = {split: _only_classes(image_set, chosen) for split, image_set in sets.items()}
    return {"train": sets["train"], "test": sets["test"].repeated(test_repeats)}


def _load_digits() -> dict[str, ImageSet]:
    """The 1797 handwritten digits of scikit-learn (a part of UCI's Optical Recognition of Handwritten Digits).

    They come without a split, so one is made here: 30 % of each class is the test set. It is the same for every seed:
    were it drawn by the study's seed, test images of one seed would be training images of another, and a difference
    between seeds would mix luck in training with luck in the split. Writers are not known, so both parts hold images of
    the same hands: the test asks for new images, not for new writers.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]  # (N, 8, 8) of 0..16 -> (N, 1, 8, 8)
    every = ImageSet(
        torch.from_numpy(images),
        torch.from_numpy(digits.target.astype(np.int64)),
        [str(label) for label in digits.target_names],
    )
    per_class = every.labels.bincount()
    rank = _rank_within_class(every, "digits split", _DIGITS_SPLIT_SEED)
    is_test = rank < (_DIGITS_TEST_SHARE * per_class).round()[every.labels]
    return {"train": every[~is_test], "test": every[is_test]}


class _Cifar(NamedTuple):
    torchvision_name: str
    n_classes: int
    per_class: dict[str, int]


_CIFAR = {
    "cifar10": _Cifar("CIFAR10", 10, {"train": 5000, "test": 1000}),
    "cifar100": _Cifar("CIFAR100", 100, {"train": 500, "test": 100}),
}
_CIFAR_SIZE = 32


def _load_cifar(name: str, folder: Path) -> dict[str, ImageSet]:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) from an image folder or from torchvision's files; the result is the same.

    Classes are in alphabetical order in both (torchvision's order is alphabetical too).
    """
    expected = _CIFAR[name]
    if any((folder / split).is_dir() for split in expected.per_class):
        passed: Counter[str] = Counter()
        files = {split: _list_split(folder, split, passed) for split in expected.per_class}
        _say_passed_over(folder, passed)
        for split, per_class in expected.per_class.items():
            _check_complete(name, folder / split, files[split], expected.n_classes, per_class)
        classes = sorted(files["train"])
        if sorted(files["test"]) != classes:
            odd = min(set(files["test"]) ^ set(classes))
            raise FileNotFoundError(f"{name} is not complete: {folder} holds {odd!r} in only one of train/ and test/")
        sets = _decoded_sets(name, folder, files, classes, _CIFAR_SIZE, resize=False)
    else:
        sets = _torchvision_cifar(name, folder)
    return {split: _in_canonical_order(image_set) for split, image_set in sets.items()}


def _check_complete(
    name: str, folder: Path, files: dict[str, list["ImageFile"]], n_classes: int, per_class: int
) -> None:
    if len(files) != n_classes:
        raise FileNotFoundError(f"{name} is not complete: {folder} holds {len(files)} classes, expected {n_classes}")
    wrong = [class_name for class_name, found in files.items() if len(found) != per_class]
    if wrong:
        more = f" (and {len(wrong) - 1} more classes differ)" if len(wrong) > 1 else ""
        raise FileNotFoundError(
            f"{name} is not complete: {folder / wrong[0]} holds {len(files[wrong[0]])} images, "
            f"expected {per_class}{more}"
        )


def _torchvision_cifar(name: str, folder: Path) -> dict[str, ImageSet]:
    """torchvision's copy below `folder`, checked by checksum, downloaded when it is not there."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, _CIFAR[name].torchvision_name)
    logger.info("looking for %s in %s, downloading it if it is not there", name, folder)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parts = {split: dataset(root=folder, train=split == "train", download=True) for split in ("train", "test")}
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"{name} is not in {folder} and could not be downloaded from {dataset.url} ({first_line(error)}): put "
            f"train/<class>/*.png and test/<class>/*.png, or {dataset.filename}, into a folder and name that folder "
            f"in data_folder or PURSUHINT_DATA"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return {
        split: ImageSet(
            torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))),
            torch.tensor(part.targets, dtype=torch.int64),
            list(part.classes),
        )
        for split, part in parts.items()
    }


def _in_canonical_order(image_set: ImageSet) -> ImageSet:
    """Sorted by label, then by the bytes of the image, so the order does not tell where the images came from."""
    n = len(image_set)
    images = np.ascontiguousarray(image_set.images.numpy()).reshape(n, -1)
    by_bytes = np.argsort(images.view(np.dtype((np.void, images.shape[1]))).reshape(n), kind="stable")
    by_label = np.argsort(image_set.labels.numpy()[by_bytes], kind="stable")
    return image_set[torch.from_numpy(by_bytes[by_label])]


def list_image_folder(
    folder: Path, n_classes: int, seed: int
) -> tuple[dict[str, dict[str, list["ImageFile"]]], list[str]]:
    """The image files of ``train/<class>/`` and ``test/<class>/``, those in subfolders too; nothing is decoded.

    A ``test/`` that is not there, or has none of the classes of ``train/``, as where nothing is labeled, leaves its
    place to ``val/``. Logs, in one line, what is passed over: hidden files, those that no suffix makes an image that
    the installed Pillow reads, those outside a class, and those of a ``val/`` or ``test/`` that is not used.

    Returns split ("train", "test") -> class -> its files, both sorted by name, and the classes: `n_classes` of them
    drawn by `seed`, all for 0. Raises FileNotFoundError or ValueError, one line, when the folder is not made like that.
    """
    there = [split for split in ("test", "val") if (folder / split).is_dir()]
    if not there or not (folder / "train").is_dir():
        raise FileNotFoundError(f"image folder {folder} must hold train/<class>/* and test/<class>/* or val/<class>/*")
    passed: dict[str, Counter[str]] = {split: Counter() for split in ("train", *there)}
    listed = {split: _list_split(folder, split, of_split) for split, of_split in passed.items()}
    test_split = next((split for split in there if listed[split].keys() & listed["train"].keys()), there[0])
    for split in set(there) - {test_split}:
        unused = passed[split].total() + sum(map(len, listed[split].values()))
        passed[split] = Counter({f"in {split}/, as {test_split}/ is the test set": unused})
    _say_passed_over(folder, sum(passed.values(), Counter()))
    files = {"train": listed["train"], "test": listed[test_split]}
    unknown = sorted(set(files["test"]) - set(files["train"]))
    if unknown:
        raise ValueError(f"class {unknown[0]!r} is in {folder / test_split} but not in {folder / 'train'}")
    for split, classes in files.items():
        empty = [class_name for class_name, found in classes.items() if not found]
        if empty or not classes:
            where = folder / (test_split if split == "test" else split) / (empty[0] if empty else "<class>")
            raise FileNotFoundError(f"{where} holds no images (known suffixes: {' '.join(_suffixes())})")
    chosen = _choose_classes(sorted(files["train"]), n_classes, seed)
    files = {split: {name: classes[name] for name in chosen if name in classes} for split, classes in files.items()}
    return files, chosen


def data_folder(folder: str | Path) -> Path:
    """The folder meant by the argument, else by the environment, else the home's ``data/``, which a download makes.

    Raises FileNotFoundError, one line, when a folder that is named is not there.
    """
    named = str(folder) or os.environ.get("PURSUHINT_DATA", "")
    if not named:
        return storage.home() / "data"
    path = storage.home() / Path(named).expanduser()
    if not path.is_dir():
        source = "data_folder" if str(folder) else "PURSUHINT_DATA"
        raise FileNotFoundError(f"data folder {path} is not there (named by {source})")
    return path


def _choose_classes(classes: list[str], n_classes: int, seed: int) -> list[str]:
    """`n_classes` of `classes` drawn by `seed`, in the order they had; all of them for 0."""
    if not 0 <= n_classes <= len(classes):
        raise ValueError(f"n_classes must be 0 (all) or 1..{len(classes)}, the classes there are, not {n_classes}")
    if n_classes == 0:
        return classes
    drawn = _random_state("classes", seed).permutation(len(classes))[:n_classes]
    return [classes[position] for position in sorted(drawn)]


def _only_classes(image_set: ImageSet, chosen: list[str]) -> ImageSet:
    """The images of the chosen classes, relabeled by their position in `chosen`."""
    if chosen == image_set.classes:
        return image_set
    position = {name: label for label, name in enumerate(chosen)}
    relabel = torch.tensor([position.get(name, -1) for name in image_set.classes])  # (K,), -1: not chosen
    labels = relabel[image_set.labels]
    return ImageSet(image_set.images[labels >= 0], labels[labels >= 0], chosen)


# ----------------------------------------------------------------------------------------------------
# Decoding folders, once


class ImageFile(NamedTuple):
    """A file that was listed; `path` is relative to the data folder."""

    path: str
    size: int
    changed_ns: int  # the system's own time of change: what unpacks or copies a file sets the other one as it likes


@cache
def _suffixes() -> tuple[str, ...]:
    """Suffixes of FORMATS, as far as the installed Pillow reads them."""
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


def _list_split(folder: Path, split: str, passed: Counter[str]) -> dict[str, list[ImageFile]]:
    """Image files by class, both sorted by name; what is passed over is counted in `passed`.

    The class of a file is the folder below `split` that it lies in, however deep; or, where no such folder is a class
    of the table ``<split>_annotations.txt``, as in the ``val/`` of Tiny ImageNet, the second word of the file's line in
    it. Raises ValueError for two classes of one name as text.
    """
    if not (folder / split).is_dir():
        return {}
    table = folder / split / f"{split}_annotations.txt"
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines() if table.is_file() else []
    class_of = {name: class_name for name, class_name, *_ in (f"{line}\t\t".split("\t") for line in lines)}
    below = storage.files_below(folder / split)
    if lines:
        below = list(below)
        folders = {path.partition("/")[0] for path, _ in below if "/" in path}
        named = {class_of.get(path.rpartition("/")[2]) for path, _ in below} - {None, ""}
        if folders & set(class_of.values()) or not named:
            class_of = {}
            passed[f"{table.name}, as folders are the classes"] += 1
    classes: dict[str, list[ImageFile]] = {}
    for path, status in below:
        top, inside, _ = path.partition("/")
        name = path.rpartition("/")[2]
        class_name = class_of.get(name, "") if class_of else top if inside else ""
        found = classes.setdefault(class_name, []) if class_name else []
        if status and class_name and name.lower().endswith(_suffixes()):
            found.append(ImageFile(f"{split}/{path}", status.st_size, status.st_ctime_ns))
        elif name and path != table.name:
            what = f"*{Path(name).suffix}" if class_name else "outside the folders of classes"
            passed["hidden" if name.startswith(".") else what] += 1
    for text, count in Counter(map(as_text, classes)).items():
        if count > 1:
            where = as_text(folder / split)
            raise ValueError(f"{where} holds {count} classes whose name as text is {text}: rename one")
    return {as_text(class_name): sorted(found) for class_name, found in sorted(classes.items())}


def _say_passed_over(folder: Path, passed: Counter[str]) -> None:
    if passed:
        most = sorted(passed.items(), key=lambda item: (-item[1], item[0]))[:5]
        counts = ", ".join(f"{count} {what}" for what, count in most)
        logger.warning("images of %s: %d passed over (%s)", as_text(folder), passed.total(), as_text(counts))


def as_text(name: str | Path) -> str:
    """The name of a file or folder as one line of text: bytes that are not UTF-8 as ``\\xe9``, new lines as ``\\n``."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub("[\0-\x1f\x7f-\x9f\u2028\u2029]", lambda odd: odd[0].encode("unicode_escape").decode(), text)


def _decoded_sets(
    name: str,
    folder: Path,
    files: dict[str, dict[str, list[ImageFile]]],
    classes: list[str],
    image_size: int,
    *,
    resize: bool,
) -> dict[str, ImageSet]:
    """ImageSets of listed files, in the order of the listing, from the cache when nothing changed since."""
    flat = {split: [file for found in by_class.values() for file in found] for split, by_class in files.items()}
    shapes = {split: (len(found), 3, image_size, image_size) for split, found in flat.items()}
    # Pillow's version is in the key because its decoders and its resizing may change by a bit; the folder, because
    # another may hold files of equal names, sizes and times. The first number goes up when `read_image` refuses
    # more, or a cache holds more.
    listing = json.dumps([1, PIL.__version__, image_size, str(folder.resolve()), flat])
    key = hashlib.sha256(listing.encode()).hexdigest()[:16]
    cache = storage.home() / "data" / "cache" / f"{name}-{key}.npz"
    total = sum(map(len, flat.values()))
    changed: list[str] = []
    images = _read_cache(cache, shapes, changed)
    if images is None:
        _check_memory(folder, shapes)
        with tqdm(total=total, desc=f"decoding {name}", unit=" images", disable=None) as progress:
            images = {
                split: _decode(folder, found, image_size, resize, progress, changed) for split, found in flat.items()
            }
        with storage.written_whole(cache) as temporary:
            np.savez(temporary, **images, changed=np.array(changed, dtype=np.str_))
    say_changed(folder, total, changed)
    sets = {}
    for split, by_class in files.items():
        label = {class_name: position for position, class_name in enumerate(classes)}
        labels = torch.tensor([label[class_name] for class_name, found in by_class.items() for _ in found])
        sets[split] = ImageSet(torch.from_numpy(images[split]), labels.to(torch.int64), classes)
    return sets


def _read_cache(path: Path, shapes: dict[str, tuple[int, ...]], changed: list[str]) -> dict[str, np.ndarray] | None:
    """The cached images, or None when there are none or they are damaged (.npz holds a checksum of each array).

    changed: see `read_image`; what was needed when they were decoded.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, said = {split: arrays[split] for split in shapes}, arrays["changed"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("cache %s is damaged (%s): decoding again", path, first_line(error))
        return None
    if any(images[split].shape != shape or images[split].dtype != np.uint8 for split, shape in shapes.items()):
        logger.warning("cache %s does not hold the images expected: decoding again", path)
        return None
    changed += said
    return images


def _check_memory(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse before hours of decoding what the system would end by killing the process."""
    needed = sum(int(np.prod(shape)) for shape in shapes.values())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"the images of {folder} need {needed / 2**30:.1f} GiB at image_size {shapes['train'][-1]}, this machine "
            f"has {there / 2**30:.1f} GiB: choose fewer classes (n_classes) or a smaller image_size"
        )


def _decode(
    folder: Path, files: list[ImageFile], image_size: int, resize: bool, progress: tqdm, changed: list[str]
) -> np.ndarray:
    """(N, 3, image_size, image_size) uint8, decoded by threads (Pillow lets go of the lock while it decodes).

    changed: see `read_image`.
    """
    images = np.empty((len(files), 3, image_size, image_size), np.uint8)

    def decode_chunk(start: int) -> int:
        chunk = files[start : start + _DECODE_CHUNK]
        for position, file in enumerate(chunk, start):
            images[position] = _decoded_image(folder / file.path, image_size, resize, changed)
        return len(chunk)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in pool.map(decode_chunk, range(0, len(files), _DECODE_CHUNK)):
            progress.update(done)
    return images


def _decoded_image(path: Path, image_size: int, resize: bool, changed: list[str]) -> np.ndarray:
    """One image as (3, image_size, image_size) uint8 RGB; with `resize`, shorter side resized and center cropped."""
    rgb = read_image(path, changed)
    if rgb.size != (image_size, image_size):
        if not resize:
            raise ValueError(f"{as_text(path)} is {rgb.width}x{rgb.height} pixels, expected {image_size}x{image_size}")
        rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def read_image(path: Path, changed: list[str] | None = None) -> Image.Image:
    """An image file, decoded to RGB: its first frame, upright as its EXIF data say, on GROUND where it is transparent.

    changed: what of these was needed is appended to it, for `say_changed`.

    Raises ValueError, one line that names the file, for a damaged one, and for one of more than 8 bits a channel: how
    many of them are used (12 bits in 16 are common), or which floats are black and white, no file says for sure.
    """
    changed = [] if changed is None else changed
    try:
        with Image.open(path, formats=FORMATS) as image:
            if _is_deep(image, path):
                raise ValueError("more than 8 bits a channel, and which values are black and white is not known")
            if getattr(image, "is_animated", False) and image.format != "MPO":  # where others are previews of the first
                changed.append("first of several frames")
            if _is_turned(image):
                changed.append("turned upright by their EXIF data")
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    changed.append(f"transparent, laid on {GROUND}")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, GROUND), image)
            return image.convert("RGB")
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything (SyntaxError, struct.error)
        reason = first_line(error)
        raise ValueError(f"{as_text(path)} cannot be used ({reason}): convert, replace or delete it") from None


def _is_deep(image: Image.Image, path: Path) -> bool:
    """Whether a channel has more than 8 bits. `image` is open, and not decoded."""
    if image.format == "PPM" and isinstance(arguments := image.tile[0].args, tuple) and arguments[1] > 255:
        return True  # the value of white
    if image.format in _DEPTH:
        pattern, above_8 = _DEPTH[image.format]
        found = pattern.search(path.read_bytes())
        return bool(found and found[1][0] & above_8)
    return bool(_DEEP.search(f"{image.mode} {image.tile}"))


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # damaged EXIF data say nothing; the image itself may be whole
        return False


def say_changed(folder: Path, looked_at: int, changed: Sequence[str]) -> None:
    """Log, in one line, how many images had to be changed to be seen as `read_image` says; nothing for none."""
    if changed:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(Counter(changed).items()))
        logger.warning("images of %s: of %d, %s", as_text(folder), looked_at, counts)


# ----------------------------------------------------------------------------------------------------
# Choosing images


def hold_out(image_set: ImageSet, per_class: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split a set in two that share no image: (rest, held_out), with `per_class` images of each class held out.

    Which ones depends on `seed` alone; both parts keep the order of `image_set`. To hold out twice (validation, then
    probe images) call it again on the rest. Raises ValueError when a class would have no image left.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be 1 or more, not {per_class}")
    counts = image_set.labels.bincount(minlength=len(image_set.classes))
    smallest = int(counts.argmin())
    if counts[smallest] <= per_class:
        raise ValueError(
            f"class {image_set.classes[smallest]!r} has {int(counts[smallest])} images: "
            f"cannot hold out {per_class} of them and keep one"
        )
    held = _rank_within_class(image_set, "hold out", seed) < per_class
    return image_set[~held], image_set[held]


def balanced_subset(image_set: ImageSet, size: int, seed: int) -> ImageSet:
    """`size` images with the classes as even as can be (all images when there are fewer), in the order of the set.

    Drawn in rounds, one image of each class per round, in an order of classes drawn by `seed`. So when `size` is no
    multiple of K, the classes first in that order have one image more, and a class that runs out is skipped. For one
    seed, a smaller subset lies within a larger one.
    """
    if size < 1:
        raise ValueError(f"a subset needs 1 image or more, not {size}")
    rank = _rank_within_class(image_set, "subset", seed)
    turn = torch.from_numpy(_random_state("turns", seed).permutation(len(image_set.classes)))  # (K,)
    drawn = torch.argsort(rank * len(turn) + turn[image_set.labels])[:size]  # no ties: (round, turn) is unique
    return image_set[drawn.sort().values]


def _rank_within_class(image_set: ImageSet, purpose: str, seed: int) -> Tensor:
    """(N,) int64: the place of each image in a random order of the images of its class, 0 first."""
    shuffled = torch.from_numpy(_random_state(purpose, seed).permutation(len(image_set)))
    by_class = shuffled[torch.argsort(image_set.labels[shuffled], stable=True)]  # classes together, random within
    counts = image_set.labels.bincount(minlength=len(image_set.classes))
    first = counts.cumsum(0) - counts  # (K,), where each class starts in by_class
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(by_class)) - first[image_set.labels[by_class]]
    return rank


def channel_stats(image_set: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of each channel on the [0, 1] scale: two (C,) float64 tensors.

    Computed from the counts of the 256 values, so they are exact and no float copy of the images is made.
    """
    if len(image_set) == 0:
        raise ValueError("an empty ImageSet has no mean")
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack(
        [image_set.images[:, channel].flatten().bincount(minlength=256) for channel in range(image_set.channels)]
    ).to("cpu", torch.float64)  # (C, 256)
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    return mean, variance.sqrt()


# ----------------------------------------------------------------------------------------------------
# Batches


class Batch(NamedTuple):
    """images: (B, C, H, W) float32, normalized, channels_last. labels, index (rows of the set): (B,) int64. Of a batch
    that a DataLoader gave, images are as they came, and index is None.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None


Part = Callable[[int], slice]  # number of images of a batch -> a slice of its rows, with start and stop


class BatchSource:
    """Batches of a set of images, pass by pass: `Batches` of images in memory, `folders.FolderBatches` of images on
    disk. Order, crops and flips of a pass depend on (seed, epoch) alone.
    """

    image_set: Any  # with labels (N,), classes and a length
    batch_size: int
    shuffle: bool
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return count_batches(len(self.image_set), self.batch_size, self.shuffle)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} x {self.batch_size} of {self.image_set!r} on {self.device})"

    def images_in(self, step: int) -> int:
        """Number of images of a batch, counted from 0."""
        return min(self.batch_size, len(self.image_set) - step * self.batch_size)

    def epoch(self, epoch: int, part: Part | None = None) -> Iterator[Batch]:
        """The batches of pass `epoch` (0, 1, ...). They may be taken in any order, left early or read side by side.

        part: which rows of a batch of so many images are wanted, if not all. They are what they are in the whole
        batch; a batch of which none is wanted is left out.
        """
        raise NotImplementedError


class Batches(BatchSource):
    """Normalized batches of an ImageSet that lives on the device as one uint8 tensor.

    ``for batch in batches.epoch(e)`` is one pass; ``for batch in batches`` is ``epoch(0)``, the pass for evaluation:
    always the same order, and the same noise. ``len(batches)`` counts the batches of a pass. Order, crops, flips and
    noise of a pass depend on (seed, epoch) alone. Each is drawn from a generator of its own, so that turning one on or
    off leaves the others as they were. Noise is drawn on the device, batch by batch, so another kind of device or
    another `batch_size` may draw other noise; all else is drawn on the CPU and is the same everywhere.

    image_set: N images, kept as `.image_set`.
    mean, std: (C,) each on the [0, 1] scale (`channel_stats`); images come out as (image / 255 - mean) / std.
    crop_padding: P > 0 pads the images with P black pixels on each side and crops H x W at a random place.
    flip: mirror each image left to right with probability 1/2.
    noise: standard deviation, on the [0, 1] scale, of Gaussian noise on every pixel, added before the normalization.
        The sum is not clipped to [0, 1]: clipping would make the noise depend on the image.
    stream: a name that goes into every draw. Sets that are to be independent (training, validation, test) carry
        different names: under one name and seed they would be given the same noise, image for image.
    shuffle: random order, for training. A last batch of a single image is then dropped, because batch normalization
        cannot train on one image; every other image is used once per pass.

    Raises ValueError, in one line, for an empty set or a value that makes no sense.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        crop_padding: int = 0,
        flip: bool = False,
        noise: float = 0.0,
        shuffle: bool = False,
        seed: int = 0,
        stream: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        n, channels, height, width = image_set.images.shape
        count_batches(n, batch_size, shuffle)
        mean, std = checked_statistics(mean, std, channels)
        if crop_padding < 0 or not noise >= 0:
            raise ValueError(f"crop_padding and noise must be 0 or more, not {crop_padding}, {noise}")
        self.image_set = image_set
        self.batch_size = batch_size
        self.crop_padding = crop_padding
        self.flip = flip
        self.noise = noise
        self.shuffle = shuffle
        self.seed = seed
        self.stream = stream
        self.device = torch.device(device)

        pixels = image_set.images.to(self.device).permute(0, 2, 3, 1)  # (N, H, W, C): channels_last comes for free
        pixels = F.pad(pixels, (0, 0, *[crop_padding] * 4)).contiguous()
        self._labels = image_set.labels.to(self.device)

        # A batch is gathered as rows of one matrix: row = start of the image + offset within the image. When images
        # are moved, a row is a pixel, and the offsets are those of an upright or of a mirrored H x W window.
        # Otherwise a row is a whole image, and its only offset is 0.
        self._row_length = width + 2 * crop_padding
        y, x = torch.arange(height)[:, None], torch.arange(width)[None, :]
        if crop_padding or flip:
            upright, mirrored = y * self._row_length + x, y * self._row_length + width - 1 - x
            self._offsets = torch.stack([upright.flatten(), mirrored.flatten()]).to(self.device)  # (2, H*W)
            self._rows = pixels.view(-1, channels)
        else:
            self._offsets = torch.zeros(2, 1, dtype=torch.int64, device=self.device)
            self._rows = pixels.view(n, -1)
        self._rows_per_image = len(self._rows) // n

        # (H*W*C,) each, laid out like an image: far quicker on a CPU than spreading C numbers over the last dimension.
        factors = (1 / (255 * std), -mean / std, noise / std)
        self._scale, self._shift, self._noise_scale = (
            values.float().repeat(height * width).to(self.device) for values in factors
        )

    def epoch(self, epoch: int, part: Part | None = None) -> Iterator[Batch]:
        """See `BatchSource.epoch`. The noise of a whole batch is drawn, whatever part of it is wanted."""
        n, (channels, height, width) = len(self.image_set), self.image_set.images.shape[1:]
        index = torch.arange(n)
        if self.shuffle:
            index = shuffled_order(n, self.seed, epoch, self.stream)
        start = index * self._rows_per_image
        if self.crop_padding:
            places = 2 * self.crop_padding + 1
            top, left = torch.randint(places, (2, n), generator=self._generator("crop", epoch))
            start += top * self._row_length + left
        mirrored = torch.zeros(n, dtype=torch.int64)
        if self.flip:
            mirrored = torch.randint(2, (n,), generator=self._generator("flip", epoch))
        noise_generator = self._generator("noise", epoch, self.device)
        index, start, mirrored = (values.to(self.device) for values in (index, start, mirrored))
        labels = self._labels[index]

        def batches() -> Iterator[Batch]:
            for first in range(0, len(self) * self.batch_size, self.batch_size):
                whole = min(self.batch_size, n - first)
                own = part(whole) if part else slice(0, whole)
                if self.noise:
                    drawn = torch.randn((whole, len(self._scale)), generator=noise_generator, device=self.device)[own]
                if own.start == own.stop:
                    continue
                taken = slice(first + own.start, first + own.stop)
                rows = start[taken, None] + self._offsets[mirrored[taken]]  # (B, H*W), or (B, 1) for whole images
                pixels = self._rows.index_select(0, rows.flatten()).view(len(rows), -1).float()  # (B, H*W*C)
                images = torch.addcmul(self._shift, pixels, self._scale)
                if self.noise:
                    images.addcmul_(drawn, self._noise_scale)
                images = images.view(-1, height, width, channels).permute(0, 3, 1, 2)
                yield Batch(images, labels[taken], index[taken])

        return batches()

    def _generator(self, purpose: str, epoch: int, device: torch.device | str = "cpu") -> torch.Generator:
        return seeded_generator(self.stream + purpose, self.seed, epoch, device=device)


def count_batches(n: int, batch_size: int, shuffle: bool) -> int:
    """Batches in a pass over n images; when shuffled, without a last batch of one image.

    Raises ValueError when that leaves none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if n == 0 or (n == 1 and shuffle and batch_size > 1):
        raise ValueError(f"{n} images give no batch (a single image is dropped when shuffled)")
    return -(-n // batch_size) - (shuffle and n % batch_size == 1)


def checked_statistics(
    mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """mean and std as (C,) float64 tensors on the CPU. Raises ValueError when they cannot be those of `channels`."""
    mean = torch.as_tensor(mean, dtype=torch.float64, device="cpu")
    std = torch.as_tensor(std, dtype=torch.float64, device="cpu")
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ValueError(
            f"mean and std need one value per channel, shape ({channels},), not {tuple(mean.shape)}, {tuple(std.shape)}"
        )
    if not (std > 0).all():
        raise ValueError(f"std must be above 0 in every channel, not {std.tolist()}")
    return mean, std


def shuffled_order(n: int, seed: int, epoch: int, stream: str) -> Tensor:
    """(n,) int64: the order of n images in pass `epoch`."""
    return torch.randperm(n, generator=seeded_generator(stream + "order", seed, epoch))


def seeded_generator(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, seeded by NumPy's SeedSequence of the numbers (seed, epoch) and the purpose.

    SeedSequence is made for this: neighboring seeds and epochs give unrelated streams, which seed + epoch does not
    (there, epoch 1 of seed 0 would be epoch 0 of seed 1).
    """
    return torch.Generator(device).manual_seed(int(_entropy(purpose, *numbers).generate_state(1)[0]))


def _entropy(purpose: str, *numbers: int) -> np.random.SeedSequence:
    """A seed for one purpose, so that equal seeds for different purposes draw different things."""
    if min(numbers) < 0:
        raise ValueError(f"seeds and epochs must be 0 or more, not {min(numbers)}")
    return np.random.SeedSequence([*numbers, *purpose.encode()])


def _random_state(purpose: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(_entropy(purpose, seed)))


def _shortened(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")

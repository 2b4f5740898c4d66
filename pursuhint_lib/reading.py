"""Images, labels and logits, in the forms that they come in.

A batch is images alone, a tuple (images, labels), or a dict or an object that holds them by name; a network returns its
logits alone, or something that holds them. Whoever needs one of the three reads it here.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pursuhint_lib.errors import first_line

IMAGES = ("images", "image", "pixel_values", "img", "inputs", "x")
LABELS = ("labels", "label", "targets", "target", "y")


def images_of(batch: Any) -> Tensor:
    """The images of a batch: (B, C, H, W), or what else the network takes. Raises TypeError, one line."""
    return batch if isinstance(batch, Tensor) else _part(batch, "images", IMAGES, 0)


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: (B,) int64, none below 0. Raises TypeError or ValueError, one line."""
    labels, images = _part(batch, "labels", LABELS, 1), images_of(batch)
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be int64 ({len(images)},), one for each image, not {form(labels)}")
    if labels.numel() and labels.min() < 0:
        raise ValueError(f"labels must be classes, counted from 0, not {int(labels.min())}")
    return labels


def _part(batch: Any, what: str, names: Sequence[str], position: int) -> Tensor:
    value_of = batch.get if isinstance(batch, Mapping) else lambda name: getattr(batch, name, None)
    found = {name: value for name in names if (value := value_of(name)) is not None}
    if not found and isinstance(batch, tuple | list) and len(batch) > position:
        found = {f"[{position}]": batch[position]}
    if len(found) != 1:
        raise TypeError(
            f"a batch is {form(batch)}, which has {' and '.join(found) or f'no {what}'}: "
            f"it must be (images, labels), or hold {what} by one of the names {', '.join(names)}"
        )
    (value,) = found.values()
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} of a batch must be a tensor, not {form(value)}")
    return value


def logits_of(output: Any) -> Tensor:
    """The logits (B, K) in what a network returns: all of it, its entry or attribute `logits`, or the first of a tuple.
    Auxiliary logits beside them are passed over. Raises TypeError, one line.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, tuple | list) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point():
        raise TypeError(
            f"the network returns {form(output)}, and its logits must be one tensor (B, K): "
            "alone, by the name logits, or first in a tuple"
        )
    return logits


def form(value: Any) -> str:
    """What a value is, in a few words: "float32 (8, 3, 32, 32)", "dict of a, b"."""
    if isinstance(value, Tensor):
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{device}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return type(value).__name__


@contextlib.contextmanager
def in_one_line(who: str, images: Tensor) -> Iterator[None]:
    """Inside the block, what goes wrong with these images becomes a ValueError of one line that says who cannot take
    them, and what they are. A GPU's memory that runs out is no fault of theirs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a foreign network says of images that it cannot take
        reason = first_line(error)
        raise ValueError(f"{who} fails on images {form(images)}: {reason}") from error

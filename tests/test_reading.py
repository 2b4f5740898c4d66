"""Batches and outputs in every form that they come in, and one line for every other."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import googlenet

from pursuhint_lib.data import Batch
from pursuhint_lib.reading import images_of, in_one_line, labels_of, logits_of

X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
LOGITS = torch.randn(4, 5)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, torch.arange(4)),
        namedtuple("Sample", "first second")(X, Y),
        Batch(X, Y, torch.arange(4)),
        {"pixel_values": X, "labels": Y},
        {"image": X, "label": Y, "name": ["a", "b", "c", "d"]},
        SimpleNamespace(images=X, targets=Y),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_images_and_labels_are_found_in_tuples_dicts_and_objects(batch):
    assert images_of(batch) is X and labels_of(batch) is Y


def test_images_alone_are_a_batch_of_images():
    assert images_of(X) is X


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"pictures": X, "labels": Y}, "a batch is dict of pictures, labels, which has no images"),
        ({"image": X, "pixel_values": X, "label": Y}, "which has image and pixel_values"),
        (X.numpy(), "a batch is ndarray, which has no images"),
        ((X.numpy(), Y), "images of a batch must be a tensor, not ndarray"),
        (X, "which has no labels"),
        ((X,), "a batch is tuple of Tensor, which has no labels"),
        ((X, 3), "labels of a batch must be a tensor, not int"),
        ((X, Y.float()), "labels must be int64 (4,), one for each image, not float32 (4,)"),
        ((X, Y[:2]), "int64 (4,), one for each image, not int64 (2,)"),
        ((X, Y - 1), "counted from 0, not -1"),
    ],
)
def test_a_batch_of_another_form_is_one_line_that_says_what_it_is(batch, says):
    with pytest.raises((TypeError, ValueError)) as error:
        images_of(batch), labels_of(batch)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, X),
        {"loss": torch.tensor(1.0), "logits": LOGITS},
        SimpleNamespace(logits=LOGITS, hidden_states=(X,)),
        namedtuple("Outputs", "aux logits")(X, LOGITS),
    ],
    ids=lambda output: type(output).__name__,
)
def test_logits_are_found_in_whatever_a_network_returns(output):
    assert logits_of(output) is LOGITS


def test_logits_are_found_beside_the_auxiliary_ones_of_torchvision():
    network = googlenet(num_classes=5, aux_logits=True, init_weights=False).train()
    output = network(torch.randn(2, 3, 64, 64))
    assert not isinstance(output, torch.Tensor) and logits_of(output) is output.logits


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ({"out": LOGITS}, "dict of out"),
        (X, "float32 (4, 3, 8, 8)"),
        (Y, "int64 (4,)"),
        ((), "tuple of nothing"),
        (None, "NoneType"),
        (np.zeros((4, 5)), "ndarray"),
    ],
)
def test_an_output_without_logits_is_one_line_that_says_what_it_is(output, says):
    with pytest.raises(TypeError) as error:
        logits_of(output)
    assert str(error.value).startswith(f"the network returns {says}, and its logits must be one tensor (B, K)")


@pytest.mark.parametrize(
    ("network", "images", "says"),
    [
        (nn.Conv2d(3, 2, 1).half(), X, "she fails on images float32 (4, 3, 8, 8)"),
        (nn.Conv2d(3, 2, 1), (255 * X).byte(), "she fails on images uint8 (4, 3, 8, 8)"),
        (nn.BatchNorm2d(3), X[0], "she fails on images float32 (3, 8, 8)"),
    ],
)
def test_images_that_a_network_cannot_take_are_named_in_one_line(network, images, says):
    with pytest.raises(ValueError) as error, in_one_line("she", images):
        network(images)
    assert str(error.value).startswith(f"{says}: ") and "\n" not in str(error.value)

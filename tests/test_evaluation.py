"""Scores and sizes of networks, by hand."""

import math

import pytest
import torch

from pursuhint_lib.evaluation import accuracy, count_macs, count_parameters, score
from pursuhint_lib.models import build_model


def test_accuracy_loss_and_agreement_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    found = score(logits, labels, teacher)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert accuracy(logits, labels) == found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx((right + right + wrong) / 3)
    assert found["agreement"] == pytest.approx(2 / 3)


def test_sizes_of_a_published_network():
    network = build_model("resnet20", 100)
    assert count_parameters(network) == 278_324
    assert round(count_macs(network, (3, 32, 32)) / 1e6, 2) == 40.82

"""Logits and networks -> numbers. Accuracies are fractions in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, batch norm's included."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image (C, H, W) through convolutions and linear layers, by torch's own counter."""
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    model.train(was_training)
    return counter.get_total_flops() // 2


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the label's. logits: (N, K), labels: (N,)."""
    return float((logits.argmax(1) == labels).double().mean())


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> dict[str, float]:
    """What one network did on one set: accuracy, loss (cross entropy, nats), agreement (same answer as the teacher).

    logits, teacher_logits: (N, K) of the same images in the same order, labels: (N,).
    """
    return {
        "accuracy": accuracy(logits, labels),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "agreement": float((logits.argmax(1) == teacher_logits.argmax(1)).double().mean()),
    }

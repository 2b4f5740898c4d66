"""Logits and networks -> numbers. Accuracies are fractions in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from scipy import optimize
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TEMPERATURES = (0.01, 100.0)  # where `fit_temperature` looks
CALIBRATION_BINS = 15


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


def check_says_something(logits: Tensor, teacher: str) -> None:
    """Raise ValueError, one line, when nothing can be learned from these logits (N, K) of the network `teacher`."""
    if not logits.isfinite().all():
        raise ValueError(f"teacher {teacher}: its logits are not all finite, so it can teach nothing: are its weights?")
    if (logits == logits[0]).all():
        raise ValueError(f"teacher {teacher}: its logits are the same for every image, so it can teach nothing")


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimizes the cross entropy of logits / T (Guo et al. 2017, section 4.2), in TEMPERATURES.

    logits: (N, K), labels: (N,), of validation images; what is scaled by T is measured on others. The cross entropy is
    convex in 1 / T, so its derivative has one root, which is searched for over log T in float64. Where there is none
    between the bounds, T is a bound: the lower one if every image is classified right (the sharper, the better, without
    end), or if all logits are equal; the upper one if the logits say less than nothing.
    """
    logits = logits.double()
    above = logits - logits.gather(1, labels[:, None])  # how far each class is above the right one

    def slope(log_temperature: float) -> float:
        """Of the cross entropy in 1 / T. Of logits relative to the right class, so that it never rounds above 0 where
        the right class is on top.
        """
        return float(((logits / math.exp(log_temperature)).softmax(1) * above).sum(1).mean())

    lower, upper = (math.log(bound) for bound in TEMPERATURES)
    if slope(lower) <= 0:
        return TEMPERATURES[0]
    if slope(upper) >= 0:
        return TEMPERATURES[1]
    return math.exp(optimize.brentq(slope, lower, upper))


def score(logits: Tensor, labels: Tensor, teacher_logits: Tensor, temperature: float) -> dict[str, float]:
    """What one network did on one set of images.

    logits, teacher_logits: (N, K), finite, of the same images in the same order; labels: (N,). temperature: of this
    network, from `fit_temperature` on other images. Computed in float64:

    accuracy, top5: share of images whose label has the largest logit, or one of the five largest (NaN for K <= 5,
        where every image would count).
    loss, loss_scaled: cross entropy in nats, of the logits and of logits / temperature.
    agreement, agreement_wrong: share of images that get the teacher's answer, of all and of those where the teacher is
        wrong (NaN if there are none).
    kl: mean over images of KL(teacher || student) in nats, at temperature 1.
    ece, ece_scaled: expected calibration error of the top label (Guo et al. 2017, eq. 3), CALIBRATION_BINS bins of
        equal width, mean absolute gap weighted by images; of the logits and of logits / temperature.
    """
    logits, teacher_logits = logits.double(), teacher_logits.double()
    answers, teacher_answers = logits.argmax(1), teacher_logits.argmax(1)
    agrees, teacher_wrong = (answers == teacher_answers).double(), teacher_answers != labels
    in_top5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    divergence = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="batchmean", log_target=True)
    return {
        "accuracy": accuracy(logits, labels),
        "top5": float(in_top5.double().mean()) if logits.shape[1] > 5 else math.nan,
        "loss": float(F.cross_entropy(logits, labels)),
        "agreement": float(agrees.mean()),
        "agreement_wrong": float(agrees[teacher_wrong].mean()),  # of none: NaN
        "kl": float(divergence),
        "ece": _calibration_error(logits, labels),
        "ece_scaled": _calibration_error(logits / temperature, labels),
        "loss_scaled": float(F.cross_entropy(logits / temperature, labels)),
    }


def _calibration_error(logits: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes seconds to import

    # Probabilities, because torchmetrics takes logits that happen to lie in [0, 1] for probabilities. Below 1, because
    # it gives a confidence of exactly 1 a bin of its own; this is the next smaller float32, in which it computes.
    probabilities = logits.softmax(1).clamp(max=1 - 2**-24)
    return float(multiclass_calibration_error(probabilities, labels, logits.shape[1], CALIBRATION_BINS, norm="l1"))

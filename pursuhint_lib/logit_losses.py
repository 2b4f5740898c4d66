"""Ways to match the teacher's logits: DKD, WSLD and DIST beside `losses.kd_loss`, and standardized logits for any.

All take (B, K) logits and give one scalar, in float32 as `losses.in_float32` says. A published weight belongs to the
normalization that the docstring states. To add one: a function here, a line in LOGIT_LOSSES, a test.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pursuhint_lib.losses import in_float32, kd_loss, unit_length


@in_float32
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: alpha * TCKD + beta * NCKD, both times T^2.

    TCKD is the KL divergence of (label, everything else), two probabilities; NCKD that of the other classes among
    themselves, renormalized. student_logits, teacher_logits: (B, K), labels: (B,) int64. Summed over classes, mean over
    the batch; zero when both give the same probabilities. With K = 2 there is one other class and NCKD is zero.
    Zhao et al. 2022 (arXiv 2203.08679), equation 7; by equation 6, beta = 1 - (the teacher's softened probability of
    the label) gives plain `kd_loss` back.

    Everything stays a log-probability here. The benchmark's code takes the logarithm of a probability, which is -inf
    once it underflows, and hides the label from NCKD by subtracting 1000 from its logit, which stops hiding it when
    logits are of that size.
    """
    student_binary, student_others = _split_off(student_logits / temperature, labels)
    teacher_binary, teacher_others = _split_off(teacher_logits / temperature, labels)
    target_term = kd_loss(student_binary, teacher_binary, 1.0)
    others_term = kd_loss(student_others, teacher_others, 1.0)
    return (alpha * target_term + beta * others_term) * temperature**2


def _split_off(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K), (B,) -> logits of (label, everything else) (B, 2), and of the other classes (B, K - 1)."""
    label = labels[:, None]
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, columns + (columns >= label))  # the columns from the label on move up by one
    return torch.cat([logits.gather(1, label), others.logsumexp(dim=1, keepdim=True)], dim=1), others


@in_float32
def wsld_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Weighted soft labels: cross entropy with the teacher's softened probabilities, weighted per image, times T^2.

    An image's weight is 1 - exp(-cls_student / cls_teacher), with both cross entropies at temperature 1: small where
    the student already knows the label better than the teacher. No gradient flows through the weight.
    student_logits, teacher_logits: (B, K), labels: (B,) int64. Summed over classes, mean over the batch.
    Zhou et al. 2021 (arXiv 2102.00650), as in the authors' code: a cross entropy and no divergence, so that it is not
    zero when student and teacher agree, though its gradient is.
    """
    with torch.no_grad():
        student_cls = F.cross_entropy(student_logits, labels, reduction="none")
        teacher_cls = F.cross_entropy(teacher_logits, labels, reduction="none")
        weight = -torch.expm1(-student_cls / (teacher_cls + 1e-7))  # (B,)
    targets = F.softmax(teacher_logits / temperature, dim=1)
    soft = F.cross_entropy(student_logits / temperature, targets, reduction="none")  # (B,)
    return (weight * soft).mean() * temperature**2


@in_float32
def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """DIST: beta * inter + gamma * intra, times T^2; one minus Pearson's correlation of softened probabilities.

    Inter correlates the classes of each image (mean over the B rows), intra the images of each class (mean over the K
    columns). student_logits, teacher_logits: (B, K). Zero when the student's probabilities are an increasing linear
    function of the teacher's, so a less certain student is not punished for that. Huang et al. 2022 (arXiv 2205.10536);
    the temperature is their tau.

    A row or column that is constant up to rounding has no correlation: it adds one, without a gradient. The authors'
    code adds 1e-8 to the product of the two norms instead, which also quiets classes that are merely rare in a batch.
    """
    student = F.softmax(student_logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits / temperature, dim=1)
    inter = 1 - (_deviations(student) * _deviations(teacher)).sum(dim=1).mean()
    intra = 1 - (_deviations(student.mT) * _deviations(teacher.mT)).sum(dim=1).mean()
    return (beta * inter + gamma * intra) * temperature**2


@in_float32
def standardize_logits(logits: Tensor) -> Tensor:
    """Each image's logits with mean 0 and standard deviation 1, for student and teacher before a loss on logits.

    (B, K) -> (B, K), in float32. The student then has to match the teacher's order and proportions, not its scale.
    Sun et al. 2024 (arXiv 2403.01427), with the sample deviation (K - 1) of the authors' code. Equal logits become
    zeros without a gradient; the authors' code divides them by 1e-7.
    """
    return _deviations(logits) * (logits.shape[1] - 1) ** 0.5


def _deviations(x: Tensor) -> Tensor:
    """Rows centered and of unit length; zero, without a gradient, for a row that is constant up to rounding."""
    rounding = 16 * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return unit_length(x - x.mean(dim=1, keepdim=True), dim=1, floor=rounding)


TWO_CLASSES = "standardized logits of two classes are -0.7 and 0.7 in one order or the other, so they teach nothing"


@dataclass(frozen=True)
class LogitLoss:
    """A way to match logits, with one face for all: called with student_logits, teacher_logits (B, K), labels (B,), T.

    published_weight: that of the method's authors or of the field's benchmark; None for kd and kd_std, whose weight
    every study names (`kd_weight`). warm_up: fraction of the training over which the weight rises from 0.
    standardized: see `standardize_logits`. Raises ValueError, one line, for logits of different classes, and where two
    classes are to be standardized.
    """

    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    published_weight: float | None = 1.0
    warm_up: float = 0.0
    standardized: bool = False

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        if student_logits.shape != teacher_logits.shape:
            classes = f"{student_logits.shape[1]} and {teacher_logits.shape[1]}"
            raise ValueError(f"student and teacher know {classes} classes, and must know the same")
        if self.standardized:
            if student_logits.shape[1] == 2:
                raise ValueError(TWO_CLASSES)
            student_logits, teacher_logits = standardize_logits(student_logits), standardize_logits(teacher_logits)
        return self.loss(student_logits, teacher_logits, labels, temperature)


def _kd(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return kd_loss(student_logits, teacher_logits, temperature)


def _dist(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return dist_loss(student_logits, teacher_logits, temperature)


_PLAIN = {
    "kd": LogitLoss(_kd, published_weight=None),
    "dkd": LogitLoss(dkd_loss, warm_up=20 / 240),
    "wsld": LogitLoss(wsld_loss, published_weight=2.5),
    "dist": LogitLoss(_dist),
}
LOGIT_LOSSES: dict[str, LogitLoss] = _PLAIN | {
    f"{name}_std": replace(loss, standardized=True) for name, loss in _PLAIN.items()
}

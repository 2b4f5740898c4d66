"""What a student is asked to match: pure functions, tensors in, one scalar out.

The three terms of the method's objective are named here as everywhere in the project: `cls` (labels), `kd` (the
teacher's logits) and `hint` (the teacher's inner layers); the authors' page writes them L_cls, L_logit and L_hint.
Every loss is computed in float32 (float64 when it is given float64), also under autocast and for bfloat16 features.
Other ways to match logits are in `logit_losses`, other hints in `hint_losses`.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a loss outside autocast, with half-precision inputs raised to float32."""

    def raised(x: Tensor | float) -> Tensor | float:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x

    @functools.wraps(loss)
    def run(*inputs: Tensor | float, **options: Tensor | float) -> Tensor:
        device = next(x.device for x in (*inputs, *options.values()) if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return loss(*map(raised, inputs), **{name: raised(x) for name, x in options.items()})

    return run


@in_float32
def cls_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with the labels, mean over the batch. logits: (B, K), labels: (B,) int64. In nats."""
    return F.cross_entropy(logits, labels)


@in_float32
def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation: KL divergence of the student's softened probabilities from the teacher's, times T^2.

    student_logits, teacher_logits: (B, K). Summed over classes, mean over the batch; zero when both give the same
    probabilities. T^2 keeps the gradient's size as T grows. Hinton et al. 2015 (arXiv 1503.02531), section 2.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@in_float32
def attention_map(feature: Tensor) -> Tensor:
    """Where a layer looks: channel mean of the squared feature, flattened, of unit length. (B, C, H, W) -> (B, H*W).

    An all-zero feature gives an all-zero map. Zagoruyko and Komodakis 2017 (arXiv 1612.03928), section 3.1, with p = 2.
    """
    return F.normalize(feature.square().mean(dim=1).flatten(1), dim=1)


@in_float32
def at_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Attention transfer: mean squared difference of the two attention maps.

    student_feature: (B, Cs, H, W), teacher_feature: (B, Ct, H, W); channel counts may differ, sizes must not.
    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), equation 2, but averaged over the H*W entries, as in the field's
    benchmark code, so that published weights can be used; the term is therefore at most 2 / (H*W).
    """
    return (attention_map(student_feature) - attention_map(teacher_feature)).square().mean()


@in_float32
def hint_mse(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """FitNet hint: mean squared error of two features of one shape (B, C, H, W), mean over all entries.

    Romero et al. 2015 (arXiv 1412.6550), equation 3, averaged rather than summed, without its factor 1/2.
    """
    return F.mse_loss(student_feature, teacher_feature)


def match_size(student_feature: Tensor, teacher_feature: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps to one size: the larger is averaged down to the smaller, in height and width separately.

    (B, Cs, Hs, Ws), (B, Ct, Ht, Wt) -> (B, Cs, H, W), (B, Ct, H, W) with H = min(Hs, Ht), W = min(Ws, Wt).
    """
    size = (
        min(student_feature.shape[2], teacher_feature.shape[2]),
        min(student_feature.shape[3], teacher_feature.shape[3]),
    )
    return _shrink(student_feature, size), _shrink(teacher_feature, size)


@in_float32
def _shrink(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


@in_float32
def unit_length(x: Tensor, dim: int, floor: Tensor | float = 0.0) -> Tensor:
    """x over its norm along `dim`, of x's shape; zero, and without a gradient, where the norm is not above `floor`.

    torch's normalize multiplies the gradient of a zero vector by 1e12, so that one dead channel or one silent image
    drowns all others. Vectors too short for their squares to be exact count as zero as well.
    """
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.where(norm > floor + torch.finfo(x.dtype).tiny ** 0.5, torch.inf)

"""Other ways to match a layer than `losses.at_loss` and `losses.hint_mse`: pure functions of features or embeddings.

Two features of one pair have the same size (see `losses.match_size`), and the same channels where the docstring has
one C: adapters are not made here. Each gives one scalar, in float32 as `losses.in_float32` says. A published weight
belongs to the normalization (sum or mean) that the docstring states. A loss that compares images with each other
depends on the batch size, and cannot be summed over parts of a batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pursuhint_lib.losses import attention_map, hint_mse, in_float32, unit_length

# Entry by entry


@in_float32
def vid_loss(prediction: Tensor, target: Tensor, raw_variance: Tensor) -> Tensor:
    """Variational information: how unlikely the target is under a Gaussian around the prediction; may be negative.

    Mean over all entries of ((prediction - target)^2 / v + ln v) / 2, where v = softplus(raw_variance) + 1e-5 is
    learned, one per channel. prediction, target: (B, C, H, W) or (B, C), raw_variance: (C,). Ahn et al. 2019
    (arXiv 1904.05835), without the constant ln(2 pi) / 2. torch's softplus cannot overflow as the benchmark's literal
    ln(1 + exp(.)) does.
    """
    variance = _per_channel(F.softplus(raw_variance) + 1e-5, target)
    return ((prediction - target).square() / variance + variance.log()).mean() / 2


@in_float32
def hcl_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Hierarchical context: mean squared error at several sizes, averaged with weights that halve from one to the next.

    Of the whole maps, and of both averaged to 4x4, 2x2 and 1x1, as far as that is smaller.
    student_feature, teacher_feature: (B, C, H, W); mean over all entries of each size. Chen et al. 2021
    (arXiv 2104.09044), as in the authors' code, which looks at the height only; here both sides must be larger.
    """
    side = min(student_feature.shape[2:])
    losses = [hint_mse(student_feature, teacher_feature)]
    for size in (4, 2, 1):
        if size < side:
            pooled = (F.adaptive_avg_pool2d(feature, size) for feature in (student_feature, teacher_feature))
            losses.append(hint_mse(*pooled))
    weights = [0.5**level for level in range(len(losses))]
    return sum(weight * loss for weight, loss in zip(weights, losses)) / sum(weights)


@in_float32
def ofd_loss(student_feature: Tensor, teacher_feature: Tensor, margin: Tensor) -> Tensor:
    """Overhaul: squared error to the teacher's feature cut off below at a negative margin, but for what both keep off.

    With t = max(teacher, margin), an entry counts (student - t)^2, and nothing where student <= t <= 0: the next ReLU
    hides such a difference. Both features: (B, C, H, W) before the activation; margin: (C,). Summed over an image's
    entries, mean over the batch. Heo et al. 2019 (arXiv 1904.01866), equations 2 and 4.
    """
    target = torch.maximum(teacher_feature, _per_channel(margin, teacher_feature))
    heard = (student_feature > target) | (target > 0)
    return (student_feature - target).square().where(heard, 0.0).flatten(1).sum(dim=1).mean()


@in_float32
def ab_loss(student_feature: Tensor, teacher_feature: Tensor, margin: float = 1.0) -> Tensor:
    """Activation boundaries: squared hinge that puts each entry on the teacher's side of zero, `margin` away from it.

    (margin - student)_+^2 where the teacher is positive, (margin + student)_+^2 elsewhere. Both features: (B, C, H, W)
    before the activation; only the teacher's signs matter. Summed over an image's entries, mean over the batch; the
    benchmark further multiplies by 3/1000. Heo et al. 2019 (arXiv 1811.03233), their differentiable alternative loss.
    """
    short = torch.where(teacher_feature > 0, margin - student_feature, margin + student_feature)
    return short.relu().square().flatten(1).sum(dim=1).mean()


def _per_channel(values: Tensor, feature: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1) beside a feature (B, C, H, W); (C,) beside (B, C)."""
    return values.reshape(-1, *[1] * (feature.ndim - 2))


# Where a layer looks


@in_float32
def ft_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Factor transfer: mean absolute difference of the two factors' attention maps (see `losses.attention_map`).

    student_factor: (B, Cs, H, W) from the translator, teacher_factor: (B, Ct, H, W) from the paraphraser. Mean over all
    entries. Kim et al. 2018 (arXiv 1802.04977) with the 1-norm, but as in the field's benchmark code, whose published
    weight is for maps: the paper normalizes the whole factor, channels included.
    """
    return (attention_map(student_factor) - attention_map(teacher_factor)).abs().mean()


@in_float32
def nst_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Neuron selectivity: squared maximum mean discrepancy of the channels' maps, each of unit length.

    With k(a, b) = <a, b>^2: mean k(s, s) + mean k(t, t) - 2 mean k(s, t), over all pairs of channels, mean over the
    batch. student_feature: (B, Cs, H, W), teacher_feature: (B, Ct, H, W). Zero when both have the same channels in any
    order and scale. Huang and Wang 2017 (arXiv 1707.01219), polynomial kernel of order 2. The inner products are
    batched matrix products of (B, Cs, Ct); the benchmark's code holds (B, Cs, Ct, H*W), with the same result.
    """
    student = unit_length(student_feature.flatten(2), dim=2)  # (B, Cs, H*W)
    teacher = unit_length(teacher_feature.flatten(2), dim=2)  # (B, Ct, H*W)
    return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT).square().mean()


# How the images of a batch relate to each other: (B, D), or (B, C, H, W) which is flattened


@in_float32
def sp_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Similarity preserving: mean squared difference of the two B x B tables of inner products, rows of unit length.

    student_feature: (B, ...), teacher_feature: (B, ...); only the batch must be the same. Mean over the B^2 entries.
    Zero when one is a rotation of the other, or a multiple. Tung and Mori 2019 (arXiv 1907.09682), as in the field's
    benchmark; torchdistill divides a row by the sum of its absolute values instead.
    """
    return (_inner_products(student_feature) - _inner_products(teacher_feature)).square().mean()


def _inner_products(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    return unit_length(flat @ flat.mT, dim=1)


@in_float32
def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Correlation congruence as the field's benchmark has it: neighbors in the batch should not be off together.

    With gap = |student - teacher|: sum over dimensions of gap_i * gap_(i+1), mean over the B - 1 neighbors; zero for
    one image. student_embedding, teacher_embedding: (B, D). It depends on the order of the batch, and is also zero when
    only every second image is matched. Peng et al. 2019 (arXiv 1904.01802) compare two B x B tables of kernel values
    instead (as torchdistill does); the published weight belongs to the form here.
    """
    gap = (student_embedding - teacher_embedding).abs()
    return (gap[:-1] * gap[1:]).sum() / max(len(gap) - 1, 1)


@in_float32
def rkd_distance_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Relational, distances: smooth L1 between the two tables of Euclidean distances, each over its mean.

    student_feature: (B, ...), teacher_feature: (B, ...). The mean distance is over pairs that differ, the loss over all
    B^2 entries, diagonal included (Park et al. 2019, arXiv 1904.05068, section 3.2.1, sum over pairs). Zero when one is
    a moved, rotated or scaled copy of the other. Distances come from differences: |a|^2 + |b|^2 - 2ab, the benchmark's
    way, loses small ones, and its floor of 1e-6 would count images that coincide as a pair that differs.
    """
    return F.smooth_l1_loss(_distances(student_feature), _distances(teacher_feature))


def _distances(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.where(mean > 0, 1.0)


@in_float32
def rkd_angle_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Relational, angles: smooth L1 between the cosines of the angles j-i-k of all triples of images.

    student_feature: (B, ...), teacher_feature: (B, ...). Mean over all B^3 triples, those with i = j or i = k (zero in
    both) and j = k included (Park et al. 2019, arXiv 1904.05068, section 3.2.2, sum over triples). Zero when one is a
    moved, rotated or scaled copy of the other. Needs several tables of B^3 and of B^2 * D numbers: at D = 256 in
    float32, 1 and 4 MiB each for 64 images, 512 and 256 MiB for 512.
    """
    return F.smooth_l1_loss(_angles(student_feature), _angles(teacher_feature))


def _angles(feature: Tensor) -> Tensor:
    flat = feature.flatten(1)
    directions = unit_length(flat[None] - flat[:, None], dim=2)  # (B, B, D), [i, j] from i to j
    return directions @ directions.mT  # (B, B, B)


@in_float32
def pkt_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Probabilistic transfer: KL divergence between the two tables of who is near whom in the batch.

    A row of a table holds (1 + cosine) / 2 to every image, itself included, over the row's sum.
    student_feature: (B, ...), teacher_feature: (B, ...). Mean over the B^2 entries of p_t ln((p_t + 1e-7) / (p_s +
    1e-7)), as in the authors' code, to which the published weight of 30000 belongs; Passalis and Tefas 2018
    (arXiv 1803.10837) sum, and leave the diagonal out. That code is NaN for opposite features whose cosine rounds to
    below -1.
    """
    student, teacher = _affinities(student_feature), _affinities(teacher_feature)
    return (teacher * ((teacher + 1e-7) / (student + 1e-7)).log()).mean()


def _affinities(feature: Tensor) -> Tensor:
    unit = unit_length(feature.flatten(1), dim=1)
    affinities = (1 + unit @ unit.mT).clamp(min=0)  # (B, B)
    return affinities / affinities.sum(dim=1, keepdim=True)


# One image against many others


@in_float32
def crd_scores(embedding: Tensor, others: Tensor, temperature: float = 0.07) -> Tensor:
    """How well embeddings match each of K given ones: inner products over the temperature.

    embedding: (B, D), others: (B, K, D), both with vectors of unit length -> (B, K).
    """
    return torch.einsum("bd,bkd->bk", embedding, others) / temperature


@in_float32
def crd_log_normalization(positive_scores: Tensor, negative_scores: Tensor, n_images: int) -> Tensor:
    """ln Z, with Z = n_images * mean of exp(score), which makes exp(score) / Z a probability over the images.

    positive_scores: (B,), negative_scores: (B, K) -> scalar. The field takes it from its first batch and keeps it.
    """
    scores = torch.cat([positive_scores, negative_scores.flatten()])
    return scores.logsumexp(dim=0) + math.log(n_images / len(scores))


@in_float32
def crd_loss(
    positive_scores: Tensor, negative_scores: Tensor, n_images: int, log_normalization: Tensor | float
) -> Tensor:
    """Contrastive representation: tell the teacher's embedding of the same image from those of K other images.

    -ln h(positive) - sum over K of ln(1 - h(negative)), mean over the batch, where h = p / (p + K / n_images) and
    p = exp(score - log_normalization). positive_scores: (B,), negative_scores: (B, K), from `crd_scores`. The method
    adds both directions: the student's embedding against the teacher's of all images, and the reverse.
    Tian et al. 2020 (arXiv 1910.10699), equations 17 and 18, with the normalization of the authors' code. As h is a
    sigmoid of the score, the exponentials are never formed and cannot overflow; the authors' 1e-7 in the denominators
    is not needed.
    """
    offset = log_normalization + math.log(negative_scores.shape[1] / n_images)
    right = F.logsigmoid(positive_scores - offset) + F.logsigmoid(offset - negative_scores).sum(dim=1)  # (B,)
    return -right.mean()

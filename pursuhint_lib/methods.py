"""Hint methods: a loss and, where channels must be matched, an adapter on the student's side.

One class per method, under a heading each; `HintMethod` says what all of them keep to. The formulas, and what the
published weights belong to, are with the losses. "The benchmark" is the field's common code for CIFAR-100.
To add a method: a loss in `hint_losses`, a class here, a line in METHODS, a test.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pursuhint_lib import parallel
from pursuhint_lib.data import Batch
from pursuhint_lib.hint_losses import (
    ab_loss,
    cc_loss,
    crd_log_normalization,
    crd_loss,
    crd_scores,
    ft_loss,
    hcl_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
    vid_loss,
)
from pursuhint_lib.losses import at_loss, hint_mse, in_float32, match_size, unit_length

Shape = tuple[int, int, int]  # channels, height, width


class HintMethod(nn.Module):
    """What a student layer is asked to take over from a teacher layer: an adapter and a loss for one pair.

    Built from the two shapes and `labels`, (N,) int64, of all training images, which only CRD looks at. Called with
    (B, Cs, Hs, Ws) of the student, (B, Ct, Ht, Wt) of the teacher and the batch that they belong to, it gives one
    scalar, unweighted, in float32. Any two shapes can be a pair: of two maps the larger is averaged down to the
    smaller (see `losses.match_size`), and methods that compare vectors take the spatial mean.

    Parameters are drawn from torch's global generator, are trained with the student, and are no part of the student
    that is saved. All else that changes from call to call is a buffer and changes in training mode only, so that a
    state_dict is enough to go on exactly. Neither network is touched.

    published_weight: per pair, of the benchmark (or of the method's authors); it belongs to the loss's normalization.
    joint: built for all pairs of a hint at once, as the pairs depend on each other; see `ReviewKD`, the only one.
    warm_up: part of the training during which the weight should rise linearly from 0.
    pre_stage: part of the training that comes before the main part; see `ActivationBoundaries`, `FactorTransfer`.
    any_form: takes tokens and vectors as well as maps.
    one_process: cannot be trained by several processes together, see `parallel`. Methods that relate the images of a
    batch to each other (sp, cc, rkd, pkt) then see each process's part of it only.
    """

    published_weight: float
    joint = False
    warm_up = 0.0
    pre_stage = 0.0
    any_form = False
    one_process = False

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__()


@in_float32
def _pooled(feature: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C), the spatial mean."""
    return feature.mean(dim=(2, 3))


@in_float32
def _mean_square(feature: Tensor) -> Tensor:
    """(B, C, H, W) -> (C,)."""
    return feature.square().mean(dim=(0, 2, 3))


def _pointwise(channels: int, out: int) -> nn.Sequential:
    """1x1 convolution and batch norm. Without an activation at the end, so that any target can be met."""
    return nn.Sequential(nn.Conv2d(channels, out, kernel_size=1, bias=False), nn.BatchNorm2d(out))


# ---- AT ----


class AttentionTransfer(HintMethod):
    """AT: the student should look where the teacher looks. No parameters. Silent where a map is 1x1."""

    published_weight = 1000.0

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        return at_loss(*match_size(student_feature, teacher_feature))


# ---- FitNet ----


class FitNet(HintMethod):
    """FitNet: a linear image of the student's feature should equal the teacher's feature.

    The regressor is a 1x1 convolution with batch norm. It ends without an activation, so that targets from before an
    activation can be met as well (the benchmark's code ends with a ReLU and can meet only positive ones).
    """

    published_weight = 100.0

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        self.regressor = _pointwise(student_shape[0], teacher_shape[0])

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student_feature, teacher_feature = match_size(student_feature, teacher_feature)
        return hint_mse(self.regressor(student_feature), teacher_feature)


# ---- VID ----


class VariationalInformation(HintMethod):
    """VID: the teacher's feature should be likely under a Gaussian around an image of the student's.

    The regressor is three 1x1 convolutions with ReLUs between them, started as He et al. 2015 start them. A variance
    per channel is learned. It starts at the mean square of the teacher's channel in the first batch, which is what a
    regressor that knows nothing leaves. (The benchmark starts at 5. Where features are smaller, the hint then grows far
    louder as the variance falls to their scale, and with a weight that was balanced at the first steps the training
    diverges.)
    """

    published_weight = 1.0

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        channels = teacher_shape[0]
        self.regressor = nn.Sequential(
            nn.Conv2d(student_shape[0], channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
        )
        for convolution in self.regressor[::2]:
            # As loud at the end as at the beginning (He et al. 2015). As torch starts them, three such layers leave a
            # tenth of the gradient: a weight that is balanced then is far too large once the regressor has learned.
            nn.init.kaiming_normal_(convolution.weight)
        self.raw_variance = nn.Parameter(torch.zeros(channels))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student_feature, teacher_feature = match_size(student_feature, teacher_feature)
        if self.training and not self.started:
            self._start(teacher_feature)
        return vid_loss(self.regressor(student_feature), teacher_feature, self.raw_variance)

    @torch.no_grad()
    def _start(self, feature: Tensor) -> None:
        variance = parallel.batch_mean(_mean_square(feature))
        variance = variance.clamp(min=1e-4)  # a dead channel has to start somewhere
        self.raw_variance.copy_(variance + (-torch.expm1(-variance)).log())  # softplus gives the variance back
        self.started.fill_(True)


# ---- SP ----


class SimilarityPreserving(HintMethod):
    """SP: images that are alike for the teacher should be alike for the student. No parameters; maps as they are."""

    published_weight = 3000.0
    any_form = True

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        return sp_loss(student_feature, teacher_feature)


# ---- CC ----


class CorrelationCongruence(HintMethod):
    """CC: learned embeddings of both, 128 numbers each, should not be apart for two neighbors in the batch."""

    published_weight = 0.02

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        self.student_embedding = nn.Linear(student_shape[0], 128)
        self.teacher_embedding = nn.Linear(teacher_shape[0], 128)

    @in_float32
    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student, teacher = _pooled(student_feature), _pooled(teacher_feature)
        return cc_loss(self.student_embedding(student), self.teacher_embedding(teacher))


# ---- RKD ----


class RelationalKnowledge(HintMethod):
    """RKD: distances and angles between the images of a batch. No parameters."""

    published_weight = 1.0  # of the sum, which has the benchmark's own weights

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student, teacher = _pooled(student_feature), _pooled(teacher_feature)
        return 25 * rkd_distance_loss(student, teacher) + 50 * rkd_angle_loss(student, teacher)


# ---- PKT ----


class ProbabilisticTransfer(HintMethod):
    """PKT: who is near whom in the batch, as probabilities. No parameters."""

    published_weight = 30000.0

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        return pkt_loss(_pooled(student_feature), _pooled(teacher_feature))


# ---- NST ----


class NeuronSelectivity(HintMethod):
    """NST: the student's channels should look where the teacher's do, in any order. No parameters. Silent where a map
    is 1x1: only the sign of a channel would be left, and its square is 1.
    """

    published_weight = 50.0

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        return nst_loss(*match_size(student_feature, teacher_feature))


# ---- CRD ----


class ContrastiveRepresentation(HintMethod):
    """CRD: the student's embedding should match the teacher's of the same image rather than of images of other classes.

    Both embeddings (linear, 128 numbers, unit length) are learned. Two banks, (N, 128), remember those of all training
    images: after each batch, its rows move half way to the new embeddings and are brought back to unit length. Each
    embedding is scored against the other network's bank, at the same image and at K negatives, drawn anew for each
    image and step, with repetition: K = 16384, or the images outside the largest class if these are fewer. The
    normalization of each direction is taken from the first batch and kept. The loss is the sum of both.

    Negatives depend on `seed`, which is drawn with the parameters, and on `step`, the number of batches seen.
    `batch.index` must be rows of the set that `labels` belongs to. Memory: 1 KiB per training
    image, also in a state_dict. Raises ValueError if all labels are the same: there are no negatives then.
    """

    published_weight = 0.8
    one_process = True  # a bank would have to learn of all processes' images, in the order of one
    temperature = 0.07
    momentum = 0.5

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError(
                f"crd needs images of other classes as negatives: all {len(labels)} images are of one class"
            )
        self.n_images, self.n_negatives = len(labels), min(16384, len(labels) - int(sizes.max()))
        self.student_embedding = nn.Linear(student_shape[0], 128)
        self.teacher_embedding = nn.Linear(teacher_shape[0], 128)
        self.register_buffer("student_bank", unit_length(torch.randn(len(labels), 128), dim=1))
        self.register_buffer("teacher_bank", unit_length(torch.randn(len(labels), 128), dim=1))
        self.register_buffer("log_normalization", torch.zeros(2))  # the student's direction, the teacher's
        self.register_buffer("seed", torch.randint(2**62, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # Images in the order of their classes, and where in it the class of each image begins and how long it is, (N,)
        # each. They follow from the labels, so that a state_dict need not hold them.
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("class_begin", (sizes.cumsum(0) - sizes)[classes], persistent=False)
        self.register_buffer("class_size", sizes[classes], persistent=False)

    @in_float32
    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student = unit_length(self.student_embedding(_pooled(student_feature)), dim=1)
        teacher = unit_length(self.teacher_embedding(_pooled(teacher_feature)), dim=1)
        negatives = self.draw_negatives(batch.index)
        loss = self._one_way(0, student, self.teacher_bank, batch.index, negatives)
        loss = loss + self._one_way(1, teacher, self.student_bank, batch.index, negatives)
        if self.training:
            self._remember(self.student_bank, batch.index, student)
            self._remember(self.teacher_bank, batch.index, teacher)
            self.step += 1
        return loss

    def _one_way(self, way: int, embedding: Tensor, bank: Tensor, index: Tensor, negatives: Tensor) -> Tensor:
        right = scores_of_rows(embedding, bank, index[:, None], self.temperature)[:, 0]  # (B,)
        wrong = scores_of_rows(embedding, bank, negatives, self.temperature)  # (B, K)
        log_z = self.log_normalization[way]
        if int(self.step) == 0:
            log_z = crd_log_normalization(right.detach(), wrong.detach(), self.n_images)
            if self.training:
                self.log_normalization[way] = log_z
        return crd_loss(right, wrong, self.n_images, log_z)

    def draw_negatives(self, index: Tensor) -> Tensor:
        """Rows of the training set, each row of `index`, (B,), with K of other classes: (B, K). Equally likely, and the
        same at every call until the next step.
        """
        # As in `data.Batches`: SeedSequence gives unrelated streams for neighboring seeds and steps.
        entropy = np.random.SeedSequence(torch.stack([self.seed, self.step]).tolist())
        generator = torch.Generator(index.device).manual_seed(int(entropy.generate_state(1)[0]))
        begin, size = self.class_begin[index, None], self.class_size[index, None]  # (B, 1)
        shape = (len(index), self.n_negatives)
        # Far more numbers than images: none is favored by the remainder to a degree that could be seen.
        place = torch.randint(2**62, shape, generator=generator, device=index.device) % (self.n_images - size)
        return self.by_class[place + size * (place >= begin)]  # over the anchor's own class

    @torch.no_grad()
    def _remember(self, bank: Tensor, index: Tensor, embedding: Tensor) -> None:
        bank[index] = unit_length(self.momentum * bank[index] + (1 - self.momentum) * embedding, dim=1)


def scores_of_rows(embedding: Tensor, bank: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """`crd_scores` of embeddings, (B, D), against rows, (B, K), of a bank, (N, D): (B, K).

    By way of the scores against the whole bank where this needs less memory than K rows for each of B embeddings. The
    bank is copied for that, as it changes before the backward pass.
    """
    (n_images, dimensions), (n, k) = bank.shape, rows.shape
    if n_images * (n + dimensions) < n * k * dimensions:
        return (embedding @ bank.clone().mT / temperature).gather(1, rows)
    return crd_scores(embedding, bank[rows], temperature)


# ---- OFD ----


class Overhaul(HintMethod):
    """OFD: an image of the student's feature should equal the teacher's, as far as the next ReLU lets it be seen.

    The connector is a 1x1 convolution with batch norm. The margin of a channel, below which the teacher's responses
    are not told apart, is the mean of all its negative responses seen so far, in the size that is compared; 0 while
    there were none. (The published margin follows from the batch norm before the activation, which not every network
    has.) Meant for features before the activation. After a ReLU the margin is 0, and a student that is negative where
    the teacher is silent is still not corrected.
    """

    published_weight = 1e-3

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        channels = teacher_shape[0]
        self.connector = _pointwise(student_shape[0], channels)
        self.register_buffer("negative_sum", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("negative_count", torch.zeros(channels, dtype=torch.float64))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student_feature, teacher_feature = match_size(student_feature, teacher_feature)
        if self.training:
            self._count(teacher_feature)
        return ofd_loss(self.connector(student_feature), teacher_feature, self.margin())

    def margin(self) -> Tensor:
        """(C,), float32, not positive."""
        return (self.negative_sum / self.negative_count.clamp(min=1)).float()

    @torch.no_grad()
    def _count(self, feature: Tensor) -> None:
        self.negative_sum += parallel.batch_sum(feature.float().clamp(max=0).sum(dim=(2, 3)).double().sum(dim=0))
        self.negative_count += parallel.batch_sum((feature < 0).sum(dim=(0, 2, 3)))


# ---- ReviewKD ----


class ReviewKD(HintMethod):
    """ReviewKD: what the student knows at a level, together with all deeper ones, should equal the teacher's level.

    Built for all pairs of a hint, in the order of depth, shallowest first, with one shape per pair of each network;
    called with as many features, it gives one scalar per pair, in that order. From the deepest pair up, a student's
    feature is brought to one width for all, mixed with what came from the next deeper pair, and brought to the
    teacher's channels. The publication has the pooled vector as one more level, the deepest; here the
    levels are the pairs.
    """

    published_weight = 1.0  # the authors' are 0.6 to 8, by networks
    joint = True
    warm_up = 20 / 240

    def __init__(self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], labels: Tensor):
        super().__init__(student_shapes, teacher_shapes, labels)
        width = min(512, teacher_shapes[-1][0])
        self.entries = nn.ModuleList(_pointwise(shape[0], width) for shape in student_shapes)
        self.mixers = nn.ModuleList(nn.Conv2d(2 * width, 2, kernel_size=1) for _ in student_shapes[:-1])
        self.exits = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, shape[0], kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(shape[0]))
            for shape in teacher_shapes
        )

    def forward(
        self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], batch: Batch
    ) -> list[Tensor]:
        terms, mixed = [], None
        for level in reversed(range(len(self.entries))):
            own = self.entries[level](student_features[level])
            mixed = own if mixed is None else self._mix(level, own, mixed)
            terms.append(hcl_loss(*match_size(self.exits[level](mixed), teacher_features[level])))
        return terms[::-1]

    def _mix(self, level: int, own: Tensor, deeper: Tensor) -> Tensor:
        """Sum of the two, both of one width, with weights from 0 to 1 for each place. `own` sets the size."""
        deeper = F.interpolate(deeper, size=own.shape[2:], mode="nearest")
        weights = self.mixers[level](torch.cat([own, deeper], dim=1)).sigmoid()  # (B, 2, H, W)
        return own * weights[:, :1] + deeper * weights[:, 1:]


# ---- AB ----


class ActivationBoundaries(HintMethod):
    """AB: an image of the student's feature should be on the same side of zero as the teacher's, entry by entry.

    The connector is a 1x1 convolution with batch norm. In the pre-stage the student learns from this hint alone, and
    afterwards from everything else. Meant for features before the activation. A ReLU leaves the teacher's sides of zero
    as they are, and takes from the student what the connector could have read from negative entries.
    """

    published_weight = 0.003
    pre_stage = 30 / 240

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        self.connector = _pointwise(student_shape[0], teacher_shape[0])

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        student_feature, teacher_feature = match_size(student_feature, teacher_feature)
        return ab_loss(self.connector(student_feature), teacher_feature)


# ---- FT ----


class FactorTransfer(HintMethod):
    """FT: a translation of the student's feature should look where a summary of the teacher's feature looks.

    The summary is the middle of an autoencoder, the paraphraser, with half the teacher's channels. It learns in the
    pre-stage, by `prepare`, while the student has no hint; afterwards it is frozen and the translator learns with the
    student. Both are 3x3 convolutions with batch norm and leaky ReLU. Silent where a map is 1x1.
    """

    published_weight = 200.0
    pre_stage = 30 / 240

    def __init__(self, student_shape: Shape, teacher_shape: Shape, labels: Tensor):
        super().__init__(student_shape, teacher_shape, labels)
        student, teacher = student_shape[0], teacher_shape[0]
        factors = max(1, teacher // 2)
        encoder = _convolutions(teacher, teacher, factors, factors)
        self.paraphraser = nn.ModuleDict({"encoder": encoder, "decoder": _decoder(factors, teacher)})
        self.translator = _convolutions(student, student, factors, factors)

    def prepare(self, teacher_feature: Tensor) -> Tensor:
        """(B, Ct, Ht, Wt) -> scalar, mean squared error of the feature's reconstruction. For the paraphraser alone."""
        self.paraphraser.train().requires_grad_(True)
        target = teacher_feature.detach()
        return hint_mse(self.paraphraser["decoder"](self.paraphraser["encoder"](target)), target)

    def forward(self, student_feature: Tensor, teacher_feature: Tensor, batch: Batch) -> Tensor:
        # Frozen is more than without a gradient: an optimizer that saw parameters that need one would decay them.
        self.paraphraser.eval().requires_grad_(False)
        with torch.no_grad():
            teacher_factor = self.paraphraser["encoder"](teacher_feature)
        return ft_loss(*match_size(self.translator(student_feature), teacher_factor))


def _convolutions(*channels: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, each with batch norm and leaky ReLU."""
    layers = []
    for before, after in pairwise(channels):
        layers += [
            nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.1),
        ]
    return nn.Sequential(*layers)


def _decoder(factors: int, channels: int) -> nn.Sequential:
    """The way back. The last convolution is bare, so that any feature can be met."""
    return nn.Sequential(
        *_convolutions(factors, factors, channels), nn.Conv2d(channels, channels, kernel_size=3, padding=1)
    )


METHODS: dict[str, type[HintMethod]] = {
    "at": AttentionTransfer,
    "fitnet": FitNet,
    "vid": VariationalInformation,
    "sp": SimilarityPreserving,
    "cc": CorrelationCongruence,
    "rkd": RelationalKnowledge,
    "pkt": ProbabilisticTransfer,
    "nst": NeuronSelectivity,
    "crd": ContrastiveRepresentation,
    "ofd": Overhaul,
    "reviewkd": ReviewKD,
    "ab": ActivationBoundaries,
    "ft": FactorTransfer,
}

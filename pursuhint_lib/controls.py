"""Teachers whose hints carry less: of random weights, or of another image.

Two controls ask what a hint is worth apart from being a hint. An "untrained" hint comes from the same network with
random weights: what it gives is the architecture's doing, not learned. A "shuffled" hint is the trained teacher's,
but of another image: its scale and statistics are right and its content is wrong. In both, the logits are the
trained teacher's and those of the image itself, so that an arm differs from its twin in the hints alone.
"""

import itertools
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from pursuhint_lib.features import FrozenTeacher, Observation
from pursuhint_lib.hints import SOURCES, HintPair
from pursuhint_lib.learners import feature_key, seeded
from pursuhint_lib.params import DistillStudents, ProfileLayers
from pursuhint_lib.study import StudyImages, fresh_network, training_batches

UNTRAINED_SEED = 2**31  # parameter files end below it: no student or teacher of a study started from these weights
BATCH_NORM_BATCHES, BATCH_NORM_BATCH_SIZE = 8, 64


class ControlTeacher(nn.Module):
    """A teacher of three voices, with the face of a FrozenTeacher.

    `observe` is asked by the keys of `learners.feature_key`: "stage1.0" is the trained teacher's feature,
    "untrained/stage1.0" that of the network with random weights, "shuffled/stage1.0" the trained teacher's of another
    image of the batch (that of image i is taken from image i - 1, of the first from the last; of a batch of one it
    would be the same image). The logits are always the trained teacher's. Both networks are frozen, as FrozenTeacher
    says, and follow `to(device)`; `model` is the trained one.

    Raises ValueError where the two teachers capture different layers.
    """

    def __init__(self, teacher: FrozenTeacher, untrained: FrozenTeacher) -> None:
        super().__init__()
        if teacher.layers != untrained.layers:
            raise ValueError(
                f"the untrained teacher captures {', '.join(untrained.layers)} and the trained one "
                f"{', '.join(teacher.layers)}: both must capture the same layers"
            )
        self.teacher, self.untrained = teacher, untrained
        self.training = False
        self._asked = {
            feature_key(HintPair(layer, "", source)): (source, layer) for source in SOURCES for layer in teacher.layers
        }

    @property
    def model(self) -> nn.Module:
        """The trained network."""
        return self.teacher.model

    @property
    def layers(self) -> list[str]:
        """The keys that `observe` can be asked for."""
        return list(self._asked)

    def observe(self, images: Tensor, layers: Sequence[str] | None = None) -> Observation:
        """The trained teacher's logits of images (B, C, H, W), and key -> feature for the keys `layers` (None: all).

        Each network runs at most once, the untrained one only when a key asks for it. Keys come by source, and within
        it in execution order. Raises what `FrozenTeacher.observe` raises.
        """
        asked = {self._asked.get(key, ("trained", key)): key for key in (self.layers if layers is None else layers)}
        trained, untrained, shuffled = (
            [layer for of, layer in asked if of == source] for source in ("trained", "untrained", "shuffled")
        )
        seen = self.teacher.observe(images, list(dict.fromkeys(trained + shuffled)))
        features = {("trained", layer): feature for layer, feature in seen.features.items()}
        if untrained:
            unlearned = self.untrained.observe(images, untrained)
            features |= {("untrained", layer): feature for layer, feature in unlearned.features.items()}
        for layer in (layer for layer in seen.features if layer in shuffled):
            features["shuffled", layer] = seen.features[layer].roll(1, dims=0)
        return Observation(seen.output, {asked[of]: feature for of, feature in features.items() if of in asked})

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher stays in eval mode."""
        return self


def control_teacher(
    trained: nn.Module, layers: Sequence[str], params: DistillStudents, images: StudyImages
) -> ControlTeacher:
    """The teacher of a study with control arms: `trained`, and beside it the `untrained_network` of the study."""
    return ControlTeacher(FrozenTeacher(trained, layers), FrozenTeacher(untrained_network(params, images), layers))


def untrained_network(params: ProfileLayers | DistillStudents, images: StudyImages) -> nn.Module:
    """The study's kind of teacher with random weights and measured batch-norm statistics, in eval mode on the CPU.

    The weights are drawn from UNTRAINED_SEED alone. Left as they are initialized, the batch-norm statistics (0 and 1)
    would normalize nothing in eval mode: residual sums then grow with depth, in a resnet110 to a root mean square of
    10^5 instead of about 4. AT would not notice, as it normalizes; a FitNet target of such a size no
    regressor reaches, and the arm would fail for its scale and not for its ignorance. So the statistics are measured on
    BATCH_NORM_BATCHES augmented training batches, as a trained network measured its own. That uses means and variances
    of images, but no label. Networks without batch norm stay as they are initialized.

    All is done on the CPU in float32, whatever the study computes on: the same study has the same network.
    """
    network = fresh_network(params.teacher, images, UNTRAINED_SEED)
    batches = training_batches(params, images, BATCH_NORM_BATCH_SIZE, UNTRAINED_SEED, torch.device("cpu"))
    few = itertools.islice(batches.epoch(0), BATCH_NORM_BATCHES)
    with seeded(UNTRAINED_SEED):  # dropout, where there is any, draws as well
        update_bn((batch.images for batch in few), network)
    return network.eval()

"""Students that learn: one contract for everything that can be trained.

A learner turns a batch (and what the teacher saw of it) into named loss terms: ``learner.losses(batch, observation)``
returns ``loss`` (what is minimized), ``logits`` (B, K), and each unweighted term under its name (``cls``, ``kd``,
``hint``). The training loop knows nothing else of a method.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.data import Batch
from pursuhint_lib.features import FeatureExtractor, Observation
from pursuhint_lib.hints import HintPair
from pursuhint_lib.losses import cls_loss, kd_loss
from pursuhint_lib.methods import METHODS, Shape


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers (initial weights) from `seed` inside the block; the global generator is as before after
    it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Supervised(nn.Module):
    """A network that learns from labels alone: the teacher in its youth, or a student without one."""

    teacher_layers: tuple[str, ...] = ()
    needs_teacher = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def losses(self, batch: Batch, observation: Observation | None) -> dict[str, Tensor]:
        """`observation` is not looked at."""
        logits = self.model(batch.images)
        cls = cls_loss(logits, batch.labels)
        return {"loss": cls, "logits": logits, "cls": cls}


def feature_key(pair: HintPair) -> str:
    """Under which name an observation holds the feature that teaches this pair: the teacher layer's own, behind its
    source ("untrained/stage1.0") where that is not the trained teacher.
    """
    return pair.teacher_layer if pair.source == "trained" else f"{pair.source}/{pair.teacher_layer}"


@dataclass(frozen=True)
class Hint:
    """One hint method on its pairs of layers. `weight` multiplies the sum over the pairs that teach.

    redrawn: 0 lets all pairs teach at every step. M > 0 draws anew at every step: the pairs are then every layer of a
    pool with each of M student layers, pool layer major; M layers of the pool are drawn, and the i-th of them in the
    pool's order teaches the i-th student layer. Raises ValueError for pairs that cannot be this.
    """

    method: str
    pairs: Sequence[HintPair]
    weight: float
    redrawn: int = 0

    def __post_init__(self) -> None:
        if self.redrawn and (len(self.pairs) % self.redrawn or len(self.pairs) < self.redrawn**2):
            raise ValueError(
                f"hint {self.method!r}: {len(self.pairs)} pairs are not {self.redrawn} student layers with each layer "
                f"of a pool of {self.redrawn} or more"
            )


class Distilled(nn.Module):
    """A student that learns from labels, from the teacher's logits and from hints.

    loss = ce_weight * cls + kd_weight * kd + sum over the pairs that teach of weight * hint.

    Adapters are built from the two layer tables (columns layer, channels, height, width), seeded by `seed`, live in
    `self.adapters` and train with the student `self.model`, which alone is saved. `hint_weights` holds one weight per
    pair and is part of the state, so that balanced weights (see `balance_hints`) survive an interruption.

    Where a hint is redrawn, every candidate pair has an adapter, and which pairs teach depends on (seed, `step`) alone.
    `step` counts the calls of `losses` and is part of the state, too; without such a hint it is None. A resting adapter
    has a gradient of zero: it takes its step of momentum and weight decay as if its term had weight 0.

    `teacher_layers` names the features that `losses` needs of the observation, see `feature_key`.

    Raises ValueError for an unknown method or for a pair whose layer is in neither table.
    """

    needs_teacher = True
    hint_weights: Tensor
    step: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        ce_weight: float,
        kd_weight: float,
        temperature: float,
        hints: Sequence[Hint] = (),
        teacher_table: pd.DataFrame | None = None,
        student_table: pd.DataFrame | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.ce_weight, self.kd_weight, self.temperature = ce_weight, kd_weight, temperature
        self.hints, self.seed = list(hints), seed
        self.pairs = [pair for hint in hints for pair in hint.pairs]
        self.n_teaching = sum(hint.redrawn or len(hint.pairs) for hint in hints)  # pairs that teach at one step
        self.teacher_layers = tuple(dict.fromkeys(map(feature_key, self.pairs)))
        with seeded(seed):
            self.adapters = nn.ModuleList(
                _method(hint.method)(
                    _shape(student_table, pair.student_layer), _shape(teacher_table, pair.teacher_layer)
                )
                for hint in hints
                for pair in hint.pairs
            )
        weights = list(chain.from_iterable([hint.weight] * len(hint.pairs) for hint in hints))
        self.register_buffer("hint_weights", torch.tensor(weights, dtype=torch.float32))
        redrawn = any(hint.redrawn for hint in hints)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64) if redrawn else None)
        student_layers = list(dict.fromkeys(pair.student_layer for pair in self.pairs))
        self._extract = FeatureExtractor(model, student_layers).__enter__() if student_layers else None

    def losses(self, batch: Batch, observation: Observation) -> dict[str, Tensor]:
        """The terms of one batch. `hint` is the mean of the unweighted terms of the pairs that teach, `hint_part` the
        weighted sum.
        """
        teaching = self._draw()
        logits, cls, kd, hints = self._terms(batch, observation, teaching)
        loss = self.ce_weight * cls + self.kd_weight * kd
        terms = {"logits": logits, "cls": cls, "kd": kd}
        if hints:
            hint_terms = torch.stack(hints)  # (pairs that teach,)
            hint_part = (torch.stack([self.hint_weights[i] for i in teaching]) * hint_terms).sum()
            loss = loss + hint_part
            resting = [p for i, adapter in enumerate(self.adapters) if i not in teaching for p in adapter.parameters()]
            if resting:
                # A gradient of zero: the optimizer would pass over parameters that have none, and its fused step fails
                # where some parameters have their momentum already and others not yet.
                loss = loss + 0.0 * nn.utils.parameters_to_vector(resting).sum()
            terms |= {"hint": hint_terms.mean(), "hint_part": hint_part}
        return {"loss": loss} | terms

    def _draw(self) -> list[int]:
        """Numbers of the pairs that teach at this step, and on to the next step."""
        if self.step is None:
            return list(range(len(self.pairs)))
        # As in `data.Batches`: SeedSequence gives unrelated streams for neighboring seeds and steps.
        entropy = np.random.SeedSequence([self.seed, int(self.step), *b"redrawn"])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        self.step += 1
        teaching, first = [], 0
        for hint in self.hints:
            if hint.redrawn:
                pool = len(hint.pairs) // hint.redrawn
                layers = torch.randperm(pool, generator=generator)[: hint.redrawn].sort().values.tolist()
                teaching += [first + layer * hint.redrawn + point for point, layer in enumerate(layers)]
            else:
                teaching += range(first, first + len(hint.pairs))
            first += len(hint.pairs)
        return teaching

    def _terms(
        self, batch: Batch, observation: Observation, teaching: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """logits, cls, kd, and the unweighted hint terms of the pairs with these numbers."""
        logits, features = self._extract(batch.images) if self._extract else (self.model(batch.images), {})
        cls = cls_loss(logits, batch.labels)
        kd = kd_loss(logits, observation.logits, self.temperature)
        hints = [
            self.adapters[i](features[self.pairs[i].student_layer], observation.features[feature_key(self.pairs[i])])
            for i in teaching
        ]
        return logits, cls, kd, hints

    def close(self) -> None:
        """Take the hooks off the student. The learner cannot be trained after that."""
        if self._extract:
            self._extract.close()


def balance_hints(
    learner: Distilled, batches: Sequence[Batch], observations: Sequence[Observation], share: float
) -> Tensor:
    """Set `learner.hint_weights` so that every pair starts with the same share of the gradient. Returns the weights
    (pairs,).

    The gradient of the weighted terms cls and kd, and that of each pair's hint, are taken with respect to the student's
    parameters on the given batches before any step; with root-mean-square norms g and h_j over the batches,
    weight_j = share / (number of pairs that teach at one step) * g / h_j. Without this, a mean-reduced loss weighs an
    8x8 map 16 times a 32x32 one, and where a hint is taken could not be told from how loudly it is heard. Redrawn hints
    are weighed for all candidate pairs, and nothing is drawn. The learner's weights, batch-norm statistics and step are
    left as they were.

    Raises ValueError when a hint has no gradient (it would be silent for ever).
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    base_square, hint_squares = 0.0, [0.0] * len(learner.pairs)
    learner.train()
    for batch, observation in zip(batches, observations, strict=True):
        _, cls, kd, hints = learner._terms(batch, observation, range(len(learner.pairs)))
        base_square += _square_norm(learner.ce_weight * cls + learner.kd_weight * kd, parameters)
        hint_squares = [total + _square_norm(hint, parameters) for total, hint in zip(hint_squares, hints, strict=True)]
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])
    for pair, square in zip(learner.pairs, hint_squares, strict=True):
        if not square > 0:
            raise ValueError(f"the hint {_shown(pair)} gives the student no gradient")
    weights = [share / learner.n_teaching * (base_square / square) ** 0.5 for square in hint_squares]
    learner.hint_weights.copy_(torch.tensor(weights))
    return learner.hint_weights


def gradient_norms(learner: Distilled, batch: Batch, observation: Observation) -> dict[str, float]:
    """How loudly each weighted term is heard: the norm of its gradient with respect to the student's parameters.

    Keys: cls, kd, and one per pair, "teacher layer -> student layer", the teacher's by its `feature_key`; of redrawn
    hints all candidate pairs, each as loud as it is when drawn. Batch-norm statistics and step are left as they were.
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    learner.train()
    _, cls, kd, hints = learner._terms(batch, observation, range(len(learner.pairs)))
    terms = {"cls": learner.ce_weight * cls, "kd": learner.kd_weight * kd}
    for weight, hint, pair in zip(learner.hint_weights, hints, learner.pairs, strict=True):
        terms[_shown(pair)] = weight * hint
    norms = {name: _square_norm(term, parameters) ** 0.5 for name, term in terms.items()}
    for name, buffer in learner.named_buffers():  # after the last backward pass, which still needs them
        buffer.copy_(buffers[name])
    return norms


def _shown(pair: HintPair) -> str:
    return f"{feature_key(pair)} -> {pair.student_layer}"


def _square_norm(term: Tensor, parameters: list[nn.Parameter]) -> float:
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in gradients if g is not None)


def _method(name: str) -> type[nn.Module]:
    if name not in METHODS:
        raise ValueError(f"unknown hint method {name!r} (allowed: {', '.join(METHODS)})")
    return METHODS[name]


def _shape(table: pd.DataFrame | None, layer: str) -> Shape:
    rows = table[table["layer"] == layer] if table is not None else ()
    if len(rows) != 1:
        raise ValueError(f"layer {layer!r} is not in the layer table")
    row = rows.iloc[0]
    return int(row["channels"]), int(row["height"]), int(row["width"])

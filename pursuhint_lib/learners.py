"""Students that learn: one contract for everything that can be trained.

A learner turns a batch (and what the teacher saw of it) into named loss terms: ``learner.losses(batch, observation)``
returns ``loss`` (what is minimized), ``logits`` (B, K), and each unweighted term under its name (``cls``, ``kd``, ``hint``).
The training loop knows nothing else of a method.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

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


@dataclass(frozen=True)
class Hint:
    """One hint method on its pairs of layers. `weight` multiplies the sum over the pairs."""

    method: str
    pairs: Sequence[HintPair]
    weight: float


class Distilled(nn.Module):
    """A student that learns from labels, from the teacher's logits and from hints.

    loss = ce_weight * cls + kd_weight * kd + sum over pairs of weight * hint.

    Adapters are built from the two layer tables (columns layer, channels, height, width), seeded by `seed`, live in
    `self.adapters` and train with the student `self.model`, which alone is saved. `hint_weights` holds one weight per
    pair and is part of the state, so that balanced weights (see `balance_hints`) survive an interruption.

    Raises ValueError for an unknown method or for a pair whose layer is in neither table.
    """

    needs_teacher = True
    hint_weights: Tensor

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
        self.pairs = [pair for hint in hints for pair in hint.pairs]
        self.teacher_layers = tuple(dict.fromkeys(pair.teacher_layer for pair in self.pairs))
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
        student_layers = list(dict.fromkeys(pair.student_layer for pair in self.pairs))
        self._extract = FeatureExtractor(model, student_layers).__enter__() if student_layers else None

    def losses(self, batch: Batch, observation: Observation) -> dict[str, Tensor]:
        """The terms of one batch. `hint` is the mean of the unweighted terms of all pairs, `hint_part` the weighted
        sum.
        """
        logits, cls, kd, hints = self._terms(batch, observation)
        loss = self.ce_weight * cls + self.kd_weight * kd
        terms = {"logits": logits, "cls": cls, "kd": kd}
        if hints:
            hint_terms = torch.stack(hints)  # (pairs,)
            hint_part = (self.hint_weights * hint_terms).sum()
            loss = loss + hint_part
            terms |= {"hint": hint_terms.mean(), "hint_part": hint_part}
        return {"loss": loss} | terms

    def _terms(self, batch: Batch, observation: Observation) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        logits, features = self._extract(batch.images) if self._extract else (self.model(batch.images), {})
        cls = cls_loss(logits, batch.labels)
        kd = kd_loss(logits, observation.logits, self.temperature)
        hints = [
            adapter(features[pair.student_layer], observation.features[pair.teacher_layer])
            for adapter, pair in zip(self.adapters, self.pairs, strict=True)
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
    weight_j = share / (number of pairs) * g / h_j. Without this, a mean-reduced loss weighs an 8x8 map 16 times a 32x32
    one, and where a hint is taken could not be told from how loudly it is heard. The learner's weights and batch-norm
    statistics are left as they were.

    Raises ValueError when a hint has no gradient (it would be silent for ever).
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    base_square, hint_squares = 0.0, [0.0] * len(learner.pairs)
    learner.train()
    for batch, observation in zip(batches, observations, strict=True):
        _, cls, kd, hints = learner._terms(batch, observation)
        base_square += _square_norm(learner.ce_weight * cls + learner.kd_weight * kd, parameters)
        hint_squares = [total + _square_norm(hint, parameters) for total, hint in zip(hint_squares, hints, strict=True)]
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])
    for pair, square in zip(learner.pairs, hint_squares, strict=True):
        if not square > 0:
            raise ValueError(f"the hint {pair.teacher_layer} -> {pair.student_layer} gives the student no gradient")
    weights = [share / len(hint_squares) * (base_square / square) ** 0.5 for square in hint_squares]
    learner.hint_weights.copy_(torch.tensor(weights))
    return learner.hint_weights


def gradient_norms(learner: Distilled, batch: Batch, observation: Observation) -> dict[str, float]:
    """How loudly each weighted term is heard: the norm of its gradient with respect to the student's parameters.

    Keys: cls, kd, and one per pair, "teacher layer -> student layer". Batch-norm statistics are left as they were.
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    learner.train()
    _, cls, kd, hints = learner._terms(batch, observation)
    terms = {"cls": learner.ce_weight * cls, "kd": learner.kd_weight * kd}
    for weight, hint, pair in zip(learner.hint_weights, hints, learner.pairs, strict=True):
        terms[f"{pair.teacher_layer} -> {pair.student_layer}"] = weight * hint
    norms = {name: _square_norm(term, parameters) ** 0.5 for name, term in terms.items()}
    for name, buffer in learner.named_buffers():  # after the last backward pass, which still needs them
        buffer.copy_(buffers[name])
    return norms


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

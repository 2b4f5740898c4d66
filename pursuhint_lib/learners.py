"""Students that learn: one contract for everything that can be trained.

A learner turns a batch (and what the teacher saw of it) into named loss terms: ``learner.losses(batch, observation,
progress)`` returns ``loss`` (what is minimized), ``logits`` (B, K), each unweighted term under its name (``cls``, a
logit loss like ``kd``, a hint method like ``at``), and what it adds to the loss under ``weighted_<name>``. The training
loop knows nothing else of a method.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib import parallel
from pursuhint_lib.arithmetic import laid_out
from pursuhint_lib.data import Batch
from pursuhint_lib.features import FeatureExtractor, Observation
from pursuhint_lib.hints import HintPair
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.losses import cls_loss
from pursuhint_lib.methods import METHODS, HintMethod, Shape
from pursuhint_lib.reading import form, logits_of


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
    silent = ""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def losses(self, batch: Batch, observation: Observation | None, progress: float = 1.0) -> dict[str, Tensor]:
        """`observation` and `progress` are not looked at."""
        logits = logits_of(self.model(laid_out(batch.images, self.model)))
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
    pool's order teaches the i-th student layer. Raises ValueError for no pairs, pairs that cannot be
    this, and a `weight` or `redrawn` that is below 0 or not finite.
    """

    method: str
    pairs: Sequence[HintPair]
    weight: float
    redrawn: int = 0

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if not isinstance(pair, HintPair):
                raise TypeError(f"hint {self.method!r}: {pair!r} must be a HintPair(teacher_layer, student_layer)")
        if not self.pairs or not 0 <= self.weight < math.inf or self.redrawn < 0:
            raise ValueError(
                f"hint {self.method!r} needs one pair or more, a finite weight of 0 or more and redrawn of 0 or more, "
                f"not {len(self.pairs)}, {self.weight} and {self.redrawn}"
            )
        if self.redrawn and (len(self.pairs) % self.redrawn or len(self.pairs) < self.redrawn**2):
            raise ValueError(
                f"hint {self.method!r}: {len(self.pairs)} pairs are not {self.redrawn} student layers with each layer "
                f"of a pool of {self.redrawn} or more"
            )


ROUNDING = 1e-6  # a gradient whose norm is a smaller part of its own term is what rounding leaves of none


class SilentHint(ValueError):
    """A hint that gives the student no gradient: its arm would be a null result by construction."""


class Distilled(nn.Module):
    """A student that learns from labels, from the teacher's logits and from hints.

    loss = ce_weight * cls + logit_weight * logit_loss + sum over the pairs that teach of weight * hint.

    logit_loss: a key of `logit_losses.LOGIT_LOSSES`. labels: (N,) of all training images, for the methods that contrast
    an image with those of other classes; a batch's `index` are rows of it.

    Adapters are built from the two layer tables (columns layer, channels, height, width), seeded by `seed`, live in
    `self.adapters` and train with the student `self.model`, which alone is saved. `hint_weights` holds one weight per
    pair and is part of the state, so that balanced weights (see `balance_hints`) survive an interruption.

    Where a hint is redrawn, every candidate pair has an adapter, and which pairs teach depends on (seed, `step`) alone.
    `step` counts the calls of `losses` and is part of the state, too; without such a hint it is None.

    `teacher_layers` names the features that `losses` needs of the observation, see `feature_key`. `silent` says, if it
    is not empty, why this learner is not worth training (see `check_hints`).

    Raises ValueError for an unknown method or logit loss, a weight below 0, a temperature that is not above, one of
    these that is not finite, where nothing would teach, for a pair whose layer is in neither table, and for a redrawn
    hint of a method that joins all its pairs.
    """

    needs_teacher = True
    silent = ""
    hint_weights: Tensor
    step: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        ce_weight: float,
        logit_weight: float,
        temperature: float,
        logit_loss: str = "kd",
        hints: Sequence[Hint] = (),
        teacher_table: pd.DataFrame | None = None,
        student_table: pd.DataFrame | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if logit_loss not in LOGIT_LOSSES:
            raise ValueError(f"unknown logit loss {logit_loss!r} (allowed: {', '.join(LOGIT_LOSSES)})")
        if not (0 <= ce_weight < math.inf and 0 <= logit_weight < math.inf and 0 < temperature < math.inf):
            found = f"{ce_weight}, {logit_weight} and {temperature}"
            raise ValueError(
                f"ce_weight and logit_weight must be 0 or more, temperature above 0, all finite, not {found}"
            )
        if ce_weight == logit_weight == 0 and not hints:
            raise ValueError("ce_weight and logit_weight are 0 and there are no hints: nothing teaches")
        self.model = model
        self.ce_weight, self.logit_weight, self.temperature = ce_weight, logit_weight, temperature
        self.logit_loss, self.hints, self.seed = logit_loss, list(hints), seed
        self.pairs = [pair for hint in hints for pair in hint.pairs]
        self.methods = [hint.method for hint in hints for _ in hint.pairs]  # of each pair
        self.teacher_layers = tuple(dict.fromkeys(map(feature_key, self.pairs)))
        labels = torch.empty(0, dtype=torch.int64) if labels is None else labels
        self.adapters = nn.ModuleList()
        self._served: list[list[int]] = []  # numbers of the pairs that each adapter serves
        weights = []
        with seeded(seed):
            for hint in hints:
                method, numbers = _method(hint), list(range(len(weights), len(weights) + len(hint.pairs)))
                weights += [hint.weight] * len(numbers)
                student = [_shape(student_table, pair.student_layer) for pair in hint.pairs]
                teacher = [_shape(teacher_table, pair.teacher_layer) for pair in hint.pairs]
                if method.joint:  # by depth of the student, whatever the order of the pairs
                    depth = list(student_table["layer"])
                    order = sorted(range(len(numbers)), key=lambda i: depth.index(hint.pairs[i].student_layer))
                    self.adapters.append(method([student[i] for i in order], [teacher[i] for i in order], labels))
                    self._served.append([numbers[i] for i in order])
                else:
                    self.adapters.extend(method(s, t, labels) for s, t in zip(student, teacher, strict=True))
                    self._served += [[number] for number in numbers]
        self.register_buffer("hint_weights", torch.tensor(weights, dtype=torch.float32))
        redrawn = any(hint.redrawn for hint in hints)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64) if redrawn else None)
        student_layers = list(dict.fromkeys(pair.student_layer for pair in self.pairs))
        self._extract = FeatureExtractor(model, student_layers).__enter__() if student_layers else None

    def losses(self, batch: Batch, observation: Observation, progress: float = 1.0) -> dict[str, Tensor]:
        """The terms of one batch: loss, logits, and per term the unweighted value and the weighted one.

        The term of a hint method is the mean over its pairs that teach; weighted, it is their weighted sum.
        progress: fraction of the training that is done, in [0, 1); 1 is the main phase, after all warm-ups and
        pre-stages. A term that has no part in the loss at this point of the training is left out; while a method
        prepares itself, `<method>_preparation` is part of the loss (and teaches the student nothing).
        """
        volume = self._volume(progress)
        teaching = [number for number in self._draw() if volume[self.methods[number]] > 0]
        logits, cls, logit_term, hints = self._terms(batch, observation, teaching)
        terms = {"cls": cls, self.logit_loss: logit_term}
        weighted = {
            name: volume[name] * weight * terms[name]
            for name, weight in (("cls", self.ce_weight), (self.logit_loss, self.logit_weight))
            if volume[name] * weight > 0
        }
        for method in dict.fromkeys(self.methods[number] for number in teaching):
            own = [number for number in teaching if self.methods[number] == method]
            terms[method] = torch.stack([hints[number] for number in own]).mean()
            part = torch.stack([self.hint_weights[number] * hints[number] for number in own]).sum()
            weighted[method] = volume[method] * part
        preparations = self._preparations(observation, progress)
        loss = sum([*weighted.values(), *preparations.values()], start=0.0 * cls)
        weighted = {f"weighted_{name}": term for name, term in weighted.items()}
        return {"loss": loss, "logits": logits} | terms | weighted | preparations

    def _volume(self, progress: float) -> dict[str, float]:
        """What each term's weight is multiplied with at this point of the training, by the term's name."""

        def warmed(warm_up: float) -> float:
            return min(1.0, progress / warm_up) if warm_up else 1.0

        volume = {"cls": 1.0, self.logit_loss: warmed(LOGIT_LOSSES[self.logit_loss].warm_up)}
        pre_stages = {name: METHODS[name].pre_stage for name in self.methods if METHODS[name].pre_stage}
        for name in self.methods:
            volume[name] = warmed(METHODS[name].warm_up)
            if name in pre_stages and progress < pre_stages[name] and _prepares(name):
                volume[name] = 0.0
        alone = [name for name in pre_stages if not _prepares(name)]
        if any(progress < pre_stages[name] for name in alone):
            return {name: float(name in alone) for name in volume}
        return volume | dict.fromkeys(alone, 0.0)

    def _preparations(self, observation: Observation, progress: float) -> dict[str, Tensor]:
        terms: dict[str, list[Tensor]] = {}
        for adapter, numbers in zip(self.adapters, self._served, strict=True):
            name = self.methods[numbers[0]]
            if _prepares(name) and progress < METHODS[name].pre_stage:
                feature = observation.features[feature_key(self.pairs[numbers[0]])]
                terms.setdefault(f"{name}_preparation", []).append(adapter.prepare(feature))
        return {name: torch.stack(of).sum() for name, of in terms.items()}

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
    ) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
        """logits, cls, the logit loss, and the unweighted hint terms of the pairs with these numbers, by number."""
        images = laid_out(batch.images, self.model)
        output, features = self._extract(images) if self._extract else (self.model(images), {})
        logits = logits_of(output)
        cls = cls_loss(logits, batch.labels)
        logit_term = LOGIT_LOSSES[self.logit_loss](logits, observation.logits, batch.labels, self.temperature)
        hints = {}
        for adapter, numbers in zip(self.adapters, self._served, strict=True):
            if numbers[0] not in teaching:  # of a joint adapter all pairs teach, or none
                continue
            student = [features[self.pairs[number].student_layer] for number in numbers]
            teacher = [observation.features[feature_key(self.pairs[number])] for number in numbers]
            for number, feature in zip(numbers * 2, student + teacher, strict=True):
                if feature.ndim != 4 and not adapter.any_form:
                    pair = f"{self.pairs[number].teacher_layer} -> {self.pairs[number].student_layer}"
                    raise ValueError(
                        f"hint {self.methods[number]!r} needs maps (B, C, H, W), and {pair} has {form(feature)}"
                    )
            own = adapter(student, teacher, batch) if adapter.joint else [adapter(student[0], teacher[0], batch)]
            hints |= zip(numbers, own, strict=True)
        return logits, cls, logit_term, hints

    def close(self) -> None:
        """Take the hooks off the student. The learner cannot be trained after that."""
        if self._extract:
            self._extract.close()


def check_hints(learner: Distilled, batches: Sequence[Batch], observations: Sequence[Observation]) -> None:
    """Raise SilentHint when a pair, on these batches, gives the student no gradient or one that is not finite. Redrawn
    hints are checked for all candidate pairs, methods with a warm-up or a pre-stage as in their main phase. The
    learner is left as it was.
    """
    _first_gradients(learner, batches, observations)


def balance_hints(
    learner: Distilled, batches: Sequence[Batch], observations: Sequence[Observation], share: float
) -> Tensor:
    """Set `learner.hint_weights` so that all hints together start with `share` times the gradient of the other terms,
    every hint and every pair of a hint with the same part of it. Returns the weights (pairs,).

    Gradients are taken with respect to the student's parameters on the given batches before any step; norms are
    root mean squares over the batches. With g that of the weighted terms of labels and logits and h_j that of pair j,
    weight_j is at first g / h_j / (number of hints) / (number of the hint's pairs that teach at one step); then all
    weights are multiplied by what makes the norm of the hints' sum share * g, as gradients of several pairs partly
    cancel. Without this, a mean-reduced loss weighs an 8x8 map 16 times a 32x32 one, more pairs would not be heard as
    much as one, and where a hint is taken could not be told from how loudly it is heard. Redrawn hints are weighed for
    all candidate pairs, and their sum over the first draws, which the training will draw again. Methods with a warm-up
    or a pre-stage are weighed as in their main phase. The learner's weights, buffers and step are left as they were.

    Raises SilentHint as `check_hints` does.
    """
    base, hints = _first_gradients(learner, batches, observations)
    shares = [1 / len(learner.hints) / (hint.redrawn or len(hint.pairs)) for hint in learner.hints for _ in hint.pairs]
    weights = torch.tensor([own * base / norm for own, norm in zip(shares, hints, strict=True)])
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    squares = []
    with state_kept(learner):
        for batch, observation in zip(batches, observations, strict=True):
            teaching = learner._draw()  # all, unless redrawn
            _, _, _, terms = learner._terms(batch, observation, teaching)
            squares.append(_square_norm(sum(float(weights[n]) * terms[n] for n in teaching), parameters))
    total = (sum(squares) / len(squares)) ** 0.5
    if not total > 0:
        raise SilentHint("the gradients of the hints cancel")
    learner.hint_weights.copy_(weights * share * base / total)
    return learner.hint_weights


def _first_gradients(
    learner: Distilled, batches: Sequence[Batch], observations: Sequence[Observation]
) -> tuple[float, list[float]]:
    """Norms of the gradient, root mean square over the batches: of labels and logits, and of each pair's own term."""
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    base, squares, sizes = 0.0, [0.0] * len(learner.pairs), [0.0] * len(learner.pairs)
    with state_kept(learner):
        for batch, observation in zip(batches, observations, strict=True):
            _, cls, logit_term, hints = learner._terms(batch, observation, range(len(learner.pairs)))
            base += _square_norm(learner.ce_weight * cls + learner.logit_weight * logit_term, parameters)
            for number, hint in hints.items():
                squares[number] += _square_norm(hint, parameters)
                sizes[number] += float(hint.detach()) ** 2
    for name, square, size in zip(_pair_names(learner), squares, sizes, strict=True):
        if not math.isfinite(square):
            raise SilentHint(f"the gradient of the hint {name} is not finite")
        if square <= ROUNDING**2 * size:
            raise SilentHint(f"the hint {name} gives the student no gradient")
    return (base / len(batches)) ** 0.5, [(square / len(batches)) ** 0.5 for square in squares]


def gradient_norms(learner: Distilled, batch: Batch, observation: Observation) -> dict[str, float]:
    """How loudly each weighted term is heard: the norm of its gradient with respect to the student's parameters.

    Keys: cls, the logit loss, and one per pair, "teacher layer -> student layer", the teacher's by its `feature_key`,
    behind the method where there are several; of redrawn hints all candidate pairs, each as loud as it is when drawn;
    all methods as in their main phase. The learner's weights, buffers and step are left as they were.
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    with state_kept(learner):
        _, cls, logit_term, hints = learner._terms(batch, observation, range(len(learner.pairs)))
        terms = {"cls": learner.ce_weight * cls, learner.logit_loss: learner.logit_weight * logit_term}
        for number, name in enumerate(_pair_names(learner)):
            terms[name] = learner.hint_weights[number] * hints[number]
        # Before the state is put back: the backward passes still need it.
        return {name: _square_norm(term, parameters) ** 0.5 for name, term in terms.items()}


def weighted_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what `losses` returned: name of a term -> what it adds to the loss."""
    return {name.removeprefix("weighted_"): term for name, term in terms.items() if name.startswith("weighted_")}


def shares_of_gradient(learner: nn.Module, terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each weighted term's gradient with respect to the student's parameters, over the sum of all norms.

    terms: what `losses` returned; its graph is kept. A gradient that is mere rounding counts as none. Keys: the terms'
    names; none, if no term is weighted. Of a batch that is divided among processes, the gradient is the whole's.
    """
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    norms = {}
    for name, term in weighted_terms(terms).items():
        norm = _square_norm(term, parameters) ** 0.5
        norms[name] = 0.0 if norm <= ROUNDING * abs(float(parallel.batch_mean(term.detach()))) else norm
    total = sum(norms.values())
    return {name: norm / total if total else 0.0 for name, norm in norms.items()}


@contextlib.contextmanager
def state_kept(learner: nn.Module) -> Iterator[None]:
    """In train mode inside the block; after it, parameters and buffers are as they were."""
    before = [(tensor, tensor.detach().clone()) for tensor in (*learner.parameters(), *learner.buffers())]
    learner.train()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def _pair_names(learner: Distilled) -> list[str]:
    names = [f"{feature_key(pair)} -> {pair.student_layer}" for pair in learner.pairs]
    if len(set(learner.methods)) < 2:
        return names
    return [f"{method}: {name}" for method, name in zip(learner.methods, names, strict=True)]


def _square_norm(term: Tensor, parameters: list[nn.Parameter]) -> float:
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(parallel.part_of_mean(term), parameters, retain_graph=True, allow_unused=True)
    return sum(float(parallel.batch_sum(g).double().square().sum()) for g in gradients if g is not None)


def _method(hint: Hint) -> type[HintMethod]:
    if hint.method not in METHODS:
        raise ValueError(f"unknown hint method {hint.method!r} (allowed: {', '.join(METHODS)})")
    method = METHODS[hint.method]
    if method.joint and hint.redrawn:
        raise ValueError(f"hint {hint.method!r} joins all its pairs, which cannot be redrawn one by one")
    return method


def _prepares(method: str) -> bool:
    return hasattr(METHODS[method], "prepare")


def _shape(table: pd.DataFrame | None, layer: str) -> Shape:
    rows = table[table["layer"] == layer] if table is not None else ()
    if len(rows) != 1:
        raise ValueError(f"layer {layer!r} is not in the layer table")
    row = rows.iloc[0]
    return int(row["channels"]), int(row["height"]), int(row["width"])

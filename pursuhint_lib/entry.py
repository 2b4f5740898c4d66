"""What `fit` is given: brought into one form, and tried on one batch before anything is trained."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pursuhint_lib import parallel
from pursuhint_lib.data import Batch, BatchSource, Part, seeded_generator
from pursuhint_lib.features import FrozenTeacher, Observation
from pursuhint_lib.learners import state_kept
from pursuhint_lib.reading import images_of, in_one_line, labels_of, logits_of


class LoaderBatches(BatchSource):
    """A DataLoader in the place of `data.Batches`, or anything else with a length that can be read again and again.

    Its batches are read as `reading` says and brought to `device`; `index` is None, as nobody numbers the images.
    What torch draws on the CPU while a pass is read (the order, the seeds of processes that load, crops and flips)
    depends on (seed, epoch) alone and leaves the global generator as it was. `seed` is what torch.manual_seed was last
    given; where it was not called, every process has another. A sampler or a generator of the loader's own, loading
    processes that persist, and whatever draws from another source than torch, go their own way. Then passes differ from
    one training to the next, and a training that is taken up again does not end with the bits of one in one go.

    training: after larger batches one of a single image is then dropped, as in `data.Batches`, because batch
    normalization cannot train on it. classes: labels must lie below it. Reading raises TypeError or ValueError, one
    line.
    """

    classes: float = float("inf")

    def __init__(self, loader: Any, device: torch.device, training: bool = False) -> None:
        try:
            self._length = len(loader)
        except TypeError:
            raise TypeError(
                f"batches are a {type(loader).__name__} without a length: pass data.Batches, folders.FolderBatches, "
                "or a DataLoader of a data set that has one"
            ) from None
        self.loader, self.device, self.training = loader, device, training
        self.seed = torch.initial_seed() % 2**32

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"LoaderBatches({self.loader!r} on {self.device})"

    def epoch(self, epoch: int, part: Part | None = None) -> Iterator[Batch]:
        """See `BatchSource.epoch`; there are no parts, as only one process can train on these."""
        state, batches, largest = seeded_generator("loader", self.seed, epoch).get_state(), None, 0
        while True:
            with torch.random.fork_rng(devices=[]):  # not around the yield: others draw meanwhile
                torch.set_rng_state(state)
                batches = batches or iter(self.loader)
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            images, labels = images_of(batch), labels_of(batch)
            if labels.numel() and labels.max() >= self.classes:
                raise ValueError(f"a label is {int(labels.max())}, and classes 0 to {self.classes - 1} are known")
            largest = max(largest, len(images))
            if self.training and len(images) == 1 < largest:
                continue
            yield Batch(images.to(self.device), labels.to(self.device), None)


def as_source(batches: Any, device: torch.device, training: bool = False) -> BatchSource:
    """The batches, with passes that can be counted; those of a DataLoader are brought to the device."""
    return batches if isinstance(batches, BatchSource) else LoaderBatches(batches, device, training)


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes."""
    return next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0)).device


def in_one_form(
    learners: Mapping[str, nn.Module], batches: Any, validation: Any, teacher: Any
) -> tuple[BatchSource, BatchSource | None, Any]:
    """(batches, validation, teacher) as the loop needs them: a DataLoader behind `LoaderBatches`, a bare network
    frozen, no teacher where none is needed. Raises TypeError or ValueError, one line, for what cannot be trained.
    """
    if not isinstance(learners, Mapping) or not learners:
        raise TypeError('learners must have names: pass {"mine": learner}')
    for name, learner in learners.items():
        if not isinstance(learner, nn.Module) or not hasattr(learner, "losses"):
            kind = type(learner).__name__
            raise TypeError(f"learner {name!r} is a {kind}: pass Supervised(network), or Distilled(network, ...)")
    owners: dict[nn.Parameter, str] = {}
    for name, learner in learners.items():
        for weight in filter(lambda weight: weight.requires_grad, learner.parameters()):
            if (owner := owners.setdefault(weight, name)) != name:
                raise ValueError(f"learners {owner!r} and {name!r} would train the same weights: copy the network")
    batches = as_source(batches, device_of(next(iter(learners.values()))), training=True)
    validation = None if validation is None else as_source(validation, batches.device)
    if any(isinstance(source, LoaderBatches) for source in (batches, validation)) and parallel.size() > 1:
        raise TypeError("several processes train on data.Batches or folders.FolderBatches, not on a DataLoader")
    for name, learner in learners.items():
        numbered = [module for module in learner.modules() if getattr(module, "one_process", False)]
        if numbered and isinstance(batches, LoaderBatches):
            raise ValueError(
                f"learner {name!r}: {type(numbered[0]).__name__} remembers what each image was, and a DataLoader does "
                "not say which image is which: pass data.Batches or folders.FolderBatches"
            )
    taught = [name for name, learner in learners.items() if learner.needs_teacher]
    if taught and teacher is None:
        raise ValueError(f"learner {taught[0]!r} learns from a teacher: pass teacher=FrozenTeacher(network, layers)")
    if taught and not hasattr(teacher, "observe"):
        teacher = FrozenTeacher(teacher, layers_of(learners)).to(batches.device)
    return batches, validation, teacher if taught else None


def layers_of(learners: Mapping[str, nn.Module]) -> list[str]:
    """The teacher's layers that some learner looks at."""
    return list(dict.fromkeys(layer for learner in learners.values() for layer in learner.teacher_layers))


def try_first_batch(
    learners: Mapping[str, nn.Module],
    first: Batch | None,
    batches: BatchSource,
    validation: BatchSource | None,
    teacher: Any,
) -> None:
    """Take the losses of all learners on the first batch, as in training, and the logits of their networks on the first
    one of validation, and leave them as they were.

    Raises ValueError, one line, where this fails, or where labels and logits do not fit together.
    """
    if first is None:
        raise ValueError("batches give no batch")
    observation: Observation | None = None
    if teacher is not None:
        with in_one_line("the teacher", first.images):
            observation = teacher.observe(first.images, layers=layers_of(learners))
    tried = first._replace(labels=torch.zeros_like(first.labels))  # every network knows class 0; the others: see below
    known = {}
    for name, learner in learners.items():
        if not learner.silent:  # which will not be trained
            with in_one_line(f"learner {name!r}", first.images), state_kept(learner):
                terms = learner.losses(tried, observation)
                if not terms["loss"].requires_grad:
                    raise ValueError("none of its parameters can learn")
                known[name] = terms["logits"].shape[1]
    if not known:
        return
    name = min(known, key=known.get)
    if known[name] < 2:
        raise ValueError(f"learner {name!r} knows one class only, so there is nothing to learn")
    for source in (batches, validation):
        if isinstance(source, LoaderBatches):
            source.classes = known[name]
            next(source.epoch(0), None)
        elif source is not None and (largest := int(source.image_set.labels.max())) >= known[name]:
            raise ValueError(f"learner {name!r} knows classes 0 to {known[name] - 1}, and a label is {largest}")
    if validation is not None:
        tested = next(validation.epoch(0), None)
        if tested is None:
            raise ValueError("validation gives no batch")
        for name in known:
            who, learner = f"learner {name!r}, in validation,", learners[name]
            with in_one_line(who, tested.images), state_kept(learner), torch.no_grad():
                logits_of(learner.model.eval()(tested.images))

"""One training loop, one schedule, checkpoints.

`fit` trains any number of learners in lockstep: each batch is drawn once and seen once by the teacher, then every
learner takes its step. Learners do not influence each other: the same learner gives the same bytes alone or in
company, in one go or interrupted and resumed (same CPU, same number of threads). Several processes may train them
together, see `parallel`: all of them call `fit` alike.
"""

import contextlib
import functools
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib import parallel
from pursuhint_lib.arithmetic import contiguous_where_faulty, suited_format
from pursuhint_lib.data import Batch, BatchSource, Part
from pursuhint_lib.entry import as_source, device_of, in_one_form, layers_of, try_first_batch
from pursuhint_lib.features import FrozenTeacher, Observation
from pursuhint_lib.learners import shares_of_gradient, weighted_terms
from pursuhint_lib.reading import logits_of
from pursuhint_lib.storage import written_whole

Learner = nn.Module  # with what `learners` says: model, teacher_layers, needs_teacher, silent, losses


_DROPS = {"paper": (0.625, 0.75, 0.875), "imagenet": (0.3, 0.6, 0.9)}  # schedule -> shares of the training


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. SGD with momentum; the last epoch counts.

    name: "fast" is one cycle (linear warm-up over the first quarter to `learning_rate`, then a half cosine to zero,
    set at every step); "paper" multiplies by 0.1 at 62.5, 75 and 87.5 % of the epochs (150, 180, 210 of 240),
    "imagenet" at 30, 60 and 90 % (He et al. 2016, arXiv 1512.03385, as torchvision's residual networks were trained).
    Raises ValueError for another name, epochs that are no whole number above 0, and rates that make no sense.
    """

    name: str
    epochs: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        if self.name not in ("fast", *_DROPS):
            raise ValueError(f"schedule {self.name!r} is unknown (allowed: fast, {', '.join(_DROPS)})")
        if type(self.epochs) is not int or self.epochs < 1:
            raise ValueError(f"epochs must be a whole number, 1 or more, not {self.epochs!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and above 0, not {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, not {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and 0 or more, not {self.weight_decay}")

    def learning_rate_at(self, progress: float) -> float:
        """Learning rate when the fraction `progress` in [0, 1) of the training is done."""
        if self.name in _DROPS:
            return self.learning_rate * 0.1 ** sum(progress >= drop for drop in _DROPS[self.name])
        warm_up = 0.25
        if progress < warm_up:
            return self.learning_rate * (0.04 + 0.96 * progress / warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU when there is one. Raises ValueError when a named device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(
            f"device = {name!r}: this machine offers {torch.cuda.device_count()} GPUs (allowed here: auto, cpu)"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware computes with it, else float32."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which networks compute with `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def predict(
    model: nn.Module, batches: BatchSource | Iterable[Any], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and labels (N,) of epoch 0 of `batches`, in eval mode, on the CPU. The mode is put back.
    batches: as those of `fit`.
    """
    source = as_source(batches, device_of(model))
    logits, labels = _predict_all({"": model}, source, dtype, lambda do, names: [do(name) for name in names])
    return logits[""], labels


def _predict_all(
    models: Mapping[str, nn.Module],
    batches: BatchSource,
    dtype: torch.dtype,
    each: Callable[[Callable, Iterable], list],
    part: Part | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """As `predict` for several networks, each batch being drawn (or decoded) once. each(do, names): see `_Workers`.
    part: of each batch, see `BatchSource.epoch`; there may be no image in it.
    """
    modes = {name: model.training for name, model in models.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels = []
    for batch in _pass(batches, 0, part):

        def look(name: str, batch=batch) -> None:
            with torch.no_grad(), autocast(batch.images.device, dtype):  # a thread has its own grad mode
                logits[name].append(logits_of(models[name].eval()(batch.images)).float())

        each(look, models)
        labels.append(batch.labels)
    for name, model in models.items():
        model.train(modes[name])
    if not labels:
        return {name: torch.empty(0, 1) for name in models}, torch.empty(0, dtype=torch.int64)
    return {name: torch.cat(rows).cpu() for name, rows in logits.items()}, torch.cat(labels).cpu()


def _pass(batches: BatchSource, epoch: int, part: Part | None) -> Iterator[Batch]:
    return batches.epoch(epoch, part) if part else batches.epoch(epoch)


def fit(
    learners: Mapping[str, Learner],
    batches: BatchSource | Iterable[Any],
    schedule: Schedule,
    *,
    teacher: FrozenTeacher | nn.Module | None = None,
    validation: BatchSource | Iterable[Any] | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int, pd.DataFrame], None] | None = None,
    dtype: torch.dtype = torch.float32,
    workers: int = 1,
    sync_batch_norm: bool = False,
) -> pd.DataFrame:
    """Train all learners on the same batches, the teacher looking at each batch once. One row per learner and epoch.

    Columns: arm, seed (of `batches`), epoch (from 1), learning_rate (of the epoch's first step), loss and every term,
    unweighted (means over the images of those steps that had it), loss_share_<term> (what it adds to the loss, over the
    sum of what all add, signs aside), gradient_share_<term> (the norm of its gradient over the sum of all terms', at
    the epoch's first step, and again when a term joins later in the epoch), val_accuracy, val_loss (after the epoch),
    status ("trained" or "failed"), reason (of a failure), seconds (of the whole group), finished (UNIX time). All
    learners end in eval mode.

    batches, validation: `data.Batches`, `folders.FolderBatches`, or a DataLoader of images and labels, see
    `entry.LoaderBatches` for what is then repeated and what is not. teacher: a `FrozenTeacher`, or what has its
    `observe`; of any other network a frozen copy is made. Before anything is trained, all learners try the
    first batch of both.

    checkpoint: a file that is rewritten after each epoch and taken up by the next call with the same learners, or with
    some of them; it is removed by the caller, when the results are safe. on_epoch(epoch, rows) is called after each
    epoch. A learner fails whose loss (in training or on validation) is not finite, or of which a term is zero or gives
    the student no gradient where its share is taken: it is stopped (for a loss that is not finite, at the end of that
    epoch), and the others go on.
    Dropout masks and the like depend on (seed, step) alone; the global random generator is put back at the end.
    workers: on a CPU, so many learners take their step at the same time, each in a thread of its own, while the teacher
    looks at the next batch. It changes no bit, and pays for networks too small to keep several cores busy alone.
    Learners that draw random numbers as they train (dropout) take turns, because they share one generator.

    In a group of processes (see `parallel`) every process takes its part of each batch and the learners take turns;
    all end with the same networks and the same history, of all images. The first one's learners are trained, and it
    alone writes the checkpoint. sync_batch_norm: batch norm then normalizes by the statistics of the whole batch, so
    that the networks are, up to rounding, those of one process; otherwise by those of each process's part, whose mean
    is kept. Dropout draws other masks than in one process.

    Raises TypeError or ValueError, one line, for learners, batches and a teacher that do not go together, ValueError
    for a damaged checkpoint or one of other learners, and what `parallel.losses_of` raises.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule is a {type(schedule).__name__}: pass Schedule(name, epochs, learning_rate)")
    batches, validation, teacher = in_one_form(learners, batches, validation, teacher)
    together = parallel.size() > 1
    device = batches.device
    learners = {
        name: learner.to(device, memory_format=suited_format(learner.model, device))
        for name, learner in learners.items()
    }
    optimizers = {name: _optimizer(learner, schedule) for name, learner in learners.items()}
    state = {"epoch": 0, "rows": [], "failed": []}
    if checkpoint is not None and parallel.from_first(Path(checkpoint).exists):
        state = _load_checkpoint(Path(checkpoint), learners, optimizers)
        parallel.wait_for_all()  # before the first could remove it
    losses_of = {name: parallel.losses_of(learner) for name, learner in learners.items()}
    for learner in learners.values():
        learner.silent = parallel.from_first(lambda learner=learner: learner.silent)
    random_state = torch.get_rng_state()
    with autocast(device, dtype):
        first = next(_pass(batches, 0, parallel.training_part_of if together else None), None)
        try_first_batch(learners, first, batches, validation, teacher)

    synchronized = learners.values() if together and sync_batch_norm else ()
    with (
        _Workers(workers if device.type == "cpu" and not together else 1) as pool,
        parallel.synchronized_batch_norm(synchronized),
        contiguous_where_faulty(learners.values(), device),
    ):
        for epoch in range(state["epoch"], schedule.epochs):
            started = time.perf_counter()
            active = {name: learner for name, learner in learners.items() if name not in state["failed"]}
            if not active:
                break
            means = {name: _Means() for name in active}
            for learner in active.values():
                learner.train()
            own = _pass(batches, epoch, parallel.training_part_of if together else None)
            observed = _observed(own, teacher, layers_of(learners), device, dtype, pool)
            for step, (batch, observation) in enumerate(observed):
                progress = (epoch + step / len(batches)) / schedule.epochs
                seed = batches.seed * 1_000_003 + epoch * len(batches) + step + (parallel.rank() << 40)

                def take_step(name: str, batch=batch, observation=observation, progress=progress, seed=seed) -> None:
                    learner = active[name]
                    if learner.silent:
                        return
                    _seed_dropout(device, seed)
                    with autocast(device, dtype):
                        terms, loss = losses_of[name](batch, observation, progress)
                    measured = means[name].gradient_shares
                    if any(term not in measured for term in weighted_terms(terms)):  # at first, and when one joins
                        shares = shares_of_gradient(learner, terms)
                        measured |= shares
                        silent = _silent(terms, shares)
                        learner.silent = parallel.from_first(lambda: silent)
                    _step(optimizers[name], loss, schedule.learning_rate_at(progress))
                    means[name].add(terms, len(batch.labels) if parallel.counts_here() else 0)

                with parallel.divided(len(batch.labels), batches.images_in(step) if together else len(batch.labels)):
                    pool.each(take_step, active)

            if together and not sync_batch_norm:
                for learner in active.values():
                    parallel.average_batch_norm(learner)
            if validation is not None:
                models = {name: learner.model for name, learner in active.items()}
                part = parallel.part_of if together else None
                logits, labels = _predict_all(models, validation, dtype, pool.each, part)
            rows = []
            for name, learner in active.items():
                row = {
                    "arm": name,
                    "seed": batches.seed,
                    "epoch": epoch + 1,
                    "learning_rate": schedule.learning_rate_at(epoch / schedule.epochs),
                }
                row |= means[name].row()
                if validation is not None:
                    row |= _validated(logits[name], labels)
                rows.append(row | _status(learner, row))
            seconds = time.perf_counter() - started
            rows = parallel.from_first(lambda rows=rows: rows)
            for row in rows:
                row |= {"seconds": seconds, "finished": time.time()}
                if row["status"] == "failed":
                    state["failed"].append(row["arm"])
            state["rows"] += rows
            state["epoch"] = epoch + 1
            if checkpoint is not None and parallel.rank() == 0:
                _save_checkpoint(Path(checkpoint), state, learners, optimizers)
            if on_epoch is not None:
                on_epoch(epoch + 1, pd.DataFrame(rows))

    torch.set_rng_state(random_state)
    for learner in learners.values():
        learner.eval()
    return pd.DataFrame(state["rows"])


class _Workers:
    """Does the same thing for every learner: in threads, or one after the other where that must be.

    torch computes without holding the interpreter, so threads overlap. What a learner computes does not depend on them;
    the one thing that learners share is the random generator, so a first round in turn finds out whether any uses it.
    """

    def __init__(self, workers: int):
        # A new thread takes the number of threads that torch computes with only after its first operation, if not told.
        tell = functools.partial(torch.set_num_threads, torch.get_num_threads())
        self._pool = ThreadPoolExecutor(workers, initializer=tell) if workers > 1 else None
        self._rounds = 0
        self._in_turn = workers == 1

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool:
            self._pool.shutdown()

    def each(self, do: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        """[do(name) for name in names]; the first exception is raised."""
        self._rounds += 1
        if not self._in_turn and self._rounds > 1:
            return list(self._pool.map(do, names))
        results = []
        for name in names:
            results.append(do(name))
            # `do` has seeded the generator and then, if it uses it, drawn from it.
            self._in_turn = self._in_turn or _has_drawn()
        return results

    def later(self, do: Callable[[], Any]) -> Callable[[], Any]:
        """Begin do() in a thread, if there are any; the returned function gives its result."""
        if self._pool is None:
            return do
        return self._pool.submit(do).result


def _has_drawn() -> bool:
    """Whether the generator has moved since it was last seeded."""
    fresh = torch.Generator().manual_seed(torch.default_generator.initial_seed())
    return not torch.equal(fresh.get_state(), torch.default_generator.get_state())


def _observed(
    epoch: Iterable[Batch],
    teacher: FrozenTeacher | None,
    layers: list[str],
    device: torch.device,
    dtype: torch.dtype,
    pool: _Workers,
) -> Iterator[tuple[Batch, Observation | None]]:
    """Each batch with what the teacher saw in it (None without a teacher). The teacher is one batch ahead."""

    def observe(batch: Batch) -> Observation | None:
        if teacher is None:
            return None
        with autocast(device, dtype):
            return teacher.observe(batch.images, layers=layers)

    ahead: tuple[Batch, Callable[[], Observation | None]] | None = None
    for batch in epoch:
        ready = (ahead[0], ahead[1]()) if ahead else None  # before the next is begun: one forward pass at a time
        ahead = (batch, pool.later(functools.partial(observe, batch)))
        if ready:
            yield ready
    if ahead:
        yield ahead[0], ahead[1]()


def _seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout draws from. torch.manual_seed would, at every step, also visit absent devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _optimizer(learner: Learner, schedule: Schedule) -> torch.optim.SGD:
    return torch.optim.SGD(
        learner.parameters(),  # also those that learn at another time only
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        fused=True,
    )


def _step(optimizer: torch.optim.SGD, loss: Tensor, rate: float) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for p in group["params"]:
        # A parameter that no term of this step reaches (of an adapter that rests) takes its step of momentum and weight
        # decay all the same. The optimizer would pass over it, and its fused step fails where some parameters have
        # their momentum already and others not yet.
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def _silent(terms: Mapping[str, Tensor], gradient_shares: Mapping[str, float]) -> str:
    """Which term of the loss teaches nothing, in words; empty when there is none, or when the loss is not finite."""
    if not bool(parallel.batch_mean(terms["loss"]).isfinite()):
        return ""
    for name, share in gradient_shares.items():
        if share == 0:
            zero = parallel.batch_mean(terms[name]) == 0
            return f"the term {name} is zero" if zero else f"the term {name} gives the student no gradient"
    return ""


class _Means:
    """Means of an epoch's terms, each over the images of the steps that had it."""

    def __init__(self) -> None:
        self.gradient_shares: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        for name, term in terms.items():
            if name != "logits":
                self._sums[name] = self._sums.get(name, 0) + term.detach().double() * images
                self._images[name] = self._images.get(name, 0) + images

    def row(self) -> dict[str, float]:
        """The terms' columns of a history, of all processes' images."""
        sums = parallel.total({name: float(total) for name, total in self._sums.items()})
        images = parallel.total(self._images)
        means = {name: total / images[name] for name, total in sums.items()}
        row = {name: mean for name, mean in means.items() if not name.startswith("weighted_")}
        parts = {name.removeprefix("weighted_"): total for name, total in sums.items() if _is_part(name)}
        whole = sum(map(abs, parts.values()))
        row |= {f"loss_share_{name}": part / whole if whole else 0.0 for name, part in parts.items()}
        return row | {f"gradient_share_{name}": share for name, share in self.gradient_shares.items()}


def _validated(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """The columns of a history that come from validation. logits (N, K), labels (N,), of this process's images."""
    sums = parallel.total(
        {
            "val_accuracy": int((logits.argmax(1) == labels).sum()),
            "val_loss": float(nn.functional.cross_entropy(logits.double(), labels, reduction="sum")),
            "images": len(labels),
        }
    )
    return {name: sums[name] / sums["images"] for name in ("val_accuracy", "val_loss")}


def _is_part(name: str) -> bool:
    """Whether the loss is a sum of this and others."""
    return name.startswith("weighted_") or name.endswith("_preparation")


def _status(learner: Learner, row: Mapping[str, Any]) -> dict[str, str]:
    finite = all(math.isfinite(row[loss]) for loss in ("loss", "val_loss") if loss in row)
    reason = learner.silent or ("" if finite else "the loss was no longer finite")
    return {"status": "failed", "reason": reason} if reason else {"status": "trained"}


def _save_checkpoint(path: Path, state: dict, learners: Mapping[str, Learner], optimizers: Mapping[str, Any]) -> None:
    """State of everything, behind a sha256 of itself: half-written or changed bytes are noticed at loading."""
    content = state | {
        "learners": {name: learner.state_dict() for name, learner in learners.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    with written_whole(path) as temporary:
        temporary.write_bytes(hashlib.sha256(payload).digest() + payload)


def _load_checkpoint(path: Path, learners: Mapping[str, Learner], optimizers: Mapping[str, Any]) -> dict:
    content = path.read_bytes()
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError(
            f"{path}: damaged checkpoint (its sha256 differs); delete it to train this group from its start"
        )
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)  # weights_only: runs no code
    except Exception:
        raise ValueError(f"{path}: not a checkpoint of this program; delete it to train this group anew") from None
    missing = [name for name in learners if name not in content["learners"]]
    if missing:
        raise ValueError(
            f"{path}: checkpoint without {', '.join(missing)} (it holds {', '.join(content['learners'])}); "
            "delete it to train this group from its start"
        )
    for name, learner in learners.items():
        learner.load_state_dict(content["learners"][name])
        optimizers[name].load_state_dict(content["optimizers"][name])
    return {
        "epoch": content["epoch"],
        "rows": [row for row in content["rows"] if row["arm"] in learners],
        "failed": [name for name in content["failed"] if name in learners],
    }

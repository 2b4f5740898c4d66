"""The arms of a study: which students there are, and how each is trained once and kept.

An arm is one way to train the student (method x strategy); with a seed it gives one student. Students of one seed start
from the same weights and see the same batches, so arms are compared in pairs.

A method is written as a sum of names: at most one of `logit_losses.LOGIT_LOSSES` (kd, if there is none) and any of
`methods.METHODS`. A hint takes the layers of the arm's strategy, or always those that are named behind an "@": hint
points of the study ("clustered_r2_cca", "random_0"), or "last", the deepest layer, which needs no choice and is there
in every study. "at", "wsld+at", "dkd", "at+crd@last"; blanks around the names change nothing.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from pursuhint_lib import arithmetic, parallel
from pursuhint_lib.arithmetic import check_arithmetic, contiguous_where_faulty, suited_format
from pursuhint_lib.controls import ControlTeacher, control_teacher
from pursuhint_lib.data import BatchSource
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.hints import HintPair, HintPoints, pair_layers, select_hint_points
from pursuhint_lib.jobs import Job
from pursuhint_lib.launch import train_together
from pursuhint_lib.learners import Distilled, Hint, SilentHint, balance_hints, check_hints, feature_key
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import load_model, save_model, state_hash
from pursuhint_lib.params import DistillStudents, nearest
from pursuhint_lib.progress import Progress
from pursuhint_lib.provenance import source_state
from pursuhint_lib.storage import read_json, read_table, read_valid, run_folder, save_json, save_table
from pursuhint_lib.study import StudyImages, fixed_batches, fresh_network, training_batches, training_facts
from pursuhint_lib.tracking import StageRun
from pursuhint_lib.training import Learner, Schedule, autocast, fit

PAIR_COLUMNS = ["arm", "method", "hint", "teacher_layer", "student_layer", "teacher_shape", "student_shape"]
PAIR_COLUMNS += ["source", "redrawn"]
TIMING_COLUMNS = ["seconds", "finished"]  # the only ones that differ between equal runs; kept in a table of their own
# Of a history, as far as an arm has them; its other terms follow by name.
FIRST_COLUMNS = ["arm", "seed", "epoch", "learning_rate", "loss", "cls", "kd", "status", "reason"]
FIRST_COLUMNS += ["val_accuracy", "val_loss", *TIMING_COLUMNS]


class Objective(NamedTuple):
    """What a method asks of the student. hints: (hint method, its own strategy, or "" where it takes the arm's)."""

    logit_loss: str
    hints: tuple[tuple[str, str], ...]


def parse_method(text: str) -> Objective:
    """Read a method as a study writes it ("wsld+crd@last"), see above. Raises ValueError, one line, if it is none."""
    logit_losses, hints = [], []
    for part in _without_blanks(text).split("+"):
        name, at, strategy = part.partition("@")
        if name not in METHODS and name not in LOGIT_LOSSES:
            allowed = [*METHODS, *LOGIT_LOSSES]
            raise ValueError(f"unknown {name!r}{nearest(name, allowed)} (allowed, joined by +: {', '.join(allowed)})")
        if name in logit_losses or name in dict(hints):
            raise ValueError(f"names {name} twice (allowed: each name once)")
        if at and name in LOGIT_LOSSES:
            raise ValueError(f"{part!r}: a logit loss takes no layers (allowed: {name})")
        if at and not strategy:
            raise ValueError(f"{part!r}: names no layers (allowed behind a hint method: @ and a strategy)")
        if name in LOGIT_LOSSES:
            logit_losses.append(name)
        else:
            hints.append((name, strategy))
    if len(logit_losses) > 1:
        raise ValueError(f"matches logits in {len(logit_losses)} ways (allowed: one of {', '.join(LOGIT_LOSSES)})")
    return Objective(logit_losses[0] if logit_losses else "kd", tuple(hints))


def parse_methods(texts: Sequence[str]) -> dict[str, Objective]:
    """Read all methods of a study: each as it is written, without blanks, -> what it asks.

    Raises ValueError, one line that names the method, if it is none, or the same sum as another. The order of the names
    changes a student, as adapters draw their weights one after the other: arms of both would differ by that alone.
    """
    read: dict[str, Objective] = {}
    for text in texts:
        try:
            objective = parse_method(text)
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        for other, (logit_loss, hints) in read.items():
            if logit_loss == objective.logit_loss and sorted(hints) == sorted(objective.hints):
                raise ValueError(f"{text!r}: the same sum as {other!r} (allowed: one of the two)")
        read[_without_blanks(text)] = objective
    return read


def _without_blanks(method: str) -> str:
    return re.sub(r"\s*([+@])\s*", r"\1", method.strip())


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    same_as names an earlier arm with the same logit loss and the same hints (two strategies chose the same layers):
    such an arm is not trained, its results are the other's.
    """

    name: str
    method: str
    strategy: str
    hints: tuple[Hint, ...] = ()
    logit_loss: str = "kd"
    same_as: str = ""

    @property
    def pairs(self) -> tuple[HintPair, ...]:
        """Of all hints."""
        return tuple(pair for hint in self.hints for pair in hint.pairs)


def study_arms(
    hint_points: Mapping[str, HintPoints],
    methods: Sequence[str],
    teacher_table: pd.DataFrame,
    student_table: pd.DataFrame,
    hint_weights: Mapping[str, float] | None = None,
) -> list[Arm]:
    """`kd` (no hints), then every method with every strategy, in the order given.

    A method without hints, or whose hints all name a strategy of their own, is one arm. hint_weights: of hint methods;
    one left out has its published weight. Raises ValueError, one line, for a method or hint points that are not there,
    and for two methods that are the same sum.
    """
    arms = [Arm("kd", "kd", "none")]
    named = dict(hint_points)
    named.setdefault("last", select_hint_points("last", None, teacher_table, 1))
    for method, objective in parse_methods(methods).items():
        own = [strategy for _, strategy in objective.hints]
        unknown = next((name for name in own if name and name not in named), None)
        if unknown:
            raise ValueError(f"method {method!r}: no hint points {unknown!r} (there are {', '.join(named)})")
        for strategy in hint_points if "" in own else ["+".join(dict.fromkeys(own)) or "none"]:
            hints = []
            for name, of_its_own in objective.hints:
                points = named[of_its_own or strategy]
                weight = (hint_weights or {}).get(name, METHODS[name].published_weight)
                pairs = tuple(pair_layers(points, teacher_table, student_table))
                hints.append(Hint(name, pairs, weight, points.redrawn))
            name = f"{method}_{strategy}" if "" in own else method
            arm = Arm(name, method, strategy, tuple(hints), objective.logit_loss)
            twin = next((earlier.name for earlier in arms if _training(earlier) == _training(arm)), "")
            if name not in [earlier.name for earlier in arms]:
                arms.append(replace(arm, same_as=twin))
    return arms


def _training(arm: Arm) -> tuple:
    """What decides the arm's students: arms that agree in it have the same."""
    return arm.logit_loss, arm.hints


def pair_table(arms: Sequence[Arm], teacher_table: pd.DataFrame, student_table: pd.DataFrame) -> pd.DataFrame:
    """Which teacher layer speaks to which student layer: one row per arm, hint method and pair.

    Columns: arm; method, the hint method; hint, the number of the student layer among those that this method teaches
    (from 1); teacher_layer, student_layer; teacher_shape, student_shape (CxHxW); source, whose features
    (`hints.SOURCES`); redrawn, 0 where the pair teaches at every step. A redrawn hint has a row for every pair that can
    be drawn, of which `redrawn` teach at a time.
    """
    shapes = {
        role: {row.layer: f"{row.channels}x{row.height}x{row.width}" for row in table.itertuples()}
        for role, table in (("teacher", teacher_table), ("student", student_table))
    }
    depth = {layer: i for i, layer in enumerate(student_table["layer"])}
    rows = [
        {
            "arm": arm.name,
            "method": hint.method,
            "hint": number,
            "teacher_layer": pair.teacher_layer,
            "student_layer": pair.student_layer,
            "teacher_shape": shapes["teacher"][pair.teacher_layer],
            "student_shape": shapes["student"][pair.student_layer],
            "source": pair.source,
            "redrawn": hint.redrawn,
        }
        for arm in arms
        for hint in arm.hints
        for number, pair in _numbered_pairs(hint, depth)
    ]
    return pd.DataFrame(rows, columns=PAIR_COLUMNS)


def _numbered_pairs(hint: Hint, depth: Mapping[str, int]) -> list[tuple[int, HintPair]]:
    """The hint's pairs with the number of their student layer, by its depth; those left out that are never drawn."""
    taught = sorted({pair.student_layer for pair in hint.pairs}, key=depth.__getitem__)
    numbered = [(taught.index(pair.student_layer) + 1, pair) for pair in hint.pairs]
    if not hint.redrawn:
        return sorted(numbered, key=lambda of: of[0])
    # Of L layers, drawn in order, the i-th of M (from 0) is one of i .. L - M + i: no other pair can come up.
    most = len(hint.pairs) // hint.redrawn - hint.redrawn
    places = [divmod(number, hint.redrawn) for number in range(len(hint.pairs))]
    return [of for (layer, i), of in zip(places, numbered, strict=True) if 0 <= layer - i <= most]


@dataclass(frozen=True)
class Distillation:
    """What all arms of a study share: images, a frozen teacher, the layer tables, the recipe.

    Arms whose pairs have another source than "trained" need a ControlTeacher, see `controls.control_teacher`.
    """

    params: DistillStudents
    images: StudyImages
    teacher: FrozenTeacher | ControlTeacher
    teacher_table: pd.DataFrame
    student_table: pd.DataFrame
    device: torch.device
    dtype: torch.dtype

    @property
    def schedule(self) -> Schedule:
        """Of every student."""
        p = self.params
        return Schedule(p.schedule, p.epochs, p.learning_rate, p.momentum, p.weight_decay)

    def batches(self, seed: int) -> BatchSource:
        """What every student of `seed` is shown."""
        return training_batches(self.params, self.images, self.params.batch_size, seed, self.device)

    def learner(self, arm: Arm, seed: int) -> Distilled:
        """A fresh student of `seed` with the arm's hints, weighed as the parameters say.

        With balance "gradient" the weights are set on the first four batches of epoch 0, see `learners.balance_hints`;
        a hint without a gradient makes the learner `silent`. Redrawn arms of one seed draw the same layers at the same
        step, whatever their method. Raises ValueError, one line, for a source of hints that the teacher does not have.
        """
        self._check_sources(arm)
        learner = Distilled(
            fresh_network(self.params.student, self.images, seed),
            ce_weight=self.params.ce_weight,
            logit_loss=arm.logit_loss,
            logit_weight=self._logit_weight(arm.logit_loss),
            temperature=self.params.temperature,
            hints=arm.hints,
            teacher_table=self.teacher_table,
            student_table=self.student_table,
            labels=self.images.train.labels,
            seed=seed,
        )
        learner.to(self.device, memory_format=suited_format(learner.model, self.device))
        if arm.hints:
            first = list(itertools.islice(self.batches(seed).epoch(0), 4))
            with autocast(self.device, self.dtype), contiguous_where_faulty([learner], self.device):
                observations = [self.teacher.observe(batch.images, layers=learner.teacher_layers) for batch in first]
                try:
                    if self.params.balance == "gradient":
                        balance_hints(learner, first, observations, self.params.hint_share)
                    else:
                        check_hints(learner, first, observations)
                except SilentHint as silent:
                    learner.silent = str(silent)
        return learner

    def _logit_weight(self, logit_loss: str) -> float:
        if logit_loss in ("kd", "kd_std"):
            return self.params.kd_weight
        return self.params.logit_weights.get(logit_loss, LOGIT_LOSSES[logit_loss].published_weight)

    def key(self, arm: Arm) -> str:
        """Hash of all that decides the arm's students but the seed, see `training_key`."""
        self._check_sources(arm)
        control = {}
        if any(pair.source == "untrained" for pair in arm.pairs):
            # Its weights alone: its batch-norm statistics follow from them and from the facts below, though their last
            # bits differ between kinds of CPU, and a finished student should be known again on another.
            control["untrained"] = state_hash(nn.ParameterList(self.teacher.untrained.model.parameters()))
        return training_key(
            hints=[asdict(hint) for hint in arm.hints],
            logit_loss=arm.logit_loss,
            logit_weight=self._logit_weight(arm.logit_loss),
            **control,
            teacher=state_hash(self.teacher.model),
            schedule=asdict(self.schedule),
            **self.params.model_dump(include={"student", "ce_weight", "temperature", "balance", "hint_share"}),
            **training_facts(self.params, self.images, self.params.student, self.device, self.dtype),
        )

    def _check_sources(self, arm: Arm) -> None:
        sources = sorted({pair.source for pair in arm.pairs} - {"trained"})
        if sources and not isinstance(self.teacher, ControlTeacher):
            raise ValueError(
                f"arm {arm.name!r} takes hints of source {sources[0]!r}, which a {type(self.teacher).__name__} does "
                "not have: make the teacher with controls.control_teacher"
            )

    def train(
        self,
        arms: Sequence[Arm],
        folder: Path,
        seeds: Sequence[int] | None = None,
        report_to: Path | None = None,
    ) -> pd.DataFrame:
        """Train every arm that is not `same_as` another, seed by seed in lockstep, and keep the students in `folder`.

        seeds: some of the study's; all, if not given. report_to: where the heartbeat is written, if not in `folder`.
        Where the parameters ask for several processes, these do it, see `launch.train_together`; they know only what
        the notebooks before have left.

        Returns the histories of all arms and seeds; see `train_and_keep` for what is not trained again, and for errors.
        """
        trained = {arm.name: arm for arm in arms if not arm.same_as}
        keys = {name: self.key(arm) for name, arm in trained.items()}
        seeds, epochs = seeds or self.params.seeds, self.params.epochs
        if self.params.processes > parallel.size() and any(unfinished(folder, keys, seed) for seed in seeds):
            name = f"students-s{seeds[0]}" if len(seeds) == 1 else "students"
            job = Job("04_distill_students", name, tuple(seeds), tuple(trained))
            train_together(job, self.params, folder, report_to or folder)
        progress = Progress(report_to or folder, len(seeds) * len(trained) * epochs, "student epochs")
        histories = [
            train_and_keep(
                folder,
                f"students-s{seed}",
                keys,
                lambda name, seed=seed: self.learner(trained[name], seed),
                self.batches(seed),
                self.schedule,
                teacher=self.teacher,
                validation=fixed_batches(self.params, self.images, "validation", self.device),
                progress=progress,
                dtype=self.dtype,
                workers=self.params.workers,
                processes=self.params.processes,
                sync_batch_norm=self.params.sync_batch_norm,
            )
            for seed in seeds
        ]
        return pd.concat(histories, ignore_index=True)


def load_distillation(
    params: DistillStudents, images: StudyImages, device: torch.device, dtype: torch.dtype
) -> tuple[Distillation, list[Arm]]:
    """What the notebooks before have left, made ready: the teacher, the layer tables, and the study's arms.

    Raises what `storage.read_table`, `models.load_model` and `study_arms` raise.
    """
    before = run_folder(params.study)
    teacher_table = read_table(before / "02_profile_layers" / "layers_teacher.csv")
    student_table = read_table(before / "02_profile_layers" / "layers_student.csv")
    chosen = read_json(before / "03_cluster_layers" / "hint_points.json")
    hint_points = {name: HintPoints(**choice) for name, choice in chosen.items()}
    trained, layers = load_teacher(params.study), list(teacher_table["layer"])
    if all(points.source == "trained" for points in hint_points.values()):
        teacher = FrozenTeacher(trained, layers).to(device)
    else:  # some control arms take hints that know less
        teacher = control_teacher(trained, layers, params, images).to(device)
    distillation = Distillation(params, images, teacher, teacher_table, student_table, device, dtype)
    return distillation, study_arms(hint_points, params.methods, teacher_table, student_table, params.hint_weights)


def training_key(**facts: Any) -> str:
    """Hash of everything that decides a trained network: the given facts (JSON-able), the training code, torch's
    version.
    """
    content = json.dumps(facts | {"code": _code_hash(), "torch": torch.__version__}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _code_hash() -> str:
    here = Path(__file__).parent
    names = [
        "arithmetic",
        "arms",
        "baselines",
        "controls",
        "data",
        "features",
        "folders",
        "hint_losses",
        "hints",
        "learners",
        "logit_losses",
    ]
    names += ["losses", "methods", "parallel", "reading", "study", "training"]
    files = [here / f"{name}.py" for name in names] + sorted((here / "models").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kept_file(folder: Path, name: str, seed: int) -> Path:
    """Where `train_and_keep` leaves a finished network: ``<folder>/networks/<name>-s<seed>.safetensors``."""
    return Path(folder) / "networks" / f"{name}-s{seed}.safetensors"


def check_trained(history: pd.DataFrame, parameter: str) -> None:
    """Raise ValueError, one line, when a network of this history failed; `parameter` is the learning rate to lower."""
    failed = history[history["status"] == "failed"]
    for row in failed.itertuples():
        raise ValueError(
            f"{row.arm} seed {row.seed}: {row.reason} in epoch {row.epoch}; lower {parameter}, delete "
            "its file below networks/ and run again"
        )


def load_teacher(study: str) -> nn.Module:
    """The teacher that notebook 01 trained. Raises what `storage.read_table` and `models.load_model` raise."""
    folder = run_folder(study, "01_train_teacher")
    baselines = read_table(folder / "baselines.csv")
    seed = baselines.loc[baselines["model"] == "teacher", "seed"].iloc[0]
    return load_model(kept_file(folder, "teacher", seed))[0]


def load_student(study: str, arm: str, seed: int) -> nn.Module:
    """A student of a study: "unaided" from notebook 01, any other arm from notebook 04. Raises what
    `models.load_model` raises.
    """
    stage = "01_train_teacher" if arm == "unaided" else "04_distill_students"
    return load_model(kept_file(run_folder(study, stage), arm, seed))[0]


def train_and_keep(
    folder: Path,
    training: str,
    arms: Mapping[str, str],
    build: Callable[[str], Learner],
    batches: BatchSource,
    schedule: Schedule,
    *,
    teacher: FrozenTeacher | ControlTeacher | None = None,
    validation: BatchSource,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    workers: int = 1,
    processes: int = 1,
    sync_batch_norm: bool = False,
) -> pd.DataFrame:
    """Train the students of one seed in lockstep, those that are not already there; keep each. Returns all their
    histories.

    training: a name for all of it, which no other one below `folder` has: its checkpoint's.
    arms: name -> training key. A student whose file carries the same key is finished and is not trained again (`build`
    is not even called for it). The others go on from the checkpoint of an interrupted run, if there is one.
    build(name) -> a learner with fresh weights. progress counts epochs of single students (arms x epochs). With each
    student stands the commit at which its training was begun, or taken up again, and the arithmetic of this machine.
    Returns one row per arm and epoch, as `training.fit`, in the order of `arms`.

    processes: how many train the students together; each of them calls this (see `parallel`), and the first one alone
    looks for files and writes them. They may be called for by one that is none of them when all is finished.

    Raises ValueError, one line, for a damaged student or checkpoint file; nothing is overwritten then. Raises
    WrongArithmetic, one line, before anything is trained, where this machine computes a network's gradients wrongly;
    RuntimeError for students that are to be trained by another number of processes than there are.
    """
    folder, seed = Path(folder), batches.seed
    missing = parallel.from_first(lambda: unfinished(folder, arms, seed))
    if missing and processes != parallel.size():
        raise RuntimeError(
            f"{', '.join(missing)} of seed {seed}: not what {processes} processes have left below {folder}; they know "
            "only what the notebooks before have left there"
        )
    checkpoint = folder / "checkpoints" / f"{training}.ckpt"
    keys_file = checkpoint.with_suffix(".json")  # which arms, under which keys, the checkpoint belongs to
    begun = parallel.from_first(lambda: _begun(missing, checkpoint, keys_file))
    if len(missing) < len(arms):
        kept = len(arms) - len(missing)
        progress.skip(f"seed {seed}: {kept} finished", by=kept * schedule.epochs)
    for group in (begun, [name for name in missing if name not in begun]):
        if group:
            if parallel.rank() == 0:
                save_json({name: arms[name] for name in group}, keys_file)
            learners = {name: build(name) for name in group}
            for model in {repr(learner.model): learner.model for learner in learners.values()}.values():
                check_arithmetic(model, batches.image_set.image_shape, batches.batch_size, batches.device, dtype)
            source = source_state()
            history = fit(
                learners,
                batches,
                schedule,
                teacher=teacher,
                validation=validation,
                checkpoint=checkpoint,
                on_epoch=_reporter(progress, schedule.epochs),
                dtype=dtype,
                workers=workers,
                sync_batch_norm=sync_batch_norm,
            )
            if parallel.rank() == 0:
                for name, learner in learners.items():
                    own = source | {"arithmetic": arithmetic.facts(learner.model, batches.device, dtype)}
                    _keep(folder, name, seed, learner, history[history["arm"] == name], arms[name], own)
                checkpoint.unlink()
                keys_file.unlink()
    parallel.wait_for_all()  # for the files of the first
    return pd.concat([read_table(_history_file(folder, name, seed)) for name in arms], ignore_index=True)


def unfinished(folder: Path, arms: Mapping[str, str], seed: int) -> dict[str, str]:
    """Of arms (name -> training key) those whose network of this seed `train_and_keep` has not left in `folder`."""
    return {name: key for name, key in arms.items() if _kept_key(folder, name, seed) != key}


def _begun(missing: Mapping[str, str], checkpoint: Path, keys_file: Path) -> list[str]:
    """Of the missing arms those that the checkpoint holds. It is removed if it holds none."""
    keys = (read_valid(keys_file, dict[str, str]) if checkpoint.exists() else None) or {}
    begun = [name for name, key in missing.items() if keys.get(name) == key]
    if not begun:  # they are of other settings, or of students that are finished: never to be taken up again
        checkpoint.unlink(missing_ok=True)
        keys_file.unlink(missing_ok=True)
    return begun


def _reporter(progress: Progress, epochs: int) -> Callable[[int, pd.DataFrame], None]:
    """Tells `progress` of each epoch; epochs that a checkpoint had done count as kept."""
    told = 0

    def report(epoch: int, rows: pd.DataFrame) -> None:
        nonlocal told
        seed, best = rows["seed"].iloc[0], rows.loc[rows["val_accuracy"].idxmax()]
        if epoch > told + 1:
            progress.skip(f"seed {seed}: {epoch - 1} epochs from the checkpoint", by=(epoch - 1) * len(rows))
        told = epoch
        which = f"{len(rows)} students, best {best['arm']}" if len(rows) > 1 else best["arm"]
        for row in rows[rows["status"] == "failed"].itertuples():
            which = f"{row.arm} FAILED ({row.reason}); {which}"
        progress.advance(
            f"seed {seed} epoch {epoch}/{epochs}: {which} {best['val_accuracy']:.1%} on validation", by=len(rows)
        )

    return report


def _keep(
    folder: Path,
    name: str,
    seed: int,
    learner: Learner,
    history: pd.DataFrame,
    key: str,
    source: Mapping[str, Any],
) -> None:
    history = history.dropna(axis="columns", how="all")
    # The order of the columns that come from `fit` depends on which arms were trained together, after a kill on which
    # of them were left.
    first = [column for column in FIRST_COLUMNS if column in history]
    save_table(history[first + sorted(set(history) - set(first))], _history_file(folder, name, seed))
    last = history.iloc[-1]
    facts = {
        "arm": name,
        "seed": seed,
        "key": key,
        "status": last["status"],
        "val_accuracy": float(last["val_accuracy"]),
        "source": source,
    }
    # Last of all: the student's file is what says that the arm is finished.
    save_model(learner.model, kept_file(folder, name, seed), **facts)
    if isinstance(learner, Distilled):
        learner.close()


def _kept_key(folder: Path, name: str, seed: int) -> str | None:
    """Key of a finished network; None when there is none, or its history is gone."""
    file = kept_file(folder, name, seed)
    whole = file.exists() and _history_file(folder, name, seed).exists()
    return load_model(file)[1].get("key") if whole else None


def _history_file(folder: Path, name: str, seed: int) -> Path:
    return Path(folder) / "histories" / f"{name}-s{seed}.csv"


def split_timings(history: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A history without its timing columns (equal runs give equal bytes), and the timings (arm, seed, epoch, seconds,
    finished).
    """
    return history.drop(columns=TIMING_COLUMNS), history[["arm", "seed", "epoch", *TIMING_COLUMNS]]


def terms_left(history: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """How much of each term is left, relative to the first epoch that had it, since methods have different scales.

    `history` with two more columns: logits_left, and hints_left, the mean over the methods of an arm with several; NaN
    where an arm has no such term in an epoch.
    """
    history = history.copy()
    of_arm = {arm.name: arm for arm in arms}
    for arm_name, rows in history.groupby("arm", sort=False):
        arm = of_arm[arm_name]
        for column, terms in (("logits_left", [arm.logit_loss]), ("hints_left", [hint.method for hint in arm.hints])):
            terms = [term for term in dict.fromkeys(terms) if term in rows]
            if terms:
                first = rows.groupby("seed")[terms].transform("first")
                history.loc[rows.index, column] = (rows[terms] / first).mean(axis="columns")
    return history


def student_table_rows(history: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """One row per arm and seed, from the last epoch: arm, method, strategy, same_as, seed, val_accuracy, status.

    An arm that is the same as another has the other's rows under its own name.
    """
    last = history.sort_values("epoch").groupby(["arm", "seed"], sort=False).tail(1)
    rows = []
    for arm in arms:
        for row in last[last["arm"] == (arm.same_as or arm.name)].sort_values("seed").itertuples():
            rows.append(
                {
                    "arm": arm.name,
                    "method": arm.method,
                    "strategy": arm.strategy,
                    "same_as": arm.same_as,
                    "seed": row.seed,
                    "val_accuracy": row.val_accuracy,
                    "status": row.status,
                }
            )
    return pd.DataFrame(rows)


def log_students(run: StageRun, arms: Sequence[Arm], histories: pd.DataFrame, distillation: Distillation) -> None:
    """A child run in MLflow for every trained student, with what a reader of the compare view groups by. The tag `also`
    names the arms that are the same as its arm.
    """
    params = distillation.params
    for arm in arms:
        if not arm.same_as:
            hint_points = "; ".join(_shown_points(hint, len(arm.hints) > 1) for hint in arm.hints)
            facts = {
                "network": params.student,
                "teacher": params.teacher,
                "method": arm.method,
                "strategy": arm.strategy,
                "logit_loss": arm.logit_loss,
                "hint_points": hint_points or "none",
                "epochs": params.epochs,
            }
            tags = {"also": ", ".join(other.name for other in arms if other.same_as == arm.name) or "none"}
            for seed in params.seeds:
                run.log_trained_model(
                    arm=arm.name, seed=seed, history=histories, params=facts, key=distillation.key(arm), tags=tags
                )


def _shown_points(hint: Hint, named: bool) -> str:
    layers = ", ".join(dict.fromkeys(map(feature_key, hint.pairs)) if hint.redrawn else map(feature_key, hint.pairs))
    return (f"{hint.method}: " if named else "") + (f"{hint.redrawn} drawn of " if hint.redrawn else "") + layers

"""The arms of a study: which students there are, and how each is trained once and kept.

An arm is one way to train the student (method x strategy); with a seed it gives one student. Students of one seed start
from the same weights and see the same batches, so arms are compared in pairs.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from pursuhint_lib.data import Batches
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.hints import HintPair, HintPoints, pair_layers
from pursuhint_lib.learners import Distilled, Hint, balance_hints
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import load_model, save_model, state_hash
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import Progress
from pursuhint_lib.storage import read_json, read_table, run_folder, save_json, save_table
from pursuhint_lib.study import StudyImages, fixed_batches, fresh_network, training_batches, training_facts
from pursuhint_lib.tracking import StageRun
from pursuhint_lib.training import Learner, Schedule, autocast, fit

TIMING_COLUMNS = ["seconds", "finished"]  # the only ones that differ between equal runs; kept in a table of their own


@dataclass(frozen=True)
class Arm:
    """One way to train the student.

    same_as names an earlier arm with the same method and the same pairs (two strategies chose the same layers):
    such an arm is not trained, its results are the other's.
    """

    name: str
    method: str
    strategy: str
    pairs: tuple[HintPair, ...] = ()
    same_as: str = ""


def study_arms(
    hint_points: Mapping[str, HintPoints],
    methods: Sequence[str],
    teacher_table: pd.DataFrame,
    student_table: pd.DataFrame,
) -> list[Arm]:
    """`kd` (no hints), then every method with every strategy, in the order given."""
    arms = [Arm("kd", "kd", "none")]
    for method in methods:
        for strategy, points in hint_points.items():
            pairs = tuple(pair_layers(points, teacher_table, student_table))
            twin = next((arm.name for arm in arms if arm.method == method and arm.pairs == pairs), "")
            arms.append(Arm(f"{method}_{strategy}", method, strategy, pairs, twin))
    return arms


def pair_table(arms: Sequence[Arm], teacher_table: pd.DataFrame, student_table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and hint: arm, hint (from 1), teacher_layer, student_layer, teacher_shape, student_shape
    (CxHxW).
    """
    shapes = {
        role: {row.layer: f"{row.channels}x{row.height}x{row.width}" for row in table.itertuples()}
        for role, table in (("teacher", teacher_table), ("student", student_table))
    }
    rows = [
        {
            "arm": arm.name,
            "hint": number,
            "teacher_layer": pair.teacher_layer,
            "student_layer": pair.student_layer,
            "teacher_shape": shapes["teacher"][pair.teacher_layer],
            "student_shape": shapes["student"][pair.student_layer],
        }
        for arm in arms
        for number, pair in enumerate(arm.pairs, start=1)
    ]
    return pd.DataFrame(
        rows, columns=["arm", "hint", "teacher_layer", "student_layer", "teacher_shape", "student_shape"]
    )


@dataclass(frozen=True)
class Distillation:
    """What all arms of a study share: images, a frozen teacher, the layer tables, the recipe."""

    params: DistillStudents
    images: StudyImages
    teacher: FrozenTeacher
    teacher_table: pd.DataFrame
    student_table: pd.DataFrame
    device: torch.device
    dtype: torch.dtype

    @property
    def schedule(self) -> Schedule:
        """Of every student."""
        p = self.params
        return Schedule(p.schedule, p.epochs, p.learning_rate, p.momentum, p.weight_decay)

    def batches(self, seed: int) -> Batches:
        """What every student of `seed` is shown."""
        return training_batches(self.params, self.images, self.params.batch_size, seed, self.device)

    def learner(self, arm: Arm, seed: int) -> Distilled:
        """A fresh student of `seed` with the arm's hints, weighed as the parameters say.

        With balance "gradient" the weights are set on the first four batches of epoch 0, see `learners.balance_hints`.
        """
        published = METHODS[arm.method].published_weight if arm.pairs else 0.0
        weight = self.params.hint_weights.get(arm.method, published)
        learner = Distilled(
            fresh_network(self.params.student, self.images, seed),
            ce_weight=self.params.ce_weight,
            kd_weight=self.params.kd_weight,
            temperature=self.params.temperature,
            hints=[Hint(arm.method, arm.pairs, weight)] if arm.pairs else [],
            teacher_table=self.teacher_table,
            student_table=self.student_table,
            seed=seed,
        ).to(self.device, memory_format=torch.channels_last)
        if arm.pairs and self.params.balance == "gradient":
            first = list(itertools.islice(self.batches(seed).epoch(0), 4))
            with autocast(self.device, self.dtype):
                observations = [self.teacher.observe(batch.images, layers=learner.teacher_layers) for batch in first]
                balance_hints(learner, first, observations, self.params.hint_share)
        return learner

    def key(self, arm: Arm) -> str:
        """Hash of all that decides the arm's students but the seed, see `training_key`."""
        names = {"student", "ce_weight", "kd_weight", "temperature", "balance", "hint_share", "hint_weights"}
        return training_key(
            method=arm.method,
            pairs=[asdict(pair) for pair in arm.pairs],
            teacher=state_hash(self.teacher.model),
            schedule=asdict(self.schedule),
            **self.params.model_dump(include=names),
            **training_facts(self.params, self.images, self.params.batch_size, self.device, self.dtype),
        )

    def train(self, arms: Sequence[Arm], folder: Path) -> pd.DataFrame:
        """Train every arm that is not `same_as` another, seed by seed in lockstep, and keep the students in `folder`.

        Returns the histories of all arms and seeds; see `train_and_keep` for what is not trained again, and for errors.
        """
        trained = {arm.name: arm for arm in arms if not arm.same_as}
        keys = {name: self.key(arm) for name, arm in trained.items()}
        seeds, epochs = self.params.seeds, self.params.epochs
        progress = Progress(folder, len(seeds) * len(trained) * epochs, "student epochs")
        histories = [
            train_and_keep(
                folder,
                keys,
                lambda name, seed=seed: self.learner(trained[name], seed),
                self.batches(seed),
                self.schedule,
                teacher=self.teacher,
                validation=fixed_batches(self.params, self.images, "validation", self.device),
                progress=progress,
                dtype=self.dtype,
                workers=self.params.workers,
            )
            for seed in seeds
        ]
        return pd.concat(histories, ignore_index=True)


def training_key(**facts: Any) -> str:
    """Hash of everything that decides a trained network: the given facts (JSON-able), the training code, torch's
    version.
    """
    content = json.dumps(facts | {"code": _code_hash(), "torch": torch.__version__}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _code_hash() -> str:
    here = Path(__file__).parent
    names = ["arms", "data", "features", "hints", "learners", "losses", "methods", "study", "training"]
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
            f"{row.arm} seed {row.seed}: the loss was no longer finite in epoch {row.epoch}; lower {parameter}, delete its "
            "file below networks/ and run again"
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
    arms: Mapping[str, str],
    build: Callable[[str], Learner],
    batches: Batches,
    schedule: Schedule,
    *,
    teacher: FrozenTeacher | None = None,
    validation: Batches,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    workers: int = 1,
) -> pd.DataFrame:
    """Train the students of one seed in lockstep, those that are not already there; keep each. Returns all their
    histories.

    arms: name -> training key. A student whose file carries the same key is finished and is not trained again (`build`
    is not even called for it). The others go on from the checkpoint of an interrupted run, if there is one.
    build(name) -> a learner with fresh weights. progress counts epochs of single students (arms x epochs). Returns
    one row per arm and epoch, as `training.fit`, in the order of `arms`.

    Raises ValueError, one line, for a damaged student or checkpoint file; nothing is overwritten then.
    """
    folder, seed = Path(folder), batches.seed
    missing = {name: key for name, key in arms.items() if _kept_key(folder, name, seed) != key}
    checkpoint = folder / "checkpoints" / f"s{seed}.ckpt"
    keys_file = checkpoint.with_suffix(".json")  # which arms, under which keys, the checkpoint belongs to
    begun = read_json(keys_file) if checkpoint.exists() and keys_file.exists() else {}
    begun = [name for name, key in missing.items() if begun.get(name) == key]
    if not begun:
        checkpoint.unlink(missing_ok=True)  # of other settings: it can never be taken up again
    if len(missing) < len(arms):
        kept = len(arms) - len(missing)
        progress.skip(f"seed {seed}: {kept} finished", by=kept * schedule.epochs)
    for group in (begun, [name for name in missing if name not in begun]):
        if group:
            save_json({name: arms[name] for name in group}, keys_file)
            learners = {name: build(name) for name in group}
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
            )
            for name, learner in learners.items():
                _keep(folder, name, seed, learner, history[history["arm"] == name], arms[name])
            checkpoint.unlink()
            keys_file.unlink()
    return pd.concat([read_table(_history_file(folder, name, seed)) for name in arms], ignore_index=True)


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
        progress.advance(
            f"seed {seed} epoch {epoch}/{epochs}: {which} {best['val_accuracy']:.1%} on validation", by=len(rows)
        )

    return report


def _keep(folder: Path, name: str, seed: int, learner: Learner, history: pd.DataFrame, key: str) -> None:
    save_table(history.dropna(axis="columns", how="all"), _history_file(folder, name, seed))
    last = history.iloc[-1]
    facts = {
        "arm": name,
        "seed": seed,
        "key": key,
        "status": last["status"],
        "val_accuracy": float(last["val_accuracy"]),
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
    """A child run in MLflow for every trained student, with what a reader of the compare view groups by."""
    params = distillation.params
    for arm in arms:
        if not arm.same_as:
            hint_points = ", ".join(pair.teacher_layer for pair in arm.pairs)
            facts = {
                "network": params.student,
                "teacher": params.teacher,
                "method": arm.method,
                "strategy": arm.strategy,
            }
            facts |= {"hint_points": hint_points or "none", "epochs": params.epochs}
            for seed in params.seeds:
                run.log_trained_model(
                    arm=arm.name, seed=seed, history=histories, params=facts, key=distillation.key(arm)
                )

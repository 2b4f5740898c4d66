"""The arms of a study: which students there are, and how each is trained once and kept.

An arm is one way to train the student (method x strategy); with a seed it gives one student. Students of one seed start
from the same weights and see the same batches, so arms are compared in pairs.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from pursuhint_lib.models import load_model, save_model
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import Progress
from pursuhint_lib.storage import read_json, read_table, run_folder, save_json, save_table
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
    hint_points: Mapping[str, HintPoints], methods: Sequence[str], teacher_table: pd.DataFrame, student_table: pd.DataFrame
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
    """One row per arm and hint: arm, hint (from 1), teacher_layer, student_layer, teacher_shape, student_shape (CxHxW)."""
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
    return pd.DataFrame(rows, columns=["arm", "hint", "teacher_layer", "student_layer", "teacher_shape", "student_shape"])


def arm_learner(
    arm: Arm,
    student: nn.Module,
    params: DistillStudents,
    *,
    teacher: FrozenTeacher,
    teacher_table: pd.DataFrame,
    student_table: pd.DataFrame,
    batches: Batches,
    dtype: torch.dtype,
) -> Distilled:
    """The learner of an arm: `student` (fresh weights) with the arm's hints, weighed as the parameters say.

    With balance "gradient" the weights are set on the first four batches of epoch 0, see `learners.balance_hints`.
    """
    published = METHODS[arm.method].published_weight if arm.pairs else 0.0
    weight = params.hint_weights.get(arm.method, published)
    learner = Distilled(
        student,
        ce_weight=params.ce_weight,
        kd_weight=params.kd_weight,
        temperature=params.temperature,
        hints=[Hint(arm.method, arm.pairs, weight)] if arm.pairs else [],
        teacher_table=teacher_table,
        student_table=student_table,
        seed=batches.seed,
    ).to(batches.device, memory_format=torch.channels_last)
    if arm.pairs and params.balance == "gradient":
        first = [batch for batch, _ in zip(batches.epoch(0), range(4), strict=False)]
        with autocast(batches.device, dtype):
            observations = [teacher.observe(batch.images, layers=list(learner.teacher_layers)) for batch in first]
            balance_hints(learner, first, observations, params.hint_share)
    return learner


def training_key(**facts: Any) -> str:
    """Hash of everything that decides a trained network: the given facts (JSON-able), the training code, torch's version."""
    content = json.dumps(facts | {"code": _code_hash(), "torch": torch.__version__}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _code_hash() -> str:
    here = Path(__file__).parent
    names = ["arms", "data", "features", "hints", "learners", "losses", "methods", "training"]
    files = [here / f"{name}.py" for name in names] + sorted((here / "models").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def kept_file(folder: Path, name: str, seed: int) -> Path:
    """Where `train_and_keep` leaves a finished network: ``<folder>/networks/<name>-s<seed>.safetensors``."""
    return Path(folder) / "networks" / f"{name}-s{seed}.safetensors"


def load_teacher(study: str) -> nn.Module:
    """The teacher that notebook 01 trained. Raises what `storage.read_table` and `models.load_model` raise."""
    folder = run_folder(study, "01_train_teacher")
    baselines = read_table(folder / "baselines.csv")
    seed = baselines.loc[baselines["model"] == "teacher", "seed"].iloc[0]
    return load_model(kept_file(folder, "teacher", seed))[0]


def load_student(study: str, arm: str, seed: int) -> nn.Module:
    """A student of a study: "unaided" from notebook 01, any other arm from notebook 04. Raises what `models.load_model` raises."""
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
) -> pd.DataFrame:
    """Train the students of one seed in lockstep, those that are not already there; keep each. Returns all their histories.

    arms: name -> training key. A student whose file carries the same key is finished and is not trained again (`build`
    is not even called for it). The others go on from the checkpoint of an interrupted run, if there is one.
    build(name) -> a learner with fresh weights. progress counts epochs of single students (arms x epochs). Returns one row
    per arm and epoch, as `training.fit`, in the order of `arms`.

    Raises ValueError, one line, for a damaged student or checkpoint file; nothing is overwritten then.
    """
    folder, seed = Path(folder), batches.seed
    missing = {name: key for name, key in arms.items() if _kept_key(kept_file(folder, name, seed)) != key}
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
        progress.advance(f"seed {seed} epoch {epoch}/{epochs}: {which} {best['val_accuracy']:.1%} on validation", by=len(rows))

    return report


def _keep(folder: Path, name: str, seed: int, learner: Learner, history: pd.DataFrame, key: str) -> None:
    save_table(history.dropna(axis="columns", how="all"), _history_file(folder, name, seed))
    last = history.iloc[-1]
    facts = {"arm": name, "seed": seed, "key": key, "status": last["status"], "val_accuracy": float(last["val_accuracy"])}
    # Last of all: the student's file is what says that the arm is finished.
    save_model(learner.model, kept_file(folder, name, seed), **facts)
    if isinstance(learner, Distilled):
        learner.close()


def _kept_key(file: Path) -> str | None:
    return load_model(file)[1].get("key") if file.exists() else None


def _history_file(folder: Path, name: str, seed: int) -> Path:
    return Path(folder) / "histories" / f"{name}-s{seed}.csv"


def split_timings(history: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A history without its timing columns (equal runs give equal bytes), and the timings (arm, seed, epoch, seconds, finished)."""
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

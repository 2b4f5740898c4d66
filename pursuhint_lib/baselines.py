"""What notebook 01 trains: the teacher, others of its kind, and for every seed a student that has no teacher."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from pursuhint_lib import parallel
from pursuhint_lib.arms import check_trained, kept_file, train_and_keep, training_key, unfinished
from pursuhint_lib.jobs import Job
from pursuhint_lib.launch import train_together
from pursuhint_lib.learners import Supervised
from pursuhint_lib.models import load_model
from pursuhint_lib.params import TrainTeacher
from pursuhint_lib.pretrained import keep_pretrained, load_weights
from pursuhint_lib.progress import Progress
from pursuhint_lib.study import StudyImages, fixed_batches, fresh_network, training_batches, training_facts
from pursuhint_lib.tracking import SpooledRun, StageRun
from pursuhint_lib.training import Schedule, torch_threads


@dataclass(frozen=True)
class Baselines:
    """Images and recipes of the networks that learn from labels alone. Each is trained once and kept, see
    `arms.train_and_keep`; by several processes, where the parameters ask for them, see `launch.train_together`.
    """

    params: TrainTeacher
    images: StudyImages
    device: torch.device
    dtype: torch.dtype

    @property
    def teachers(self) -> dict[str, int]:
        """Name -> seed of its initial weights: "teacher", then those that never teach, "teacher_1", ... All see the
        same batches.
        """
        names = ["teacher"] + [f"teacher_{k}" for k in range(1, self.params.other_teachers + 1)]
        return {name: self.params.teacher_seed + k for k, name in enumerate(names)}

    @property
    def teacher_schedule(self) -> Schedule:
        """Of every teacher."""
        p = self.params
        return Schedule(p.schedule, p.teacher_epochs, p.teacher_learning_rate, p.momentum, p.weight_decay)

    @property
    def student_schedule(self) -> Schedule:
        """Of every student."""
        p = self.params
        return Schedule(p.schedule, p.epochs, p.learning_rate, p.momentum, p.weight_decay)

    def train_teachers(self, folder: Path, report_to: Path | None = None) -> pd.DataFrame:
        """Train the teachers in lockstep and keep them in `folder`, with a share of the threads for each of the
        workers. Where the parameters name weights, the teacher is taken as it is. Returns their histories.

        report_to: where the heartbeat is written, if not in `folder`. Raises ValueError, one line, for a teacher that
        failed, and what `pretrained.load_weights` and `arms.train_and_keep` raise.
        """
        p, histories, seeds = self.params, [], self.teachers
        with torch_threads(max(1, p.threads // (p.workers * p.processes))):
            if p.teacher_weights:
                del seeds["teacher"]
                if parallel.size() == 1:
                    network = load_weights(fresh_network(p.teacher, self.images, p.teacher_seed), p.teacher_weights)
                    histories.append(keep_pretrained(folder, network, p.teacher_seed, self._validation(), self.dtype))
            if seeds:
                schedule, facts = self.teacher_schedule, self._facts(p.teacher)
                recipe = {"network": p.teacher, "schedule": asdict(schedule)}
                keys = {name: training_key(seed=seed, **recipe, **facts) for name, seed in seeds.items()}
                if p.processes > parallel.size() and unfinished(folder, keys, p.teacher_seed):
                    train_together(Job("01_train_teacher", "teachers"), p, folder, report_to or folder)
                history = train_and_keep(
                    folder,
                    "teachers",
                    keys,
                    lambda name: Supervised(fresh_network(p.teacher, self.images, seeds[name])),
                    training_batches(p, self.images, p.batch_size, p.teacher_seed, self.device),
                    schedule,
                    validation=self._validation(),
                    progress=Progress(report_to or folder, p.teacher_epochs * len(seeds), "teachers"),
                    dtype=self.dtype,
                    workers=p.workers,
                    processes=p.processes,
                    sync_batch_norm=p.sync_batch_norm,
                )
                if parallel.size() == 1:  # of a group, whoever has started it will say so
                    check_trained(history, "teacher_learning_rate")
                histories.append(history)
        return pd.concat(histories, ignore_index=True)

    def train_unaided(
        self, folder: Path, seeds: Sequence[int] | None = None, report_to: Path | None = None
    ) -> pd.DataFrame:
        """Train the student without a teacher, once for each of `seeds` (if not given, all), and keep it in `folder`.
        Returns the histories; see `train_teachers`.
        """
        p, seeds = self.params, seeds or self.params.seeds
        histories = []
        with torch_threads(max(1, p.threads // p.processes)):
            schedule = asdict(self.student_schedule)
            key = training_key(network=p.student, schedule=schedule, **self._facts(p.student))
            if p.processes > parallel.size() and any(unfinished(folder, {"unaided": key}, seed) for seed in seeds):
                name = f"unaided-s{seeds[0]}" if len(seeds) == 1 else "unaided"
                train_together(Job("01_train_teacher", name, tuple(seeds)), p, folder, report_to or folder)
            progress = Progress(report_to or folder, p.epochs * len(seeds), "unaided students")
            for seed in seeds:
                history = train_and_keep(
                    folder,
                    f"unaided-s{seed}",
                    {"unaided": key},
                    lambda _, seed=seed: Supervised(fresh_network(p.student, self.images, seed)),
                    training_batches(p, self.images, p.batch_size, seed, self.device),
                    self.student_schedule,
                    validation=self._validation(),
                    progress=progress,
                    dtype=self.dtype,
                    processes=p.processes,
                    sync_batch_norm=p.sync_batch_norm,
                )
                if parallel.size() == 1:
                    check_trained(history, "learning_rate")
                histories.append(history)
        return pd.concat(histories, ignore_index=True)

    def log(self, run: StageRun | SpooledRun, folder: Path, histories: pd.DataFrame) -> None:
        """The images, and a child run in MLflow for every network of these histories, as `folder` keeps it."""
        for name, of_set in self.images.facts()["sets"].items():
            run.log_dataset(f"{self.params.data} {name}", of_set["digest"], name)
        for row in histories[["arm", "seed"]].drop_duplicates().itertuples():
            network = self.params.student if row.arm == "unaided" else self.params.teacher
            run.log_trained_model(
                arm=row.arm,
                seed=row.seed,
                history=histories,
                params={"network": network, "method": row.arm, "strategy": "none"},
                key=load_model(kept_file(folder, row.arm, row.seed))[1]["key"],
            )

    def _validation(self):
        return fixed_batches(self.params, self.images, "validation", self.device)

    def _facts(self, network: str) -> dict:
        return training_facts(self.params, self.images, network, self.device, self.dtype)

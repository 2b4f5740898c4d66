"""A study's work in pieces that can be done apart, each by a process of its own.

A job trains some of the networks of a stage, or looks into one of its teachers, with the stage's own parameters and
functions, and keeps what it made where the stage's notebook looks for it. So the notebook finds it finished, whoever
did it, and a training that is begun again goes on from its checkpoint.
"""

import fcntl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import read_table, run_folder


@dataclass(frozen=True)
class Job:
    """A piece of one stage. name: "teachers", "unaided-s0", "teacher_1" (the teacher that it looks into) or
    "students-s0". seeds: those that it trains; of the teachers none. arms: some of the study's, or none for all.
    """

    stage: str
    name: str
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()


def jobs_of(stage: str, params: Mapping[str, Any]) -> list[Job]:
    """The jobs of a stage, in the order in which they are best begun; none for a stage that is one piece.

    params: the stage's parameters, as JSON has them. Raises FileNotFoundError, one line, where notebook 02 is asked for
    and notebook 01 has left nothing.
    """
    if stage == "01_train_teacher":
        return [Job(stage, "teachers"), *(Job(stage, f"unaided-s{seed}", (seed,)) for seed in params["seeds"])]
    if stage == "02_profile_layers":
        return [Job(stage, name) for name in _other_teachers(params["study"])]
    if stage == "04_distill_students":
        return [Job(stage, f"students-s{seed}", (seed,)) for seed in params["seeds"]]
    return []


def job_folder(study: str, job: Job) -> Path:
    """``runs/<study>/jobs/<stage>/<name>/``: its heartbeat, and what its process leaves beside networks."""
    return run_folder(study, f"jobs/{job.stage}/{job.name}")


def run_job(job: Job, params: Mapping[str, Any], folder: Path, spool: Path | None = None) -> list[Path]:
    """Do what is not done yet. Needs what the stages before have left. Returns the files that it keeps.

    params: the stage's parameters, as JSON has them. folder: the job's own, for its heartbeat. spool: file in which the
    trained networks are logged, see `tracking_spool`; none, if not given. Raises ParameterError, and what the stage's
    notebook would raise.
    """
    # Here, so that a driver that only hands out jobs stays light.
    import torch

    from pursuhint_lib.training import resolve_device, resolve_precision

    params = STAGES[job.stage].model_validate(params)
    device = resolve_device(params.device)
    dtype = resolve_precision(params.precision, device)
    images = _images(params)
    if job.stage == "02_profile_layers":
        from pursuhint_lib.teachers import keep_similarities

        torch.set_num_threads(params.threads)
        return [keep_similarities(params, images, device, job.name, _other_teachers(params.study)[job.name], folder)]

    from pursuhint_lib.arms import kept_file, load_distillation, log_students
    from pursuhint_lib.baselines import Baselines
    from pursuhint_lib.tracking import SpooledRun

    torch.set_num_threads(max(1, params.threads // (params.workers * params.processes)))
    if spool:
        spool.unlink(missing_ok=True)  # of an earlier try
    run = SpooledRun(params.study, job.stage, "", spool) if spool else None
    stage_folder = run_folder(params.study, job.stage)
    if job.stage == "01_train_teacher":
        baselines = Baselines(params, images, device, dtype)
        if job.seeds:
            history = baselines.train_unaided(stage_folder, job.seeds, folder)
        else:
            history = baselines.train_teachers(stage_folder, folder)
        if run:
            baselines.log(run, stage_folder, history)
    else:
        distillation, arms = load_distillation(params, images, device, dtype)
        asked = [arm for arm in arms if not job.arms or arm.name in job.arms]
        history = distillation.train(asked, stage_folder, job.seeds, folder)
        if run:
            for name, of_set in images.facts()["sets"].items():
                if name != "test":  # which training does not look at
                    run.log_dataset(f"{params.data} {name}", of_set["digest"], name)
            own = replace(distillation, params=params.model_copy(update={"seeds": list(job.seeds)}))
            log_students(run, asked, history, own)
    trained = history[["arm", "seed"]].drop_duplicates()
    return [kept_file(stage_folder, row.arm, row.seed) for row in trained.itertuples()]


def _other_teachers(study: str) -> dict[str, int]:
    """Name -> seed of the teachers that never teach."""
    table = read_table(run_folder(study, "01_train_teacher") / "other_teachers.csv")
    return dict(zip(table["model"], table["seed"].tolist()))


def _images(params: Any) -> Any:
    """`study.study_images`, by one job after the other where the first of them may have to download."""
    from pursuhint_lib.study import study_images

    if not params.data.startswith("cifar"):
        return study_images(params)
    with open(run_folder(params.study, "jobs") / ".images", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return study_images(params)

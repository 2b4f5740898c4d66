"""A study's training in pieces that can be done apart, each by a process of its own.

A job trains some of the networks of a stage, with the stage's own parameters and functions, and keeps them where the
stage's notebook looks for them. So the notebook finds them finished, whoever trained them, and a job that is begun
again goes on from its checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pursuhint_lib.params import STAGES
from pursuhint_lib.storage import run_folder


@dataclass(frozen=True)
class Job:
    """Some of the networks of one stage. name: "teachers", "unaided-s0" or "students-s0". seeds: those that it trains;
    of the teachers none. arms: some of the study's, or none for all.
    """

    stage: str
    name: str
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()


def jobs_of(stage: str, params: Mapping[str, Any]) -> list[Job]:
    """The jobs of a stage, in the order in which they are best begun; none for a stage that trains nothing.

    params: the stage's parameters, as JSON has them.
    """
    if stage == "01_train_teacher":
        return [Job(stage, "teachers"), *(Job(stage, f"unaided-s{seed}", (seed,)) for seed in params["seeds"])]
    if stage == "04_distill_students":
        return [Job(stage, f"students-s{seed}", (seed,)) for seed in params["seeds"]]
    return []


def job_folder(study: str, job: Job) -> Path:
    """``runs/<study>/jobs/<stage>/<name>/``: its heartbeat, and what its process leaves beside networks."""
    return run_folder(study, f"jobs/{job.stage}/{job.name}")


def run_job(job: Job, params: Mapping[str, Any], report_to: Path) -> None:
    """Train what is not there yet. Needs what the stages before have left.

    params: the stage's parameters, as JSON has them. report_to: the heartbeat's folder. Raises ParameterError, and what
    the stage's notebook would raise.
    """
    # Here, so that a driver that only hands out jobs stays light.
    import torch

    from pursuhint_lib.arms import load_distillation
    from pursuhint_lib.baselines import Baselines
    from pursuhint_lib.study import study_images
    from pursuhint_lib.training import resolve_device, resolve_precision

    params = STAGES[job.stage].model_validate(params)
    device = resolve_device(params.device)
    dtype = resolve_precision(params.precision, device)
    torch.set_num_threads(max(1, params.threads // (params.workers * params.processes)))
    folder, images = run_folder(params.study, job.stage), study_images(params)
    if job.stage == "01_train_teacher":
        baselines = Baselines(params, images, device, dtype)
        if job.seeds:
            baselines.train_unaided(folder, job.seeds, report_to)
        else:
            baselines.train_teachers(folder, report_to)
    else:
        distillation, arms = load_distillation(params, images, device, dtype)
        distillation.train([arm for arm in arms if arm.name in job.arms or not job.arms], folder, job.seeds, report_to)

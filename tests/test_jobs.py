"""Pieces of a study's training: done apart, they leave what the notebooks would have."""

import json
import subprocess
import sys
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from pursuhint_lib.arms import load_distillation
from pursuhint_lib.baselines import Baselines
from pursuhint_lib.features import layer_table
from pursuhint_lib.hints import select_hint_points
from pursuhint_lib.jobs import Job, job_folder, jobs_of, run_job
from pursuhint_lib.models import candidate_layers
from pursuhint_lib.params import DistillStudents, ProfileLayers, TrainTeacher
from pursuhint_lib.progress import read_progress
from pursuhint_lib.storage import read_table, run_folder, save_json, save_table
from pursuhint_lib.study import fresh_network, probe_batches, study_images
from pursuhint_lib.teachers import teacher_similarities

CPU, F32 = torch.device("cpu"), torch.float32
SMALL = {"teacher": "resnet8_w8", "student": "resnet8_w4", "epochs": 1, "seeds": [0, 3], "validation_per_class": 100}
FIRST, SECOND, FOURTH = "01_train_teacher", "02_profile_layers", "04_distill_students"


def parameters(model, study):
    return model(study=study, **SMALL)


def files(study, stage):
    folder = run_folder(study, stage)
    kept = sorted([*folder.glob("networks/*"), *folder.glob("histories/*")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept if path.suffix == ".safetensors"}


def lay_out(study):
    """What notebooks 01 to 03 leave that training the students needs."""
    params = parameters(TrainTeacher, study)
    images = study_images(params)
    Baselines(params, images, CPU, F32).train_teachers(run_folder(study, FIRST))
    save_table(pd.DataFrame([{"model": "teacher", "seed": 0}]), run_folder(study, FIRST) / "baselines.csv")
    for role in ("teacher", "student"):
        network = fresh_network(getattr(params, role), images, 0)
        table = layer_table(network, candidate_layers(network), images.shape)
        save_table(table, run_folder(study, "02_profile_layers") / f"layers_{role}.csv")
    points = select_hint_points("stage_ends", None, table, 3)
    save_json({"stage_ends": asdict(points)}, run_folder(study, "03_cluster_layers") / "hint_points.json")


def test_the_jobs_of_a_stage_name_each_network_once():
    params = parameters(DistillStudents, "s").model_dump(mode="json")
    assert jobs_of(FOURTH, params) == [Job(FOURTH, "students-s0", (0,)), Job(FOURTH, "students-s3", (3,))]
    jobs = jobs_of(FIRST, params | {"teacher_seed": 3})
    assert [job.name for job in jobs] == ["teachers", "unaided-s0", "unaided-s3"]
    assert jobs_of("03_cluster_layers", params) == []


def test_a_teacher_that_was_looked_into_apart_gives_the_notebook_the_same_bytes(home):
    params = parameters(TrainTeacher, "s")
    images = study_images(params)
    Baselines(params, images, CPU, F32).train_teachers(run_folder("s", FIRST))
    save_table(pd.DataFrame([{"model": "teacher_1", "seed": 0}]), run_folder("s", FIRST) / "other_teachers.csv")
    params = ProfileLayers(study="s", teacher=SMALL["teacher"], validation_per_class=100)
    probe = probe_batches(params, images, params.probe_images, CPU)

    def found(params=params):
        tables = teacher_similarities(params, images, probe, "teacher_1", 0)
        return {metric: table.to_csv() for metric, table in tables.items()}

    alone = found()
    (job,) = jobs_of(SECOND, params.model_dump(mode="json"))
    (kept,) = run_job(job, params.model_dump(mode="json"), job_folder("s", job))
    assert job == Job(SECOND, "teacher_1") and kept == job_folder("s", job) / "similarities.csv"
    assert found() == alone and list(alone) == params.similarity_metrics
    table = read_table(kept)
    table.iloc[0, 3] = 0.25
    save_table(table, kept)
    taken = found()
    assert taken["r2_cca"] != alone["r2_cca"] and taken["rbf_cka"] == alone["rbf_cka"]  # it was not computed again
    assert found(params.model_copy(update={"noise": 0.4})) == alone  # made from other images: not taken


def test_a_table_reads_back_bit_for_bit(tmp_path):
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    table = pd.DataFrame({"x": [*values, 5e-324, 1 / 3, 1e23, 0.1 + 0.2]})
    assert read_table(save_table(table, tmp_path / "t.csv")).equals(table)


def test_jobs_of_the_first_stage_in_any_order_leave_the_networks_of_the_notebook(home):
    whole = Baselines(parameters(TrainTeacher, "whole"), study_images(parameters(TrainTeacher, "whole")), CPU, F32)
    whole.train_teachers(run_folder("whole", FIRST))
    whole.train_unaided(run_folder("whole", FIRST))
    params = parameters(TrainTeacher, "apart").model_dump(mode="json")
    for job in reversed(jobs_of(FIRST, params)):
        kept = run_job(job, params, job_folder("apart", job), job_folder("apart", job) / "spool")
        assert kept and all(path.exists() for path in kept)
        logged = [json.loads(line) for line in (job_folder("apart", job) / "spool").read_text().splitlines()]
        assert [line["call"] for line in logged] == ["log_dataset"] * 3 + ["log_trained_model"] * len(kept)
        heartbeat = read_progress(job_folder("apart", job))
        assert heartbeat["done"] == heartbeat["total"]
    assert files("apart", FIRST) == files("whole", FIRST) and len(files("whole", FIRST)) == 4


def test_jobs_of_the_students_leave_those_of_the_notebook_and_nothing_is_trained_twice(home):
    for study in ("whole", "apart"):
        lay_out(study)
    params = parameters(DistillStudents, "whole")
    distillation, arms = load_distillation(params, study_images(params), CPU, F32)
    histories = distillation.train(arms, run_folder("whole", FOURTH))
    params = parameters(DistillStudents, "apart")
    for job in reversed(jobs_of(FOURTH, params.model_dump(mode="json"))):
        spool = job_folder("apart", job) / "spool"
        kept = run_job(job, params.model_dump(mode="json"), job_folder("apart", job), spool)
        logged = [json.loads(line)["arguments"] for line in spool.read_text().splitlines()]
        assert [(line["arm"], line["seed"]) for line in logged if "arm" in line] == [
            (path.stem.rpartition("-s")[0], *job.seeds) for path in kept
        ]
    assert files("apart", FOURTH) == files("whole", FOURTH) and len(files("whole", FOURTH)) == 4
    before = {path: path.stat().st_mtime_ns for path in run_folder("apart", FOURTH).glob("networks/*")}
    distillation, arms = load_distillation(params, study_images(params), CPU, F32)
    again = distillation.train(arms, run_folder("apart", FOURTH))
    numbers = ["arm", "seed", "epoch", "loss", "at", "val_loss"]
    assert again[numbers].equals(histories[numbers])
    assert before == {path: path.stat().st_mtime_ns for path in run_folder("apart", FOURTH).glob("networks/*")}


def test_a_job_trains_the_arms_that_it_names_alone(home):
    lay_out("some")
    params = parameters(DistillStudents, "some").model_dump(mode="json")
    job = Job(FOURTH, "one", (3,), ("kd",))
    run_job(job, params, job_folder("some", job))
    assert list(files("some", FOURTH)) == ["networks/kd-s3.safetensors"]


def test_a_job_refuses_parameters_that_are_not_its_stage_s(home):
    params = parameters(DistillStudents, "s").model_dump(mode="json")
    with pytest.raises(ValueError, match="methods"):
        run_job(Job(FIRST, "teachers"), params, home)


def test_a_job_s_process_does_without_mlflow():
    modules = "arms, baselines, fanout, jobs, teachers, tracking, worker"
    code = f"import sys; from pursuhint_lib import {modules}; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

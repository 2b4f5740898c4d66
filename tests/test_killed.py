"""Killed with SIGKILL at random moments, a study goes on from there: it ends with the bytes of one that was left alone,
and no finished student is trained twice.

Two kills by default; ``PURSUHINT_KILLS=10`` in the environment asks for ten.
"""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from pursuhint_lib.arms import TIMING_COLUMNS, Distillation, kept_file, split_timings, study_arms
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPoints
from pursuhint_lib.models import candidate_layers
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.storage import save_table
from pursuhint_lib.study import fresh_network, study_images

KILLS = int(os.environ.get("PURSUHINT_KILLS", "2"))
PARAMS = DistillStudents(
    study="killed",
    teacher="resnet8_w8",
    student="resnet8_w4",
    methods=["at", "crd", "ft+ofd", "dkd"],  # banks, a pre-stage, running margins, a warm-up: what a kill could lose
    seeds=[0, 1],
    epochs=3,
    n_classes=4,
    batch_size=64,
)
N_ARMS = 8  # kd, dkd, and three methods with two choices of layers
POINTS = {
    "all": HintPoints("all", ["stage1.0", "stage2.0", "stage3.0"]),
    "last": HintPoints("last", ["stage3.0"]),
}


def small_study():
    """Its Distillation and its arms."""
    torch.set_num_threads(1)
    images = study_images(PARAMS)
    teacher, student = (fresh_network(name, images, 5) for name in (PARAMS.teacher, PARAMS.student))
    tables = [layer_table(network, candidate_layers(network), images.shape) for network in (teacher, student)]
    frozen = FrozenTeacher(teacher, list(tables[0]["layer"]))
    distillation = Distillation(PARAMS, images, frozen, *tables, torch.device("cpu"), torch.float32)
    return distillation, study_arms(POINTS, PARAMS.methods, *tables)


def run(folder, ready):
    """The whole study, as a process of its own does it. `ready` is set when the training is about to begin."""
    distillation, arms = small_study()
    ready.set()
    histories = distillation.train(arms, folder)
    save_table(split_timings(histories)[0], folder / "history.csv")


def begun(folder):
    """The process that runs the study, which is about to train."""
    # A server imports everything once (torch._dynamo is what the first optimizer imports) and makes each process a copy
    # of itself. It has computed nothing, so every process is as good as new.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pursuhint_lib.arms", "sklearn.datasets", "torch._dynamo"])
    ready = context.Event()
    process = context.Process(target=run, args=(folder, ready))
    process.start()
    assert ready.wait(120)
    return process


def finished(process):
    process.join()
    assert process.exitcode == 0


def unfinished_files(folder):
    return list(folder.rglob(".*.partial*"))


def students(folder):
    """When and in which file each student was written."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("networks/[!.]*")}


def contents(folder):
    """All files that a study leaves but its heartbeat: their bytes, of a history the cells that are no timings."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    files -= {folder / "progress.json", *unfinished_files(folder)}
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path):
    if path.parent.name != "histories":
        return path.read_bytes()
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    told = [column for column, name in enumerate(rows[0]) if name not in TIMING_COLUMNS]
    return [[row[column] for column in told] for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder of the whole study, and how long its training took, in seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = begun(folder)
    start = time.perf_counter()
    finished(process)
    return folder, time.perf_counter() - start


def anything(folder):
    return True


def a_file_is_being_written(folder):
    return bool(unfinished_files(folder))


def some_students_of_a_seed_are_kept(folder):
    return len(students(folder)) % N_ARMS > 0


def an_epoch_is_done(folder):
    return any(folder.glob("checkpoints/students-s?.ckpt")) and not some_students_of_a_seed_are_kept(folder)


WAITED_FOR = [some_students_of_a_seed_are_kept, an_epoch_is_done, a_file_is_being_written, anything]


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_a_random_moment_it_ends_with_the_same_bytes_and_trains_no_student_twice(undisturbed, tmp_path, kill):
    whole, duration = undisturbed
    moment = (kill + random.Random(kill).random()) / KILLS * duration  # each in a part of the run of its own
    event = WAITED_FOR[kill % len(WAITED_FOR)]
    while True:
        folder = tmp_path / f"after {moment:.3f} s"
        process = begun(folder)
        time.sleep(moment)
        while process.is_alive() and not event(folder):
            time.sleep(0.0005)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
        moment /= 2  # it was at its end already

    kept, unfinished = students(folder), len(unfinished_files(folder))
    print(f"{event.__name__}, {moment:.2f} of {duration:.2f} s: {len(kept)} students, {unfinished} unfinished files")
    finished(begun(folder))
    assert {path: facts for path, facts in students(folder).items() if path in kept} == kept
    assert contents(folder) == contents(whole)


def test_the_whole_study_keeps_every_student_and_no_checkpoint(undisturbed):
    folder, _ = undisturbed
    _, arms = small_study()
    networks = {kept_file(folder, arm.name, seed) for arm in arms for seed in PARAMS.seeds}
    assert len(arms) == N_ARMS and len(networks) == 2 * N_ARMS and set(students(folder)) == networks
    assert len(contents(folder)) == 2 * len(networks) + 1 and not list(folder.glob("checkpoints/*"))


def test_killed_after_the_last_student_of_a_seed_it_clears_away_what_is_left(undisturbed, tmp_path):
    whole, _ = undisturbed
    folder = shutil.copytree(whole, tmp_path / "cut")
    (folder / "checkpoints" / "students-s0.json").write_text("{}")  # the checkpoint itself goes first
    (folder / "networks" / ".kd-s0.1.partial.safetensors").write_bytes(b"half a studen")
    kept = students(folder)
    finished(begun(folder))
    assert students(folder) == kept and contents(folder) == contents(whole)

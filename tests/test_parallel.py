"""Networks that several processes train together: they are those of one process, whoever of the processes dies.

Two processes are made once and do everything that needs two; what they made is then compared with one process's. All is
computed in float64, in which "the same up to rounding" leaves no room for an error in the method.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time

import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist

from pursuhint_lib import deaths, parallel
from pursuhint_lib.arms import Distillation, kept_file, split_timings, study_arms
from pursuhint_lib.data import Batches
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPair, HintPoints, select_hint_points
from pursuhint_lib.jobs import Job, job_folder, run_job
from pursuhint_lib.launch import _what_died, train_together
from pursuhint_lib.learners import Distilled, Hint
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import candidate_layers, save_model
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import read_progress
from pursuhint_lib.storage import run_folder, save_json, save_table
from pursuhint_lib.study import fresh_network, study_images, training_facts
from pursuhint_lib.training import Schedule, fit

CPU = torch.device("cpu")
FOURTH = "04_distill_students"
PARAMS = DistillStudents(
    study="together", teacher="resnet8_w8", student="resnet8_w4", seeds=[0], n_classes=4, epochs=12, batch_size=64
)
BATCH = 16
RELATIONAL = {"sp", "cc", "rkd", "pkt", "dist", "dist_std"}  # relate images of a batch to each other: see the part only
OTHERS = [name for name in METHODS if name not in ("at", "fitnet", "crd")] + [
    name for name in LOGIT_LOSSES if name != "kd"
]
POINTS = {"all": HintPoints("all", ["stage1.0", "stage2.0", "stage3.0"])}
CASES = {  # what to train: methods, training images, epochs, and whether batch norm is synchronized
    "hints": (["at", "fitnet"], 75, 2, True),  # batches of 16, 16, 16, 16 and 11 images, twice
    "three": (["at", "fitnet"], BATCH + 3, 1, True),  # the last batch does not give each process two images
    "others": (OTHERS, 75, 1, True),
    "unsynchronized": (["fitnet"], 75, 1, False),
}


class Float64(Batches):
    def epoch(self, epoch, part=None):
        return (batch._replace(images=batch.images.double()) for batch in super().epoch(epoch, part))


def batches(images, source, n, stream, **options):
    statistics = {"mean": images.mean, "std": images.std}
    return Float64(source[:n], BATCH, **statistics, noise=0.5, seed=0, stream=stream, **options)


def setting():
    images = study_images(PARAMS)
    teacher, student = (fresh_network(name, images, 5) for name in (PARAMS.teacher, PARAMS.student))
    tables = [layer_table(network, candidate_layers(network), images.shape) for network in (teacher, student)]
    frozen = FrozenTeacher(teacher, list(tables[0]["layer"]))
    return images, frozen, tables


def trained(methods, n, epochs, synchronized):
    """Students of all methods after a training, name -> their state with adapters, and their history."""
    images, teacher, tables = setting()
    distillation = Distillation(PARAMS, images, teacher, *tables, CPU, torch.float32)
    arms = study_arms(POINTS, methods, *tables)
    learners = {arm.name: distillation.learner(arm, 0).double() for arm in arms}
    history = fit(
        learners,
        batches(images, images.train, n, "train", crop_padding=1, shuffle=True),
        Schedule("fast", epochs, 0.05),
        teacher=teacher.double(),
        validation=batches(images, images.validation, BATCH + 1, "validation"),  # one image in the last batch
        sync_batch_norm=synchronized,
    )
    return {name: learner.state_dict() for name, learner in learners.items()}, split_timings(history)[0]


def trained_after_a_norm():
    """A student that is hinted at a batch norm, which synchronizing must not put another in the place of."""
    images, teacher, tables = setting()
    student = fresh_network(PARAMS.student, images, 5)
    layers = ["stage2.0.bn2"]
    tables = [layer_table(network, layers, images.shape) for network in (teacher.model, student)]
    hint = Hint("fitnet", [HintPair(layers[0], layers[0])], 1.0)
    learner = Distilled(
        student,
        ce_weight=1.0,
        logit_weight=1.0,
        temperature=4.0,
        hints=[hint],
        teacher_table=tables[0],
        student_table=tables[1],
    ).double()
    source = batches(images, images.train, 2 * BATCH, "train", shuffle=True)
    frozen = FrozenTeacher(teacher.model, layers).double()
    history = fit({"": learner}, source, Schedule("fast", 1, 0.05), teacher=frozen, sync_batch_norm=True)
    kinds = {type(module).__name__ for module in learner.modules() if "forward" not in vars(module)}
    return {"": learner.state_dict()}, split_timings(history)[0], kinds


def refusal():
    """What several processes say of a method that keeps a bank."""
    try:
        trained(["crd"], 2 * BATCH, 1, True)
    except ValueError as error:
        return str(error)


def everything(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {name: trained(*case) for name, case in CASES.items()}
    results |= {"norm": trained_after_a_norm(), "refusal": refusal()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def processes_that_know_torch():
    # A server imports everything once (torch._dynamo is what the first optimizer imports) and makes each process a copy
    # of itself. It has computed nothing, so every process is as good as new.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pursuhint_lib.arms", "sklearn.datasets", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes made, and what this one made."""
    folder = tmp_path_factory.mktemp("two")
    context = processes_that_know_torch()
    two = [context.Process(target=everything, args=(rank, folder)) for rank in (0, 1)]
    for process in two:
        process.start()
    alone = {name: trained(*case) for name, case in CASES.items()} | {"norm": trained_after_a_norm()}
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    return *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)), alone


def relative_difference(states, others):
    """The largest, over all tensors, of max |a - b| / max |b|, and whose it is."""
    assert states.keys() == others.keys()
    found = [(0.0, "")]
    for name, state in states.items():
        assert state.keys() == others[name].keys()  # no prefix of whatever was wrapped around the learner
        for key, tensor in state.items():
            a, b = tensor.double(), others[name][key].double()
            if a.numel():
                found.append((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)), f"{name} {key}"))
    return max(found)


def compared(a, b, case):
    """The two histories, their numbers being the same up to rounding."""
    left, right = a[case][1], b[case][1]
    pd.testing.assert_frame_equal(left, right, rtol=1e-6, atol=1e-12)
    return left


@pytest.mark.parametrize("case", ["hints", "three", "norm"])
def test_two_processes_end_with_the_parameters_statistics_and_history_of_one(results, case):
    first, _, alone = results
    assert relative_difference(first[case][0], alone[case][0]) < (1e-6, "")
    assert len(compared(first, alone, case)) > 0


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end_with_the_same_bits(results, case):
    first, second, _ = results
    assert relative_difference(first[case][0], second[case][0])[0] == 0
    pd.testing.assert_frame_equal(first[case][1], second[case][1])


def test_hints_reach_the_student_through_what_is_wrapped_around_it(results):
    first, _, _ = results
    history = first["hints"][1].set_index("arm")
    for method in ("at", "fitnet"):
        assert (history.loc[f"{method}_all", method] > 0).all()
        assert (history.loc[f"{method}_all", f"gradient_share_{method}"] > 1e-3).all()
    assert (first["norm"][1][["fitnet", "gradient_share_fitnet"]] > 1e-3).all(axis=None)


def test_synchronized_batch_norm_leaves_ordinary_modules(results):
    first, _, alone = results
    assert first["norm"][2] == alone["norm"][2] and "BatchNorm2d" in first["norm"][2]


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_is_that_of_one_process_unless_it_relates_images_to_each_other(results, method):
    first, _, alone = results
    arm = f"{method}_all" if method in METHODS else method
    history = first["others"][1].set_index("arm").loc[[arm]]
    assert history["status"].tolist() == ["trained"], history["reason"].tolist()
    difference, whose = relative_difference({arm: first["others"][0][arm]}, {arm: alone["others"][0][arm]})
    assert (difference > 1e-6) == (method in RELATIONAL), (difference, whose)


def test_without_synchronizing_networks_differ_from_those_of_one_process(results):
    first, _, alone = results
    assert relative_difference(first["unsynchronized"][0], alone["unsynchronized"][0]) > (1e-6, "")


def test_a_method_that_keeps_a_bank_is_refused_in_one_line(results):
    for process in results[:2]:
        assert "ContrastiveRepresentation" in process["refusal"] and "\n" not in process["refusal"]


def test_parts_of_a_batch_are_the_rows_of_the_whole_and_none_is_missing(monkeypatch):
    images = study_images(PARAMS)
    source = batches(images, images.train, BATCH + 3, "train", crop_padding=1, flip=True, shuffle=True)
    whole = list(source.epoch(1))
    monkeypatch.setattr(parallel, "size", lambda: 4)
    pieces = []
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        pieces += source.epoch(1, parallel.part_of)
        assert parallel.training_part_of(3) == slice(0, 3) and parallel.training_part_of(BATCH) == slice(
            4 * rank, 4 * rank + 4
        )
    assert len(pieces) == 4 + 3  # the last batch has nothing for one of them
    row_of = {int(index): image for batch in whole for index, image in zip(batch.index, batch.images, strict=True)}
    shown = [(int(index), image) for batch in pieces for index, image in zip(batch.index, batch.images, strict=True)]
    assert sorted(index for index, _ in shown) == sorted(row_of)
    assert all(torch.equal(image, row_of[index]) for index, image in shown)


def test_what_processes_decide_is_part_of_the_key_only_where_there_are_several():
    images = study_images(PARAMS)

    def facts(**changes):
        return training_facts(PARAMS.model_copy(update=changes), images, "resnet8_w4", CPU, torch.float32)["arithmetic"]

    assert set(facts()) == {"device", "precision", "threads", "memory_format", "cpu_capability"}
    two = facts(processes=2, threads=5)
    assert (two["processes"], two["sync_batch_norm"], two["threads"]) == (2, False, 2)
    assert two != facts(processes=2, threads=5, sync_batch_norm=True)


# ---- A study's students, by processes that a launcher starts ----


def lay_out(study, **changes):
    """What notebooks 01 to 03 leave that training the students needs, and the parameters as JSON has them."""
    params = PARAMS.model_copy(update={"study": study, "processes": 2, "sync_batch_norm": True, **changes})
    images, teacher, tables = setting()
    first = run_folder(study, "01_train_teacher")
    save_model(teacher.model, kept_file(first, "teacher", 0), arm="teacher")
    save_table(pd.DataFrame([{"model": "teacher", "seed": 0}]), first / "baselines.csv")
    for role, table in zip(("teacher", "student"), tables, strict=True):
        save_table(table, run_folder(study, "02_profile_layers") / f"layers_{role}.csv")
    points = select_hint_points("stage_ends", None, tables[1], 3)
    save_json({"stage_ends": dataclasses.asdict(points)}, run_folder(study, "03_cluster_layers") / "hint_points.json")
    return params.model_dump(mode="json")


JOB = Job(FOURTH, "students-s0", (0,))


def train(params, home=None):
    if home:
        os.environ["PURSUHINT_HOME"] = str(home)  # which the server of processes does not know
    run_job(JOB, params, job_folder(params["study"], JOB))


def left(study):
    """Networks, and histories without their timings."""
    folder = run_folder(study, FOURTH)
    histories = {path.name: split_timings(pd.read_csv(path))[0].to_csv() for path in folder.glob("histories/*.csv")}
    return {path.name: path.read_bytes() for path in folder.glob("networks/*.safetensors")} | histories


def workers_of(pid):
    """The processes that train, below this one."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "pursuhint_lib.launch" in command and "torch.distributed.run" not in command:
            found.append(process)
    return found


def next_checkpoint(study):
    """Wait until one is written that is not there yet."""
    file = run_folder(study, FOURTH) / "checkpoints" / "students-s0.ckpt"

    def written():
        return file.stat().st_mtime_ns if file.exists() else 0

    before = written()
    while written() == before:
        time.sleep(0.02)


def kill_a_worker(study, pid):
    next_checkpoint(study)
    second = [process for process in workers_of(pid) if process.environ()["RANK"] == "1"]
    second[0].send_signal(signal.SIGKILL)


def test_killed_processes_and_launchers_leave_no_orphan_and_the_job_goes_on_to_the_same_bytes(home, capfd):
    train(lay_out("whole"))
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if "epoch 12/12" in line and "2 students" in line], lines
    heartbeat = read_progress(job_folder("whole", JOB))
    assert heartbeat["done"] == heartbeat["total"] == 24

    params = lay_out("killed")
    launcher = processes_that_know_torch().Process(target=train, args=(params, home))
    launcher.start()
    next_checkpoint("killed")
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.join()
    assert psutil.wait_procs(workers, timeout=300)[1] == []

    killer = threading.Thread(target=kill_a_worker, args=("killed", os.getpid()), daemon=True)
    killer.start()
    with pytest.raises(RuntimeError) as error:
        train(params)
    killer.join()
    assert str(error.value).startswith("process 2 of 2 died: SIGKILL, killed from outside; all that was said is in ")
    assert "\n" not in str(error.value)
    assert "goes on from the last checkpoint" in str(error.value) and not workers_of(os.getpid())
    assert (job_folder("killed", JOB) / "together.log").stat().st_size

    train(params)
    assert left("killed") == left("whole") and len(left("whole")) == 4
    before = {path: path.stat().st_mtime_ns for path in run_folder("killed", FOURTH).glob("networks/*")}
    train(params)  # nothing is started
    assert before == {path: path.stat().st_mtime_ns for path in run_folder("killed", FOURTH).glob("networks/*")}


def test_the_line_names_the_process_that_died_first_and_how(tmp_path, monkeypatch):
    for rank, seconds, error in ((0, 2.0, "RuntimeError: Connection closed by peer"), (1, 1.0, "ValueError: no")):
        (tmp_path / f"error-{rank}.json").write_text(json.dumps({"rank": rank, "time": seconds, "error": error}))
    monkeypatch.setattr(deaths, "oom_kills", lambda: 0)
    log = tmp_path / "together.log"
    log.write_text("\n")
    assert _what_died(tmp_path, 2, 1, 0) == "process 2 of 2 stopped: ValueError: no"
    log.write_text("[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 7)\n")
    assert _what_died(tmp_path, 2, 1, 0) == "process 2 of 2 stopped: ValueError: no"
    ends = "".join(f"[{n}]:\n  rank      : {n} (local_rank: {n})\n  exitcode  : {{{n}}} (pid: 7)\n" for n in (0, 1))
    for codes, who in (
        ((-15, -9), "process 2 of 2 died: SIGKILL, killed from outside"),  # torchrun ends the other by SIGTERM
        ((-9, -15), "process 1 of 2 died: SIGKILL, killed from outside"),
        ((1, -9), "process 2 of 2 died: SIGKILL, killed from outside"),  # whose end is the other's exception
        ((-15, -15), "process 2 of 2 died: SIGTERM, killed from outside"),  # torchrun names the first last
        ((-15, 1), "process 2 of 2 stopped: ValueError: no"),
        ((-11, -15), "process 1 of 2 died: SIGSEGV, a crash in native code, not a kill for lack of memory"),
    ):
        log.write_text(ends.format(*codes))
        assert _what_died(tmp_path, 2, 1, 0) == who


def test_networks_that_several_processes_are_to_keep_elsewhere_are_refused(home, tmp_path):
    params = PARAMS.model_copy(update={"processes": 2})
    with pytest.raises(ValueError, match="only"):
        train_together(JOB, params, tmp_path / "elsewhere", tmp_path)


def test_students_that_several_processes_should_have_trained_are_not_trained_by_one(tmp_path, monkeypatch):
    images, teacher, tables = setting()
    params = PARAMS.model_copy(update={"processes": 2})
    distillation = Distillation(params, images, teacher, *tables, CPU, torch.float32)
    monkeypatch.setattr("pursuhint_lib.arms.train_together", lambda *order: None)
    with pytest.raises(RuntimeError, match="at_all of seed 0: not what 2 processes have left"):
        distillation.train(study_arms(POINTS, ["at"], *tables)[1:], tmp_path)

"""Independent work as jobs: what is asked for, how jobs run, fail and die, and what is left when a driver dies."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import fanout_works
import psutil
import pytest
from test_pipeline import MAKE, empty_database, toy, toy_sources, write_notebook  # noqa: F401

from pursuhint_lib import fanout, records, tracking, tracking_store, worker
from pursuhint_lib.execution import KernelDied, StageFailed
from pursuhint_lib.fanout import FanOut, Fleet, Work, settle
from pursuhint_lib.jobs import Job
from pursuhint_lib.params import ParameterError
from pursuhint_lib.pipeline import main
from pursuhint_lib.status import StudyBusy
from pursuhint_lib.storage import REPOSITORY, run_folder, save_json

TESTS = Path(__file__).parent


@pytest.fixture
def paths(home, monkeypatch):
    """Processes find this folder's modules and this repository, whatever folder they work in."""
    also = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(REPOSITORY), *also]))
    return home


# --- What is asked for


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("slrum", "", "", "", ""), "EXECUTOR = 'slrum': should be local or slurm; did you mean 'slurm'?"),
        (("", "2", "", "", ""), "JOBS = '2': says nothing without EXECUTOR (local or slurm)"),
        (("local", "0", "", "", ""), "JOBS = '0': should be a whole number, 1 or more"),
        (("local", "2", "two", "", ""), "JOB_CORES = 'two': should be a whole number, 1 or more"),
        (("local", "2", "", "-1", ""), "JOB_GPUS = '-1': should be a whole number, 0 or more"),
        (("local", "", "", "", "time=1"), "SLURM = 'time=1': says nothing with EXECUTOR=local (allowed with slurm)"),
        (("slurm", "", "", "", "gpu"), "SLURM = 'gpu': 'gpu' should be an option of sbatch, as in partition=gpu"),
        (("slurm", "", "", "", "cpus_per_task=2"), "SLURM = 'cpus_per_task=2': cpus_per_task is set by JOB_CORES"),
        (("slurm", "", "", "", "a='b"), 'SLURM = "a=\'b": No closing quotation'),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(options, told):
    with pytest.raises(ParameterError) as error:
        FanOut.of_options(*options)
    assert str(error.value) == told


def test_options_are_read_and_what_is_left_out_follows_from_the_study(monkeypatch):
    assert FanOut.of_options("", "", "", "", "") is None
    asked = FanOut.of_options("slurm", "8", "4", "1", "partition=gpu --time=600 mail_type='END,FAIL'")
    assert asked == FanOut("slurm", 8, 4, 1, {"partition": "gpu", "time": "600", "mail-type": "END,FAIL"})
    monkeypatch.setattr(fanout, "hardware", lambda: {"cores": 8, "gpu": ["A", "B", "C"]})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    local = FanOut("local")
    assert local.for_stage({"threads": 2, "device": "cpu"}) == FanOut("local", 4, 2, 0)
    assert local.for_stage({"threads": 4, "processes": 2, "device": "cpu"}) == FanOut("local", 2, 4, 0)
    assert local.for_stage({"threads": 2, "workers": 4, "device": "cpu"}) == FanOut("local", 2, 4, 0)
    alone = {"threads": 1, "workers": 4, "device": "cpu"}
    assert local.for_stage(alone) == FanOut("local", 8, 1, 0)
    assert local.for_stage(alone).of_job(alone)["workers"] == 1
    assert FanOut("local", 2, 3).for_stage(alone).of_job(alone) == alone | {"workers": 3}
    assert FanOut("local", 2, 1).for_stage(alone | {"threads": 4}).of_job(alone | {"threads": 4})["workers"] == 4
    from_disk = {"threads": 1, "processes": 2, "device": "cpu", "streaming": True, "loaders": 3}
    assert local.for_stage(from_disk) == FanOut("local", 1, 8, 0)
    assert local.for_stage({"threads": 1, "processes": 2, "device": "cpu"}) == FanOut("local", 4, 2, 0)
    assert local.for_stage({"threads": 1, "device": "auto"}) == FanOut("local", 3, 1, 1)
    assert FanOut("local", 8, 1, 2).for_stage({"device": "cuda"}) == FanOut("local", 1, 1, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.for_stage({"threads": 1, "device": "auto"}) == FanOut("local", 8, 1, 0)
    for parameters, told in (
        ({"device": "cuda"}, "device = 'cuda' with processes = 1: this machine has 0 GPUs"),
        (
            {"device": "cuda", "processes": 2},
            "device = 'cuda' with processes = 2: this machine has 0 GPUs, and a job wants 2",
        ),
        ({"device": "cuda:1"}, "device = 'cuda:1': names one GPU"),
    ):
        with pytest.raises(ParameterError, match=told):
            local.for_stage(parameters)
    with pytest.raises(ParameterError, match="device is 'cpu'"):
        FanOut("local", 1, 1, 1).for_stage({"device": "cpu"})


def test_what_was_asked_for_can_be_typed_again_and_handed_on():
    asked = FanOut("slurm", 8, 4, 0, {"partition": "gpu", "comment": "a b"})
    typed = asked.as_typed
    assert typed.startswith(" EXECUTOR=slurm JOBS=8 JOB_CORES=4 JOB_GPUS=0 SLURM=")
    made = dict(part.split("=", 1) for part in shlex.split(typed))
    assert FanOut.of_options(*(made[name] for name in ("EXECUTOR", "JOBS", "JOB_CORES", "JOB_GPUS", "SLURM"))) == asked
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs")
    fanout.add_options(parser)
    read = parser.parse_args(asked.as_arguments)
    assert FanOut.of_options(read.executor, read.jobs, read.cores, read.gpus, read.slurm) == asked
    assert FanOut("local").as_typed == " EXECUTOR=local" and FanOut("local").as_arguments == ["--executor=local"]


def test_a_job_that_cannot_be_handed_out_is_not_waited_for(paths, monkeypatch):
    def refuse(self, task, name):
        raise StageFailed("no room")

    monkeypatch.setattr(fanout._Local, "begin", refuse)
    told, _, _ = run_all(paths, {"first": ""})
    assert told == "no room" and not worker.read_attempt(paths / "jobs/first")
    assert fanout.settle("s", "04", "key", print) == {}


def test_a_machine_without_slurm_says_so_before_anything_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ParameterError, match="there is no sbatch here"):
        FanOut("slurm").check_slurm()
    FanOut("local").check_slurm()


def test_what_a_second_try_may_mend():
    mends = [RuntimeError("CUDA"), MemoryError(), OSError(5, "I/O error"), ConnectionError(), KernelDied("01: dead")]
    not_mended = [ParameterError("x"), ValueError(), FileNotFoundError(), KeyError(), StageFailed("01: cell [3]")]
    not_mended += [OSError(28, "No space left on device"), NotImplementedError(), SystemExit(0)]
    assert [worker.may_mend(error) for error in mends + not_mended] == [True] * 5 + [False] * 8


# --- Jobs here


def works_of(root, faults):
    """A work for each name."""
    return [
        Work(name, partial(fanout_works.write, name, fault, root), root / "jobs" / name, root / "jobs" / name)
        for name, fault in faults.items()
    ]


def run_all(root, faults, key="key", gpus=""):
    """Run works; returns seconds and memory by name, and what was said."""
    said, ended = [], []
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"], "PURSUHINT_HOME": str(root), "OMP_NUM_THREADS": "3"}
    fleet = Fleet(FanOut("local", 2, 1, 1 if gpus else 0), key, environment, root, said.append, lambda: None)
    try:
        facts = fleet.run(works_of(root, faults), {}, lambda work: ended.append(work.name), lambda beat, lines: None)
    except StageFailed as error:
        return str(error), said, ended
    return facts, said, ended


def tries(root, name):
    path = root / f"{name}.tries"
    return len(path.read_text().split()) if path.exists() else 0


def test_jobs_that_die_are_tried_once_more_the_others_run_to_their_end_and_nothing_finished_is_repeated(
    paths, monkeypatch
):
    root = paths
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5")
    faults = {"first": "", "dies": "killed", "second": "", "dies_once": "crashed once", "wrong": "wrong"}
    told, said, ended = run_all(root, faults, gpus="two")
    assert told.startswith("2 of 5 jobs failed (dies, wrong): job dies: it died: SIGKILL, killed from outside; ")
    assert told.endswith("; what the others made is kept, the same command goes on")
    assert "\n" not in told and sorted(ended) == ["dies_once", "first", "second"]
    assert [tries(root, name) for name in faults] == [1, 2, 1, 2, 1]
    said = "\n".join(said)
    assert "job wrong: ValueError: learning_rate = -1: should be more than 0; given up (log: " in said
    assert said.count("job dies: it died: SIGKILL, killed from outside; peak memory ") == 2
    assert said.count("job dies_once: it died: SIGSEGV, a crash in native code, not a kill for lack of memory; ") == 1
    for line in said.splitlines():
        assert Path(line.rpartition("log: ")[2].rstrip(")")).exists(), line
    for name in ("first", "second", "dies_once"):
        gpu, threads, folder, *together = (root / f"{name}.txt").read_text().split()
        assert gpu in ("7", "GPU-5") and threads == "3" and folder == root.name and len(together) <= 2

    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.glob("*.txt")}
    (root / "first.txt").unlink()  # a finished job whose file is gone is begun again
    del before[root / "first.txt"]
    told, said, ended = run_all(root, faults | {"dies": "", "wrong": "device"}, gpus="two")
    assert set(told) == set(ended) == set(faults) and all(facts["peak_memory_gb"] > 0 for facts in told.values())
    assert [tries(root, name) for name in faults] == [2, 3, 1, 2, 3]
    assert len(said) == 1 and said[0].startswith("job wrong: RuntimeError: CUDA error; tried again (log: ")
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in before}
    assert worker.finished(root / "jobs/second", "key") and not worker.finished(root / "jobs/second", "other")


def until(reached, what):
    end = time.monotonic() + 600
    while not reached():
        assert time.monotonic() < end, f"not reached: {what}"
        time.sleep(0.05)


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_stopped_driver_ends_its_jobs_with_their_children_and_shows_how_far_they_were(paths):
    seen = []

    def stop():
        if (paths / "job/pids").exists() and any("first round" in line for _, lines in seen for line in lines):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fanout_works.drive(paths / "job", stop, lambda beat, lines: seen.append((beat, lines)))
    assert not any(alive(int(pid)) for pid in (paths / "job/pids").read_text().split())
    beat, (line,) = seen[-1]
    assert (beat["done"], beat["total"], beat["text"]) == (25, 100, "0 of 1 jobs done, 1 running")
    assert line.startswith("  waits 25 % · first round · ") and line.endswith(" left")


@pytest.mark.parametrize("victim", ["the driver alone", "the driver, and the job before it could say a word"])
def test_jobs_of_a_killed_driver_end_by_themselves_or_by_the_next_one(paths, victim):
    folder = run_folder("s", "jobs/04/waits")
    code = f"import pathlib, fanout_works; fanout_works.drive(pathlib.Path({str(folder)!r}))"
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=TESTS, stdout=subprocess.DEVNULL)
    try:
        until((folder / "pids").exists, "the job waits")
        job, child = map(int, (folder / "pids").read_text().split())
        token = worker.read_attempt(folder)["token"]
        until(lambda: len(worker.read_worker(folder, token).get("family", ())) > 1, "the job has told of its child")
    finally:
        driver.kill()  # and not waited for: a zombie is dead, too
    if victim != "the driver alone":
        os.kill(job, signal.SIGKILL)
        assert alive(child)
        assert settle("s", "04", "key", print) == {} and not list(folder.glob("worker.*")) and not alive(child)
    until(lambda: not alive(job) and not alive(child), "both have ended")
    driver.wait()


def test_a_job_that_begins_late_does_nothing_when_another_has_taken_its_place(paths, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folder = paths / "job"
    save_json({"token": "new", "key": "k", "executor": "slurm", "id": ""}, folder / worker.ATTEMPT)
    for token, done in (("old", False), ("new", True)):
        work = partial(fanout_works.write, token, "", paths)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        worker.run_task(worker.Task(work, folder, paths, "k", token))
        assert (paths / f"{token}.txt").exists() == bool(worker.read_end(folder, token)) == done


# --- Slurm's answers


@pytest.fixture
def queue(paths, monkeypatch):
    """A squeue that prints the file `queue`, and a scancel that empties it."""
    commands = paths / "bin"
    commands.mkdir()
    for name, script in (
        ("squeue", 'test -e "$Q" && cat "$Q"'),
        ("scancel", 'echo "$@" >> "$Q.cancelled"; : > "$Q"'),
        ("srun", ""),
    ):
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("Q", str(paths / "queue"))
    return paths / "queue"


def left_over(name, **attempt):
    """An attempt of an earlier driver at a job of stage 04."""
    folder = run_folder("s", f"jobs/04/{name}")
    save_json({"token": f"t{name}", "key": "key", "executor": "slurm", "id": "", **attempt}, folder / worker.ATTEMPT)
    return folder


def test_a_job_still_under_way_in_slurm_is_waited_for_or_cancelled_but_never_doubled(queue):
    queue.write_text("7|RUNNING|None\n8|PENDING|Resources\n9|FAILED|NonZeroExitCode\n")
    left_over("running", id="7")
    save_json({"slurm": "8", "host": "n", "family": [], "peak_bytes": 0}, left_over("told") / "worker.ttold.json")
    gone = left_over("gone", id="9")
    over = left_over("over", id="10")
    ended = {"token": "tover", "key": "key", "error": "", "again": False, "kept": [], "seconds": 1.0, "peak_bytes": 1}
    save_json(ended, over / worker.ENDED)
    said = []
    adopted = {"running": {"id": "7", "token": "trunning"}, "told": {"id": "8", "token": "ttold"}}
    assert settle("s", "04", "key", said.append) == adopted and len(said) == 2
    assert not (gone / worker.ATTEMPT).exists() and (over / worker.ATTEMPT).exists()
    assert settle("s", "04", "other key", said.append) == {}  # made from something else now
    assert Path(f"{queue}.cancelled").read_text() == "7\n" and "cancelled" in said[-1]
    ending = left_over("ending", id="12")
    queue.write_text("12|COMPLETING|None\n")
    assert settle("s", "04", "key", said.append) == {}  # nobody takes it over
    assert not (ending / worker.ATTEMPT).exists() and queue.read_text() == ""
    left_over("lost", id="11")
    queue.unlink()
    with pytest.raises(StudyBusy, match=r"^job lost was handed to Slurm \(number 11\), which does not answer here"):
        settle("s", "04", "key", said.append)


def test_how_a_job_of_slurm_ended_is_asked_of_squeue_and_no_answer_is_no_end(queue, monkeypatch):
    monkeypatch.setattr(fanout, "_LOOK_S", 0.0)
    engine = fanout._Slurm(FanOut("slurm", 1, 1, 0), {})
    queue.write_text("7|RUNNING|None\n8|OUT_OF_MEMORY|OutOfMemory\n9|COMPLETING|None\n")
    assert [engine.way_of_end(number) for number in ("7", "8", "9", "10")] == [None, "out of memory", None, ""]
    queue.unlink()
    assert engine.way_of_end("10") is None


def test_a_job_whose_time_is_up_goes_on_as_long_as_it_gets_further(queue, monkeypatch):
    monkeypatch.setattr(fanout, "_LOOK_S", 0.0)
    monkeypatch.setattr(fanout, "_GRACE_S", 0.0)
    monkeypatch.setattr(fanout._Slurm, "grace_s", 0.0)
    reached = iter([1, 2, 3, 3, 3])
    folder, said = queue.parent / "job", []

    def begin(engine, task, name):
        save_json(
            {"done": next(reached), "total": 9, "text": "", "updated": 0.0, "eta_s": None}, folder / "progress.json"
        )
        queue.write_text("7|TIMEOUT|TimeLimit\n")
        return "7"

    monkeypatch.setattr(fanout._Slurm, "begin", begin)
    fleet = Fleet(FanOut("slurm", 1, 1, 0), "key", {}, folder, said.append, lambda: None)
    with pytest.raises(StageFailed, match="its time was up"):
        fleet.run([Work("long", print, folder, folder)], {}, print, lambda beat, lines: None)
    assert len(said) == 5 and "given up" in said[-1] and next(reached, None) is None


# --- A study


@pytest.fixture
def fanned(toy, monkeypatch):  # noqa: F811
    """The toy study, whose first notebook finds two of its parts made by jobs, and logs them again."""
    also = [path for path in sys.path if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(toy.root), str(TESTS), str(REPOSITORY), *also]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    again = "from pursuhint_lib.tracking import stage_run\nimport fanout_works\n"
    again += "with stage_run(study, '01_make', {}) as run:\n    for n in (0, 1): fanout_works.log_part(run, n)"
    write_notebook(toy.root / "notebooks/01_make.ipynb", [*MAKE, again])
    jobs = {"01_make": [Job("01_make", f"part{n}", (n,)) for n in (0, 1)]}
    toy.sources = replace(
        toy_sources(toy.root), jobs=lambda stage, params: jobs.get(stage, []), run_job=fanout_works.make_part
    )
    return toy


def reproduce(toy):  # noqa: F811
    return main(["reproduce", "toy", "--executor", "local", "--jobs", "2"], toy.sources)


def test_a_study_with_jobs_fails_in_one_line_goes_on_and_logs_every_network_once(fanned, capsys):
    (fanned.root / "runs/toy").mkdir(parents=True)
    (fanned.root / "runs/toy/kill").touch()
    assert reproduce(fanned) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("1 of 2 jobs failed (part1): job part1: it died")
    assert captured.out.count("job part1: it died") == 2
    assert main(["status", "toy"], fanned.sources) == 0
    assert "failed: 1 of 2 jobs failed" in capsys.readouterr().out
    client, experiment = tracking_store.open_client(), tracking.open_experiment("toy")

    def parts():
        return client.search_runs([experiment], "tags.arm = 'part'", order_by=["tags.seed ASC"])

    assert [run.data.tags["seed"] for run in parts()] == ["0"]  # logged although the stage failed
    (fanned.root / "runs/toy/kill").unlink()
    assert reproduce(fanned) == 0
    assert fanned.trained() == ["0", "1", "2", "3"]
    assert [run.data.tags["seed"] for run in parts()] == ["0", "1"]
    assert {run.data.tags["mlflow.parentRunId"] for run in parts()} == {
        json.loads((fanned.make / "record.json").read_text())["runs"]["notebook"]
    }
    record = records.read_record(fanned.make)["fan_out"]
    assert {name: record[name] for name in ("executor", "jobs", "cores", "gpus")} == {
        "executor": "local",
        "jobs": 2,
        "cores": 1,
        "gpus": 0,
    }
    assert set(record["ran"]) == {"part0", "part1"} and set(record["ran"]["part0"]) == {"seconds", "peak_memory_gb"}
    assert records.read_record(fanned.judge)["fan_out"]["ran"] == {}
    assert not list(fanned.root.glob("runs/toy/jobs/**/*spool*")) and fanned.status()["state"] == "finished"
    capsys.readouterr()
    assert reproduce(fanned) == 0 and "nothing to do" in capsys.readouterr().out


def test_where_notebooks_are_jobs_too_the_same_files_come_of_them_and_the_same_errors(fanned, capsys, monkeypatch):
    monkeypatch.setattr(FanOut, "notebooks_too", True)
    fanned.set(**{"01_make": {"fault": "raise"}})
    assert reproduce(fanned) == 1
    captured = capsys.readouterr()
    told = "job notebook: 01_make stopped in cell [4]: ValueError: damaged checkpoint toy: delete it; notebook as it "
    assert captured.err.startswith(told) and captured.err.count("\n") == 1 and "tried again" not in captured.out
    fanned.set()
    assert reproduce(fanned) == 0
    assert set(records.read_record(fanned.judge)["outputs"]) == {"results.csv", "executed.ipynb"}
    assert sorted(fanned.mlflow()) == ["FAILED", *["FINISHED"] * 3]  # of the notebook twice, and of both parts
    assert records.read_record(fanned.make)["peak_memory_gb"] > 0 and not (fanned.make / "running.ipynb").exists()

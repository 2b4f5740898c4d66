"""Slurm as a user has it, and what submitit makes of it. Skipped where Slurm is not installed.

Slurm keeps the record of an ended job for MinJobAge (300 s by default), then forgets it; without accounting nobody
else knows of it. So how does a driver tell that a job is gone without a result?

* submitit cannot: it asks ``sacct``, which fails ("accounting storage is disabled"). ``job.state`` stays UNKNOWN, which
  counts as not done: ``job.done()`` is never true and ``job.result()`` waits for ever. It logs a warning at each call.
  A job that raised an exception is no such case: its traceback is in its result file.
* ``squeue --me --states=all`` answers for all jobs in one call of some milliseconds: FAILED, CANCELLED, TIMEOUT,
  OUT_OF_MEMORY, NODE_FAIL. A job that it does not name is forgotten, so it ended. Naming the ids (``--jobs``) is worse:
  a single one that is forgotten is an error, as is a controller that does not answer, which must not be read as an end.
* So a job is gone without a result when ``squeue`` succeeded, the job is absent or in a state that is not one of
  PENDING, CONFIGURING, RUNNING, COMPLETING, SUSPENDED, REQUEUED, and its result file is still absent then. Look at the
  file after ``squeue``, and on a network file system once more some seconds later.
"""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import fanout_works
import psutil
import pytest
import slurm_on_loopback
from slurm_on_loopback import environment, slurm, slurm_missing

from pursuhint_lib.execution import StageFailed
from pursuhint_lib.fanout import FanOut, Fleet, Work, settle
from pursuhint_lib.params import ParameterError
from pursuhint_lib.storage import REPOSITORY

pytestmark = pytest.mark.skipif(bool(slurm_missing()), reason=slurm_missing())

UNDECIDED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
HARNESS = [sys.executable, slurm_on_loopback.__file__]


@pytest.fixture(scope="module")
def two_cores(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm"), cores=2) as variables:
        yield variables


@pytest.fixture
def cluster(two_cores, monkeypatch):
    """The commands and submitit talk to the Slurm of this file. No job of another test is left in it."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SQUEUE", "SCANCEL"))]:
        monkeypatch.delenv(name)
    for name, value in two_cores.items():
        monkeypatch.setenv(name, value)
    yield
    call("scancel", "--me")
    wait_until(lambda: set(states().values()).isdisjoint(UNDECIDED), "all jobs have ended")


@pytest.fixture
def executor(cluster, tmp_path):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    executor = submitit.AutoExecutor(tmp_path / "jobs", cluster="slurm")
    executor.update_parameters(timeout_min=10, cpus_per_task=1, mem_gb=0.25)
    return executor


def call(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def submit(script, *options):
    """The id of a new job that runs a line of shell."""
    return call("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}").strip()


def states():
    """The state of every job that Slurm remembers, by id."""
    return dict(
        line.split("|") for line in call("squeue", "--me", "--states=all", "--noheader", "--format=%i|%T").split()
    )


def wait_until(reached, what):
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, f"not reached within a minute: {what}"
        time.sleep(0.05)


def processes(folder):
    """Names of the processes of the Slurm in `folder`: daemons, and jobs that were submitted with its variables."""
    mark = f"SLURM_CONF={environment(folder)['SLURM_CONF']}".encode()
    names = []
    for process in psutil.process_iter():
        try:
            # Not psutil's environ(): slurmstepd writes its title over the first variables, and psutil stops there.
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                names.append(process.name())
        except (OSError, psutil.Error):  # it has ended, or is another user's
            pass
    return names


def run_stubborn_job(folder, monkeypatch):
    """A job of the Slurm in `folder` that ignores SIGTERM and has a child in a session of its own."""
    monkeypatch.setenv("SLURM_CONF", environment(folder)["SLURM_CONF"])
    submit("trap '' TERM; setsid sleep 600 & wait; sleep 600")
    wait_until(lambda: "sleep" in processes(folder), "the job runs")
    assert {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"} <= {name.strip(":") for name in processes(folder)}


def test_a_job_runs_to_its_end_and_a_cancelled_one_does_not(cluster, tmp_path):
    short = submit("echo done > result", f"--chdir={tmp_path}")
    long = submit("sleep 600")
    wait_until(lambda: states()[short] == "COMPLETED" and states()[long] == "RUNNING", "one has ended, one runs")
    assert (tmp_path / "result").read_text() == "done\n"
    call("scancel", long)
    wait_until(lambda: states()[long] == "CANCELLED", "the long one is cancelled")


def test_two_jobs_of_one_core_run_at_once_and_a_third_waits_for_a_core(cluster):
    first, second, third = (submit("sleep 600", "--cpus-per-task=1") for _ in range(3))
    wait_until(lambda: states()[first] == states()[second] == "RUNNING", "two jobs run")
    wait_until(
        lambda: call("squeue", "--noheader", f"--jobs={third}", "--format=%T %r") == "PENDING Resources\n", "wait"
    )
    call("scancel", first)
    wait_until(lambda: states()[third] == "RUNNING", "the third runs")
    assert states()[second] == "RUNNING"


def test_stop_leaves_no_process_and_no_job(tmp_path, monkeypatch):
    printed = call(*HARNESS, "start", tmp_path)
    try:
        assert printed == f"export SLURM_CONF={tmp_path}/slurm.conf\n"
        run_stubborn_job(tmp_path, monkeypatch)
        again = subprocess.run([*HARNESS, "start", tmp_path], capture_output=True, text=True)
        assert again.returncode == 1 and again.stderr.endswith("one runs there already\n")
        assert "slurmctld" in processes(tmp_path)
    finally:
        call(*HARNESS, "stop", tmp_path)
    assert processes(tmp_path) == []


def test_a_killed_test_leaves_no_process_and_no_job(tmp_path, monkeypatch):
    script = (
        "import sys, time; import slurm_on_loopback as s\nwith s.slurm(sys.argv[1]): print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, tmp_path]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE) as test:
        try:
            assert test.stdout.readline() == b"\n"
            run_stubborn_job(tmp_path, monkeypatch)
        finally:
            test.kill()
    wait_until(lambda: processes(tmp_path) == [], "all processes have ended")


def test_a_slurm_that_cannot_start_says_why_and_leaves_no_process(tmp_path):
    folder = tmp_path / ("x" * 108)
    with pytest.raises(RuntimeError, match=r"^Slurm did not start in .*: munged: .*socket pathname$"), slurm(folder):
        pass
    assert processes(folder) == []


def test_an_absent_slurm_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm_on_loopback, "SEARCH_PATH", str(tmp_path))
    assert slurm_missing().startswith("Slurm is not installed (Debian: slurm-wlm, munge); not found: munged, slurmctld")
    with pytest.raises(RuntimeError, match="^Slurm is not installed"), slurm(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_submitit_runs_a_function_and_brings_its_result(executor):
    job = executor.submit(lambda x: (2 * x, os.environ["SLURM_CPUS_PER_TASK"]), 21)
    assert job.result() == (42, "1")


def test_a_killed_job_is_failed_for_squeue_and_unknown_for_submitit(executor, tmp_path):
    def work(path):
        path.with_suffix(".tmp").write_text(str(os.getpid()))
        path.with_suffix(".tmp").rename(path)
        time.sleep(600)

    job = executor.submit(work, tmp_path / "pid")
    wait_until((tmp_path / "pid").exists, "the job runs")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    wait_until(lambda: states()[job.job_id] not in UNDECIDED, "the job has ended")
    assert states()[job.job_id] == "FAILED"
    assert not job.paths.result_pickle.exists()
    assert "task 0: Killed" in job.stderr()
    assert not job.done(force_check=True) and job.state == "UNKNOWN"


def fleet_of(root, monkeypatch, say):
    """A fleet of two jobs at a time, whose processes find this folder's modules, and its works: (name, fault)."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setenv("PURSUHINT_HOME", str(root))
    also = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = os.pathsep.join([str(Path(__file__).parent), str(REPOSITORY), *also])
    environment = {"PYTHONPATH": path, "PURSUHINT_HOME": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "7"}
    options = FanOut("slurm", 2, 1, 0, {"time": "10", "mem": "300M"})
    return Fleet(options, "key", environment, root, say, lambda: None)


def works_of(root, **faults):
    folders = {name: root / "jobs" / name for name in faults}
    return [
        Work(name, partial(fanout_works.write, name, faults[name], root), folder, folder)
        for name, folder in folders.items()
    ]


def test_a_killed_job_is_begun_again_and_one_that_sbatch_refuses_is_one_line(cluster, tmp_path, monkeypatch):
    said, ended = [], []
    fleet = fleet_of(tmp_path, monkeypatch, said.append)
    works = works_of(tmp_path, good="", dies_once="killed once")
    fleet.run(works, {}, lambda work: ended.append(work.name), lambda beat, lines: None)
    assert sorted(ended) == ["dies_once", "good"] and len(said) == 1
    assert said[0].startswith("job dies_once: it died: a crash, or killed from outside, or out of memory")
    assert Path(said[0].rpartition("log: ")[2].rstrip(")")).exists()
    assert (tmp_path / "good.txt").read_text().split()[:3] == ["7", "1", tmp_path.name]

    fleet.options.slurm["partition"] = "nowhere"
    with pytest.raises(StageFailed, match=r"^sbatch refused the job wrong: .*partition"):
        fleet.run(works_of(tmp_path, wrong=""), {}, print, print)


def test_what_slurm_would_refuse_is_one_line_before_anything_runs(cluster):
    FanOut("slurm", 2, 1, 0, {"time": "10"}).check_slurm()
    with pytest.raises(ParameterError, match="^EXECUTOR=slurm JOBS=2 JOB_CORES=64 JOB_GPUS=0: sbatch refuses") as error:
        FanOut("slurm", 2, 64, 0).check_slurm()
    assert "\n" not in str(error.value)
    with pytest.raises(ParameterError, match="SLURM=partition=nowhere: sbatch refuses such jobs: .*partition"):
        FanOut("slurm", 2, 1, 0, {"partition": "nowhere"}).check_slurm()


def test_a_job_in_the_queue_says_what_it_waits_for(cluster, tmp_path, monkeypatch):
    seen, rivals = [], [submit("sleep 600", "--cpus-per-task=1") for _ in range(2)]
    wait_until(lambda: all(states()[number] == "RUNNING" for number in rivals), "the node is full")
    fleet = fleet_of(tmp_path, monkeypatch, print)

    def show(beat, lines):
        seen.append((beat["text"], *lines))
        if "Resources" in lines[0] or "Priority" in lines[0]:
            call("scancel", *rivals)
        assert len(seen) < 200, seen  # a minute and more

    fleet.run(works_of(tmp_path, late=""), {}, print, show)
    assert any(line.startswith("  late · in the queue: ") for _, line in seen), seen
    assert any(text == "0 of 1 jobs done, 0 running, 1 handed out" for text, _ in seen)


def test_the_job_of_a_driver_that_is_gone_is_taken_over_or_cancelled(cluster, tmp_path, monkeypatch):
    said, folder = [], tmp_path / "runs/s/jobs/04/waits"
    fleet = fleet_of(tmp_path, monkeypatch, said.append)
    work = Work("waits", partial(fanout_works.wait_with_a_child, folder), folder, folder)

    def die(beat, lines):
        if (folder / "pids").exists():
            raise KeyError("a driver that is killed cancels nothing")

    cancel = fleet.engine.cancel
    monkeypatch.setattr(fleet.engine, "cancel", lambda jobs: None)
    with pytest.raises(KeyError):
        fleet.run([work], {}, print, die)
    (number,) = [number for number, state in states().items() if state == "RUNNING"]
    adopted = settle("s", "04", "key", said.append)
    assert adopted["waits"]["id"] == number and "waiting for it" in said[0]

    def stop(beat, lines):
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet.engine, "cancel", cancel)
    with pytest.raises(KeyboardInterrupt):
        fleet.run([work], adopted, print, stop)
    wait_until(lambda: states()[number] == "CANCELLED", "the job is cancelled")
    for pid in map(int, (folder / "pids").read_text().split()):
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), "its processes have ended")
    assert settle("s", "04", "key", said.append) == {}

"""Independent work of a stage as jobs: processes of this machine, or of a cluster under Slurm.

submitit starts the jobs and keeps their logs; what they say and how they end stands in files, see `worker`. Here is
what submitit leaves open: how many are under way at a time, which GPU each has, a second try, one view of all, an end
of all when the driver is stopped, and no second copy of a job beside one that an earlier driver left.

Neither an exit code nor what an executor says of a job decides whether it is done, only its own last file: locally
submitit's process hides how its child ended, and a Slurm without accounting forgets its jobs after minutes.
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pursuhint_lib.deaths import NOT_KNOWN, oom_kills, way_of_death
from pursuhint_lib.errors import first_line
from pursuhint_lib.execution import StageFailed
from pursuhint_lib.params import ParameterError, nearest
from pursuhint_lib.progress import duration, read_progress
from pursuhint_lib.provenance import hardware
from pursuhint_lib.status import StudyBusy, short
from pursuhint_lib.storage import run_folder, save_json
from pursuhint_lib.worker import (
    ATTEMPT,
    ENDED,
    WORKER,
    Task,
    end_family,
    finished,
    read_attempt,
    read_end,
    read_worker,
    run_task,
)

EXECUTORS = ("local", "slurm")
LOGS = "log"  # in a job's folder: what submitit writes, a file of output for every try
CODE = "exit_code"  # in a job's folder: of its process, where that is one of this machine
TRIES = 2
SLURM_JOBS = 16  # in the queue at a time, if nothing else is asked for
_FOREVER = 60 * 24 * 365  # minutes: submitit ends a local job after two, if nothing is said
_OURS = {  # options of sbatch that are set here, and what to write instead
    "cpus-per-task": "JOB_CORES",
    "gpus": "JOB_GPUS",
    "gpus-per-node": "JOB_GPUS",
    "array": "JOBS",
}
_SLURM_OVER = {
    "BOOT_FAIL": "the node did not start",
    "CANCELLED": "cancelled from outside",
    "COMPLETED": "it ended without a word",
    "DEADLINE": "its deadline has passed",
    "FAILED": NOT_KNOWN,
    "NODE_FAIL": "the node failed",
    "OUT_OF_MEMORY": "out of memory",
    "PREEMPTED": "preempted",
    "TIMEOUT": "its time was up",
}
_PATIENCE_S = 60  # for a job that is ending
_LOOK_S = 5.0  # between two questions to Slurm
_GRACE_S = 10.0  # a shared file system may show a job's last file later than Slurm forgets the job


@dataclass(frozen=True)
class FanOut:
    """How independent work is run. jobs: at most so many at a time; cores and gpus: of each. 0 jobs or cores, and gpus
    of None, mean a default. slurm: options of sbatch.
    """

    executor: str
    jobs: int = 0
    cores: int = 0
    gpus: int | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_options(cls, executor: str, jobs: str, cores: str, gpus: str, slurm: str) -> "FanOut | None":
        """As written on the command line, empty where nothing was; None without an executor. Raises ParameterError."""
        if not executor:
            given = {"JOBS": jobs, "JOB_CORES": cores, "JOB_GPUS": gpus, "SLURM": slurm}
            for name, value in given.items():
                if value:
                    raise ParameterError(f"{name} = {value!r}: says nothing without EXECUTOR (local or slurm)")
            return None
        if executor not in EXECUTORS:
            meant = nearest(executor, EXECUTORS)
            raise ParameterError(f"EXECUTOR = {executor!r}: should be {' or '.join(EXECUTORS)}{meant}")
        if slurm and executor != "slurm":
            raise ParameterError(f"SLURM = {slurm!r}: says nothing with EXECUTOR={executor} (allowed with slurm)")
        return cls(
            executor,
            whole_number("JOBS", jobs, 1) or 0,
            whole_number("JOB_CORES", cores, 1) or 0,
            whole_number("JOB_GPUS", gpus, 0),
            _slurm_options(slurm),
        )

    @property
    def as_arguments(self) -> list[str]:
        """The options of the command line that ask for it."""
        return [f"--{name}={value}" for name, value in self._given().items()]

    @property
    def as_typed(self) -> str:
        """The same as make's, each behind a space."""
        names = {"cores": "JOB_CORES", "gpus": "JOB_GPUS"}
        given = self._given().items()
        return "".join(f" {names.get(name, name.upper())}={shlex.quote(value)}" for name, value in given)

    def _given(self) -> dict[str, str]:
        given = {"executor": self.executor, "jobs": self.jobs or "", "cores": self.cores or ""}
        given |= {"gpus": "" if self.gpus is None else self.gpus}
        given |= {"slurm": " ".join(f"{name}={shlex.quote(value)}" for name, value in self.slurm.items())}
        return {name: str(value) for name, value in given.items() if value != ""}

    @property
    def notebooks_too(self) -> bool:
        """Whether notebooks are executed as jobs: where the driver is, on a login node, nothing heavy may run."""
        return self.executor == "slurm"

    def for_stage(self, parameters: Mapping[str, Any]) -> "FanOut":
        """The same with every default filled in, for a stage's parameters. Raises ParameterError, one line, for what
        this machine or the stage's device does not allow.
        """
        # The threads are shared out, at least one to each, among learners that take their steps at the same time
        # (workers) or processes that train one network together, which have a GPU each.
        threads, workers, processes = (parameters.get(name, 1) for name in ("threads", "workers", "processes"))
        decoding = processes * parameters.get("loaders", 0) if parameters.get("streaming") else 0
        busy = max(threads, processes, workers if threads > 1 else 1)  # of one thread: see `of_job`
        cores, device = self.cores or busy + decoding, parameters.get("device", "cpu")
        if ":" in device and self.executor == "local":
            raise ParameterError(
                f"device = {device!r}: names one GPU, and jobs are given one each (allowed: auto, cuda)"
            )
        there = visible_gpus()
        gpus = self.gpus
        if gpus is None:
            gpus = processes if device.startswith("cuda") or (device == "auto" and there) else 0
        if gpus and device == "cpu":
            raise ParameterError(f"JOB_GPUS = {gpus}: device is 'cpu' (allowed: 0)")
        if 0 < gpus < processes:
            raise ParameterError(f"JOB_GPUS = {gpus}: each of {processes} processes has one (allowed: {processes})")
        if self.executor == "slurm":
            return FanOut(self.executor, self.jobs or SLURM_JOBS, cores, gpus, self.slurm)
        if gpus > len(there):
            asked = f"JOB_GPUS = {gpus}" if self.gpus else f"device = {device!r} with processes = {processes}"
            raise ParameterError(f"{asked}: this machine has {len(there)} GPUs, and a job wants {gpus}")
        jobs = self.jobs or max(1, hardware()["cores"] // cores)
        return FanOut(self.executor, min(jobs, len(there) // gpus) if gpus else jobs, cores, gpus)

    def check_slurm(self) -> None:
        """See that Slurm would take jobs as they are asked for, where they are for it: called on what `for_stage`
        returns. Raises ParameterError, one line in Slurm's own words.
        """
        if self.executor != "slurm":
            return
        command = ["sbatch", "--test-only", "--wrap=true", f"--cpus-per-task={self.cores}"]
        command += [f"--gpus-per-node={self.gpus}"] if self.gpus else []
        command += [f"--{name}={value}" for name, value in self.slurm.items()]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise ParameterError(
                "EXECUTOR = 'slurm': there is no sbatch here (allowed: local; slurm where Slurm is)"
            ) from None
        except subprocess.TimeoutExpired:
            raise ParameterError("EXECUTOR = 'slurm': Slurm does not answer (allowed: local; slurm later)") from None
        if tried.returncode:
            told = [line.strip().removeprefix("sbatch: ") for line in tried.stderr.splitlines() if line.strip()]
            asked = self.as_typed.strip()
            raise ParameterError(f"{asked}: sbatch refuses such jobs: {'; '.join(told) or tried.returncode}")

    def of_job(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's parameters for its jobs, which give the same bits: where each worker has one thread, whatever their
        number, a job has no more workers than cores. More jobs gain more than more workers do.
        """
        if parameters.get("threads") != 1 or "workers" not in parameters:
            return dict(parameters)
        return {**parameters, "workers": min(parameters["workers"], self.cores)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `FanOut.of_options` wants of a command line, but for the number of jobs."""
    for option, text in (
        ("--executor", "run independent work as jobs: local (processes here) or slurm"),
        ("--cores", "CPU cores of a job; what the study's threads and loaders use, if not given"),
        ("--gpus", "GPUs of a job; one for each of the study's processes, if not given"),
        ("--slurm", "options of sbatch, for example 'partition=gpu time=600'"),
    ):
        parser.add_argument(option, default="", help=text)


def whole_number(name: str, text: str, least: int) -> int | None:
    """An option's number, None where nothing was written. Raises ParameterError."""
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise ParameterError(f"{name} = {text!r}: should be a whole number, {least} or more")
    return int(text)


def _slurm_options(text: str) -> dict[str, str]:
    try:
        pairs = [part.removeprefix("--").partition("=") for part in shlex.split(text)]
    except ValueError as error:  # a quotation mark without its other half
        raise ParameterError(f"SLURM = {text!r}: {error}") from None
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ParameterError(
                f"SLURM = {text!r}: {name + equals + value!r} should be an option of sbatch, as in partition=gpu"
            )
        if (dashed := name.replace("_", "-")) in _OURS:
            raise ParameterError(f"SLURM = {text!r}: {name} is set by {_OURS[dashed]}")
    return {name.replace("_", "-"): value for name, _, value in pairs}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is None:
        return [str(number) for number in range(len(hardware()["gpu"]))]
    return [name.strip() for name in said.split(",") if name.strip()]


@dataclass(frozen=True)
class Work:
    """Something that is done in a process of its own.

    do() does it there and returns the files that it keeps; it must be a function of a module, or a partial of one.
    folder: of its own. heartbeat: the folder of its `progress.Progress`.
    """

    name: str
    do: Callable[[], Sequence[Path]]
    folder: Path
    heartbeat: Path


@dataclass
class _Job:
    """A work on its way: waiting, running, done or failed."""

    work: Work
    state: str = "waiting"
    tries: int = 0
    token: str = ""
    id: str = ""
    kills_before: int = 0  # see `deaths`
    gone_since: float | None = None
    best: float = 0.0  # share of it that was done when the last try ended
    end: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """How much of it is done, from its heartbeat."""
        if self.state == "done":
            return 1.0
        beat = read_progress(self.work.heartbeat)
        return beat["done"] / beat["total"] if beat else 0.0


class Fleet:
    """The jobs of one stage.

    key: of all that the stage is made from; a job that is finished under it is not begun again. environment: of the
    jobs' processes, cwd: their folder. say: prints a line that stays. check_stop: raises when the driver is to stop.
    """

    def __init__(
        self,
        options: FanOut,
        key: str,
        environment: Mapping[str, str],
        cwd: Path,
        say: Callable[[str], None],
        check_stop: Callable[[], None],
    ):
        self.options, self.key, self.cwd = options, key, cwd
        self.say, self.check_stop = say, check_stop
        engine = _Slurm if options.executor == "slurm" else _Local
        self.engine = engine(options, environment)
        self.jobs: list[_Job] = []
        self.began, self.share_before = time.time(), 0.0

    def run(
        self,
        works: Sequence[Work],
        adopted: Mapping[str, Mapping[str, str]],
        on_end: Callable[[Work], None],
        show: Callable[[dict[str, Any], list[str]], None],
    ) -> dict[str, dict[str, float]]:
        """Do all works, in this order as far as there is room. Returns seconds and peak_memory_gb of each, by name.

        adopted: from `settle`. on_end is called for every work that is done. show is given the heartbeat of all jobs
        together (see `progress.Progress`) and a line for each that is under way. Raises StageFailed, one line, after
        the last job when some have failed; what check_stop raises, after all jobs are cancelled.
        """
        self.jobs = [_Job(work) for work in works]
        for job in self.jobs:
            if end := finished(job.work.folder, self.key):
                job.state, job.end = "done", end
                on_end(job.work)
            elif job.work.name in adopted:
                job.state, job.tries = "running", 1
                job.id, job.token = (adopted[job.work.name][name] for name in ("id", "token"))
            else:
                (job.work.heartbeat / "progress.json").unlink(missing_ok=True)
        self.began, self.share_before = time.time(), self._share()
        try:
            self._go_through(on_end, show)
        except BaseException:
            running = [job for job in self.jobs if job.state == "running"]
            self.engine.cancel([(job.id, read_worker(job.work.folder, job.token).get("family", [])) for job in running])
            raise
        self._tell_of_failures()
        return {
            job.work.name: {
                "seconds": job.end["seconds"],
                "peak_memory_gb": round(job.end["peak_bytes"] / 2**30, 2),
            }
            for job in self.jobs
        }

    def _go_through(self, on_end: Callable[[Work], None], show: Callable[[dict[str, Any], list[str]], None]) -> None:
        shown = 0.0
        while True:
            self.check_stop()
            for job in self.jobs:
                if job.state == "running" and self._is_over(job):
                    self._close(job)
                    if job.state == "done":
                        on_end(job.work)
            self._begin_some()
            if not any(job.state == "running" for job in self.jobs):
                return
            if time.monotonic() - shown >= 0.5:
                shown = time.monotonic()
                show(self.heartbeat(), self.lines())
            time.sleep(0.2)

    # Begin

    def _begin_some(self) -> None:
        for job in self.jobs:
            running = sum(other.state == "running" for other in self.jobs)
            if job.state == "waiting" and running < self.options.jobs:
                self._begin(job)

    def _begin(self, job: _Job) -> None:
        folder = job.work.folder
        folder.mkdir(parents=True, exist_ok=True)
        job.token, job.gone_since, job.kills_before = uuid.uuid4().hex, None, oom_kills()
        attempt = {"token": job.token, "key": self.key, "executor": self.options.executor, "id": ""}
        for name in (ENDED, CODE):
            (folder / name).unlink(missing_ok=True)
        save_json(attempt, folder / ATTEMPT)
        end_workers(folder, self.say)  # now, for none of an older attempt begins any more
        # cloudpickle takes functions along by their names, so the job's process needs this code, not a copy of it.
        task = Task(job.work.do, folder, self.cwd, self.key, job.token, self.engine.driver)
        try:
            job.id = self.engine.begin(task, job.work.name)
        except BaseException:
            (folder / ATTEMPT).unlink()  # nobody has it
            raise
        job.state, job.tries = "running", job.tries + 1
        save_json(attempt | {"id": job.id}, folder / ATTEMPT)

    # End

    def _is_over(self, job: _Job) -> bool:
        if self.engine.way_of_end(job.id) is None:
            job.gone_since = None
            return self.engine.trusts_files and bool(read_end(job.work.folder, job.token))
        job.gone_since = job.gone_since or time.monotonic()
        return bool(read_end(job.work.folder, job.token)) or time.monotonic() - job.gone_since >= self.engine.grace_s

    def _close(self, job: _Job) -> None:
        """Decide whether a job that is over is done, is tried again, or has failed."""
        job.end = read_end(job.work.folder, job.token)
        about = read_worker(job.work.folder, job.token)
        self.engine.forget(job.id, about.get("family", []))
        (job.work.folder / WORKER.format(job.token)).unlink(missing_ok=True)  # so nobody looks for it any more
        if job.end and not job.end["error"]:
            job.state = "done"
            return
        reason, again = job.end.get("error"), job.end.get("again", True)
        if not job.end:
            how = self.engine.way_of_end(job.id) or _exit_code(job.work.folder)
            reason = f"it died: {way_of_death(how, job.kills_before, about.get('peak_bytes', 0))}"
            if how == _SLURM_OVER["TIMEOUT"] and job.share > job.best:  # a long job in short pieces is no failure
                job.tries -= 1
        job.best = max(job.best, job.share)
        log = short(self._log(job))
        if again and job.tries < TRIES:
            self.say(f"job {job.work.name}: {reason}; tried again (log: {log})")
            job.state = "waiting"
        else:
            self.say(f"job {job.work.name}: {reason}; given up (log: {log})")
            job.state, job.end = "failed", {"error": reason}

    def _log(self, job: _Job) -> Path:
        return job.work.folder / LOGS / f"{job.id}_0_log.out"

    def _tell_of_failures(self) -> None:
        failed = [job for job in self.jobs if job.state == "failed"]
        if not failed:
            return
        first, names = failed[0], ", ".join(job.work.name for job in failed)
        text = f"job {first.work.name}: {first.end['error']}; log: {short(self._log(first))}"
        if len(self.jobs) > 1:
            text = f"{len(failed)} of {len(self.jobs)} jobs failed ({names}): {text}"
            text += "; what the others made is kept, the same command goes on"
        raise StageFailed(text)

    # View

    def _share(self) -> float:
        return sum(job.share for job in self.jobs) / max(1, len(self.jobs))

    def heartbeat(self) -> dict[str, Any]:
        """Of all jobs together, in percent, as `progress.read_progress` gives it."""
        share, now = self._share(), time.time()
        left = None
        if share > self.share_before:
            left = (1 - share) * (now - self.began) / (share - self.share_before)
        states = [
            "handed out" if job.state == "running" and not read_worker(job.work.folder, job.token) else job.state
            for job in self.jobs
        ]
        text = f"{states.count('done')} of {len(self.jobs)} jobs done, {states.count('running')} running"
        for state in ("handed out", "waiting", "failed"):
            text += f", {states.count(state)} {state}" if state in states else ""
        return {
            "done": int(100 * share),
            "total": 100,
            "text": text,
            "started": self.began,
            "updated": now,
            "eta_s": left,
        }

    def lines(self) -> list[str]:
        """One for each job under way, as in ``students-s0 35 % · seed 0 epoch 7/20: ... · 40 s left``."""
        lines = []
        for job in self.jobs:
            if job.state == "running":
                beat = read_progress(job.work.heartbeat)
                parts = [f"  {job.work.name}"]
                if beat:
                    parts[0] += f" {100 * beat['done'] // beat['total']} %"
                    parts.append(str(beat["text"]))
                    if beat["eta_s"] is not None:
                        left = beat["eta_s"] - (time.time() - beat["updated"])
                        parts.append(f"{duration(left)} left")
                elif read_worker(job.work.folder, job.token):
                    parts.append("starting")
                else:
                    why = self.engine.why_waiting(job.id)
                    parts.append(f"in the queue: {why}" if why else "handed out")
                lines.append(" · ".join(parts))
        return lines


# --- Executors


class _Local:
    """Processes of this machine, each below one of submitit's."""

    trusts_files = False  # a job is over when its process is, with its memory and its GPU
    grace_s = 0.0

    def __init__(self, options: FanOut, environment: Mapping[str, str]):
        self.environment = environment
        self.driver = (os.getpid(), psutil.Process().create_time())
        gpus = visible_gpus()
        self._free = [",".join(gpus[n : n + options.gpus]) for n in range(0, len(gpus), max(1, options.gpus))]
        self._free = self._free[: options.jobs] if options.gpus else [""] * options.jobs  # "": sees none
        self._jobs: dict[str, tuple[Any, str]] = {}

    def begin(self, task: Task, _name: str) -> str:
        """Start a process; returns submitit's name for it, the number of its own process."""
        gpus = self._free.pop(0)
        command = shlex.join(["sh", "-c", '"$@"; code=$?; echo $code >"$0"; exit $code', str(task.folder / CODE)])
        command += f" {_python(self.environment | {'CUDA_VISIBLE_DEVICES': gpus})}"
        executor = _submitit().LocalExecutor(folder=task.folder / LOGS, python=command)
        executor.update_parameters(timeout_min=_FOREVER, stderr_to_stdout=True)
        # Ctrl-C in a terminal reaches all its processes. It is for the driver alone, which then ends the jobs; blocked
        # signals stay blocked in children, and one that comes meanwhile reaches the driver a moment later.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            job = executor.submit(run_task, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._jobs[job.job_id] = job, gpus
        return job.job_id

    def way_of_end(self, job_id: str) -> str | None:
        """None while it is under way; "" afterwards."""
        return "" if job_id not in self._jobs or self._jobs[job_id][0].done() else None

    def why_waiting(self, _job_id: str) -> str:
        """Nothing: a process begins at once."""
        return ""

    def forget(self, job_id: str, family: Sequence) -> None:
        """A job is over: what it started ends, and another one may have its place."""
        end_family(family)
        self._free.append(self._jobs.pop(job_id)[1])

    def cancel(self, jobs: Sequence[tuple[str, Sequence]]) -> None:
        """End jobs, each (id, its processes as last seen)."""
        for job_id, family in jobs:
            own = []
            with contextlib.suppress(psutil.NoSuchProcess):
                own = [(int(job_id), psutil.Process(int(job_id)).create_time())]
            end_family([*own, *family])


class _Slurm:
    """Jobs of a cluster, each handed to sbatch."""

    trusts_files = True  # what a job says at its end is there before Slurm knows
    grace_s = _GRACE_S
    driver = None  # a job goes on without one

    def __init__(self, options: FanOut, environment: Mapping[str, str]):
        self.options, self.environment = options, environment
        self._there: dict[str, tuple[str, str]] | None = None  # not known
        self._asked = time.monotonic()

    def begin(self, task: Task, name: str) -> str:
        """Hand a job to sbatch; returns Slurm's number for it. Raises StageFailed, one line, when sbatch refuses."""
        executor = _submitit().SlurmExecutor(folder=task.folder / LOGS, python=_python(self.environment))
        cores = self.options.cores
        executor.update_parameters(
            job_name=f"pursuhint-{name}",
            cpus_per_task=cores,
            srun_args=[f"--cpus-per-task={cores}"],  # which a step does not take over from its job since Slurm 22.05
            gpus_per_node=self.options.gpus or None,
            time=None,  # else five minutes
            stderr_to_stdout=True,
            additional_parameters=dict(self.options.slurm),
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where submitit says the same at length
                job_id = executor.submit(run_task, task).job_id
        except _submitit().core.utils.FailedJobError as error:
            raise StageFailed(f"sbatch refused the job {name}: {first_line(error)}") from None
        if self._there is not None:
            self._there[job_id] = ("PENDING", "")  # until Slurm is asked again
        return job_id

    def way_of_end(self, job_id: str) -> str | None:
        """None while it is under way; afterwards how it ended, "" where Slurm does not know."""
        if time.monotonic() - self._asked >= _LOOK_S:
            self._asked, self._there = time.monotonic(), slurm_jobs()
        if self._there is None:
            return None
        state, _ = self._there.get(job_id, ("", ""))
        return _SLURM_OVER.get(state) if state else ""

    def why_waiting(self, job_id: str) -> str:
        """Slurm's word for why a job has not begun, "" where there is none."""
        state, reason = (self._there or {}).get(job_id, ("", ""))
        return reason if state == "PENDING" and reason != "None" else ""

    def forget(self, job_id: str, family: Sequence) -> None:
        """Nothing: Slurm itself ends what a job has started."""

    def cancel(self, jobs: Sequence[tuple[str, Sequence]]) -> None:
        """End jobs, each (id, anything)."""
        if jobs:
            subprocess.run(["scancel", *(job_id for job_id, _ in jobs)], capture_output=True)


def _submitit() -> Any:
    """submitit, imported when a job is begun. It remarks on a Slurm without accounting, which matters to nobody."""
    module = importlib.import_module("submitit")
    logging.getLogger("submitit").setLevel(logging.CRITICAL)
    return module


def _exit_code(folder: Path) -> int | str:
    """How the process of a job that was one of this machine ended, as `subprocess` has it: a shell adds 128."""
    try:
        code = int((folder / CODE).read_text())
    except (OSError, ValueError):
        return NOT_KNOWN
    return 128 - code if code > 128 else code


def _python(environment: Mapping[str, str]) -> str:
    """The command by which submitit starts a job's process: this interpreter, with these variables from its start."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable])


def slurm_jobs() -> dict[str, tuple[str, str]] | None:
    """Number -> state and its reason, of this user's jobs in Slurm, with those that ended lately; None when it does not
    answer.
    """
    command = ["squeue", "--noheader", "--states=all", "--format=%i|%T|%r", f"--user={os.getuid()}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.strip().split("|") for line in done.stdout.splitlines() if "|" in line]
    return {number: (state, reason) for number, state, reason in lines}


# --- What an earlier driver has left


def settle(study: str, stage: str, key: str, say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """See that no job of an earlier driver goes on beside this one.

    A job under Slurm that is made from `key` goes on: its id and token are returned, by name, for `Fleet.run`; an
    empty `key` means none. Every other is ended. Raises StudyBusy, one line, where Slurm has to be asked and cannot be.
    """
    adopted = {}
    for path in sorted((run_folder(study) / "jobs").glob(f"*/*/{ATTEMPT}")):
        folder, attempt = path.parent, read_attempt(path.parent)
        token = attempt.get("token", "")
        if read_end(folder, token):
            continue
        if attempt.get("executor") == "slurm":
            number = attempt["id"] or read_worker(folder, token).get("slurm", "")
            state = _slurm_state(number, folder)
            # One that is ending, well or not, cannot be taken over.
            if state not in ("", "COMPLETING") and folder.parent.name == stage and attempt["key"] == key:
                say(f"job {folder.name} of an earlier run is still under way (Slurm's job {number}): waiting for it")
                adopted[folder.name] = {"id": number, "token": token}
                continue
            _end_slurm_job(number, folder, say)
        path.unlink(missing_ok=True)  # a job that has not begun yet finds no token of its own and does nothing
        end_workers(folder, say)
    return adopted


def end_workers(folder: Path, say: Callable[[str], None]) -> None:
    """End the processes and Slurm's jobs of all attempts at a job but the one that ATTEMPT names."""
    current = read_attempt(folder).get("token", "")
    for path in folder.glob(WORKER.format("*")):
        token = path.name.split(".")[1]
        if token == current:
            continue
        worker = read_worker(folder, token)
        if number := worker.get("slurm"):
            _end_slurm_job(number, folder, say)
        elif worker.get("host") == socket.gethostname():
            end_family(worker["family"], patience_s=4)  # without its driver it ends by itself
        path.unlink(missing_ok=True)


def _slurm_state(number: str, folder: Path) -> str:
    """Of a job that is not over, "" of any other."""
    there = slurm_jobs()
    if there is None:
        raise StudyBusy(
            f"job {folder.name} was handed to Slurm (number {number or 'unknown'}), which does not answer here: go on "
            f"where squeue does, or delete {short(folder)} when the job is gone"
        )
    state, _ = there.get(number, ("", ""))
    return "" if state in _SLURM_OVER else state


def _end_slurm_job(number: str, folder: Path, say: Callable[[str], None]) -> None:
    if not _slurm_state(number, folder):
        return
    say(f"job {folder.name} of an earlier run is still under way (Slurm's job {number}): cancelled")
    subprocess.run(["scancel", number], capture_output=True)
    for _ in range(_PATIENCE_S):
        if not _slurm_state(number, folder):
            return
        time.sleep(1)
    raise StudyBusy(f"Slurm's job {number} was cancelled a minute ago and is still there: try again later")

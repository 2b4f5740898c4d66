"""A job, seen from its own process: the one that an executor has started.

The driver and a job speak through files in the job's folder, which is all that they need to share. The driver writes
ATTEMPT before it hands the job out; the job writes a WORKER file when it begins and ENDED, last and whole, when it is
over. A job that left no ENDED died. Every file names the attempt by a token, so that a job that an executor begins
late, for a driver that is no more, sees that another one has taken its place.
"""

import contextlib
import errno
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, Field, FiniteFloat

from pursuhint_lib.errors import first_line
from pursuhint_lib.execution import KernelDied, StageFailed
from pursuhint_lib.storage import home, read_valid, save_json

ATTEMPT = "attempt.json"
WORKER = "worker.{}.json"  # token
ENDED = "ended.json"


class _Attempt(BaseModel):
    """By the driver. id: the executor's name for the job."""

    token: str
    key: str
    executor: str
    id: str


class _Worker(BaseModel):
    """By the job, renewed while it works. family: number and start of each of its processes."""

    slurm: str
    host: str
    family: list[Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]]
    peak_bytes: int


class _Ended(BaseModel):
    """By the job, at its end."""

    token: str
    key: str
    error: str
    again: bool
    kept: list[str]
    seconds: FiniteFloat
    peak_bytes: int


@dataclass(frozen=True)
class Task:
    """What an executor carries to a job's process.

    work() does the job and returns the files that it has kept. folder: the job's. cwd: where it works. key: of all that
    the job is made from. driver: (number, start) of a process without which this one is to end, or None.
    """

    work: Callable[[], Sequence[Path]]
    folder: Path
    cwd: Path
    key: str
    token: str
    driver: tuple[int, float] | None = None


def run_task(task: Task) -> None:
    """Do a job and leave ENDED. Raises nothing: what went wrong stands there, and whole in the log."""
    signal.signal(signal.SIGTERM, _leave)  # submitit would go on; what is finished is on the disk already
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's word that time is running out
    watch = _Watch(task)
    watch.start()  # first, and the token after it: of two jobs that begin at the same time one sees the other
    if read_attempt(task.folder).get("token") != task.token:
        print("another job has taken this one's place: nothing is done")
        watch.stop()
        (task.folder / WORKER.format(task.token)).unlink()
        return
    started = time.time()
    ended: dict[str, Any] = {"token": task.token, "key": task.key, "error": "", "again": False, "kept": []}
    try:
        os.chdir(task.cwd)
        ended["kept"] = [os.path.relpath(path, home()) for path in task.work()]
    except BaseException as error:
        traceback.print_exc()
        kind = "" if isinstance(error, StageFailed) else f"{type(error).__name__}: "
        ended |= {"error": kind + first_line(str(error)), "again": may_mend(error)}
    watch.stop()
    ended |= {"seconds": round(time.time() - started, 1), "peak_bytes": watch.peak_bytes}
    save_json(ended, task.folder / ENDED)


def may_mend(error: BaseException) -> bool:
    """Whether a second try can help: the machine failed (memory, a device, a network, a disk), not what was asked.

    Wrong parameters, damaged or missing files and a full disk stay what they are.
    """
    if isinstance(error, StageFailed):
        return isinstance(error, KernelDied)
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, PermissionError)) and error.errno != errno.ENOSPC
    hopeless = isinstance(error, (NotImplementedError, RecursionError))
    return isinstance(error, (RuntimeError, MemoryError)) and not hopeless  # CUDA's errors are RuntimeErrors


def read_attempt(folder: Path) -> dict[str, Any]:
    """What the driver last said of a job, {} when there is nothing that can be read."""
    return read_valid(folder / ATTEMPT, _Attempt) or {}


def read_worker(folder: Path, token: str) -> dict[str, Any]:
    """What the process of this attempt says of itself, {} before it began."""
    return read_valid(folder / WORKER.format(token), _Worker) or {}


def read_end(folder: Path, token: str) -> dict[str, Any]:
    """How this attempt ended, {} when it has not, or without a word."""
    found = read_valid(folder / ENDED, _Ended) or {}
    return found if found.get("token") == token else {}


def finished(folder: Path, key: str) -> dict[str, Any]:
    """ENDED of a job that was done well under this key and whose files are all there; else {}."""
    found = read_valid(folder / ENDED, _Ended) or {}
    whole = found.get("key") == key and not found["error"] and all((home() / name).exists() for name in found["kept"])
    return found if whole else {}


def _leave(signum: int, _frame: Any) -> None:
    """End at once, with all children, those in sessions of their own as well."""
    children = []
    with contextlib.suppress(psutil.Error):
        children = [[one.pid, one.create_time()] for one in psutil.Process().children(recursive=True)]
    end_family(children)
    os._exit(128 + signum)


class _Watch:
    """Looks once a second, from a thread: who belongs to this job, how much memory they hold, is the driver there?"""

    def __init__(self, task: Task):
        self.task, self.peak_bytes, self._over = task, 0, threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="watch", daemon=True)
        self._me = psutil.Process()
        self._told: tuple[list, int] = ([], 0)

    def start(self) -> None:
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """Look for the last time."""
        self._over.set()
        self._thread.join()
        self.look()

    def look(self) -> None:
        """Note the family and the memory; say so when either is news."""
        family, total = [], 0
        for one in [self._me, *self._me.children(recursive=True)]:
            try:
                total += one.memory_info().rss
                family.append([one.pid, one.create_time()])
            except psutil.Error:  # it has just ended
                continue
        self.peak_bytes = max(self.peak_bytes, total)
        if family != self._told[0] or self.peak_bytes > 1.1 * self._told[1]:
            self._told = family, self.peak_bytes
            job = os.environ.get("SLURM_JOB_ID", "") if self.task.driver is None else ""
            about = {"slurm": job, "host": socket.gethostname(), "family": family, "peak_bytes": self.peak_bytes}
            save_json(about, self.task.folder / WORKER.format(self.task.token))

    def _go_on(self) -> None:
        while not self._over.wait(1):
            if self.task.driver and not is_alive(*self.task.driver):
                print("the driver is gone: this job ends, too", flush=True)
                _leave(signal.SIGTERM, None)
            try:
                self.look()
            except OSError:  # a full disk: the job itself will say so
                continue


def is_alive(pid: int, created: float) -> bool:
    """Whether the process with this number and start still runs; a number may be used again.

    Starts are told by the clock, which may have been set meanwhile: two seconds apart is the same.
    """
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) <= 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end_family(family: Sequence[Sequence[float]], patience_s: float = 0.0) -> None:
    """See that these processes, (number, start) each, and all their children are gone: killed after `patience_s`."""
    processes: dict[int, psutil.Process] = {}
    for pid, created in family:
        if is_alive(int(pid), created):
            try:
                process = psutil.Process(int(pid))
                processes |= {one.pid: one for one in [process, *process.children(recursive=True)]}
            except psutil.Error:
                continue
    if patience_s:
        psutil.wait_procs(list(processes.values()), timeout=patience_s)
    for process in processes.values():
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(list(processes.values()), timeout=4)

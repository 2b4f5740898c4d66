"""Where a study stands.

``runs/<study>/status.json`` is what the driver says of itself. A driver that was killed can say nothing more, so
whether it still runs is asked of the study's lock, which the system lets go of at its death; how far it came, of the
notebook's heartbeat.
"""

import contextlib
import fcntl
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat

from pursuhint_lib import records
from pursuhint_lib.progress import duration, read_progress
from pursuhint_lib.records import Stage
from pursuhint_lib.storage import home, read_valid, run_folder

_Pid = Annotated[int, Field(gt=0, lt=2**31)]


class StudyBusy(RuntimeError):
    """Another driver runs this study."""


class _Kernel(BaseModel):
    pid: _Pid
    created: FiniteFloat


class _Status(BaseModel):
    """What a driver says of itself."""

    state: Literal["running", "failed", "interrupted", "killed", "finished"]
    stage: str
    stage_started: FiniteFloat
    progress: str
    to_redo: list[str]
    pid: _Pid
    host: str
    options: str = ""
    seconds: dict[str, FiniteFloat]
    spent: dict[str, FiniteFloat]
    kernel: _Kernel | None = None
    message: str = ""


class _Told(BaseModel):
    """What is read of a verdict."""

    text: str


def folders(study: str, stage: str) -> tuple[Path, Path]:
    return home() / "runs" / study / stage, home() / "reports" / study


def read_status(study: str) -> dict[str, Any]:
    """What the last driver wrote of itself, {} when there was none or it is damaged."""
    return read_valid(home() / "runs" / study / "status.json", _Status) or {}


def state_text(study: str, status: Mapping[str, Any], busy: bool, stages: Sequence[Stage]) -> str:
    stage = status.get("stage", "")
    heartbeat = read_progress(home() / "runs" / study / stage) if stage else None
    now = dict(status)
    if heartbeat and heartbeat["updated"] >= status.get("stage_started", 0):
        now["progress"] = progress_text(heartbeat)
    if busy:
        left = heartbeat.get("eta_s") if heartbeat else None
        return (
            f"running {where(now)}"
            + (f", {duration(left)} left of it" if left is not None else "")
            + f" (process {status.get('pid')})"
        )
    again = command_line("reproduce", study, status.get("options", ""))
    going_on = f"kept: {kept(study, stages)}; '{again}' goes on from there"
    match status.get("state"):
        case None:
            return "not run yet"
        case "finished":
            return f"finished; {read_verdict(study)['text']}"
        case "running" if status.get("host") != socket.gethostname():
            return f"last seen running on {status.get('host')} {where(now)}; {going_on}"
        case "running":
            return f"was killed {where(now)}; {going_on}"
        case "failed":
            return f"failed: {status.get('message')}; {going_on}"
        case _:
            return f"was interrupted {where(now)}; {going_on}"


def where(status: Mapping[str, Any]) -> str:
    if not status.get("stage"):
        return "between two notebooks"
    return f"during {status['stage']}" + (f" ({status['progress']})" if status.get("progress") else "")


def progress_text(heartbeat: Mapping[str, Any]) -> str:
    return f"{heartbeat['done']}/{heartbeat['total']}, {heartbeat['text']}"


def kept(study: str, stages: Sequence[Stage]) -> str:
    """What a stopped run leaves, for example ``01_train_teacher, 02_profile_layers and 12 finished networks``."""
    done, pieces = [], 0
    for stage in stages:
        folder, _ = folders(study, stage.name)
        if records.read_record(folder) is not None:
            done.append(stage.name)
        elif stage.pieces:
            pieces += sum(not path.name.startswith(".") for path in folder.glob(stage.pieces))
    parts = [", ".join(done)] if done else []
    parts += [f"{pieces} finished networks"] if pieces else []
    return " and ".join(parts) or "nothing was finished yet"


def read_verdict(study: str) -> dict[str, Any]:
    """The verdict of the last run, in one line under "text"."""
    return read_valid(home() / "runs" / study / "verdict.json", _Told) or {"text": "not known"}


@contextlib.contextmanager
def study_lock(study: str) -> Iterator[None]:
    """Hold the study. The system lets go of it when the process ends, however it ends, so it is never stale."""
    path = run_folder(study) / ".lock"
    read_only = path.exists() and not os.access(path.parent, os.W_OK)  # a finished study needs no more
    with open(path, "r" if read_only else "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StudyBusy(
                f"study {study} is being run by {lock.read() or 'another process'}; "
                f"'{command_line('status', study)}' shows how far it is"
            ) from None
        if not read_only:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        yield


def is_busy(study: str) -> bool:
    path = home() / "runs" / study / ".lock"
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def end_process(kernel: Mapping[str, Any] | None) -> None:
    """See that a dead driver's kernel, which ends by itself within seconds, does not write beside its successor."""
    if not kernel:
        return
    import psutil

    try:
        process = psutil.Process(kernel["pid"])
        if abs(process.create_time() - kernel["created"]) > 1:
            return  # the number was used again
        family = [process, *process.children(recursive=True)]
        _, alive = psutil.wait_procs(family, timeout=4)
        for one in alive:
            one.kill()
        psutil.wait_procs(alive, timeout=4)
    except psutil.Error:
        return


def command_line(verb: str, study: str, options: str = "") -> str:
    """What to type. options: those of make behind the study."""
    return (
        f"make reproduce STUDY={study}{options}"
        if verb == "reproduce"
        else f"python -m pursuhint_lib.pipeline {verb} {shlex.quote(study)}"
    )


def short(path: Path) -> str:
    """A path as seen from where the command was given, when it lies below."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

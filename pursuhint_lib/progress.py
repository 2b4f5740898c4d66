"""How far a notebook has come.

A notebook says one plain line per step (progress bars bloat a headless notebook and show nothing in the terminal) and
leaves a heartbeat, ``progress.json``, from which `pipeline` draws its live line and tells where a killed run stopped.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from pursuhint_lib.storage import read_valid


class _Heartbeat(BaseModel):
    done: int
    total: Annotated[int, Field(ge=1)]
    text: str
    updated: FiniteFloat
    eta_s: FiniteFloat | None


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``8 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Counts `total` equal steps of `what`, prints one line for each and writes ``<folder>/progress.json`` whole.

    The file holds {"done", "total", "text", "started", "updated", "eta_s"}; times are UNIX seconds, eta_s is null until
    the first step is done. Steps that an earlier run has done are given to `skip`: they count as done but not as pace.
    """

    def __init__(self, folder: Path, total: int, what: str):
        if total < 1:
            raise ValueError(f"total = {total} steps of {what!r}: should be at least 1")
        self.path = Path(folder) / "progress.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.total, self.what = total, what
        self.done, self.skipped = 0, 0
        self.started = time.time()
        self._write(what)

    def advance(self, text: str, by: int = 1) -> None:
        """`by` steps were done just now; `text` says what they gave, for example ``at_uniform s0: 61.2 %``."""
        self.done += by
        self._write(text)
        left = self.eta_s()
        self._say(text, "done" if self.done >= self.total else f"{duration(left or 0)} left")

    def skip(self, text: str, by: int = 1) -> None:
        """`by` steps were done by an earlier run and are kept."""
        self.done += by
        self.skipped += by
        self._write(text)
        self._say(text, "kept")

    def eta_s(self) -> float | None:
        """Seconds to go at the mean pace so far; None before the first step."""
        worked = self.done - self.skipped
        if worked <= 0:
            return None
        return max(0, self.total - self.done) * (time.time() - self.started) / worked

    def _say(self, text: str, end: str) -> None:
        print(f"{self.what} {self.done}/{self.total} · {text} · {end}", flush=True)

    def _write(self, text: str) -> None:
        state = {
            "done": self.done,
            "total": self.total,
            "text": text,
            "started": self.started,
            "updated": time.time(),
            "eta_s": self.eta_s(),
        }
        write_progress(self.path.parent, state)


def write_progress(folder: Path, heartbeat: Mapping[str, Any]) -> None:
    """Leave a heartbeat in `folder`, in the form that `Progress` describes."""
    # Renamed but not flushed to disk: a reader sees whole files, and a heartbeat must not cost a disk's latency.
    temporary = folder / f".progress.{os.getpid()}.partial.json"
    temporary.write_text(json.dumps(heartbeat, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, folder / "progress.json")


def read_progress(folder: Path) -> dict | None:
    """The last heartbeat in `folder`, or None when there is none or it is damaged."""
    return read_valid(Path(folder) / "progress.json", _Heartbeat)

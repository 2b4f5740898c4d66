"""What runs now, in the terminal: one live line, or several.

On a terminal they are redrawn in place; elsewhere (a log file, CI) the first of them is printed as a plain line at most
every 30 seconds, so a short study is quiet there.
"""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from pursuhint_lib.progress import duration


def study_seconds_left(
    stage: str,
    later: Sequence[str],
    spent_s: float,
    heartbeat: Mapping[str, Any] | None,
    past: Mapping[str, float],
    shares: Mapping[str, float],
    now: float,
) -> tuple[float | None, float | None]:
    """Seconds left of this stage and of the study (from this stage to the last of `later`); None when nothing is known.

    past: seconds that stages took, in this run or the last one; spent_s: this stage's, so far. A stage that says how
    far it is, is believed. One that was never timed is guessed from those that were and the `shares` of the stage
    table.
    """
    timed = {name: past[name] for name in shares if past.get(name)}
    pace = sum(timed.values()) / sum(shares[name] for name in timed) if timed else None

    def whole(name: str) -> float | None:
        return timed.get(name, None if pace is None else shares[name] * pace)

    if heartbeat and heartbeat.get("eta_s") is not None:
        left = max(0.0, heartbeat["eta_s"] - (now - heartbeat["updated"]))
        pace = pace or (spent_s + left) / shares[stage]
    else:
        expected = whole(stage)
        left = None if expected is None else max(0.0, expected - spent_s)
    rest = [whole(name) for name in later]
    return left, None if left is None or None in rest else left + sum(rest)


class LiveLine:
    """Draws the state of a running stage; every other line goes through `say`, which clears it first."""

    def __init__(self, stream: TextIO | None = None, *, every_s: float = 30.0):
        self.stream = stream or sys.stdout
        self.every_s = every_s
        self.terminal = self.stream.isatty()
        self._drawn = 0  # lines on the terminal that the next call replaces
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, file=self.stream, flush=True)
        self._last = time.monotonic()

    def draw(self, text: str) -> None:
        """Show `text` until the next call: a line or several, the one that counts first, cut to the terminal's size."""
        now = time.monotonic()
        if self.terminal and (not self._drawn or now - self._last >= 0.2):
            size = shutil.get_terminal_size()
            lines = text.splitlines()
            if len(lines) > size.lines:  # what has scrolled away cannot be replaced
                kept = max(1, size.lines - 1)
                lines = [*lines[:kept], f"... and {len(lines) - kept} more"][: size.lines]
            shown = "\n".join(line[: size.columns - 1] + "\x1b[K" for line in lines)
            print(f"{self._back()}{shown}\x1b[J", end="", file=self.stream, flush=True)
            self._drawn, self._last = len(lines), now
        elif not self.terminal and now - self._last >= self.every_s:
            self.say(text.partition("\n")[0])

    def clear(self) -> None:
        """Wipe what was drawn."""
        if self._drawn:
            print(f"{self._back()}\x1b[J", end="", file=self.stream, flush=True)
            self._drawn = 0

    def _back(self) -> str:
        """Moves the cursor to the start of what was drawn."""
        return "\r" + (f"\x1b[{self._drawn - 1}A" if self._drawn > 1 else "")


def stage_line(
    place: str, stage: str, heartbeat: Mapping[str, Any] | None, left: float | None, study_left: float | None
) -> str:
    """As in ``[4/5] 04_distill_students 35 % · at_uniform s0: 61.2 % · stage 40 s, study about 1 min 10 s left``."""
    parts = [f"{place} {stage}"]
    if heartbeat:
        parts[0] += f" {100 * heartbeat['done'] // heartbeat['total']} %"
        parts.append(str(heartbeat["text"]))
    times = [f"stage {duration(left)}"] if left is not None else []
    times += [f"study about {duration(study_left)}"] if study_left is not None else []
    if times:
        parts.append(", ".join(times) + " left")
    return " · ".join(parts)

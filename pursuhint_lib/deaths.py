"""How a process died, in words: of kernels, of jobs, of processes that train together, of a grid's studies."""

import contextlib
import re
import signal
from pathlib import Path

from pursuhint_lib.provenance import memory_limit

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_NEARLY_ALL = 0.9  # of the memory: what a process holds when the system kills it for that, seen a second before
_TRACE = "Fatal Python error: "  # begins what faulthandler writes
NOT_KNOWN = "a crash, or killed from outside, or out of memory"


def oom_kills() -> int:
    """How many processes were killed for lack of memory so far, in this process's own group of processes (cgroup v2 or
    v1), or where that is not told, on this machine; 0 where nobody counts them.
    """
    places = ["/proc/vmstat"]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if "memory" in kind.split(","):
                places.insert(0, f"/sys/fs/cgroup/memory{path}/memory.oom_control")
            elif not kind:
                places.insert(0, f"/sys/fs/cgroup{path}/memory.events")
    for place in places:
        with contextlib.suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)$", Path(place).read_text(), re.M):
                return int(found[1])
    return 0


def way_of_death(code: int | str, kills_before: int, peak_bytes: int = 0, said: str = "") -> str:
    """What ended a process, how much memory it held and what it said last, in one line.

    code: as `subprocess` has it, negative for a signal; words where there is no such number. kills_before: `oom_kills`
    when it began. peak_bytes: the most that it and its children were seen to hold, 0 if nobody looked. said: by it.
    """
    nearly_all = peak_bytes >= _NEARLY_ALL * memory_limit()
    if isinstance(code, str):
        text = code
    elif code >= 0:
        text = f"it ended by itself with exit code {code}"
    elif -code in _CRASHES:
        text = f"{signal.Signals(-code).name}, a crash in native code, not a kill for lack of memory"
    elif -code == signal.SIGKILL and (nearly_all or oom_kills() > kills_before):
        text = "SIGKILL, out of memory"
    else:
        text = f"{_name(-code)}, killed from outside"
    if peak_bytes:
        text += f"; peak memory {peak_bytes / 2**30:.1f} of {memory_limit() / 2**30:.1f} GB"
    last = [line.strip()[:200] for line in said.partition(_TRACE)[0].splitlines() if line.strip()][-3:]
    return text + (f"; it said last: {' / '.join(last)}" if last else "")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"

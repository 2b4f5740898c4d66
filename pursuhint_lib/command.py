"""What every command of the package does first, so that its surroundings neither end it half-way nor garble it."""

import io
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

# What a driver or a notebook's kernel needs, found by trying. Terminals allow more; services and queues may not.
_LIMITS = {
    resource.RLIMIT_NOFILE: ("open files (ulimit -n)", 128, 1),
    resource.RLIMIT_AS: ("GiB of address space (ulimit -v)", 4, 2**30),
}


def run_command(main: Callable[[], int]) -> int:
    """Run a command; returns its exit status, or 1 with one line where these surroundings do not allow its work."""
    _keep_streams()
    if trouble := _trouble():
        print(trouble, file=sys.stderr)
        return 1
    return main()


def _trouble() -> str:
    """What the surroundings lack, in one line. A limit that may be raised is."""
    for kind, (what, needed, unit) in _LIMITS.items():
        allowed, most = resource.getrlimit(kind)
        if resource.RLIM_INFINITY != allowed < needed * unit:
            if resource.RLIM_INFINITY != most < needed * unit:
                return f"this process may have {most / unit:.3g} {what}: at least {needed} are needed"
            resource.setrlimit(kind, (needed * unit, most))
    named = os.environ.get("PURSUHINT_HOME", "")
    if os.path.exists(named) and not os.path.isdir(named):
        return f"PURSUHINT_HOME = {named!r}: should be a folder, and is a file"
    return ""


class _Outlet(io.FileIO):
    """A standard stream without which a command goes on: when it can no longer be written (closed, full), this is said
    once, on the other one, and what follows goes nowhere.
    """

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self.fileno() == 1:
                lost = "nothing more can be said on standard output, the command goes on"
                print(f"{lost}: {error.strerror}", file=sys.stderr)
            return len(data)


def _keep_streams() -> None:
    """See that standard streams are open and that writing to them never fails, whatever the text and its encoding."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed: the next file that is opened would have its number, and get what is meant for it
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)  # dup2 sees to it, but not for a number that it finds in place
        if number:
            outlet = io.BufferedWriter(_Outlet(number, "w", closefd=False))
            encoding = stream.encoding if stream else "utf-8"
            lines = name == "stderr" or outlet.raw.isatty()
            setattr(sys, name, io.TextIOWrapper(outlet, encoding, "backslashreplace", line_buffering=lines))

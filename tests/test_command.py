"""Commands in surroundings that are not as they should be go on where they can, and end with one line where not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pursuhint_lib.storage import REPOSITORY

TALK = """import subprocess, sys
from pursuhint_lib.command import run_command
def main():
    with open("work", "w") as file:
        print("one \\u00b7 two", flush=True)
        print("three", flush=True)
        subprocess.run(["sh", "-c", "echo of a child; echo error >&2"])
        file.write(f"done {file.fileno() > 2}")
    return 0
sys.exit(run_command(main))"""
LOST = "nothing more can be said on standard output, the command goes on: "


def command(folder, code, surroundings="", **environment):
    """Run Python code in a folder by a shell that is told of the surroundings: `ulimit`, `exec` with redirections."""
    given = {"PYTHONPATH": str(REPOSITORY), "PURSUHINT_HOME": "", **environment}
    line = f'{surroundings}\nexec "{sys.executable}" -c "$CODE"'
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=os.environ | given | {"CODE": code}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("surroundings", "told"),
    [
        ("exec >&-", "error\n"),
        ("exec >/dev/full", f"{LOST}No space left on device\nerror\n"),
        (
            "exec > >(exec true); sleep 0.2",
            f"{LOST}Broken pipe\nerror\n",
        ),
        ("exec 2>&-", ""),
        ("exec >/dev/full 2>&1", ""),
        ("exec <&- >&- 2>&-", ""),
    ],
)
def test_a_command_goes_on_when_nobody_can_hear_it(tmp_path, surroundings, told):
    done = command(tmp_path, TALK, surroundings)
    assert (done.returncode, done.stderr) == (0, told)
    assert (tmp_path / "work").read_text() == "done True", "a file had the number of a stream that was closed"


def test_what_an_encoding_does_not_know_is_written_out(tmp_path):
    done = command(tmp_path, TALK, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "one \\xb7 two\nthree\nof a child\n")


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ("ulimit -n 32", "this process may have 32 open files (ulimit -n): at least 128 are needed\n"),
        ("ulimit -v 3145728", "this process may have 3 GiB of address space (ulimit -v): at least 4 are needed\n"),
        ("ulimit -S -n 32; ulimit -S -v 3145728", ""),
    ],
)
def test_a_limit_that_is_too_low_is_raised_or_else_refused_before_anything_runs(tmp_path, limit, told):
    done = command(tmp_path, TALK, limit)
    assert (done.returncode, done.stderr) == ((1, told) if told else (0, "error\n"))
    assert (tmp_path / "work").exists() == (not told)


@pytest.mark.parametrize("arguments", [["pipeline", "status", "smoke"], ["grid", "status", "pairs"], ["tracking_page"]])
def test_a_home_that_is_a_file_is_refused_in_one_line(tmp_path, arguments):
    (tmp_path / "home").touch()
    line = [sys.executable, "-m", f"pursuhint_lib.{arguments[0]}", *arguments[1:]]
    environment = os.environ | {"PURSUHINT_HOME": str(tmp_path / "home")}
    done = subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"PURSUHINT_HOME = '{tmp_path}/home': should be a folder, and is a file\n"


def test_a_driver_is_stopped_when_the_process_that_started_it_is_killed(tmp_path):
    code = """import time
from pursuhint_lib.pipeline import noted_signals
with noted_signals() as stop:
    open("begun", "w").close()
    while stop.signum is None:
        time.sleep(0.05)
    with open("signal", "w") as file:
        file.write(str(stop.signum))"""
    line = f'PURSUHINT_PARENT=$$ "{sys.executable}" -c "$CODE" & wait'
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CODE": code}
    starter = subprocess.Popen(["sh", "-c", line], cwd=tmp_path, env=environment)
    for name in ("begun", "signal"):
        end = time.monotonic() + 60
        while not (tmp_path / name).exists() or (name == "signal" and not (tmp_path / name).read_text()):
            assert time.monotonic() < end, f"{name} did not come"
            time.sleep(0.05)
        starter.kill()
    starter.wait()
    assert (tmp_path / "signal").read_text() == str(signal.SIGTERM.value)

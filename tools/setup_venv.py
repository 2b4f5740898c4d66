"""Build .venv from requirements.lock, whole or not at all. `make` runs this before every target that needs it.

Needs the standard library of Python 3.11 or newer and a package index, nothing else. Does nothing when .venv is ready:
a stamp, .venv/.ready, is written last and names the lock and the folder it was made for, so an interrupted set-up and
an old lock are both noticed and built again. uv is used when it is on the PATH; pip is the plain route, and the way
out when uv fails, since uv does not read pip's configuration (a mirror, a certificate).
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".ready"
HEARTBEAT = 30  # seconds between signs of life


class SetupError(Exception):
    """One line that says what stopped the set-up."""


def main() -> None:
    if ready():
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_at_a_time() as lock_handle:
        if ready():  # the set-up that was waited for did it
            return
        started = time.monotonic()
        lock, folder = stamp_now()
        made_for, made_in = stamp_found()
        if made_for == lock and PYTHON.exists():
            say(f"Set-up: .venv was made in {made_in}; linking it to {folder}")
            move(Path(made_in) / VENV.name)
        else:
            build(lock_handle, why="requirements.lock has changed" if made_for else "there is no complete .venv yet")
        # No build isolation: an isolated build would fetch setuptools anew, past the lock's hashes.
        link = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
        run([PYTHON, "-m", "pip", *link], lock_handle, "link pursuhint_lib into .venv")
        write_lab_settings()
        write_anew(STAMP, f"{lock}\n{folder}\n".encode())
        say(f"Set-up: ready after {spoken(time.monotonic() - started)}")


def ready() -> bool:
    """Whether .venv is complete, for this lock and this folder, and its Python is still on this machine."""
    return stamp_found() == stamp_now() and PYTHON.exists()


def stamp_now() -> tuple[str, str]:
    return hashlib.sha256(LOCK.read_bytes()).hexdigest(), str(ROOT)


def stamp_found() -> tuple[str, str]:
    """What the stamp of .venv says: the lock's hash and the folder; empty texts without a stamp."""
    try:
        lock, folder = STAMP.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "", ""
    return lock, folder


@contextlib.contextmanager
def one_at_a_time() -> Iterator[int]:
    """Hold the lock file's own lock, so two `make` in one folder do not build one .venv; gives the handle to
    inherit.
    """
    with open(LOCK, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Set-up: another set-up of this folder is at work; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: go on without
        yield file.fileno()


def move(old: Path) -> None:
    """Have everything in .venv outside of its packages name .venv where it names `old`, the place that it was made for:
    first lines of scripts, activate, pyvenv.cfg, kernels.
    """
    was, now = os.fsencode(old), os.fsencode(VENV)
    named = re.compile(rb"(?<![\w.-])" + re.escape(was) + rb"(?![\w.-])")
    first_line = re.compile(rb"\A#!(" + re.escape(was) + rb"/\S+)\n")
    parts = [path for part in ("bin", "etc", "share") for path in (VENV / part).rglob("*")]
    for path in [VENV / "pyvenv.cfg", *parts]:
        if path.is_file() and not path.is_symlink() and named.search(content := path.read_bytes()):
            # As pip writes it for a long path, or one with spaces: for sh this starts Python, for Python it is a text.
            content = first_line.sub(rb"""#!/bin/sh\n'''exec' "\1" "$0" "$@"\n' '''\n""", content)
            write_anew(path, named.sub(lambda _: now, content))


def write_anew(path: Path, content: bytes) -> None:
    """Write a file whole, never into the one that is there: another .venv may share that (``cp -al``)."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(content)
    if path.exists():
        shutil.copymode(path, temporary)
    os.replace(temporary, path)


def build(lock_handle: int, why: str) -> None:
    """Make .venv anew and install every pin of the lock, checked by hash."""
    uv = shutil.which("uv")
    say(f"Set-up: {why}; building it with Python {'.'.join(map(str, sys.version_info[:3]))} from {sys.base_prefix}")
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: its venv package is missing"
            " (Debian and Ubuntu: apt install python3-venv); or name another with make PYTHON=/path/to/python3"
        )
    STAMP.unlink(missing_ok=True)  # first, so that what follows is never taken for complete
    try:
        venv.EnvBuilder(clear=True, symlinks=True, with_pip=True).create(VENV)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"{sys.executable} could not put pip into .venv: {(error.output or b'').decode()}") from None
    # Wheels only: building a source archive would fetch its build tools past the lock's hashes.
    options = ["--quiet", "--require-hashes", "--only-binary", ":all:", "--requirement", str(LOCK)]
    say(
        "Set-up: fetching and unpacking about 200 packages, 3 GB to download and 6 GB on disk "
        "(PyTorch's CUDA libraries)"
    )
    if uv:
        say("Set-up: with uv, about half a minute on a fast line")
        try:
            run([uv, "pip", "install", "--python", str(PYTHON), *options], lock_handle, "install the lock with uv")
            return
        except SetupError as error:
            say(f"Set-up: {error}; going on with pip")
    say("Set-up: with pip, 3 to 5 minutes on a fast line")
    pip = [PYTHON, "-m", "pip", "install", "--no-input", "--no-compile", "--disable-pip-version-check"]
    run([*pip, *options], lock_handle, "install the lock with pip")


def run(command: list[str | Path], lock_handle: int, what: str) -> None:
    """Run a command to its end with a sign of life now and then; its own errors go to the terminal.

    The command inherits the handle of the set-up's lock: when this process is killed, the next set-up waits until the
    command that it left behind has let go of .venv.
    """
    started = time.monotonic()
    environment = os.environ | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[lock_handle])
    try:
        while True:
            try:
                status = process.wait(timeout=HEARTBEAT)
                break
            except subprocess.TimeoutExpired:
                unpacked = len(list(VENV.glob("lib/python*/site-packages/*.dist-info")))
                doing = f"{unpacked} packages unpacked" if unpacked > 2 else "downloading"
                say(f"Set-up: {spoken(time.monotonic() - started)}, {doing}")
    except BaseException:  # Ctrl-C or SIGTERM: leave nothing behind that still writes
        process.terminate()
        process.wait()
        raise
    if status:
        raise SetupError(f"could not {what} (exit status {status}, its message is above)")


def write_lab_settings() -> None:
    """JupyterLab, started from this .venv in any way, does not ask about news and does not look for updates."""
    folder = VENV / "etc" / "jupyter" / "labconfig"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    write_anew(folder / "page_config.json", f"{json.dumps(settings, indent=1)}\n".encode())


def spoken(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # closed, or a full disk: nobody hears it, and the set-up goes on
        os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        sys.exit(f"Set-up stopped: {error}. Nothing is lost: the same command starts it again.")
    except KeyboardInterrupt:
        print("\nSet-up interrupted; the same command starts it again.", file=sys.stderr)
        sys.exit(130)

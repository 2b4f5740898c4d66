"""One notebook, executed headless.

papermill runs it (only here), with a kernel that is this very interpreter. What papermill and the notebook's metadata
say of success is not believed: papermill marks the cells of a dead kernel "completed", and ``sys.exit(0)`` in a cell
raises nothing.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pursuhint_lib import records
from pursuhint_lib.deaths import oom_kills, way_of_death
from pursuhint_lib.errors import first_line
from pursuhint_lib.status import short
from pursuhint_lib.storage import REPOSITORY, home, written_whole


class StageFailed(RuntimeError):
    """A stage did not end well. The text is one line: stage, cell, error, where the notebook is kept."""


class KernelDied(StageFailed):
    """The notebook's process ended in the middle of a cell."""


class Execution:
    """A notebook, executed by papermill in a second thread."""

    def __init__(self, notebook: Path, folder: Path, parameters: Mapping[str, Any], environment: Mapping[str, str]):
        self.notebook, self.folder = notebook, folder
        self.parameters, self.environment = dict(parameters), dict(environment)
        self.kernel: dict[str, Any] | None = None  # {"pid", "created"} of the kernel's process
        self.peak_bytes = 0
        self._error: BaseException | None = None
        self._executed: Any = None
        self._killed = False
        self._looked = 0.0
        self._process: Any = None  # the kernel's, as `subprocess` started it
        self._kills_before = oom_kills()
        self._thread = threading.Thread(target=self._execute, name="papermill", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; True when the notebook has ended, well or not."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def kill(self) -> None:
        """End the kernel and every process it started."""
        self._killed = True
        end = time.monotonic() + 15
        while self._thread.is_alive() and time.monotonic() < end:  # again and again: it may only just be starting
            for process in self._kernel_processes():
                with contextlib.suppress(Exception):  # it may have ended by itself
                    process.kill()
            self._thread.join(0.2)
        (self.folder / records.RUNNING).unlink(missing_ok=True)  # papermill has marked its cells "completed"

    def look(self) -> None:
        """Note who the kernel is and how much memory it and its children hold. Costs little: at most once a second."""
        if self._process is None or time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        import psutil

        total = 0
        for process in self._kernel_processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, total)

    def _kernel_processes(self) -> list[Any]:
        import psutil

        with contextlib.suppress(psutil.Error):
            if self._process and self._process.returncode is None:
                kernel = psutil.Process(self._process.pid)
                self.kernel = {"pid": kernel.pid, "created": kernel.create_time()}
                return [kernel, *kernel.children(recursive=True)]
        return []

    def result(self, stage: str) -> dict:
        """The executed notebook. Raises StageFailed, one line, when it did not run through."""
        import papermill
        from nbclient.exceptions import DeadKernelError

        error = self._error
        if isinstance(error, DeadKernelError) or (isinstance(error, RuntimeError) and "Kernel died" in str(error)):
            (where, written), said = self._mark_dead_cell(), self.folder / records.SAID
            text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
            how = way_of_death(self._process.returncode, self._kills_before, self.peak_bytes, f"{written}\n{text}")
            raise KernelDied(f"{stage}: the kernel died {where}: {how}{self._kept()}")
        if isinstance(error, papermill.PapermillExecutionError):
            reason = f"{error.ename}: {first_line(error.evalue)}"
            raise StageFailed(f"{stage} stopped in cell [{error.exec_count}]: {reason}{self._kept()}")
        if error is not None:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StageFailed(f"{stage} could not be executed: {reason}{self._kept()}") from error
        for cell in self._executed.cells:
            if cell.cell_type != "code" or not cell.source.strip():
                continue
            errors = [output for output in cell.outputs if output.output_type == "error"]
            if errors or cell.execution_count is None:
                reason = f"{errors[0].ename}: {first_line(errors[0].evalue)}" if errors else "it was not run"
                raise StageFailed(
                    f"{stage} ended early in cell [{cell.execution_count or '-'}]: {reason}{self._kept()}"
                )
        return self._executed

    def _kept(self) -> str:
        """Keep the notebook as it stopped, and beside it what was said past it, and say where."""
        with contextlib.suppress(OSError):
            os.replace(self.folder / records.RUNNING, self.folder / records.FAILED)
            if (said := self.folder / records.SAID).exists() and said.stat().st_size:
                os.replace(said, self.folder / records.TRACE)
                return f"; notebook as it stopped: {short(self.folder / records.FAILED)}, and {records.TRACE} beside it"
            return f"; notebook as it stopped: {short(self.folder / records.FAILED)}"
        return ""

    def _mark_dead_cell(self) -> tuple[str, str]:
        """A dead kernel's cells are all marked "completed": put that right. Returns where it died, and what the cell
        had written to stderr by then.
        """
        path = self.folder / records.RUNNING
        try:
            notebook = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "before its first cell", ""
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        begun = [cell for cell in notebook["cells"] if cell["metadata"].get("papermill", {}).get("start_time")]
        for cell in notebook["cells"]:
            if cell not in begun:
                cell["metadata"].setdefault("papermill", {})["status"] = "pending"
        if begun:
            begun[-1]["metadata"]["papermill"] |= {"status": "failed", "exception": True}
        notebook["metadata"].setdefault("papermill", {})["exception"] = True
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False), encoding="utf-8")
        if not begun:
            return "before its first cell", ""
        said = [output["text"] for output in begun[-1].get("outputs", ()) if output.get("name") == "stderr"]
        return f"in cell [{sum(cell in begun for cell in code)}]", "".join(map("".join, said))

    def _execute(self) -> None:
        try:
            with (
                tempfile.TemporaryDirectory(prefix="pursuhint-") as private,
                _environ(_plot_folder() | self.environment | _private(private, self.folder / records.SAID)),
            ):
                try:
                    self._papermill()
                except RuntimeError as error:
                    # So jupyter_client reports a kernel that did not start: once it may be a port that was just taken.
                    if self._killed or "Kernel d" not in str(error) or _has_begun(self.folder / records.RUNNING):
                        raise
                    self._papermill()
        except BaseException as error:  # handed to the first thread
            self._error = error

    def _papermill(self) -> None:
        import papermill

        for name in ("papermill", "traitlets"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the driver says what went wrong, in one line
        self._executed = papermill.execute_notebook(
            _literal(self.notebook),
            _literal(self.folder / records.RUNNING),
            parameters=self.parameters,
            kernel_name="python3",
            language="python",
            cwd=str(self.notebook.parent),  # as in JupyterLab
            progress_bar=False,
            log_output=False,
            start_timeout=120,
            coalesce_streams=True,
            kernel_manager_class=self._manager(),
            # ipykernel remarks on its local TCP and on being stopped. What libraries write past Python goes to a file,
            # where it outlives the kernel, and not into the notebook, with which the last of it would be lost.
            extra_arguments=["--log-level=50", "--IPKernelApp.capture_fd_output=False"],
        )

    def _manager(self) -> type:
        """What starts the kernel: Jupyter's own, which lets its process be known, for the way in which it ends."""
        from jupyter_client import AsyncKernelManager

        execution = self

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **options: Any) -> None:
                await super().start_kernel(**options)
                execution._process = self.provisioner.process

        return Manager


def run_notebook(
    stage: records.Stage, notebook: Path, folder: Path, parameters: Mapping[str, Any], environment: Mapping[str, str]
) -> list[Path]:
    """Execute a notebook to its end and leave it, executed, in the stage's folder: what a driver does here, done by a
    process elsewhere. Returns its file. Raises StageFailed.

    A stage that cannot go on from what an earlier try has left begins in an empty folder.
    """
    if not stage.resumes:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    execution = Execution(notebook, folder, parameters, environment)
    execution.start()
    while not execution.wait(1):
        execution.look()
    execution.result(stage.name)
    return [folder / records.RUNNING]


def kernel_environment(threads: int | None) -> dict[str, str]:
    """Environment of a notebook's kernel: this repository, a fixed number of threads, no surprises."""
    environment = {
        "PURSUHINT_HOME": str(home()),
        "PURSUHINT_PREFIX": sys.prefix,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")])),
        "PYTHONHASHSEED": "0",  # the order of sets must not differ between equal runs
        "PYTHONFAULTHANDLER": "1",  # a crash in native code says where in Python it was
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    }
    if threads:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environment


def _private(folder: str, said: Path) -> dict[str, str]:
    """Jupyter's folders for one notebook, below the temporary `folder`, with a kernel that is this very interpreter.
    Its stdout and stderr are the file `said`.

    Otherwise a kernel called python3 in the user's home or in another Jupyter may win, and the user's IPython start-up
    files, history and a home that cannot be written would matter.
    """
    kernel = Path(folder) / "share" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = ["sh", "-c", 'exec "$@" >"$PURSUHINT_SAID" 2>&1', "sh"]
    command += [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    text = json.dumps({"argv": command, "display_name": "Python 3 (ipykernel)", "language": "python"})
    (kernel / "kernel.json").write_text(text, encoding="utf-8")
    return {
        "JUPYTER_PATH": str(kernel.parent.parent),  # searched first
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": f"{folder}/runtime",
        "IPYTHONDIR": f"{folder}/ipython",
        "PURSUHINT_SAID": str(said),
    }


def _plot_folder() -> dict[str, str]:
    """matplotlib's folder, only where its own in the user's home cannot be written.

    There it would write two lines with this machine's paths into the notebook. It is one folder for all studies: it
    holds the font cache, which takes a second or more to make, so once here instead of for every notebook in a private
    folder, and not at all for a user who has a home.
    """
    if os.environ.get("MPLCONFIGDIR"):
        return {}
    user = os.path.expanduser("~")  # stays "~" when nobody knows
    for base, name in (("XDG_CONFIG_HOME", ".config"), ("XDG_CACHE_HOME", ".cache")):
        if not _made_and_writable(Path(os.environ.get(base) or Path(user, name)) / "matplotlib"):
            return {"MPLCONFIGDIR": str(home() / "runs" / ".matplotlib")}
    return {}


def _made_and_writable(folder: Path) -> bool:
    """What matplotlib does and asks when it is imported."""
    if not folder.is_absolute():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _environ(changes: Mapping[str, str]) -> Iterator[None]:
    """Change the environment and put it back, key by key: the first thread reads it at the same time."""
    before = {name: os.environ.get(name) for name in [*changes, "MPLBACKEND"]}
    os.environ.update(changes)
    os.environ.pop("MPLBACKEND", None)  # figures belong in the notebook
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _literal(path: Path) -> str:
    """papermill formats paths with the parameters: braces in a folder's name have to be doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _has_begun(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return any(cell.get("execution_count") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    return False


def publish(notebook: Any, folder: Path, target: Path) -> None:
    """Keep the notebook in the stage's folder and in the reports, without the names of this machine's folders."""
    import nbformat

    notebook.metadata.papermill |= {
        "input_path": f"notebooks/{target.name}",
        "output_path": f"reports/{target.parent.parent.name}/notebooks/{target.name}",
    }
    text = nbformat.writes(notebook)
    user = os.path.expanduser("~")  # Path.home() raises where nobody knows
    for place in sorted({str(REPOSITORY), str(home()), sys.prefix, user}, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(json.dumps(place)[1:-1] + "/", "")
    with written_whole(folder / records.EXECUTED) as temporary:
        temporary.write_text(text, encoding="utf-8")
    copy_whole(folder / records.EXECUTED, target)
    (folder / records.RUNNING).unlink(missing_ok=True)


def copy_whole(source: Path, target: Path) -> None:
    with written_whole(target) as temporary:
        shutil.copyfile(source, temporary)

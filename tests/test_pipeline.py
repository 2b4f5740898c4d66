"""The driver, on a toy study of two notebooks: skipping, forcing, failing, dying, and telling the truth about it."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from pursuhint_lib import deaths, execution, records, tracking, tracking_notebook, tracking_store, worker
from pursuhint_lib.live import study_seconds_left
from pursuhint_lib.params import PARAMS_FOLDER, ParameterError, load_params
from pursuhint_lib.pipeline import SPOOL, Driver, Sources, Stage, is_finished, main, one_line
from pursuhint_lib.progress import Progress, duration, read_progress
from pursuhint_lib.provenance import source_state
from pursuhint_lib.storage import REPOSITORY, home, save_json
from pursuhint_lib.verdict import compare_results, judge

# --- A toy study. It is also imported by the child processes that the tests start and kill.


class Make(BaseModel):
    model_config = ConfigDict(extra="forbid")
    study: str
    base: float = 0.5
    pause: float = 0.0
    fault: str = ""


class Judge(BaseModel):
    model_config = ConfigDict(extra="forbid")
    study: str
    shift: float = 0.0


STAGES = (
    Stage(
        "01_make", writes=("numbers.csv", "parts/*.txt"), compared=("numbers.csv",), resumes=True, pieces="parts/*.txt"
    ),
    Stage(
        "02_judge",
        reads=("01_make",),
        writes=("results.csv",),
        compared=("results.csv",),
    ),
)
MAKE = [
    "study: str = ''\nbase: float = 0.0\npause: float = 0.0\nfault: str = ''  # what goes wrong",
    """import os, sys, time
from pathlib import Path
from pursuhint_lib.progress import Progress
from toylib import arms
assert sys.prefix == os.environ["PURSUHINT_PREFIX"]
folder = Path(os.environ["PURSUHINT_HOME"], "runs", study, "01_make")
(folder / "parts").mkdir(exist_ok=True)
print("working in", os.environ["PURSUHINT_HOME"] + "/runs")""",
    """if fault == "raise": raise ValueError(f"damaged checkpoint {study}: delete it\\nsecond line")
if fault == "exit": sys.exit(0)
if fault.startswith("SIG"):
    print("a warning", file=sys.stderr, flush=True)
    os.write(2, b"free(): invalid pointer\\n")
    import signal
    os.kill(os.getpid(), signal.Signals[fault])
if fault == "full": raise OSError(28, "No space left on device")
if fault == "forget": raise SystemExit""",
    """progress = Progress(folder, 4, "part")
for n in range(4):
    part = folder / "parts" / f"p{n}.txt"
    if part.exists():
        progress.skip(f"part {n}")
        continue
    time.sleep(pause if n else 0)
    part.write_text(str(base))
    with open(folder.parent / "trained.txt", "a") as log: log.write(f"{n}\\n")
    progress.advance(f"part {n}")""",
    """rows = [f"{arm},{seed},{base + 0.01 * seed}" for arm in arms.ARMS for seed in range(3)]
(folder / "numbers.csv").write_text("\\n".join(["arm,seed,test_accuracy", *rows]) + "\\n")""",
]
JUDGE = [
    "study: str = ''\nshift: float = 0.0",
    """import csv, os
from pathlib import Path
home = Path(os.environ["PURSUHINT_HOME"])
lines = list(csv.reader(open(home / "runs" / study / "01_make" / "numbers.csv")))
text = "\\n".join([",".join(lines[0]), *(f"{a},{s},{float(v) + shift}" for a, s, v in lines[1:])]) + "\\n"
(home / "runs" / study / "02_judge" / "results.csv").write_text(text)""",
]


def write_notebook(path, cells):
    """A notebook as they are stored: no kernel named, no outputs; the first cell is the parameters cell."""
    code = [nbformat.v4.new_code_cell(source) for source in cells]
    code[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=code), path)


def load_toy(path):
    values = yaml.safe_load(Path(path).read_text())
    return {
        stage: model(study=path.stem, **values.get(stage, {}))
        for stage, model in (("01_make", Make), ("02_judge", Judge))
    }


def find_toy(study, folder):
    if not (folder / f"{study}.yaml").exists():
        raise ParameterError(f"no study {study!r}: params/ holds toy")
    return folder / f"{study}.yaml"


def write_toy_report(study):
    results = home() / "runs" / study / "02_judge" / "results.csv"
    for name, text in (("tables/results.csv", results.read_text()), ("report.html", "<p>done</p>")):
        path = home() / "reports" / study / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def toy_sources(root):
    root = Path(root)
    return Sources(
        stages=STAGES,
        notebooks=root / "notebooks",
        library=root / "toylib",
        lock=root / "requirements.lock",
        find=lambda study: find_toy(study, root / "params"),
        load=load_toy,
        check=lambda params, file: None,
        images=lambda params: "",
        report=write_toy_report,
    )


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PURSUHINT_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking_store.open_client()
    return folder / "mlflow.db"


class Toy:
    """The toy study in a folder, and what a test asks of it."""

    def __init__(self, root):
        self.root = root
        self.make, self.judge = root / "runs/toy/01_make", root / "runs/toy/02_judge"

    def set(self, **sections):
        (self.root / "params").mkdir(exist_ok=True)
        (self.root / "params/toy.yaml").write_text(yaml.safe_dump({f"{k}": v for k, v in sections.items()}))

    def run(self, *arguments):
        return main(["reproduce", "toy", *arguments], toy_sources(self.root))

    def status(self):
        return json.loads((self.root / "runs/toy/status.json").read_text())

    def trained(self):
        path = self.root / "runs/toy/trained.txt"
        return path.read_text().split() if path.exists() else []

    def mlflow(self, stage="01_make"):
        """Statuses of a stage's runs, oldest first."""
        found = tracking_store.open_client().search_runs(
            [tracking.open_experiment("toy")], f"tags.stage = '{stage}'", order_by=["start_time ASC"]
        )
        return [run.info.status for run in found]

    def start(self, *arguments, stdout=subprocess.PIPE):
        """The driver as a process of its own."""
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_pipeline as t; "
        code += f"sys.exit(t.main({['reproduce', 'toy', *arguments]!r}, t.toy_sources({str(self.root)!r})))"
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, name):
        end = time.monotonic() + 60
        while not (self.make / name).exists():
            assert time.monotonic() < end, f"{name} did not come"
            time.sleep(0.05)


@pytest.fixture
def toy(home, empty_database, monkeypatch):
    root = home / "a {study} folder"  # braces and spaces: papermill formats paths
    root.mkdir()
    monkeypatch.setenv("PURSUHINT_HOME", str(root))
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("PURSUHINT_DEBUG", raising=False)
    foreign = home / "jupyter/kernels/python3"  # a kernel of the same name that must not be used
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(
        '{"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}'
    )
    monkeypatch.setenv("JUPYTER_PATH", str(home / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    shutil.copyfile(empty_database, root / "mlflow.db")
    write_notebook(root / "notebooks/01_make.ipynb", MAKE)
    write_notebook(root / "notebooks/02_judge.ipynb", JUDGE)
    (root / "toylib").mkdir()
    (root / "toylib/__init__.py").write_text("")
    (root / "toylib/arms.py").write_text("from .names import ARMS\n")
    (root / "toylib/names.py").write_text("ARMS = ['kd', 'at']\n")
    (root / "toylib/unused.py").write_text("")
    (root / "requirements.lock").write_text("torch==1\n")
    toy = Toy(root)
    toy.set()
    return toy


# --- A study from its first run to a forced one


def test_a_study_runs_is_skipped_mended_changed_and_forced(toy, capsys):
    assert toy.run() == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == "verdict: first run: nothing to compare with"
    assert out[-1].startswith("report: ") and out[-1].endswith("reports/toy/report.html")
    assert any("/runs?workflowType=machine_learning" in line for line in out)
    record = records.read_record(toy.make)
    assert set(record["outputs"]) == {
        "numbers.csv",
        "parts/p0.txt",
        "parts/p1.txt",
        "parts/p2.txt",
        "parts/p3.txt",
        "executed.ipynb",
    }
    assert set(records.read_record(toy.judge)["outputs"]) == {"results.csv", "executed.ipynb"}
    assert set(record["inputs"]["library"]) == {"__init__.py", "arms.py", "names.py"}
    for text in (json.dumps(record), (toy.root / "reports/toy/notebooks/01_make.ipynb").read_text()):
        assert str(toy.root) not in text and sys.prefix not in text  # published files name no folder of this machine
    notebook = nbformat.read(toy.root / "reports/toy/notebooks/01_make.ipynb", 4)
    assert any(
        "part 4/4 · part 3 · done" in output.text for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert toy.mlflow() == toy.mlflow("02_judge") == ["FINISHED"]
    assert toy.status()["state"] == "finished"

    # again: nothing to do
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "first run" in out and "report.html" in out
    assert toy.mlflow() == ["FINISHED"]

    # a report of which something is gone or changed is made again from the tables, by no notebook
    table = toy.root / "reports/toy/tables/results.csv"
    text = table.read_text()
    table.write_text("tampered")
    assert toy.run() == 0
    assert "tables/results.csv was gone or changed" in capsys.readouterr().out and table.read_text() == text
    shutil.rmtree(toy.root / "reports/toy")
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert "made again from the tables" in out and "nothing to do" in out and table.read_text() == text
    assert (toy.root / "reports/toy/notebooks/02_judge.ipynb").exists() and toy.mlflow("02_judge") == ["FINISHED"]

    # a changed output is made again, the file that was changed is kept aside, and equal results leave the rest alone
    (toy.make / "parts/p2.txt").write_text("tampered")
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert "output parts/p2.txt is gone or changed" in out and "[2/2] 02_judge: done before, kept" in out
    assert "verdict: reproduced exactly" in out
    assert (toy.root / "runs/toy/set_aside/01_make/parts/p2.txt").read_text() == "tampered"
    assert toy.trained() == ["0", "1", "2", "3", "2"]

    # a changed parameter
    toy.set(**{"01_make": {"base": 0.6}})
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert "parameter base 0.5 -> 0.6" in out and "[2/2] 02_judge (01_make gave something else)" in out
    assert "verdict: differs, as it was asked something else (base 0.5 -> 0.6)" in out

    # forced: everything is made again, and compared with what was there
    assert toy.run("--force") == 0
    out = capsys.readouterr().out
    assert "[1/2] 01_make (forced)" in out and "[2/2] 02_judge (forced)" in out
    assert out.splitlines()[-2].startswith("verdict: reproduced exactly")
    assert toy.trained()[-4:] == ["0", "1", "2", "3"]

    # the folder moves: all records still hold
    moved = toy.root.with_name("moved")
    shutil.copytree(toy.root, moved)
    os.environ["PURSUHINT_HOME"] = os.environ["PYTHONPATH"] = str(moved)
    assert Toy(moved).run() == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_with_nothing_to_do_imports_nothing_heavy(toy):
    toy.set(**{"02_judge": {"shift": 0.0}})
    assert toy.run() == 0
    code = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import builtins
whole = builtins.__import__
def light(name, *rest, **more):
    assert name.split('.')[0] not in ('torch', 'mlflow', 'papermill', 'scipy', 'matplotlib'), name
    return whole(name, *rest, **more)
import test_pipeline as t, pathlib
builtins.__import__ = light
sys.exit(t.main(['reproduce', 'toy'], t.toy_sources({str(toy.root)!r})))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr


def test_what_is_finished_is_looked_at_on_a_disk_that_cannot_be_written(toy, capsys, monkeypatch):
    assert toy.run() == 0
    before = {path: path.stat().st_mtime_ns for path in toy.root.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert toy.run() == 0
    assert capsys.readouterr().out.startswith("nothing to do: all 2 notebooks of toy are done")
    after = {path: path.stat().st_mtime_ns for path in toy.root.rglob("*")}
    assert before == after


# --- What is refused before anything runs


@pytest.mark.parametrize("folder", ["runs", "reports"])
def test_a_folder_that_cannot_be_written_is_one_line_before_the_first_stage_runs(toy, capsys, monkeypatch, folder):
    place = toy.root / folder / "toy"
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != place)
    assert toy.run() == 1
    assert capsys.readouterr().err == f"{place}: cannot be written\n" and not toy.make.exists()


def test_an_unknown_study_is_one_line(toy, capsys):
    assert main(["reproduce", "toi"], toy_sources(toy.root)) == 1
    assert capsys.readouterr().err == "no study 'toi': params/ holds toy\n"


def test_a_parameter_that_the_notebook_does_not_declare_is_refused(toy, capsys):
    write_notebook(toy.root / "notebooks/01_make.ipynb", [MAKE[0].replace("base", "bass"), *MAKE[1:]])
    assert toy.run() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "base" in error and "did you mean 'bass'" in error and "01_make.ipynb" in error
    assert not (toy.root / "runs").exists()


def test_a_variable_of_the_parameters_cell_that_is_no_parameter_is_refused(toy, capsys):
    write_notebook(toy.root / "notebooks/02_judge.ipynb", [JUDGE[0] + "\nmetric: str | None = None", *JUDGE[1:]])
    assert toy.run() == 1
    assert "metric: declared in the parameters cell" in capsys.readouterr().err


def test_names_are_checked_before_the_first_stage_runs(toy, capsys):
    def refuse(params, file):
        raise ParameterError(f"{file}: common.teacher = 'resnet1': unknown")

    sources = toy_sources(toy.root)
    sources = Sources(**{name: getattr(sources, name) for name in sources.__dataclass_fields__} | {"check": refuse})
    assert main(["reproduce", "toy"], sources) == 1
    assert capsys.readouterr().err == "params/toy.yaml: common.teacher = 'resnet1': unknown\n"
    assert main(["check", "toy"], sources) == 1
    assert not toy.make.exists()


def test_the_study_file_is_checked_without_running(toy, capsys):
    assert main(["check", "toy"], toy_sources(toy.root)) == 0
    assert capsys.readouterr().out == "params/toy.yaml: fit to run\n"


# --- Notebooks that do not end well


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "raise",
            "01_make stopped in cell [4]: ValueError: damaged checkpoint toy: delete it; notebook as it stopped: ",
        ),
        ("exit", "01_make ended early in cell [4]: SystemExit: 0; notebook as it stopped: "),
        ("SIGKILL", "01_make: the kernel died in cell [4]: SIGKILL, killed from outside"),
        ("full", "a disk is full ("),
    ],
)
def test_a_notebook_that_fails_is_one_line_and_a_failed_run(toy, capsys, fault, told):
    toy.set(**{"01_make": {"fault": fault}})
    assert toy.run() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(told) and captured.err.count("\n") == 1
    assert toy.mlflow() == ["FAILED"]
    assert toy.status()["state"] == "failed"
    assert not (toy.make / "record.json").exists() and not (toy.root / "reports/toy/notebooks/01_make.ipynb").exists()
    notebook = nbformat.read(toy.make / "failed.ipynb", 4)
    code = [cell.metadata.papermill for cell in notebook.cells if cell.cell_type == "code"]
    if fault == "SIGKILL":  # papermill calls all of them completed
        assert [cell.status for cell in code] == ["completed"] * 3 + ["failed"] + ["pending"] * 2


@pytest.mark.parametrize(
    ("fault", "memory", "how"),
    [
        ("SIGSEGV", 2**40, "SIGSEGV, a crash in native code, not a kill for lack of memory"),
        ("SIGABRT", 2**40, "SIGABRT, a crash in native code, not a kill for lack of memory"),
        ("SIGKILL", 2**40, "SIGKILL, killed from outside"),
        ("SIGKILL", 2**20, "SIGKILL, out of memory"),
        ("SIGTERM", 2**20, "SIGTERM, killed from outside"),
    ],
)
def test_a_kernel_that_died_says_how_and_what_it_said_last(toy, capsys, monkeypatch, fault, memory, how):
    monkeypatch.setattr(deaths, "memory_limit", lambda: memory)
    toy.set(**{"01_make": {"fault": fault}})
    assert toy.run() == 1
    told = capsys.readouterr().err.replace("a warning / ", "")  # which may not have got out of the kernel in time
    assert f"the kernel died in cell [4]: {how}; peak memory " in told and told.count("\n") == 1
    assert (
        f"of {memory / 2**30:.1f} GB; it said last: free(): invalid pointer; notebook as it stopped: "
        in told
    )
    said = (toy.make / "failed.txt").read_text()
    crashed = how.startswith(("SIGSEGV", "SIGABRT"))
    assert ("Fatal Python error: " in said and "most recent call first" in said) == crashed


def test_a_kill_that_the_system_counts_among_those_for_lack_of_memory_is_one_of_them(monkeypatch):
    before = deaths.oom_kills()
    monkeypatch.setattr(deaths, "oom_kills", lambda: before + 1)
    assert deaths.way_of_death(-signal.SIGKILL, before) == "SIGKILL, out of memory"
    assert deaths.way_of_death(-signal.SIGKILL, before + 1) == "SIGKILL, killed from outside"


def test_a_kernel_that_dies_before_its_first_cell_says_how(toy, capsys, monkeypatch):
    monkeypatch.setattr(execution.sys, "executable", "/bin/false")
    assert toy.run() == 1
    assert "the kernel died before its first cell: it ended by itself with exit code 1" in capsys.readouterr().err


def test_an_expected_file_that_is_missing_is_a_failure(toy, capsys):
    write_notebook(toy.root / "notebooks/01_make.ipynb", MAKE[:-1])
    assert toy.run() == 1
    assert "01_make ended without writing numbers.csv" in capsys.readouterr().err
    assert toy.mlflow() == ["FAILED"]


def test_a_traceback_is_shown_on_request_only(toy, capsys, monkeypatch):
    monkeypatch.setenv("PURSUHINT_DEBUG", "1")
    assert main(["reproduce", "toi"], toy_sources(toy.root)) == 1
    assert "Traceback" in capsys.readouterr().err


# --- Drivers that die


def test_after_a_kill_the_next_run_tells_the_truth_and_keeps_what_was_finished(toy, capsys):
    toy.set(**{"01_make": {"pause": 1.0}})
    driver = toy.start()
    toy.wait_for("parts/p1.txt")
    driver.kill()
    driver.communicate()
    assert toy.status()["state"] == "running" and toy.mlflow() == ["RUNNING"]
    assert main(["status", "toy"], toy_sources(toy.root)) == 0
    told = capsys.readouterr().out
    assert "was killed during 01_make (" in told and "finished networks" in told and "[" not in told
    kept = len(list((toy.make / "parts").glob("p*.txt")))
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert (
        out.startswith("the last run was killed during 01_make (")
        and f"kept: {kept} finished networks; going on" in out
    )
    assert toy.trained() == ["0", "1", "2", "3"]
    assert toy.mlflow() == ["KILLED", "FINISHED"]
    assert "first run: nothing to compare with" in out
    assert records.read_record(toy.make)["seconds"] > 3  # the killed attempt's time counts


@pytest.mark.parametrize(("signum", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_an_interrupted_study_says_what_is_kept_and_leaves_no_kernel(toy, signum, code, name):
    toy.set(**{"01_make": {"pause": 60.0}})
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell without job control starts things
    try:
        driver = toy.start()
    finally:
        signal.signal(signal.SIGINT, ignored)
    toy.wait_for("parts/p0.txt")
    if signum == signal.SIGTERM:
        rival = toy.start()
        assert rival.wait() == 1 and f"study toy is being run by process {driver.pid}" in rival.stderr.read()
    time.sleep(1.2)  # the driver looks for its kernel once a second
    kernel = toy.status()["kernel"]["pid"]
    driver.send_signal(signum)
    _, error = driver.communicate(timeout=20)
    assert driver.returncode == code
    assert error == (
        f"stopped by {name} during 01_make (1/4, part 0); kept: 1 finished networks; "
        "'make reproduce STUDY=toy' goes on from there\n"
    )
    assert toy.status()["state"] == "interrupted" and toy.mlflow() == ["KILLED"]
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_a_forced_run_that_was_stopped_is_taken_up_by_the_plain_command(toy, capsys):
    assert toy.run() == 0
    status = toy.status() | {"state": "interrupted", "to_redo": ["02_judge"]}
    (toy.root / "runs/toy/status.json").write_text(json.dumps(status))
    assert main(["status", "toy"], toy_sources(toy.root)) == 0
    assert "02_judge: is to be made again (--force)" in capsys.readouterr().out
    assert toy.run() == 0
    out = capsys.readouterr().out
    assert "01_make (" not in out and "[2/2] 02_judge (forced)" in out
    assert toy.status()["to_redo"] == []


# --- MLflow, which only mirrors


@pytest.fixture
def logging_toy(toy):
    """The toy study, whose first notebook logs a number."""
    line = json.dumps({"call": "log_metrics", "arguments": {"metrics": {"breaks": 3.0}}})
    write_notebook(
        toy.root / "notebooks/01_make.ipynb",
        [*MAKE, f"open(os.environ['{tracking.SPOOL}'], 'w').write({line!r} + '\\n')"],
    )
    return toy


def logged(toy):
    """Statuses of the runs of both notebooks, and the number that the first of them logged."""
    run = tracking_store.open_client().get_run(records.read_record(toy.make)["runs"]["notebook"])
    return toy.mlflow(), toy.mlflow("02_judge"), run.data.metrics


def test_a_tracker_that_takes_no_runs_costs_no_result_and_is_given_them_by_the_same_command(
    logging_toy, capsys, monkeypatch
):
    def refuse(*arguments, **options):
        raise tracking.TrackingError("the run of 01_make cannot be created: no room")

    honest = tracking.create_run
    monkeypatch.setattr(tracking, "create_run", refuse)
    assert logging_toy.run() == 0
    captured = capsys.readouterr()
    told = "warning: the run of 01_make cannot be created: no room; going on without MLflow"
    assert told in captured.out.splitlines() and not captured.err and "compare the runs" not in captured.out
    lacks = "MLflow lacks the runs of 01_make, 02_judge: 'make reproduce STUDY=toy' logs them from the files"
    assert lacks in captured.out.splitlines() and logging_toy.status()["state"] == "finished"
    assert not is_finished("toy", toy_sources(logging_toy.root))

    monkeypatch.setattr(tracking, "create_run", honest)
    assert logging_toy.run() == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out and "01_make: MLflow did not have its runs; they were logged from its files" in out
    assert logged(logging_toy) == (["FINISHED"], ["FINISHED"], {"breaks": 3.0})
    assert is_finished("toy", toy_sources(logging_toy.root))


def test_what_the_tracker_did_not_take_is_one_warning_and_is_logged_by_the_next_run(logging_toy, capsys, monkeypatch):
    honest = tracking_notebook.log_new_points

    def refuse(*arguments):
        raise OSError("no room\nsecond line")

    monkeypatch.setattr(tracking_notebook, "log_new_points", refuse)
    assert logging_toy.run() == 0
    told = [text for text in capsys.readouterr().out.splitlines() if "no room" in text]
    assert set(told) == {"warning: metrics was not logged: no room; going on without MLflow"}

    monkeypatch.setattr(tracking_notebook, "log_new_points", honest)
    (logging_toy.judge / "results.csv").unlink()
    assert logging_toy.run() == 0
    assert "warning" not in capsys.readouterr().out
    assert logged(logging_toy) == (["FINISHED"], ["FINISHED"], {"breaks": 3.0})  # 01 itself was not run again


@pytest.mark.parametrize(
    ("harm", "told"), [(Path.unlink, ""), (lambda path: path.write_bytes(b"x" * 5000), "(file is not a database)")]
)
def test_a_store_that_is_gone_or_damaged_is_made_anew_with_the_runs_of_a_study_that_is_done(logging_toy, harm, told):
    assert logging_toy.run() == 0
    record = records.read_record(logging_toy.make)
    record["source"]["commit"] = "of then"
    (logging_toy.make / "record.json").write_text(json.dumps(record))
    harm(logging_toy.root / "mlflow.db")
    driver = logging_toy.start()
    out, error = driver.communicate()
    assert driver.returncode == 0 and not error
    assert "nothing to do" in out and told in out and ("warning" in out) == bool(told)
    run_ids = [records.read_record(folder)["runs"]["notebook"] for folder in (logging_toy.make, logging_toy.judge)]
    assert run_ids[0] != record["runs"]["notebook"]
    assert run_ids[0] in (logging_toy.root / "reports/toy/records.json").read_text()
    commit = "(SELECT value FROM tags WHERE tags.run_uuid = runs.run_uuid AND key = 'mlflow.source.git.commit')"
    query = f"SELECT run_uuid, status, metrics.value, {commit} FROM runs LEFT JOIN metrics USING (run_uuid)"
    with contextlib.closing(sqlite3.connect(logging_toy.root / "mlflow.db")) as store:  # MLflow keeps the old one open
        runs = {run_id: rest for run_id, *rest in store.execute(query)}
    commit = records.read_record(logging_toy.judge)["source"]["commit"]
    assert [runs[run_id] for run_id in run_ids] == [["FINISHED", 3.0, "of then"], ["FINISHED", None, commit]]
    assert len(runs) == 2


def test_a_study_is_done_without_a_store_that_another_process_has_locked(toy, capsys, monkeypatch):
    monkeypatch.setattr(tracking_store, "_LOCKED_S", 0.1)
    tracking_store._opened.cache_clear()
    with contextlib.closing(sqlite3.connect(toy.root / "mlflow.db")) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("CREATE TABLE mine (x)")
        assert toy.run() == 0
    out = capsys.readouterr().out
    assert "mlflow.db is locked by another process, for 0.1 s now; going on without MLflow" in out
    assert "MLflow lacks the runs of 01_make, 02_judge" in out


def test_a_store_that_was_named_and_is_not_there_is_refused_before_anything_runs(toy, capsys, monkeypatch):
    uri = f"sqlite:///{toy.root}/nowhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert toy.run() == 1
    error = f"MLFLOW_TRACKING_URI = {uri!r}: there is no folder {toy.root}/nowhere\n"
    assert capsys.readouterr().err == error and not (toy.root / "nowhere").exists() and not toy.make.exists()


def test_a_stage_that_goes_on_forgets_the_spool_of_a_killed_notebook_and_keeps_its_pieces(toy):
    (toy.make / "parts").mkdir(parents=True)
    for name in (SPOOL, "parts/p0.txt"):
        (toy.make / name).write_text("x")
    driver = Driver("toy", {}, "params/toy.yaml", toy_sources(toy.root), None)
    driver._clear(STAGES[0], toy.make, None, forced=False)
    assert [path.name for path in toy.make.rglob("*")] == ["parts", "p0.txt"]


def test_numbers_are_compared_with_the_published_ones_when_the_study_was_never_run_here(toy, capsys):
    assert toy.run() == 0
    shutil.rmtree(toy.root / "runs")
    assert toy.run() == 0
    assert capsys.readouterr().out.splitlines()[-2] == "verdict: reproduced exactly: 2 tables with the same bytes"


def damage(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_damaged_files_of_a_study_are_made_again_and_cost_no_result(toy, capsys):
    assert toy.run() == 0
    runs = toy.root / "runs/toy"
    (runs / "previous").mkdir(exist_ok=True)
    shutil.copyfile(toy.judge / "results.csv", runs / "previous/results.csv")
    (runs / "previous/records.json").write_text('{"01_make": {"outputs": {}}}')
    damage(toy.make / "record.json", inputs={"parameters": {}})
    damage(runs / "status.json", to_redo=7, seconds={"01_make": "1"})
    damage(runs / "verdict.json", text=None)
    (runs / "shown.json").write_text("[1]")
    (toy.make / "progress.json").write_text('{"done": 1}')
    assert main(["status", "toy"], toy_sources(toy.root)) == 0
    assert "not run yet" in capsys.readouterr().out
    assert toy.run() == 0 and toy.run() == 0
    captured = capsys.readouterr()
    assert "[1/2] 01_make (not done yet)" in captured.out and captured.err == ""
    assert "[2/2] 02_judge: done before, kept" in captured.out and "nothing to do: all 2" in captured.out
    assert toy.trained() == ["0", "1", "2", "3"]  # once


def test_a_folder_in_a_files_place_is_one_line_that_names_it(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "report.html").mkdir()
    with pytest.raises(OSError) as error:
        save_json({}, home / "report.html")
    assert one_line(error.value) == "report.html: Is a directory"


WHOLE = {
    "record.json": {
        "key": "k",
        "inputs": {"parameters": {}, "notebook": "", "library": {}, "lock": "", "reads": {}},
        "outputs": {"a.csv": "0"},
        "runs": {"notebook": "r", "models": {}, "trained_at": {}},
        "source": {},
        "versions": {},
        "hardware": {},
        "seconds": 1.5,
        "ended": "",
    },
    "progress.json": {"done": 1, "total": 2, "text": "", "updated": 1.0, "eta_s": None},
    "ended.json": {
        "token": "t",
        "key": "k",
        "error": "",
        "again": False,
        "kept": ["a"],
        "seconds": 1.0,
        "peak_bytes": 1,
    },
    "worker.t.json": {"slurm": "", "host": "h", "family": [[7, 1.5]], "peak_bytes": 1},
}
READ = {
    "record.json": records.read_record,
    "progress.json": read_progress,
    "ended.json": lambda folder: worker.read_end(folder, "t"),
    "worker.t.json": lambda folder: worker.read_worker(folder, "t"),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("odd", [None, [], {}, "text", float("inf")])
def test_a_file_with_a_value_of_another_kind_or_without_it_is_damaged(tmp_path, name, odd):
    whole = WHOLE[name]
    (tmp_path / name).write_text(json.dumps(whole))
    assert READ[name](tmp_path) == whole
    for key in whole:
        fits = isinstance(odd, type(whole[key])) and odd != float("inf")
        (tmp_path / name).write_text(json.dumps(whole | {key: odd}))
        assert fits or not READ[name](tmp_path), key
        (tmp_path / name).write_text(json.dumps({other: whole[other] for other in whole if other != key}))
        assert not READ[name](tmp_path), key
    for text in ("", "[" * 100_000, json.dumps(odd)):
        (tmp_path / name).write_text(text)
        assert not READ[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("runs/toy/.lock/x", "runs/toy/.lock: Is a directory"),
        ("runs/toy/01_make/record.json/x", "runs/toy/01_make/record.json: Is a directory"),
        ("reports/toy", "reports/toy/notebooks: a file is where this folder should be; move it away"),
    ],
)
def test_what_lies_where_a_file_or_folder_of_the_study_should_be_is_one_line_before_anything_runs(
    toy, capsys, name, told
):
    (toy.root / name).parent.mkdir(parents=True)
    (toy.root / name).touch()
    assert toy.run() == 1
    captured = capsys.readouterr()
    assert captured.err.endswith(f"{told}\n") and captured.err.count("\n") == 1
    assert not toy.trained()


def test_a_lock_file_of_a_dead_driver_does_not_stop_anyone(toy):
    (toy.root / "runs/toy").mkdir(parents=True)
    (toy.root / "runs/toy/.lock").write_text("99999999")
    toy.set(**{"01_make": {"fault": "exit"}})
    assert toy.run() == 1 and toy.mlflow() == ["FAILED"]  # it ran


# --- The notebook's surroundings


def test_another_users_folder_has_its_commit_too(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=somebody", "-c", "user.email=", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert subprocess.run([*git, "status"], capture_output=True).returncode == 128, "git itself refuses"
    found = source_state(tmp_path)
    assert len(found["commit"]) == 40 and found["dirty"] is False


def test_the_environment_is_put_back_key_by_key(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("TOY_OLD", "1")
    monkeypatch.setattr(os.environ, "clear", None)  # the first thread must never see it empty
    with execution._environ({"TOY_OLD": "2", "TOY_NEW": "3"}):
        assert os.environ["TOY_OLD"] + os.environ["TOY_NEW"] == "23" and "MPLBACKEND" not in os.environ
        monkeypatch.setenv("TOY_OTHER", "4")
    assert [os.environ.get(f"TOY_{name}") for name in ("OLD", "NEW", "OTHER")] == ["1", None, "4"]
    assert os.environ["MPLBACKEND"] == "Agg"


def test_matplotlib_gets_a_folder_where_the_user_has_none(home, monkeypatch):
    for name in ("MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    instead = {"MPLCONFIGDIR": str(home / "runs/.matplotlib")}
    monkeypatch.setenv("HOME", str(home))
    assert execution._plot_folder() == {}
    for nowhere in ("/dev/null", "/proc/nobody", "~"):
        monkeypatch.setenv("HOME", nowhere)
        assert execution._plot_folder() == instead, nowhere
    monkeypatch.setenv("MPLCONFIGDIR", "/chosen")
    assert execution._plot_folder() == {}


def test_a_notebook_is_published_where_the_user_has_no_home(home, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"{home}/runs")])
    notebook.metadata.papermill = {}
    target = home / "reports/toy/notebooks/01_make.ipynb"
    execution.publish(notebook, home / "runs", target)
    assert str(home) not in target.read_text()


# --- Keys


def inputs(toy):
    return records.inputs_of(
        STAGES[0],
        {"base": 1},
        toy.root / "notebooks/01_make.ipynb",
        toy.root / "toylib",
        toy.root / "requirements.lock",
        {},
    )


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("toylib/names.py", "ARMS = []\n", "library file names.py changed"),
        ("toylib/arms.page.j2", "<p>", "library file arms.page.j2 changed"),
        ("toylib/unused.py", "x = 1\n", "nothing"),
        ("requirements.lock", "torch==2\n", "requirements.lock changed"),
    ],
)
def test_the_key_changes_with_files_that_the_notebook_uses_and_with_no_other(toy, file, text, told):
    before = inputs(toy)
    (toy.root / file).write_text(text)
    assert records.what_changed(before, inputs(toy)) == told
    assert (records.key_of(before) == records.key_of(inputs(toy))) == (told == "nothing")


def test_outputs_in_a_notebook_do_not_change_the_key_and_its_source_does(toy):
    path, before = toy.root / "notebooks/01_make.ipynb", inputs(toy)
    notebook = nbformat.read(path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.cells[1].execution_count = 3
    nbformat.write(notebook, path)
    assert inputs(toy) == before
    notebook.cells[1].source += "\n# a remark"
    nbformat.write(notebook, path)
    assert records.what_changed(before, inputs(toy)) == "the notebook changed"


def test_images_are_a_part_of_the_first_key_once_they_are_there(toy, capsys):
    download = "path = Path(os.environ['PURSUHINT_HOME'], 'data/cifar-10-batches-py')\n"
    download += "path.mkdir(parents=True, exist_ok=True)\n(path / 'batch').exists() or (path / 'batch').write_text('1')"
    write_notebook(toy.root / "notebooks/01_make.ipynb", [*MAKE, download])
    named = [toy.root / "data"]

    def images(params):
        if not named[0].parent.is_dir():
            raise ParameterError(f"params/toy.yaml: common.data_folder = '{named[0]}': there is no such folder")
        return records.listing_hash("cifar10", named[0])

    sources = toy_sources(toy.root)
    sources = Sources(**{name: getattr(sources, name) for name in sources.__dataclass_fields__} | {"images": images})
    assert main(["reproduce", "toy"], sources) == 0  # downloads them
    capsys.readouterr()
    assert main(["reproduce", "toy"], sources) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (
        records.read_record(toy.make)["inputs"]["images"] and "images" not in records.read_record(toy.judge)["inputs"]
    )

    (toy.root / "data/cifar-10-batches-py/batch").write_text("22")
    assert main(["reproduce", "toy"], sources) == 0
    out = capsys.readouterr().out
    assert "[1/2] 01_make (the images changed)" in out and "[2/2] 02_judge: done before, kept" in out

    named[0] = toy.root / "nowhere/data"
    assert main(["reproduce", "toy"], sources) == 1  # also when all is done
    assert capsys.readouterr().err.startswith("params/toy.yaml: common.data_folder = ")


def test_the_fingerprint_of_images_is_of_what_would_be_read_and_not_of_where_it_lies(tmp_path):
    def put(name, text="x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (1, 1))

    def found(data="cifar100", folder="here"):
        return records.listing_hash(data, tmp_path / folder)

    assert found() == ""
    put("here/cifar-10-batches-py/batch")
    assert found() == "" and found("cifar10") != ""
    put("here/cifar-100-python/train")
    copy = found()
    put("here/train/cat/a.png")
    folder = found()
    assert len({"", copy, folder}) == 3
    put("here/train/cat/.hidden")
    put("here/notes.txt")
    assert found() == folder
    put("there/train/cat/a.png")
    assert found(folder="there") == folder
    put("there/train/cat/a.png", "y")
    assert found(folder="there") != folder  # equal in name, size and time
    put("here/train/cat/deep/er/b.png")
    assert found() != folder
    (tmp_path / "here/train/cat/deep/er/b.png").unlink()
    put("here/val/cat/a.png")
    assert found() == folder != found("image_folder")
    put("here/train/cat/a.png", "longer")
    assert found() != folder
    put("here/train/cat/a.png")
    os.utime(tmp_path / "here/train/cat/a.png", (2, 2))
    assert found() != folder


def test_a_study_whose_image_folder_is_not_there_is_refused(home, monkeypatch):
    monkeypatch.setenv("PURSUHINT_DATA", "nowhere")
    digits, cifar = (load_params(PARAMS_FOLDER / f"{name}.yaml") for name in ("digits", "cifar100_quick"))
    assert Sources().images(digits) == ""
    with pytest.raises(
        ParameterError, match=r"^params/cifar100_quick\.yaml: PURSUHINT_DATA .*'nowhere'.*no such folder"
    ):
        Sources().images(cifar)
    monkeypatch.delenv("PURSUHINT_DATA")
    assert Sources().images(cifar) == ""  # a first run downloads them


def test_earlier_stages_count_by_their_bytes_without_times(toy):
    outputs = {"results.csv": "1", "timings.csv": "2", "speed.csv": "3", "histories/kd-s0.csv": "4"}
    found = records.inputs_of(
        STAGES[1],
        {},
        toy.root / "notebooks/02_judge.ipynb",
        toy.root / "toylib",
        toy.root / "requirements.lock",
        {"01_make": {"outputs": outputs}},
    )
    assert found["reads"] == {"01_make": {"results.csv": "1"}}


def test_outputs_are_found_by_pattern_and_a_missing_notebook_is_named():
    assert records.matching({"a/x.csv": "1", "b.csv": "2"}, ("a/*.csv",)) == {"a/x.csv": "1"}
    with pytest.raises(FileNotFoundError, match="is not there"):
        records.notebook_hash(REPOSITORY / "does-not-matter.ipynb")


def test_what_the_clock_measures_is_never_compared():
    for stage in Sources().stages:
        assert not records.matching(dict.fromkeys(("timings.csv", "speed.csv"), ""), stage.compared)


# --- Verdict


def results(**arms):
    rows = [(arm, seed, value) for arm, values in arms.items() for seed, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["arm", "seed", "test_accuracy"])


def test_equal_bytes_are_reproduced_exactly():
    table = results(kd=[0.6, 0.62])
    assert judge(table, table, {"results.csv": "1"}, {"results.csv": "1", "new.csv": "2"}).kind == "reproduced exactly"


def test_a_change_smaller_than_the_noise_of_the_seeds_is_noise():
    verdict = judge(results(kd=[0.60, 0.62, 0.64]), results(kd=[0.61, 0.63, 0.62]), {"r": "1"}, {"r": "2"})
    assert (
        verdict.kind == "reproduced within seed noise"
        and "kd by +0.00 points" in verdict.text
        and "bytes differ in r" in verdict.text
    )


def test_the_allowed_change_is_welchs_interval_shared_out_over_the_arms():
    from scipy.stats import ttest_ind

    old, new = [0.60, 0.62, 0.64], [0.66, 0.67, 0.71, 0.69]
    arms = compare_results(results(kd=old, at=old), results(kd=new, at=old)).arms.set_index("arm")
    interval = ttest_ind(new, old, equal_var=False).confidence_interval(0.975)
    assert arms.loc["kd", "allowed"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-12)


def test_a_larger_change_differs_and_is_named():
    verdict = compare_results(
        results(kd=[0.60, 0.61, 0.62], at=[0.5, 0.51, 0.52]), results(kd=[0.60, 0.61, 0.62], at=[0.7, 0.71, 0.72])
    )
    assert verdict.kind == "differs"
    assert "at test accuracy 51.00 % -> 71.00 % (+20.00 points" in verdict.text and "1 of 2 arms" in verdict.text


def test_an_arm_with_one_seed_is_judged_by_the_noise_of_the_others():
    old, new = results(kd=[0.60, 0.62, 0.64], teacher=[0.70]), results(kd=[0.60, 0.62, 0.64], teacher=[0.71])
    assert compare_results(old, new).kind == "reproduced within seed noise"
    alone = compare_results(results(teacher=[0.70]), results(teacher=[0.71]))
    assert (
        alone.kind == "differs"
        and compare_results(results(teacher=[0.7]), results(teacher=[0.7])).kind == "reproduced within seed noise"
    )


def test_a_missing_arm_and_a_missing_column_differ():
    old = results(kd=[0.6], at=[0.6])
    assert compare_results(old, results(kd=[0.6])).text.startswith("differs: arm at is gone")
    assert "no column test_accuracy" in compare_results(old, old.drop(columns="test_accuracy")).text


# --- Progress and forecast


def test_progress_says_a_line_per_step_and_leaves_a_heartbeat(tmp_path, capsys):
    progress = Progress(tmp_path / "stage", 3, "arm")
    assert json.loads((tmp_path / "stage/progress.json").read_text())["eta_s"] is None
    progress.skip("kd s0")
    assert progress.eta_s() is None  # kept work is no pace
    progress.advance("at s0")
    heartbeat = json.loads((tmp_path / "stage/progress.json").read_text())
    assert (heartbeat["done"], heartbeat["total"], heartbeat["text"]) == (2, 3, "at s0") and heartbeat["eta_s"] >= 0
    progress.advance("at s1")
    assert capsys.readouterr().out == "arm 1/3 · kd s0 · kept\narm 2/3 · at s0 · 0 s left\narm 3/3 · at s1 · done\n"
    assert [file.name for file in (tmp_path / "stage").iterdir()] == ["progress.json"]


def test_durations_read_well():
    assert [duration(s) for s in (0.2, 59.4, 200, 1800, 7500)] == ["0 s", "59 s", "3 min 20 s", "30 min", "2 h 05 min"]


def test_the_forecast_uses_past_times_then_what_this_run_teaches():
    shares = {"a": 0.2, "b": 0.6, "c": 0.2}
    assert study_seconds_left("b", ["c"], 10, None, {}, shares, 0) == (None, None)
    assert study_seconds_left("b", ["c"], 10, None, {"a": 20}, shares, 0) == pytest.approx((50, 70))
    assert study_seconds_left("b", ["c"], 10, None, {"b": 30, "c": 5}, shares, 0) == pytest.approx((20, 25))
    assert study_seconds_left("a", ["b"], 10, {"eta_s": 12, "updated": 98}, {}, shares, 100) == pytest.approx((10, 70))

"""Grids: from one file to many studies, and studies that run several at a time, fail, are stopped and are killed."""

import contextlib
import io
import itertools
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import test_pipeline
import yaml

from pursuhint_lib import tracking, tracking_store
from pursuhint_lib.grid import (
    GRIDS_FOLDER,
    Grid,
    GridStudy,
    conclusion,
    fan_out_of_studies,
    grid_file,
    grid_seconds_left,
    main,
    pipeline_command,
    read_grid,
    reproduce,
    write_studies,
)
from pursuhint_lib.live import LiveLine
from pursuhint_lib.params import PARAMS_FOLDER, ParameterError, check_names, load_params, study_file
from pursuhint_lib.pipeline import Sources, check_jobs, noted_signals
from pursuhint_lib.status import StudyBusy, read_status, study_lock
from pursuhint_lib.storage import REPOSITORY, save_table

# --- From one file to many studies


def grid_of(folder, vary, base="smoke", name="pairs", **more):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": base, "vary": vary} | more, sort_keys=False))
    return read_grid(path)


@pytest.mark.parametrize("path", sorted(GRIDS_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_in_the_repository_is_fit_to_run(path, home):
    grid = read_grid(path)
    for study, file in write_studies(grid).items():
        check_names(load_params(file), study)


def test_every_combination_is_a_study_and_keys_that_vary_together_stay_together(tmp_path):
    vary = {
        "common.teacher, common.student": [["resnet20_w8", "resnet8_w4"], ["resnet14_w8", "resnet8_w4"]],
        "distill_students.temperature": [2.0, 4],
        "distill_students.methods": [["at", "crd@last"]],
    }
    grid = grid_of(tmp_path, vary)
    assert [study.name for study in grid.studies] == [
        "pairs-resnet20_w8-resnet8_w4-2_0-at_crd_last",
        "pairs-resnet20_w8-resnet8_w4-4-at_crd_last",
        "pairs-resnet14_w8-resnet8_w4-2_0-at_crd_last",
        "pairs-resnet14_w8-resnet8_w4-4-at_crd_last",
    ]
    assert grid.studies[3].values == {
        "common.teacher": "resnet14_w8",
        "common.student": "resnet8_w4",
        "distill_students.temperature": 4,
        "distill_students.methods": ["at", "crd@last"],
    }


def test_a_study_of_a_grid_is_its_base_but_for_what_varies_and_is_found_by_its_name(tmp_path, home):
    grid = grid_of(tmp_path, {"common.epochs": [1, 3]})
    assert write_studies(grid) == {study.name: study_file(study.name) for study in grid.studies}
    base, found = load_params(study_file("smoke")), load_params(study_file("pairs-3"))
    for stage, values in base.items():
        changed = {"study": "pairs-3"} | ({"epochs": 3} if hasattr(values, "epochs") else {})
        assert found[stage].model_dump() == values.model_dump() | changed
    with pytest.raises(ParameterError, match="params/ holds [^-]*; did you mean 'pairs-3'"):
        study_file("pairs-33")


def test_a_study_file_is_left_alone_until_the_grid_changes_and_goes_when_the_grid_no_longer_has_it(tmp_path, home):
    first, _ = write_studies(grid_of(tmp_path, {"common.epochs": [1, 3]})).values()
    before = first.stat()
    write_studies(grid_of(tmp_path, {"common.epochs": [1, 5]}))
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert sorted(path.name for path in first.parent.iterdir()) == ["pairs-1.yaml", "pairs-5.yaml"]


PAIR = "common.teacher, common.student"


@pytest.mark.parametrize(
    ("vary", "says"),
    [
        ({"common.studnt": ["resnet8"]}, ["'common.studnt'", "unknown key", "'common.student'", "common.teacher"]),
        ({"student": ["resnet8"]}, ["'student'", "'common.student'", "section.key", "distill_students"]),
        ({"train_teacher.epochs": [2]}, ["'train_teacher.epochs'", "'common.epochs'", "train_teacher.teacher_epochs"]),
        ({"common.study": ["mine"]}, ["common.study", "gets its name"]),
        ({"common.student": "resnet8_w4"}, ["common.student = 'resnet8_w4'", "list of values"]),
        ({"common.student": []}, ["common.student = []", "list of values"]),
        ({PAIR: [["resnet20_w8"]]}, ["['resnet20_w8']", "list of 2 values"]),
        ({PAIR: [["resnet20_w8", "resnet8_w4"]], "common.student": ["x"]}, ["common.student is given twice"]),
        ({"common.epochs": [2, "ten"]}, ["(pairs-ten)", "common.epochs = 'ten'", "integer"]),
        ({"distill_students.methods": [["at+crd"], ["at@crd"]]}, ["at+crd", "at@crd", "one name, pairs-at_crd"]),
        ({"common.teacher": ["resnet20_w8"] * 2}, ["one name, pairs-resnet20_w8"]),
        ({"common.seeds": [list(range(60))]}, ["too long", "up to 120"]),
        ({}, ["vary = {}", "common.student"]),
        ([1], ["vary = [1]", "common.student"]),
    ],
)
def test_a_mistake_is_one_line_with_file_key_value_and_what_is_allowed(tmp_path, vary, says):
    with pytest.raises(ParameterError) as error:
        grid_of(tmp_path, vary)
    text = str(error.value)
    assert text.startswith("params/grids/pairs.yaml") and "\n" not in text and "nan" not in text
    assert [part for part in says if part not in text] == [], text


def test_a_base_a_key_and_a_name_that_cannot_be_are_refused(tmp_path, monkeypatch):
    vary = {"common.epochs": [1]}
    with pytest.raises(ParameterError, match="base = 'smok': should be a study of params/; did you mean 'smoke'"):
        grid_of(tmp_path, vary, base="smok")
    with pytest.raises(ParameterError, match=r"unknown key 'only' \(allowed: base, vary\)"):
        grid_of(tmp_path, vary, only=[])
    with pytest.raises(ParameterError, match="letters, digits and underscores only"):
        grid_of(tmp_path, vary, name="my-pairs")
    with pytest.raises(ParameterError, match="no grid 'digits_pair': params/grids/ holds .*mean 'digits_pairs'"):
        grid_file("digits_pair")
    taken = tmp_path / "params"
    taken.mkdir()
    for study in ("smoke", "pairs-1"):
        (taken / f"{study}.yaml").write_text("common: {}\n")
    monkeypatch.setattr("pursuhint_lib.grid.PARAMS_FOLDER", taken)
    with pytest.raises(ParameterError, match="pairs-1 is the name of a study of params/ already"):
        grid_of(tmp_path, vary)


def test_a_mistake_in_the_base_names_the_base(tmp_path, monkeypatch):
    (tmp_path / "smoke.yaml").write_text("common: {epochs: 0}\n")
    monkeypatch.setattr("pursuhint_lib.grid.PARAMS_FOLDER", tmp_path)
    with pytest.raises(ParameterError, match=r"smoke\.yaml: common.epochs = 0"):
        grid_of(tmp_path, {"common.noise": [0, 1]})


def test_a_network_that_does_not_exist_is_refused_before_anything_runs(tmp_path, home, monkeypatch, capsys):
    monkeypatch.setattr("pursuhint_lib.grid.GRIDS_FOLDER", tmp_path)
    grid_of(tmp_path, {"common.student": ["resnet8_w4", "resnet8_w5"]})
    assert main(["reproduce", "pairs", "--jobs", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("params/grids/pairs.yaml (pairs-resnet8_w5): common.student = 'resnet8_w5'")
    assert error.count("\n") == 1 and not list((home / "runs").glob("pairs-*/01*"))
    assert main(["status", "pairs"]) == 0
    assert "  pairs-resnet8_w5: not run yet" in capsys.readouterr().out


# --- Toy studies, run

toy, empty_database = test_pipeline.toy, test_pipeline.empty_database  # fixtures


class ToyGrid:
    """A grid of toy studies (see test_pipeline) in a folder."""

    def __init__(self, root):
        self.root = root

    def run(self, grid, jobs=2, command=None):
        with noted_signals() as stop:
            return reproduce(
                grid,
                jobs=jobs,
                stop=stop,
                sources=toy_sources(self.root),
                command=command or toy_command(self.root),
                fetch=lambda params: None,
            )

    def start(self, grid, stdout=subprocess.DEVNULL):
        """The driver as a process of its own."""
        code = f"""import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_grid as t
from pursuhint_lib.grid import Grid, GridStudy
from pursuhint_lib.pipeline import Stopped
try:
    sys.exit(1 if t.ToyGrid(t.Path({str(self.root)!r})).run({grid!r}) else 0)
except Stopped as stopped:
    sys.exit(128 + stopped.signum)"""
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True
        )

    def begun(self, study):
        """How often the study's process was started."""
        log = self.root / f"runs/grids/toys/{study}.log"
        return len(re.findall("^--- ", log.read_text(), re.MULTILINE)) if log.exists() else 0

    def trained(self, study):
        return (self.root / "runs" / study / "trained.txt").read_text().split()

    def processes(self, *studies):
        """Drivers of these studies and their kernels."""
        drivers = [psutil.Process(read_status(study)["pid"]) for study in studies]
        return [one for driver in drivers for one in [driver, *driver.children(recursive=True)]]

    def mlflow(self, study):
        """Statuses of the runs of its first notebook, oldest first."""
        experiment = tracking.open_experiment(study)
        found = tracking_store.open_client().search_runs(
            [experiment], "tags.stage = '01_make'", order_by=["start_time"]
        )
        return [run.info.status for run in found]


def toys_of(*bases, **more):
    """A grid over `base`; more: further keys of the first notebook, for all studies."""
    return Grid("toys", "params/grids/toys.yaml", [toy_study(base, **more) for base in bases])


def toy_study(base, **more):
    name = f"toys-{base}".replace(".", "_")
    return GridStudy(name, {"01_make.base": base}, {"01_make": {"base": base} | more})


def toy_sources(root):
    folder = Path(root) / "runs/grids/toys/params"
    return replace(test_pipeline.toy_sources(root), find=lambda study: test_pipeline.find_toy(study, folder))


def toy_command(root):
    def command(study, options):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_grid as t; "
        code += f"sys.exit(t.test_pipeline.main({['reproduce', study, *options]!r}, t.toy_sources({str(root)!r})))"
        return [sys.executable, "-c", code]

    return command


def wait_until(what, true):
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.05)


def is_alive(process):
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def toys(toy, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    return ToyGrid(toy.root)


def test_three_studies_at_once_on_a_fresh_home_are_all_done_and_their_tables_are_stacked(toys, capsys):
    (toys.root / "mlflow.db").unlink()  # each of the three finds no store
    grid = toys_of(0.5, 0.6, 0.7)
    assert toys.run(grid, jobs=3) == {}
    out = capsys.readouterr().out
    assert "[3/3] toys-" in out and "grid toys: 3 of 3 studies done\n" in out
    assert "toys-0_6: first run: nothing to compare with" in out
    names = [study.name for study in grid.studies]
    assert [toys.mlflow(study) for study in names] == [["FINISHED"]] * 3
    table = pd.read_csv(toys.root / "reports/grids/toys/results.csv")
    assert list(table.columns) == ["study", "01_make.base", "arm", "seed", "test_accuracy"]
    parts = [pd.read_csv(toys.root / f"reports/{study}/tables/results.csv") for study in names]
    assert table[["arm", "seed", "test_accuracy"]].equals(pd.concat(parts, ignore_index=True))
    assert list(table["study"]) == [name for name in names for _ in range(6)]
    assert list(table["01_make.base"]) == [base for base in (0.5, 0.6, 0.7) for _ in range(6)]

    # again: no process is started; the tables are made again
    (toys.root / "reports/grids/toys/results.csv").write_text("tampered")
    assert toys.run(grid) == {}
    assert "nothing to do: all 3 studies of toys are done" in capsys.readouterr().out
    assert [toys.begun(study) for study in names] == [1, 1, 1]
    assert pd.read_csv(toys.root / "reports/grids/toys/results.csv").equals(table)

    # a study whose report is gone
    (toys.root / "reports/toys-0_6/report.html").unlink()
    assert toys.run(grid) == {}
    assert "grid toys: 3 of 3 studies done (2 of them before)" in capsys.readouterr().out
    assert [toys.begun(study) for study in names] == [1, 2, 1] and toys.trained("toys-0_6") == ["0", "1", "2", "3"]


def test_a_study_that_fails_is_tried_once_more_and_the_others_go_on(toys, capsys):
    lines = {
        "toys-0_5": "print('a line'); sys.exit('01_make stopped in cell [5]: ValueError: damaged')",
        "toys-0_6": "mark.exists() or (mark.touch(), os.kill(os.getpid(), 9))",
        "toys-0_7": "print(sys.argv[1:])",
    }
    begin = f"import os, sys; from pathlib import Path; mark = Path({str(toys.root / 'mark')!r}); "

    def command(study, options):
        return [sys.executable, "-c", begin + lines[study], *options]

    failed = toys.run(toys_of(0.5, 0.6, 0.7), command=command)
    assert failed == {"toys-0_5": "01_make stopped in cell [5]: ValueError: damaged"}
    assert [toys.begun(study) for study in lines] == [2, 2, 1]
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("toys-0_5 failed 2 times: 01_make stopped in cell [5]: ValueError: damaged; log: ")
    assert captured.err.endswith("runs/grids/toys/toys-0_5.log\n")
    assert "toys-0_6 failed and is tried once more: SIGKILL, killed from outside\n" in captured.out
    assert "grid toys: 2 of 3 studies done\n" in captured.out


def test_no_more_studies_run_at_a_time_than_asked_for(toys):
    trace = toys.root / "trace.txt"
    code = f"import sys, time; out = open({str(trace)!r}, 'a', buffering=1); print('begin', *sys.argv[1:], file=out); "
    code += "time.sleep(0.5); print('end', file=out)"
    with noted_signals() as stop:
        failed = reproduce(
            toys_of(*range(5)),
            jobs=2,
            stop=stop,
            sources=toy_sources(toys.root),
            command=lambda study, options: [sys.executable, "-c", code, study, *options],
            fetch=lambda params: None,
        )
    assert failed == {}
    lines = trace.read_text().splitlines()
    at_a_time = list(itertools.accumulate(1 if line.startswith("begin") else -1 for line in lines))
    assert max(at_a_time) == 2 and at_a_time[-1] == 0
    assert sorted(lines)[:5] == [f"begin toys-{n}" for n in range(5)]


def test_each_study_that_runs_at_the_same_time_has_gpus_of_its_own(toys, monkeypatch):
    trace = toys.root / "trace.txt"
    code = f"import os, sys, time; time.sleep(0.5); out = open({str(trace)!r}, 'a'); "
    code += "print(os.environ['CUDA_VISIBLE_DEVICES'], file=out)"
    for there, seen in (("0,1,2", {"0,2", "1"}), ("5", {"5"})):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
        trace.write_text("")
        with noted_signals() as stop:
            reproduce(
                toys_of(0.1, 0.2, 0.3),
                jobs=2,
                stop=stop,
                sources=toy_sources(toys.root),
                command=lambda study, options: [sys.executable, "-c", code],
                fetch=lambda params: None,
            )
        assert set(trace.read_text().split()) == seen


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--jobs", "0"], "JOBS = '0': should be a whole number, 1 or more"),
        (["--executor", "lcoal"], "EXECUTOR = 'lcoal': should be local or slurm; did you mean 'local'?"),
        (
            ["--executor", "local", "--gpus", "1"],
            "JOB_GPUS = '1': says nothing here, where a grid's jobs are its studies",
        ),
        (["--cores", "2"], "JOB_CORES = '2': says nothing without EXECUTOR"),
    ],
)
def test_options_of_a_grid_that_say_nothing_are_one_line_before_anything_runs(home, capsys, options, told):
    assert main(["reproduce", "digits_pairs", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(told) and captured.err.count("\n") == 1 and captured.out == ""
    assert not (home / "runs").exists()


def test_under_slurm_the_studies_of_a_grid_are_told_what_was_asked_for(monkeypatch):
    asked = fan_out_of_studies("slurm", "4", "", "time=60")
    command = pipeline_command("pairs-a", asked.as_arguments)
    assert command[-5:] == ["reproduce", "pairs-a", "--executor=slurm", "--cores=4", "--slurm=time=60"]
    assert fan_out_of_studies("local", "", "", "") is None
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ParameterError, match="there is no sbatch here"):
        check_jobs(asked, load_params(PARAMS_FOLDER / "smoke.yaml"), Sources())


def test_ctrl_c_stops_all_studies_each_with_what_it_has_and_begins_no_other(toys):
    grid = toys_of(0.5, 0.6, 0.7, pause=600.0)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (20, 100))
    driver = toys.start(grid, slave)
    os.close(slave)
    seen = Terminal(master)
    running = ("toys-0_5", "toys-0_6")
    parts = [toys.root / f"runs/{study}/01_make/parts/p0.txt" for study in running]
    wait_until("part 0", lambda: all(part.exists() for part in parts))
    wait_until("the view", lambda: sum("01_make 25 % · part 0" in line for line in seen.screen(20, 100)) == 2)
    block = seen.screen(20, 100)
    assert block[0].startswith("grid toys: 0/3 studies done, 2 running")
    assert block[1].startswith("  toys-0_5 [1/2] 01_make ") and block[2].startswith("  toys-0_6 [1/2] 01_make ")
    assert block[3:] == []
    with pytest.raises(StudyBusy, match="grid toys is being run by another process"):
        toys.run(grid)
    processes = toys.processes(*running)
    assert len(processes) >= 4  # two drivers, two kernels
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate()
    assert driver.returncode == 130
    assert error == "stopped by Ctrl-C; 0 of 3 studies are done; 'make reproduce GRID=toys JOBS=2' goes on from there\n"
    seen.close()
    assert "toys-0_6: stopped by Ctrl-C during 01_make (" in seen.text and "finished networks; 'make" in seen.text
    assert not any(is_alive(process) for process in processes)
    assert [read_status(study)["state"] for study in running] == ["interrupted"] * 2
    assert toys.begun("toys-0_7") == 0
    assert [toys.mlflow(study) for study in running] == [["KILLED"]] * 2


def test_when_the_driver_is_killed_its_studies_end_too_and_the_next_one_goes_on_from_there(toys):
    grid = toys_of(0.5, 0.6)
    driver = toys.start(toys_of(0.5, 0.6, pause=600.0))
    studies = [study.name for study in grid.studies]
    parts = [toys.root / f"runs/{study}/01_make/parts/p0.txt" for study in studies]
    wait_until("part 0", lambda: all(part.exists() for part in parts))
    processes = toys.processes(*studies)
    driver.kill()
    driver.communicate()
    assert toys.run(grid) == {}  # at once: it waits until the old studies have ended
    assert not any(is_alive(process) for process in processes)
    for study in studies:
        assert toys.begun(study) == 2 and toys.trained(study) == ["0", "1", "2", "3"]
        assert toys.mlflow(study) == ["KILLED", "FINISHED"]


def test_a_study_that_somebody_else_runs_is_waited_for(toys):
    (toys.root / "runs/toys-0_5").mkdir(parents=True)
    lock, seen = contextlib.ExitStack(), []
    lock.enter_context(study_lock("toys-0_5"))

    def command(study, options):
        seen.append(study)
        if study == "toys-0_7":  # the last of those that can run: now the other is let go of
            lock.close()
        return [sys.executable, "-c", ""]

    assert toys.run(toys_of(0.5, 0.6, 0.7), jobs=1, command=command) == {}
    assert seen == ["toys-0_6", "toys-0_7", "toys-0_5"]


# --- What came of it


def test_what_a_study_concludes_is_in_the_words_of_its_report(home):
    rows = [
        ("at_clustered", "kd", "main", "better"),
        ("at_clustered", "uniform", "main", "includes zero"),
        ("at_clustered", "random", "main", "includes zero"),
        ("crd_clustered", "kd", "main", "worse"),
        ("at_uniform", "kd", "other", "worse"),
    ]
    table = pd.DataFrame(rows, columns=["arm", "control", "family", "word"])
    save_table(table, home / "reports/mine/tables/contrasts.csv")
    assert conclusion("mine") == (
        "at_clustered is better than kd; it cannot be told apart from uniform, random. crd_clustered is worse than kd"
    )
    save_table(table.iloc[-1:], home / "reports/mine/tables/contrasts.csv")
    assert conclusion("mine") == "not known"  # as the verdict is, which this study has not


# --- The live view


class Terminal:
    """What was written to a terminal, in `text`."""

    def __init__(self, master):
        self.text = ""
        self._master = master
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other end was closed
            while data := os.read(self._master, 65536):
                self.text += data.decode("utf-8", errors="replace")

    def close(self):
        self._thread.join(10)
        os.close(self._master)

    def screen(self, lines, columns):
        return screen(self.text.replace("\r\n", "\n"), lines, columns)


def screen(text, lines, columns):
    """The lines that a terminal shows after `text`, those at the end without a letter left out."""
    rows, row, column = [""], 0, 0
    for control, letters in re.findall(r"(\r|\n|\x1b\[\d*[AJK])|([^\r\n\x1b]+)", text):
        if letters:
            assert column + len(letters) < columns, "the terminal would break the line"
            rows[row] = rows[row][:column].ljust(column) + letters + rows[row][column + len(letters) :]
            column += len(letters)
        elif control == "\r":
            column = 0
        elif control == "\n":
            row, column = row + 1, 0
            rows += [""] if row == len(rows) else []
        elif control[-1] == "A":
            row -= int(control[2:-1])
            assert row >= max(0, len(rows) - lines), "that line has scrolled away"
        else:
            rows[row] = rows[row][:column]
            rows = rows[: row + 1] if control[-1] == "J" else rows
    while rows and not rows[-1].strip():
        rows.pop()
    return rows


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((30, 5)))
    monkeypatch.setattr("pursuhint_lib.live.time.monotonic", iter(range(0, 10000, 100)).__next__)
    return FakeTerminal()


def test_several_lines_are_redrawn_in_place_cut_to_the_terminal_and_wiped(terminal):
    live = LiveLine(terminal)
    live.say("kept")
    live.draw("first\na longer second\nthird")
    assert screen(terminal.getvalue(), 5, 30) == ["kept", "first", "a longer second", "third"]
    live.draw("1\n2")
    assert screen(terminal.getvalue(), 5, 30) == ["kept", "1", "2"]
    live.draw("x" * 100 + "\n" + "\n".join("abcdef"))
    assert screen(terminal.getvalue(), 5, 30) == ["kept", "x" * 29, "a", "b", "c", "... and 3 more"]
    live.say("kept, too")
    live.draw("one")
    assert screen(terminal.getvalue(), 5, 30) == ["kept", "kept, too", "one"]
    live.clear()
    assert screen(terminal.getvalue(), 5, 30) == ["kept", "kept, too"]


def test_without_a_terminal_the_first_line_is_printed_now_and_then(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pursuhint_lib.live.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    live = LiveLine(stream)
    for second in range(100):
        clock[0] = float(second)
        live.draw(f"grid: {second}\n  study")
    assert stream.getvalue() == "grid: 30\ngrid: 60\ngrid: 90\n"


def test_the_time_left_is_shared_out_over_the_jobs_and_is_that_of_the_longest_at_least():
    assert grid_seconds_left([(5, None)], 3, [], 2) is None
    assert grid_seconds_left([(5, 15), (10, 10)], 2, [], 2) == (25 + 40) / 2  # the others take as long as these
    assert grid_seconds_left([(5, None)], 1, [30, 50], 1) == 35 + 40
    assert grid_seconds_left([(0, 100), (0, 10)], 0, [20], 2) == 100
    assert grid_seconds_left([(90, None)], 0, [40], 1) == 0

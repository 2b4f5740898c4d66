"""The five notebooks: how they are written, and the whole smoke study by the driver that `make reproduce` calls."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from slurm_on_loopback import slurm, slurm_missing

from pursuhint_lib.params import STAGES, load_params
from pursuhint_lib.storage import REPOSITORY

NOTEBOOKS = {stage: nbformat.read(REPOSITORY / "notebooks" / f"{stage}.ipynb", as_version=4) for stage in STAGES}
each_notebook = pytest.mark.parametrize("stage", STAGES)


def code(stage):
    return [cell for cell in NOTEBOOKS[stage].cells if cell.cell_type == "code"]


def parameters_cell(stage):
    (cell,) = [cell for cell in NOTEBOOKS[stage].cells if "parameters" in cell.metadata.get("tags", [])]
    return {
        statement.target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.AnnAssign)
    }


@each_notebook
def test_opens_with_a_title_and_a_question_and_ends_with_an_answer_from_the_run_and_an_invitation(stage):
    cells = NOTEBOOKS[stage].cells
    assert re.match(rf"# {stage[:2]} · .+\n\n> \*\*.+\?\*\*", cells[0].source)
    assert cells[-1].cell_type == "markdown" and "**Try it:**" in cells[-1].source
    takeaway = next(i for i, cell in enumerate(cells) if cell.source == "## Takeaway")
    assert {cell.cell_type for cell in cells[takeaway + 1 : -1]} == {"code"} and "Markdown(" in cells[-2].source


@each_notebook
def test_logic_lives_in_the_library(stage):
    for cell in code(stage):
        tree = ast.parse(cell.source)
        kinds = {type(node) for node in ast.walk(tree)}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.Lambda}
        assert not re.search(r"^[!%]|sys\.path|filterwarnings|import \*", cell.source, re.MULTILINE)
    lengths = sorted(len(cell.source.splitlines()) for cell in code(stage)[3:])
    assert lengths[len(lengths) // 2] <= 13 and lengths[-1] <= 30


@pytest.mark.parametrize(
    ("stage", "variables"),
    [
        ("02_profile_layers", {"neighbors": pd.Series({"<b>stem and <img src=x>": 0.9, "a": 0.5}), "place": "early"}),
        ("03_cluster_layers", {"ours": ["<b>stem", "<img src=x>"], "beside": "", "firm": "", "moved": ""}),
    ],
)
def test_the_name_of_a_layer_is_text_in_the_answer_whatever_it_is_made_of(stage, variables):
    shown = []
    given = {"main": "r2_cca", "means": ["0.7"], "agree": "", "few": "", "profile": SimpleNamespace(n_images=10)}
    given |= {"params": SimpleNamespace(n_hints=2, teacher="net"), "fits": {"r2_cca": SimpleNamespace(n_breaks_=0)}}
    given |= {"np": np, "escape": escape, "Markdown": str, "display": shown.append}
    exec(code(stage)[-1].source, given | variables)
    assert "&lt;b&gt;stem" in shown[0] and "&lt;img src=x&gt;" in shown[0] and "<" not in shown[0]


@each_notebook
def test_no_result_is_typed_into_the_text(stage):
    for cell in NOTEBOOKS[stage].cells:
        if cell.cell_type == "markdown":
            text = re.sub(
                r"`[^`]*`|\(.*?\.ipynb\)|^# \d\d ·|\[\d\d ·|[Nn]otebooks? \d\d|\(0\d\)",
                "",
                cell.source,
                flags=re.MULTILINE,
            )
            assert not re.search(r"\d", text), text


@each_notebook
def test_the_parameters_cell_declares_what_the_model_does_with_the_values_of_the_smoke_study(stage):
    smoke = load_params(REPOSITORY / "params" / "smoke.yaml")[stage].model_dump()
    assert parameters_cell(stage) == smoke == STAGES[stage]().model_dump()


def test_the_smoke_study_uses_every_section():
    assert len(yaml.safe_load((REPOSITORY / "params" / "smoke.yaml").read_text())) == 5


def reproduce(home, *options):
    """Start the smoke study below `home`, as a process group of its own."""
    also = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = os.environ | {"PURSUHINT_HOME": str(home), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *also])}
    command = [sys.executable, "-m", "pursuhint_lib.pipeline", "reproduce", "smoke", *options]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finished(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The smoke study, run once: its home and what the driver said."""
    home = tmp_path_factory.mktemp("home")
    return home, finished(reproduce(home))


def results(home):
    """Bytes of all tables and networks of a study, but for what the clock measured and what only tells of runs."""
    runs = home / "runs" / "smoke"
    files = [*runs.glob("0*/*.csv"), *runs.glob("0*/*.json"), *runs.glob("0*/networks/*")]
    volatile = ("timings.csv", "speed.csv", "record.json", "progress.json")
    return {str(f.relative_to(runs)): f.read_bytes() for f in files if f.name not in volatile}


def test_the_study_ends_with_a_report_executed_notebooks_and_complete_tables(study):
    home, said = study
    reports = home / "reports" / "smoke"
    assert "done in" in said and "first run" in said and "#/experiments/" in said
    page = (reports / "report.html").read_text()
    assert "at_clustered_r2_cca" in page and not re.search(r'(src|href)="https?://', page)
    for stage in STAGES:
        notebook = nbformat.read(reports / "notebooks" / f"{stage}.ipynb", as_version=4)
        executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in executed)
        assert not [
            o for cell in executed for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"
        ]
        answer = executed[-1].outputs[0]["data"]["text/markdown"]
        assert answer.startswith("**") and "nan" not in answer
    summary = pd.read_csv(reports / "tables" / "summary.csv")
    assert {"unaided", "kd", "at_stage_ends", "at_uniform", "at_random_0", "at_clustered_r2_cca"} <= set(summary["arm"])
    assert (summary["n"] == 2).all() and summary[["val_mean", "test_mean", "gap_closed"]].notna().all(axis=None)
    for figure in ("similarity", "clusters", "strategies", "accuracy", "differences", "student_similarity"):
        assert (reports / "figures" / f"{figure}.png").stat().st_size > 5000


def test_every_notebook_and_every_trained_network_is_a_finished_run_in_mlflow(study, monkeypatch):
    home, _ = study
    monkeypatch.setenv("PURSUHINT_HOME", str(home))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("pursuhint-smoke")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert {run.info.status for run in runs} == {"FINISHED"}
    notebooks = {run.data.tags["stage"]: run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert set(notebooks) == set(STAGES)
    (student,) = [run for run in runs if run.info.run_name == "04 at_uniform s1"]
    assert student.data.tags["mlflow.parentRunId"] == notebooks["04_distill_students"]
    for metric in ("train/at", "train/loss_share_at", "train/gradient_share_at"):  # one value per epoch
        assert len(client.get_metric_history(student.info.run_id, metric)) == 2, metric
    table = pd.read_csv(home / "reports" / "smoke" / "tables" / "provenance.csv").fillna("")
    listed = dict(zip(table["network"], table["run_id"]))
    assert listed["at_uniform-s1"] == student.info.run_id
    accuracy = pd.read_csv(home / "reports" / "smoke" / "tables" / "results.csv").set_index(["arm", "seed"])
    assert student.data.metrics["final/val_acc1"] == accuracy.loc[("at_uniform", 1), "val_accuracy"]


def test_a_second_run_does_nothing_and_a_deleted_report_is_made_again_from_the_tables(study):
    home, _ = study
    records = {path: path.stat().st_mtime_ns for path in home.glob("runs/smoke/*/record.json")}
    page = home / "reports" / "smoke" / "report.html"
    shown = [path for path in page.parent.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in shown}
    shutil.rmtree(page.parent)
    said = finished(reproduce(home))
    assert "nothing to do" in said and "made again from the tables" in said
    assert {path: path.read_bytes() for path in shown} == before
    assert records == {path: path.stat().st_mtime_ns for path in home.glob("runs/smoke/*/record.json")}


def test_killed_in_04_it_goes_on_where_it_was_and_ends_with_the_same_bytes(study, tmp_path):
    home, _ = study
    shutil.copytree(home, tmp_path / "home")
    home = tmp_path / "home"
    expected = results(home)
    for stage in ("04_distill_students", "05_evaluate"):
        shutil.rmtree(home / "runs" / "smoke" / stage)
    process = reproduce(home)
    networks = home / "runs" / "smoke" / "04_distill_students" / "networks"
    while not list(networks.glob("kd-s0.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in networks.glob("*.safetensors")}
    assert 0 < len(kept) < 8
    said = finished(reproduce(home))
    assert "killed during 04_distill_students" in said
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert results(home) == expected


def shown(home):
    """Bytes of all tables of a report, but for what the clock measured and what names runs."""
    tables, volatile = (
        (home / "reports" / "smoke" / "tables").glob("*.csv"),
        ("seconds.csv", "speed.csv", "provenance.csv"),
    )
    return {table.name: table.read_bytes() for table in tables if table.name not in volatile}


def test_by_jobs_of_which_one_is_killed_it_ends_with_the_same_bytes_and_logs_every_network_once(
    study, tmp_path, monkeypatch
):
    expected, home = study[0], tmp_path
    process = reproduce(home, "--executor", "local", "--jobs", "2")
    job = home / "runs" / "smoke" / "jobs" / "04_distill_students" / "students-s1"
    networks = home / "runs" / "smoke" / "04_distill_students" / "networks"
    while not (job / "progress.json").exists() or json.loads((job / "progress.json").read_text())["done"] == 0:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    kept = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in networks.glob("[!.]*.safetensors")}
    (about,) = job.glob("worker.*.json")
    os.kill(json.loads(about.read_text())["family"][0][0], signal.SIGKILL)
    said = finished(process)
    assert said.count("tried again") == 1 and "job students-s1: it died: SIGKILL, killed from outside; " in said
    assert kept == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in kept}
    assert results(home) == results(expected) and shown(home) == shown(expected)

    monkeypatch.setenv("PURSUHINT_HOME", str(home))
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("pursuhint-smoke").experiment_id], max_results=1000)
    models = [(run.data.tags["arm"], run.data.tags["seed"]) for run in runs if "arm" in run.data.tags]
    assert len(models) == len(set(models)) == len(list(home.glob("runs/smoke/0*/networks/*.safetensors")))
    record = json.loads((home / "runs" / "smoke" / "02_profile_layers" / "record.json").read_text())
    assert list(record["fan_out"]["ran"]) == ["teacher_1"]


@pytest.mark.skipif(bool(slurm_missing()), reason=slurm_missing())
def test_by_jobs_of_a_slurm_of_one_node_it_ends_with_the_same_bytes(study, tmp_path, tmp_path_factory, monkeypatch):
    with slurm(tmp_path_factory.mktemp("slurm"), cores=2) as variables:  # a short path, see there
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        said = finished(reproduce(tmp_path, "--executor", "slurm", "--jobs", "2", "--slurm", "time=60"))
    assert "tried again" not in said
    assert results(tmp_path) == results(study[0]) and shown(tmp_path) == shown(study[0])
    # Three jobs in 01, one in 02, two in 04, and the five notebooks.
    ends = [json.loads(path.read_text()) for path in tmp_path.glob("runs/smoke/jobs/*/*/ended.json")]
    assert len(ends) == 11 and not any(end["error"] for end in ends)


def test_forced_it_runs_again_and_says_that_it_is_the_same(study):
    home, _ = study
    expected = results(home)
    said = finished(reproduce(home, "--force"))
    assert "reproduced exactly" in said and results(home) == expected
    verdict = json.loads((home / "runs" / "smoke" / "verdict.json").read_text())
    assert "exactly" in verdict["text"]

"""Runs in MLflow: one store, honest ends, nothing logged twice, nothing sent."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from pursuhint_lib import tracking, tracking_notebook, tracking_page, tracking_store
from pursuhint_lib.arms import Arm, log_students
from pursuhint_lib.models import build_model, load_model, save_model
from pursuhint_lib.storage import REPOSITORY, run_folder


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """The file of a store that was just created: creating it takes seconds, copying it does not."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PURSUHINT_HOME", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking_store.open_client()
    return folder / "mlflow.db"


@pytest.fixture
def store(home, empty_database):
    """An empty store in a home of its own."""
    tracking._LAB_RUNS.clear()
    shutil.copyfile(empty_database, home / "mlflow.db")
    return home


def history(epochs=3, arms=("at_uniform",), seeds=(0,)):
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "epoch": epoch,
            "learning_rate": 0.1,
            "loss": 1.0 / epoch,
            "kd": float("nan") if arm == "unaided" else 0.5,
            "val_accuracy": 0.5 + epoch / 100,
            "val_loss": 2.0,
            "status": "trained",
            "seconds": 2.0,
            "finished": 1_700_000_000.0 + 2 * epoch,
        }
        for arm in arms
        for seed in seeds
        for epoch in range(1, epochs + 1)
    ]
    return pd.DataFrame(rows)


def client():
    return tracking_store.open_client()


def log(run_id, table=None, arm="at_uniform", seed=0, key="k"):
    run = tracking.StageRun("toy", "04_distill_students", run_id)
    return run.log_trained_model(
        arm=arm, seed=seed, history=history() if table is None else table, params={"method": "at"}, key=key
    )


def new_run():
    return tracking.create_run(
        "toy", "04_distill_students", params={"epochs": 3, "optimizer": {"lr": 0.1}, "seeds": [0, 1]}
    )


def test_the_embedded_store_lies_in_the_home_in_wal_mode_with_its_artifacts_beside_it(
    store, monkeypatch, tmp_path_factory
):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    experiment = client().get_experiment(tracking.open_experiment("toy"))
    assert experiment.name == "pursuhint-toy"
    assert experiment.artifact_location == (store / "mlartifacts" / "toy").as_uri()
    assert (store / "mlflow.db").read_bytes()[18] == 2  # the file format version of write-ahead logging
    assert "compareRunsMode=CHART" in experiment.tags["mlflow.note.content"]
    assert not list(elsewhere.iterdir())


def test_the_tracking_uri_of_the_environment_wins(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/other.db")
    tracking.open_experiment("toy")
    assert (home / "other.db").exists() and not (home / "mlflow.db").exists()


def test_an_unreachable_tracker_is_one_line(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(tracking.TrackingError) as caught:
        tracking.open_experiment("toy")
    assert "\n" not in str(caught.value) and "127.0.0.1" in str(caught.value)


# --- A store that cannot be used


def without_runs(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE runs")


def half_made(path):
    """As left by a process that was killed between two of MLflow's migrations."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("alembic_version", "experiments", "_alembic_tmp_experiments", "secrets"):
            database.execute(f"CREATE TABLE {table} (x)")


@pytest.fixture
def quickly_made(empty_database, monkeypatch):
    """MLflow's own making of a store, in no time."""

    def copy(uri, _artifacts):
        shutil.copyfile(empty_database, uri.removeprefix("sqlite:///"))
        return SimpleNamespace(engine=SimpleNamespace(dispose=lambda: None))

    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore", copy)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (half_made, "it was left half made"),
        (lambda path: os.truncate(path, 100_000), "database disk image is malformed"),
        (lambda path: os.truncate(path, 0), "no such table: experiments"),
        (lambda path: path.write_bytes(b"garbage" * 1000), "file is not a database"),
        (without_runs, "no such table: runs"),
        (lambda path: (path.unlink(), path.mkdir()), "it is no file"),
    ],
)
def test_a_damaged_store_is_set_aside_and_made_anew(store, quickly_made, harm, told):
    path = store / "mlflow.db"
    if harm == half_made:
        path.unlink()
    harm(path)
    with pytest.warns(UserWarning) as caught:
        tracking_store._create_store()
    (aside,) = store.glob("mlflow.db-damaged-*")
    assert str(caught[0].message) == f"{path} cannot be used ({told}): moved to {aside.name}, a new one was made"
    assert not tracking_store._damage(path)


def test_a_journal_whose_store_is_gone_is_not_played_into_a_new_one(store, quickly_made):
    for name in ("mlflow.db-wal", "mlflow.db-shm"):
        (store / name).write_text("of a process that was killed")
    (store / "mlflow.db").unlink()
    tracking_store._create_store()
    assert not list(store.glob("mlflow.db-[ws]*")) and len(list(store.glob("mlflow.db-damaged-*"))) == 2


def test_a_store_whose_making_is_broken_off_is_made_by_the_next_process(home, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("alembic.command.upgrade", killed)
    with pytest.raises(KeyboardInterrupt):
        tracking_store.open_client()
    assert not (home / "mlflow.db").exists()
    monkeypatch.undo()
    monkeypatch.setenv("PURSUHINT_HOME", str(home))
    assert tracking.open_experiment("toy")
    assert not list(home.glob("mlflow.db-new*"))


def test_a_store_that_is_whole_stays_even_when_it_cannot_be_read(store, monkeypatch):
    monkeypatch.setattr(tracking_store, "_LOCKED_S", 0.1)
    bytes_before = (store / "mlflow.db").read_bytes()
    with contextlib.closing(sqlite3.connect(store / "mlflow.db")) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(tracking.TrackingError, match=r"mlflow.db is locked by another process, for 0.1 s now"):
            tracking_store._create_store()
        assert tracking_store.missing_runs(["a run"]) == set()
    tracking_store._create_store()
    assert (store / "mlflow.db").read_bytes() == bytes_before
    assert tracking_store.missing_runs(["a run"]) == {"a run"}


@pytest.mark.parametrize("uri", ["sqlite:///{}/nowhere/store.db", "file://{}/nowhere/store", "{}/nowhere/store"])
def test_a_tracker_in_a_folder_that_is_not_there_is_refused(store, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(store))
    with pytest.raises(tracking.TrackingError, match=f"^MLFLOW_TRACKING_URI = .*: there is no folder {store}/nowhere$"):
        tracking_store.open_client()
    assert not (store / "nowhere").exists()


# --- Runs


def test_a_notebook_run_says_where_it_comes_from(store):
    run = client().get_run(new_run())
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "04 distill students"
    assert run.data.tags["mlflow.source.name"] == "notebooks/04_distill_students.ipynb"
    assert run.data.tags["host"] == socket.gethostname()
    assert {"stage", "study", "mlflow.source.git.commit", "git.dirty", "torch", "threads"} <= run.data.tags.keys()
    assert run.data.params["optimizer.lr"] == "0.1" and run.data.params["seeds"] == "[0, 1]"


def test_a_trained_model_is_logged_with_the_real_time_of_each_epoch(store):
    parent = new_run()
    run = client().get_run(log(parent))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "04 at_uniform s0")
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.info.start_time == 1_700_000_000_000 and run.info.end_time == 1_700_000_006_000
    curve = client().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value, point.timestamp) for point in curve] == [
        (1, 1.0, 1_700_000_002_000),
        (2, 0.5, 1_700_000_004_000),
        (3, 1 / 3, 1_700_000_006_000),
    ]
    assert run.data.metrics["final/val_acc1"] == run.data.metrics["val/acc1"] == 0.53
    assert {"train/lr", "train/kd", "val/loss", "final/val_loss"} <= run.data.metrics.keys()
    assert not any("seconds" in name or "status" in name for name in run.data.metrics)


def test_terms_that_an_arm_does_not_have_are_no_metrics(store):
    run = client().get_run(log(new_run(), history(arms=("unaided", "kd")), arm="unaided"))
    assert "train/kd" not in run.data.metrics and len(client().get_metric_history(run.info.run_id, "train/loss")) == 3


def test_more_than_a_thousand_points_are_logged(store):
    run_id = log(new_run(), history(epochs=300))
    assert len(client().get_metric_history(run_id, "val/acc1")) == 300


def test_the_same_model_is_logged_once_and_moves_to_the_present_run(store):
    first, second = new_run(), new_run()
    run_id = log(first)
    assert log(second) == run_id
    assert client().get_run(run_id).data.tags["mlflow.parentRunId"] == second
    assert len(client().get_metric_history(run_id, "train/loss")) == 3


def test_a_model_trained_anew_replaces_the_old_one_in_the_table(store):
    parent = new_run()
    old = log(parent, key="before")
    new = log(parent, key="after")
    other = log(parent, key="after", arm="at_uniform", seed=1, table=history(seeds=(1,)))
    assert old != new
    table = tracking.run_table("toy", "04_distill_students")
    assert list(table[["arm", "seed", "run_id", "status"]].itertuples(index=False, name=None)) == [
        ("at_uniform", 0, new, "FINISHED"),
        ("at_uniform", 1, other, "FINISHED"),
    ]
    assert client().get_run(old).data.tags["current"] == "no"


def test_a_model_that_the_last_run_of_a_stage_did_not_have_is_retired(store):
    first = new_run()
    log(first)
    log(first, history(arms=("dropped",)), arm="dropped")
    second = new_run()
    kept = log(second)
    tracking.retire_other_models("toy", "04_distill_students", second)
    assert list(tracking.run_table("toy", "04_distill_students")["run_id"]) == [kept]


def test_a_model_with_the_same_key_but_other_numbers_is_logged_anew(store):
    parent, other = new_run(), history()
    other["loss"] *= 1.01
    assert log(parent) != log(parent, other)


def broken_off():
    """Of an arm whose first epoch was fine and whose second was not."""
    table = history(epochs=2).assign(reason=[None, "the loss was no longer finite"], status=["trained", "failed"])
    table.loc[1, ["loss", "val_loss"]] = float("nan")
    return table


def test_a_failed_model_is_a_failed_run_with_its_reason_and_stands_in_no_ranking(store):
    run = client().get_run(log(new_run(), broken_off()))
    assert run.info.status == "FAILED" and run.data.metrics["val/acc1"] == 0.52
    assert {name: run.data.tags[name] for name in ("status", "reason", "epoch")} == {
        "status": "failed",
        "reason": "the loss was no longer finite",
        "epoch": "2",
    }
    assert not any(name.startswith("final/") for name in run.data.metrics)
    assert "reason" not in client().get_run(log(new_run())).data.tags


def test_a_failed_model_is_finished_work_and_logged_once(store):
    run_id, second = log(new_run(), broken_off()), new_run()
    assert log(second, broken_off()) == run_id
    assert tracking.run_table("toy", "04_distill_students")["status"].tolist() == ["FAILED"]
    tracking.retire_other_models("toy", "04_distill_students", second)
    assert tracking.run_table("toy", "04_distill_students")["run_id"].tolist() == [run_id]


def test_a_model_that_is_found_again_takes_the_present_tags(store):
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    model = {"arm": "at_uniform", "seed": 0, "history": history(), "params": {}}
    first = run.log_trained_model(**model, tags={"also": "none"})
    assert run.log_trained_model(**model, tags={"also": "at_clustered"}) == first
    assert client().get_run(first).data.tags["also"] == "at_clustered"


ARMS = ["kd", "at_uniform", "wsld+at_uniform", "crd@last", "at+crd@last_stage_ends"]


def test_a_metric_of_every_arm_is_logged_whatever_its_method_is_written_with(store):
    spool, notebook = spooled(store)
    run = tracking.StageRun("toy", "05_evaluate", new_run())
    notebook.log_metrics({f"test/{arm}": number / 10 for number, arm in enumerate(ARMS)})
    tracking.ingest(spool, run)
    assert client().get_run(run.run_id).data.metrics == {
        "test/kd": 0.0,
        "test/at_uniform": 0.1,
        "test/wsld and at_uniform": 0.2,
        "test/crd of last": 0.3,
        "test/at and crd of last_stage_ends": 0.4,
    }


def test_a_student_of_every_arm_is_logged_under_the_arms_own_name(store):
    spool, notebook = spooled(store)
    for arm in ARMS:
        table = history(arms=(arm,)).assign(**{"loss_share_crd@last": 0.5})
        notebook.log_trained_model(arm=arm, seed=0, history=table, params={"method": arm}, tags={"also": "a+b, c@d"})
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    tracking.ingest(spool, run)
    tracking.retire_other_models("toy", "04_distill_students", run.run_id)
    assert tracking.run_table("toy", "04_distill_students")["arm"].tolist() == sorted(ARMS)
    for arm in ARMS:  # and is found again
        table = history(arms=(arm,)).assign(**{"loss_share_crd@last": 0.5})
        assert log(run.run_id, table, arm=arm, key="") in set(tracking.run_table("toy", run.stage)["run_id"])


def test_arms_with_the_same_students_are_named_in_the_tag_of_the_run_that_trained_them(store):
    arms = [Arm("kd", "kd", "none"), Arm("wsld+at_a", "wsld+at", "a")]
    arms += [Arm(f"wsld+at_{name}", "wsld+at", name, same_as="wsld+at_a") for name in ("b", "c")]
    settings = SimpleNamespace(student="small", teacher="large", epochs=3, seeds=[0])
    distillation = SimpleNamespace(params=settings, key=lambda arm: arm.name)
    table = history(arms=("kd", "wsld+at_a"))
    log_students(tracking.StageRun("toy", "04_distill_students", new_run()), arms, table, distillation)
    runs = tracking.run_table("toy", "04_distill_students").set_index("arm")["run_id"]
    tags = {arm: client().get_run(run_id).data.tags["also"] for arm, run_id in runs.items()}
    assert tags == {"kd": "none", "wsld+at_a": "wsld+at_b, wsld+at_c"}


# --- What a reader compares by


@pytest.mark.parametrize(
    ("strategy", "metric"),
    [
        ("clustered_r2_cca", "r2_cca"),
        ("clustered_first_r2_cca", "r2_cca"),
        ("last+clustered_linear_cka", "linear_cka"),
        ("reversed", "main"),
        ("random_0", "none"),
        ("none", "none"),
    ],
)
def test_the_measure_by_which_a_strategy_chose_is_a_parameter_to_group_by(store, strategy, metric):
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    run_id = run.log_trained_model(arm="at_uniform", seed=0, history=history(), params={"strategy": strategy})
    params = client().get_run(run_id).data.params
    assert {name: params[name] for name in ("arm", "seed", "strategy", "metric")} == {
        "arm": "at_uniform",
        "seed": "0",
        "strategy": strategy,
        "metric": metric,
    }


def test_a_model_has_the_data_sets_of_its_notebook_as_inputs_but_not_the_test_images(store):
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    run.log_dataset("digits train", "a" * 64, "train")
    run.log_dataset("digits test", "b" * 64, "test")
    model = {"arm": "at_uniform", "seed": 0, "history": history(), "params": {}}
    run_id = run.log_trained_model(**model)
    again = tracking.StageRun("toy", "04_distill_students", new_run())
    again.log_dataset("digits train", "a" * 64, "train")
    assert again.log_trained_model(**model) == run_id
    inputs = client().get_run(run_id).inputs.dataset_inputs
    assert [(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in inputs] == [
        ("digits train", "a" * 32, "train")
    ]


def evaluated(**columns):
    table = pd.DataFrame({"arm": ["kd", "at_a", "at_b"], "same_as": ["", "", "at_a"], "seed": 0})
    return table.assign(test_accuracy=[0.5, 0.25, 0.25], test_loss=1.5, top5=float("nan"), ece=0.1).assign(**columns)


def test_test_measures_stand_on_the_runs_of_the_students_once_and_both_sides_name_each_other(store):
    parent, spool = new_run(), store / "spool.jsonl"
    students = {arm: log(parent, history(arms=(arm,)), arm=arm) for arm in ("kd", "at_a")}
    evaluation = tracking.StageRun("toy", "05_evaluate", tracking.create_run("toy", "05_evaluate"))
    tracking.SpooledRun("toy", "05_evaluate", evaluation.run_id, spool).log_evaluation(evaluated())
    tracking.ingest(spool, evaluation)
    evaluation.log_evaluation(evaluated())
    for arm, accuracy in (("kd", 0.5), ("at_a", 0.25)):
        data = client().get_run(students[arm]).data
        test = {name: value for name, value in data.metrics.items() if name.startswith("test/")}
        assert test == {"test/acc1": accuracy, "test/nll": 1.5, "test/ece": 0.1}
        assert data.tags["evaluated_in"] == evaluation.run_id
        assert len(client().get_metric_history(students[arm], "test/acc1")) == 1
    tags = client().get_run(evaluation.run_id).data.tags
    assert tags["evaluates"] == parent and parent in tags["mlflow.note.content"]


def test_a_test_measure_that_has_changed_is_a_later_point_and_the_one_that_counts(store):
    run_id = log(new_run(), history(arms=("kd",)), arm="kd")
    evaluation = tracking.StageRun("toy", "05_evaluate", tracking.create_run("toy", "05_evaluate"))
    only = evaluated().head(1)
    evaluation.log_evaluation(only)
    evaluation.log_evaluation(only.assign(test_accuracy=0.4))
    points = client().get_metric_history(run_id, "test/acc1")
    assert [(point.value, point.step) for point in points] == [(0.5, 0), (0.4, 0)]
    assert client().get_run(run_id).data.metrics["test/acc1"] == 0.4


def test_names_from_outside_stand_in_no_text_that_the_page_renders(store):
    arm, markup = "at_<img src=x onerror=alert(1)>", "<b>layer"
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    facts = {"strategy": "a", "hint_points": markup}
    run.log_dataset(markup, "a" * 64, "train")
    run.log_trained_model(arm=arm, seed=0, history=history(arms=(arm,)), params=facts, tags={"also": markup})
    evaluation = tracking.StageRun("toy", "05_evaluate", tracking.create_run("toy", "05_evaluate"), strict=True)
    evaluation.log_evaluation(evaluated(arm=arm, same_as="").head(1))
    experiment = client().get_experiment(tracking.open_experiment("toy"))
    runs = client().search_runs([experiment.experiment_id])
    assert len(runs) == 3 and any(run.data.params.get("hint_points") == markup for run in runs)
    notes = [tags.get("mlflow.note.content", "") for tags in [experiment.tags, *(run.data.tags for run in runs)]]
    assert sum(map(bool, notes)) == 2 and "<" not in "".join(notes)  # the page shows all else as text


def test_a_student_without_a_run_is_named_and_the_others_are_logged(store):
    run_id = log(new_run(), history(arms=("kd",)), arm="kd")
    evaluation = tracking.StageRun("toy", "05_evaluate", tracking.create_run("toy", "05_evaluate"), strict=True)
    with pytest.warns(UserWarning, match="not logged for at_a seed 0: no run"):
        evaluation.log_evaluation(evaluated())
    assert client().get_run(run_id).data.metrics["test/acc1"] == 0.5


def test_a_new_experiment_has_views_that_the_page_can_open(store):
    experiment_id = tracking.open_experiment("toy")
    tags = client().get_experiment(experiment_id).tags
    log(new_run())
    for key, view in tracking_page.VIEWS.items():
        saved = tags[f"mlflow.sharedViewState.{key}"]
        assert len(saved) < 5000  # MLflow's limit for a tag
        saved = json.loads(saved)
        state = json.loads(saved["state"])
        assert saved["name"] == view.name and isinstance(saved["createdAt"], int)
        assert [group["groupByData"] for group in state.get("groupBy", {}).get("groupByKeys", [])] == list(view.groups)
        assert len(client().search_runs([experiment_id], state["searchFilter"])) == 1
        assert f"compareRunsMode={view.mode}&viewStateShareKey={key}" in tags["mlflow.note.content"]


def test_views_of_an_earlier_version_are_renewed_and_a_note_of_the_reader_stays(store):
    experiment_id = tracking.open_experiment("toy")
    tag = "mlflow.sharedViewState.arms"
    new = client().get_experiment(experiment_id).tags[tag]
    client().set_experiment_tag(experiment_id, tag, "{}")
    client().set_experiment_tag(experiment_id, "mlflow.note.content", "mine")
    assert tracking.open_experiment("toy") == experiment_id
    tags = client().get_experiment(experiment_id).tags
    assert tags[tag] == new and tags["mlflow.note.content"] == "mine"


def test_charts_leave_a_landscape_out_and_do_not_take_the_best_runs_first(store):
    parent = new_run()
    for strategy in ("uniform", "subset_1_2", "single_3"):
        run = tracking.StageRun("toy", "04_distill_students", parent)
        run.log_trained_model(
            arm=f"at_{strategy}",
            seed=0,
            history=history(arms=(f"at_{strategy}",)),
            params={"strategy": strategy},
            key="k",
        )
    experiment_id = tracking.open_experiment("toy")
    tags = client().get_experiment(experiment_id).tags
    for key in ("arms", "strategies", "choices"):
        state = json.loads(json.loads(tags[f"mlflow.sharedViewState.{key}"])["state"])
        assert state["orderByKey"] == "params.`seed`" and state["orderByAsc"]
        found = client().search_runs([experiment_id], state["searchFilter"])
        assert [run.data.tags["arm"] for run in found] == ["at_uniform"]


# --- Networks


@pytest.fixture
def network_file(store):
    """A small network in a file of the home, and the run of its training."""
    file = store / "runs" / "toy" / "networks" / "at_uniform-s0.safetensors"
    file.parent.mkdir(parents=True)
    return save_model(build_model("resnet8_w4", 5, channels=1), file)


IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_network_loads_from_mlflow_without_pickles_gives_equal_logits_and_is_logged_once(
    store, network_file, monkeypatch
):
    import mlflow

    parent, spool = new_run(), store / "spool.jsonl"
    run_id = log(parent)
    model = {"name": "student", "arm": "at_uniform", "seed": 0, "file": network_file, "example": IMAGES}
    tracking.SpooledRun("toy", "04_distill_students", parent, spool).log_network(**model)
    run = tracking.StageRun("toy", "04_distill_students", parent)
    tracking.ingest(spool, run)
    address = client().get_run(run_id).data.tags["model"]
    assert run.log_network(**model) == address
    assert len(client().search_logged_models([tracking.open_experiment("toy")])) == 1
    assert len(client().get_metric_history(run_id, "final/val_acc1")) == 1
    assert [output.model_id for output in client().get_run(run_id).outputs.model_outputs] == [address.split("/")[1]]

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_store.tracking_uri())  # what load_model goes by
    loaded, more = mlflow.pytorch.load_model(address), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(loaded(more), load_model(network_file)[0](more))
    info = mlflow.models.get_model_info(address)
    assert [tuple(one.shape) for one in info.signature.inputs.inputs] == [(-1, 1, 8, 8)]
    assert [tuple(one.shape) for one in info.signature.outputs.inputs] == [(-1, 5)]
    example = mlflow.models.Model.load(address).load_input_example()
    torch.testing.assert_close(torch.from_numpy(example["images"]), IMAGES, atol=1e-4, rtol=0)

    other = save_model(build_model("resnet8_w4", 5, channels=1), network_file.with_name("at_uniform-s1.safetensors"))
    log(parent, history(seeds=(1,)), seed=1)
    second = run.log_network(**model | {"seed": 1, "file": other})
    current = {
        found.model_id: found.tags["current"]
        for found in client().search_logged_models([tracking.open_experiment("toy")])
    }
    assert current == {address.split("/")[1]: "no", second.split("/")[1]: "yes"}


@pytest.mark.parametrize("strict", [False, True])
def test_a_network_that_cannot_be_exported_costs_nothing_but_itself(store, network_file, monkeypatch, strict):
    def refuse(*arguments, **options):
        raise RuntimeError("data-dependent control flow\nsecond line")

    monkeypatch.setattr(torch.export, "export", refuse)
    parent = new_run()
    run_id = log(parent)
    run = tracking.StageRun("toy", "04_distill_students", parent, strict)
    with pytest.warns(UserWarning, match="at_uniform seed 0 was not logged: torch.export: data-dependent") as caught:
        run.log_network(name="student", arm="at_uniform", seed=0, file=network_file, example=IMAGES)
    assert "\n" not in str(caught[-1].message)
    assert client().get_run(run_id).data.tags["model"].startswith("not exported: torch.export: data-dependent")
    assert not client().search_logged_models([tracking.open_experiment("toy")])


def test_a_network_whose_file_or_run_is_gone_is_a_warning(store, network_file):
    parent = new_run()
    run = tracking.StageRun("toy", "04_distill_students", parent, strict=True)
    model = {"name": "student", "arm": "at_uniform", "seed": 0, "file": network_file, "example": IMAGES}
    with pytest.warns(UserWarning, match="it has no run"):
        run.log_network(**model)
    log(parent)
    network_file.unlink()
    with pytest.warns(UserWarning, match="safetensors is gone"):
        run.log_network(**model)


def test_a_spooled_network_is_found_again_when_the_home_has_moved(store, network_file):
    spool, notebook = spooled(store)
    notebook.log_network(name="student", arm="at_uniform", seed=0, file=network_file, example=IMAGES)
    assert json.loads(spool.read_text())["arguments"]["file"] == "runs/toy/networks/at_uniform-s0.safetensors"


def test_runs_of_dead_processes_are_closed_as_killed_and_living_ones_are_left(store):
    alive, dead, elsewhere = new_run(), new_run(), new_run()
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    client().set_tag(dead, "pid", gone.stdout.strip())
    client().set_tag(elsewhere, "host", "another-host")
    client().set_tag(elsewhere, "pid", gone.stdout.strip())
    assert tracking.sweep_dead_runs("toy") == [dead]
    statuses = [client().get_run(run_id).info.status for run_id in (alive, dead, elsewhere)]
    assert statuses == ["RUNNING", "KILLED", "RUNNING"]


def test_a_process_number_that_is_used_again_counts_as_dead(store):
    run_id = new_run()
    client().set_tag(run_id, "pid_started", "12345")
    assert tracking.sweep_dead_runs("toy") == [run_id]


def test_in_jupyterlab_a_block_creates_and_closes_its_run(store):
    run_folder("toy", "01_train_teacher").joinpath("baselines.csv").write_text("a\n1\n")
    with tracking.stage_run("toy", "01_train_teacher", {"epochs": 1}) as run:
        assert client().get_run(run.run_id).info.status == "RUNNING"
    assert client().get_run(run.run_id).info.status == "FINISHED"
    assert [file.path for file in client().list_artifacts(run.run_id)] == ["baselines.csv"]
    with tracking.stage_run("toy", "01_train_teacher", {"epochs": 1}) as again:
        assert again.run_id == run.run_id
    with pytest.raises(ZeroDivisionError), tracking.stage_run("toy", "01_train_teacher", {"epochs": 2}) as failing:
        1 / 0  # noqa: B018
    assert failing.run_id != run.run_id
    assert client().get_run(failing.run_id).info.status == "FAILED"


def test_under_the_driver_a_block_joins_its_run_and_leaves_it_open(store, monkeypatch):
    run_id = new_run()
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with tracking.stage_run("toy", "04_distill_students", {"epochs": 9}) as run:
        run.log_metrics({"teacher/val_acc1": 0.7})
        run.log_dataset("digits", "a" * 64, "training")
    found = client().get_run(run_id)
    assert run.run_id == run_id and found.info.status == "RUNNING"
    assert found.data.metrics == {"teacher/val_acc1": 0.7}
    assert [(entry.dataset.name, entry.dataset.digest) for entry in found.inputs.dataset_inputs] == [
        ("digits", "a" * 32)
    ]


def test_a_failing_tracker_warns_in_one_line_and_does_not_stop_the_training(store):
    with pytest.warns(UserWarning, match="at_uniform seed 0 was not logged") as caught:
        assert log("no-such-run", history().drop(columns="epoch")) is None
    assert "\n" not in str(caught[0].message)


# --- The spool


def spooled(folder):
    spool = folder / "spool.jsonl"
    return spool, tracking.SpooledRun("toy", "04_distill_students", "no-such-run", spool)


def test_a_torn_line_of_a_killed_notebook_does_not_swallow_the_next(tmp_path):
    spool, run = spooled(tmp_path)
    run.log_metrics({"a": 1.0})
    spool.write_text(spool.read_text() + '{"call": "log_met')
    run.log_metrics({"b": 2.0})
    run.log_metrics({"c": 3.0})
    whole, torn, *rest = spool.read_text().splitlines()
    assert '"a"' in whole and torn == '{"call": "log_met' and ['"b"' in rest[0], '"c"' in rest[1]] == [True, True]


def test_what_the_tracker_refuses_is_logged_by_the_next_try_and_nothing_else_again(store, monkeypatch):
    spool, notebook = spooled(store)
    run = tracking.StageRun("toy", "04_distill_students", new_run())
    notebook.log_metrics({"breaks": 3.0})
    spool.write_text(spool.read_text() + "{torn")
    for arm in ("good", "bad", "fine"):
        notebook.log_trained_model(arm=arm, seed=0, history=history(arms=(arm,)), params={}, key="k")
    honest = tracking.StageRun._log_trained_model

    def refuse(self, arm, *rest):
        if arm == "bad":
            raise OSError("no room\nsecond line")
        return honest(self, arm, *rest)

    monkeypatch.setattr(tracking.StageRun, "_log_trained_model", refuse)
    with pytest.raises(tracking.TrackingError) as caught:
        tracking.ingest(spool, run)
    assert str(caught.value) == "bad seed 0 was not logged: no room"
    assert client().get_run(run.run_id).data.metrics == {"breaks": 3.0}
    assert list(tracking.run_table("toy", "04_distill_students")["arm"]) == ["fine", "good"]
    monkeypatch.undo()
    monkeypatch.setenv("PURSUHINT_HOME", str(store))
    tracking.ingest(spool, run)
    assert list(tracking.run_table("toy", "04_distill_students")["arm"]) == ["bad", "fine", "good"]
    assert len(client().get_metric_history(run.run_id, "breaks")) == 1


def test_a_tracker_that_is_away_is_not_waited_for_at_every_line(tmp_path, monkeypatch):
    spool, notebook = spooled(tmp_path)
    for value in range(5):
        notebook.log_metrics({"a": value})
    tries = []

    def away(*arguments):
        tries.append(arguments)
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(tracking_notebook, "open_client", away)
    with pytest.raises(tracking.TrackingError, match="nobody answers"):
        tracking.ingest(spool, tracking.StageRun("toy", "04_distill_students", "x"))
    assert len(tries) == 2


def test_tables_and_figures_become_artifacts_and_checkpoints_do_not(store, tmp_path):
    folder = tmp_path / "stage"
    (folder / "figures").mkdir(parents=True)
    for name in ("a.csv", "figures/b.png", "c.safetensors", ".hidden.csv"):
        (folder / name).write_text("x")
    run_id = new_run()
    tracking.log_stage_files(run_id, folder)
    assert [file.path for file in client().list_artifacts(run_id)] == ["a.csv", "figures"]
    assert [file.path for file in client().list_artifacts(run_id, "figures")] == ["figures/b.png"]


def test_the_compare_link_opens_the_sorted_flat_chart(store):
    link = tracking.compare_link("toy")
    address, _, query = link.partition("?")
    assert address == f"http://127.0.0.1:5000/#/experiments/{tracking.open_experiment('toy')}/runs"
    assert dict(urllib.parse.parse_qsl(query)) == {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": 'tags.stage = "04_distill_students" and tags.current = "yes"',
        "orderByKey": "metrics.`final/val_acc1`",
        "orderByAsc": "false",
    }
    assert " " not in link
    log(new_run())
    found = client().search_runs([tracking.open_experiment("toy")], dict(urllib.parse.parse_qsl(query))["searchFilter"])
    assert len(found) == 1  # the store understands the filter


def test_artifacts_are_found_again_after_the_folder_has_moved(store, monkeypatch, tmp_path_factory):
    file = store / "table.csv"
    file.write_text("x")
    run_id = new_run()
    client().log_artifact(run_id, str(file))
    moved = tmp_path_factory.mktemp("moved with space") / "home"
    os.rename(store, moved)
    monkeypatch.setenv("PURSUHINT_HOME", str(moved))
    assert tracking.relocate() == (store / "mlartifacts").as_uri()
    assert [found.path for found in client().list_artifacts(run_id)] == ["table.csv"]
    assert tracking.relocate() is None


def test_a_fresh_store_survives_several_processes_at_once(home):
    code = "from pursuhint_lib import tracking; tracking.open_experiment('toy')"
    command = [sys.executable, "-c", code]
    crowd = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [one.communicate()[1] for one in crowd]
    assert [one.returncode for one in crowd] == [0, 0] and errors == ["", ""], errors


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, pursuhint_lib.tracking; assert not {'mlflow', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(REPOSITORY), check=True)


# --- The page


@pytest.mark.parametrize("port", ["-1", "0", "80000", "99999999"])
def test_a_port_that_is_none_is_one_line(store, capsys, port):
    assert tracking_page.main(["--port", port]) == 1
    assert capsys.readouterr() == ("", f"--port {port}: should be from 1 to 65535\n")


def test_a_port_that_another_program_has_is_one_line_and_no_address_is_printed(store, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert tracking_page.main(["--port", str(port)]) == 1
    told = f"--port {port}: Address already in use (another one: make ui ARGS='--port 5001')\n"
    assert capsys.readouterr() == ("", told)

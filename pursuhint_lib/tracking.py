"""Runs in MLflow, and only here.

One experiment per study (``pursuhint-<study>``), one run per notebook, one child run per trained model; one level
only, because MLflow's page draws no more. The store is a SQLite file in the repository (or `PURSUHINT_HOME`) with an
explicit artifact folder beside it; ``MLFLOW_TRACKING_URI`` overrides. Nothing is sent anywhere: telemetry is off
before mlflow is imported. MLflow is the lab book; the numbers of record are the tables in ``reports/``.

Who owns a run. A notebook that logs into its own run leaves it FINISHED after an error and RUNNING for ever after a
kill, so `pipeline` creates the run of a notebook, hands it down (``MLFLOW_RUN_ID``) and closes it. In JupyterLab
there is no driver: then `stage_run` creates the run and closes it. Runs carry host, process and its start;
`sweep_dead_runs` closes those whose process is gone.

When metrics are written. Under a driver a notebook only spools: its models when all its arms are trained, and the
driver logs the spool when the notebook has ended. In JupyterLab the same calls log at once. Either way a model's whole
curve is logged in one go, with the real time of each epoch: a few transactions instead of hundreds of slow calls, and
an interrupted training that goes on from its checkpoint cannot leave doubled points (MLflow keeps both points of a step
that is logged twice). `StageRun.log_trained_model` may be called again with the same model: it finds the run by its key
and attaches it to the present notebook run.

A tracker that fails must not cost a training: what notebooks call warns in one line and goes on, and what `ingest`
cannot log stays in the spool for the driver's next run.
"""

import argparse
import contextlib
import fcntl
import functools
import getpass
import hashlib
import json
import logging
import math
import os
import socket
import sqlite3
import sys
import time
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib.provenance import hardware, source_state, versions
from pursuhint_lib.storage import home, run_folder, save_table, written_whole

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it logs tracebacks of errors that it raises as well
    "GIT_PYTHON_REFRESH": "quiet",
}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # a dead server is told soon
_BATCH = 1000  # metrics in one call, MLflow's limit
_SHOWN = (".csv", ".json", ".png", ".pdf", ".html", ".ipynb")  # what is kept as artifacts: no checkpoints
_METRICS = {"val_accuracy": "val/acc1", "val_loss": "val/loss", "learning_rate": "train/lr"}  # others: train/<column>
_NOT_METRICS = ("arm", "seed", "epoch", "seconds", "finished", "status")
HEADLINE = "final/val_acc1"
LAB_TABLE = ".runs.csv"  # run ids of the networks of a notebook that was run in JupyterLab, for the report
SPOOL = "PURSUHINT_SPOOL"  # names the file that a notebook writes to when a driver will log for it
DISTILLED = "04_distill_students"


class TrackingError(RuntimeError):
    """The tracker cannot be used. The text is one line."""


# --- The store


def tracking_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, else the SQLite file below `home`, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri()


def default_uri() -> str:
    """The embedded store."""
    return f"sqlite:///{_database()}"


def _database() -> Path:
    return home() / "mlflow.db"


def _artifacts() -> str:
    return (home() / "mlartifacts").as_uri()


def environment(experiment_id: str, run_id: str, spool: Path) -> dict[str, str]:
    """Environment variables by which a notebook finds the store, its run `run_id`, and the spool that it writes to."""
    return QUIET | {
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "MLFLOW_EXPERIMENT_ID": experiment_id,
        "MLFLOW_RUN_ID": run_id,
        SPOOL: str(spool),
    }


def _client() -> Any:
    """An MlflowClient. Raises TrackingError when the store cannot be opened."""
    uri = tracking_uri()
    with _one_line_errors(f"the run tracker {uri} cannot be opened"):
        return _opened(uri)


@functools.cache
def _opened(uri: str) -> Any:
    os.environ.update(QUIET)
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")  # MLflow's use of SQLAlchemy 2.1
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    if uri == default_uri():
        _create_store(uri)
    return MlflowClient(tracking_uri=uri)


def _create_store(uri: str) -> None:
    """Create the schema, one process at a time: two at once break each other. WAL lets readers and writers meet."""
    path = _database()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name("mlflow.db.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _has_schema(path):
            return
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA journal_mode=WAL")


def _has_schema(path: Path) -> bool:
    if not path.exists():
        return False
    with contextlib.closing(sqlite3.connect(path)) as database:
        return bool(database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone())


def relocate() -> str | None:
    """Point a store that was moved with its folder at its artifacts again. Returns the old root when it changed one.

    MLflow keeps absolute addresses and shows an empty artifact list, without an error, when the folder has moved.
    """
    path = _database()
    if tracking_uri() != default_uri() or not path.exists() or not _has_schema(path):
        return None
    new = _artifacts()
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as database, database:
        row = database.execute(
            "SELECT artifact_location FROM experiments "
            "WHERE name LIKE 'pursuhint-%' AND artifact_location NOT LIKE ? || '/%'",
            (new,),
        ).fetchone()
        if row is None or "/mlartifacts/" not in row[0]:
            return None
        old = row[0].split("/mlartifacts/")[0] + "/mlartifacts"
        for table, column in (
            ("experiments", "artifact_location"),
            ("runs", "artifact_uri"),
            ("logged_models", "artifact_location"),
            ("model_versions", "storage_location"),
        ):
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, old + "/"),
            )
    return old


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # mlflow raises its own, SQLAlchemy's, requests' and the system's errors
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrackingError(f"{what}: {first[:300]}") from error


@contextlib.contextmanager
def _goes_on(what: str) -> Iterator[None]:
    """In a notebook: say in one line that something was not logged, and go on."""
    try:
        with _one_line_errors(f"{what} was not logged"):
            yield
    except TrackingError as error:
        warnings.warn(str(error), stacklevel=4)


# --- Runs


def open_experiment(study: str) -> str:
    """Id of the experiment ``pursuhint-<study>``, created when missing. Raises TrackingError."""
    client, name = _client(), f"pursuhint-{study}"
    with _one_line_errors(f"experiment {name} cannot be opened"):
        found = client.get_experiment_by_name(name)
        if found is None:
            embedded = not tracking_uri().startswith(("http:", "https:", "databricks"))
            location = f"{_artifacts()}/{study}" if embedded else None
            try:
                experiment_id = client.create_experiment(name, artifact_location=location)
            except Exception:
                if (found := client.get_experiment_by_name(name)) is None:  # else another process was first
                    raise
                return found.experiment_id
            client.set_experiment_tag(experiment_id, "study", study)
            client.set_experiment_tag(experiment_id, "mlflow.note.content", _note(experiment_id))
            return experiment_id
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id


def _note(experiment_id: str) -> str:
    return (
        f"[Compare the distilled students, best first]({_link(experiment_id, HEADLINE, DISTILLED)}). "
        "One run per notebook, one child run per trained model; group by `arm` to see means over seeds."
    )


def create_run(
    study: str,
    stage: str,
    name: str = "",
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
) -> str:
    """Create the run of a notebook, with source, versions, host and process. Returns its id. Raises TrackingError."""
    experiment_id = open_experiment(study)
    with _one_line_errors(f"the run of {stage} cannot be created"):
        run = _client().create_run(
            experiment_id,
            run_name=name or stage.replace("_", " "),
            tags=_stage_tags(study, stage) | {key: str(value) for key, value in (tags or {}).items()},
        )
        _log_params(run.info.run_id, params or {})
        return run.info.run_id


def finish_run(run_id: str, status: str) -> None:
    """Close a run: FINISHED, FAILED or KILLED. Raises TrackingError."""
    with _one_line_errors(f"run {run_id} cannot be closed"):
        _client().set_terminated(run_id, status)


def sweep_dead_runs(study: str) -> list[str]:
    """Close, as KILLED, the RUNNING runs here whose process is gone. Returns their ids, raises TrackingError."""
    client, experiment_id = _client(), open_experiment(study)
    with _one_line_errors(f"the runs of {study} cannot be read"):
        dead = [
            run.info.run_id
            for run in _search(client, experiment_id, "attributes.status = 'RUNNING'")
            if run.data.tags.get("host") == socket.gethostname() and not _alive(run.data.tags)
        ]
        for run_id in dead:
            client.set_terminated(run_id, "KILLED")
    return dead


def run_table(study: str, stage: str) -> pd.DataFrame:
    """The trained models of a stage's last run, sorted: arm, seed, run_id, status. Raises TrackingError."""
    with _one_line_errors(f"the runs of {stage} cannot be read"):
        runs = _search(_client(), open_experiment(study), f"tags.stage = '{stage}' and tags.current = 'yes'")
        rows = [(run.data.tags["arm"], int(run.data.tags["seed"]), run.info.run_id, run.info.status) for run in runs]
        return pd.DataFrame(sorted(rows), columns=["arm", "seed", "run_id", "status"])


def retire_other_models(study: str, stage: str, run_id: str) -> None:
    """Mark the models of a stage that are not children of the run `run_id` as not current. Raises TrackingError."""
    client = _client()
    with _one_line_errors(f"the runs of {stage} cannot be read"):
        for run in _search(client, open_experiment(study), f"tags.stage = '{stage}' and tags.current = 'yes'"):
            if run.data.tags.get("mlflow.parentRunId") != run_id:
                client.set_tag(run.info.run_id, "current", "no")


def log_stage_files(run_id: str, folder: Path) -> None:
    """Keep the tables, figures, pages and notebooks of a stage folder as artifacts. Raises TrackingError."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        part = path.relative_to(folder)
        if path.is_file() and path.suffix in _SHOWN and not any(name.startswith(".") for name in part.parts):
            by_folder.setdefault(part.parent, []).append(path)
    for part, paths in by_folder.items():
        log_files(run_id, paths, "" if part == Path() else part.as_posix())


def log_files(run_id: str, paths: Iterable[Path], under: str = "") -> None:
    """Keep files as artifacts, in the artifact folder `under`. Raises TrackingError."""
    with _one_line_errors(f"files of run {run_id} cannot be logged"):
        for path in paths:
            _client().log_artifact(run_id, str(path), under or None)


def compare_link(
    study: str, metric: str = HEADLINE, *, stage: str = DISTILLED, base: str = "http://127.0.0.1:5000"
) -> str:
    """Address that opens MLflow's compare chart: the present runs of a stage, flat, best first by `metric`.

    Sorting by a metric is what makes the page show child runs at all; workflowType hides its GenAI side.
    """
    if tracking_uri().startswith(("http:", "https:")):
        base = tracking_uri().rstrip("/")
    return _link(open_experiment(study), metric, stage, base)


def _link(experiment_id: str, metric: str, stage: str, base: str = "http://127.0.0.1:5000") -> str:
    query = {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": f'tags.stage = "{stage}" and tags.current = "yes"',
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": "false",
    }
    return f"{base}/#/experiments/{experiment_id}/runs?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


# --- From inside a notebook


@dataclass(frozen=True)
class StageRun:
    """The run of a notebook. When the tracker fails its methods warn and go on, or raise TrackingError if `strict`."""

    study: str
    stage: str
    run_id: str
    strict: bool = False

    def _logging(self, what: str) -> contextlib.AbstractContextManager[None]:
        return _one_line_errors(f"{what} was not logged") if self.strict else _goes_on(what)

    def log_trained_model(
        self,
        *,
        arm: str,
        seed: int,
        history: pd.DataFrame,
        params: Mapping[str, Any],
        key: str = "",
        tags: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Log one trained model as a child run, whole. Returns its run id, None after a warning.

        history: one row per epoch, at least the column epoch; learning_rate, val_accuracy, val_loss and the loss
        terms become metrics, `finished` (UNIX time of an epoch's end) and `seconds` become their times. Rows of other
        arms and seeds, where it has such columns, are left out. key: what the model was trained from (hash). The same
        key with the same history is not logged twice; a different one replaces it, and the older run stays, marked as
        not current. Call it for models kept from an earlier run too: they move below the present run and take the
        present `tags`, others are retired at its end.

        The run is FINISHED; that of a model whose last status is "failed" is FAILED, with the tags status, reason and
        epoch, and without ``final/...`` metrics, so that it stands in no ranking.
        """
        with self._logging(f"{arm} seed {seed}"):
            return self._log_trained_model(arm, int(seed), _rows_of(history, arm, seed), params, key, tags or {})
        return None

    def _log_trained_model(
        self, arm: str, seed: int, history: pd.DataFrame, params: Mapping[str, Any], key: str, tags: Mapping[str, Any]
    ) -> str:
        client, experiment_id = _client(), open_experiment(self.study)
        last = history.iloc[-1]
        failed = last.get("status") == "failed"
        if failed:
            tags = {**tags, "status": "failed", "reason": last.get("reason", "not known"), "epoch": last["epoch"]}
        metrics = _curve(history, finals=not failed)
        identity = _identity(self.study, self.stage, arm, seed, key, metrics)
        filter_string = (
            f"tags.stage = '{self.stage}' and tags.arm = '{arm}' and tags.seed = '{seed}' and tags.current = 'yes'"
        )
        existing = None
        for run in _search(client, experiment_id, filter_string):
            if run.data.tags.get("key") == identity and run.info.status in ("FINISHED", "FAILED"):
                existing = run.info.run_id
            else:
                client.set_tag(run.info.run_id, "current", "no")
        if existing is not None:
            for name, value in {**tags, "mlflow.parentRunId": self.run_id}.items():
                client.set_tag(existing, name, str(value))
            return existing
        start, end = _span(history)
        own = {"arm": arm, "seed": str(seed), "key": identity, "current": "yes", "mlflow.parentRunId": self.run_id}
        run = client.create_run(
            experiment_id,
            start_time=start,
            run_name=f"{self.stage[:2]} {arm} s{seed}",
            tags=_stage_tags(self.study, self.stage) | {name: str(value) for name, value in tags.items()} | own,
        )
        run_id = run.info.run_id
        _log_params(run_id, {"arm": arm, "seed": seed} | dict(params))
        _log_metrics(run_id, metrics)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED", end_time=end)
        return run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of the notebook itself, in one call."""
        with self._logging("metrics"):
            now = time.time()
            _log_metrics(self.run_id, [(name, float(value), now, step) for name, value in metrics.items()])

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Say which images were used, and as what (training, test). The digest is cut: MLflow allows 36 characters."""
        with self._logging(f"data set {name}"):
            client = _client()
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import DatasetInput, InputTag

            dataset = MetaDataset(CodeDatasetSource({}), name=name, digest=digest[:32])
            entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
            client.log_inputs(self.run_id, [entry])


class SpooledRun:
    """A notebook's run when a driver logs for it: the calls of `StageRun`, written to a file, a JSON line each.

    So a notebook need not import MLflow (seconds), can run where there is none, and loses nothing when a store is
    slow or away; the driver `ingest`s the file when the notebook has ended, well or not. A notebook that is run again
    spools everything again, models it kept from before included.
    """

    def __init__(self, study: str, stage: str, run_id: str, spool: Path):
        self.study, self.stage, self.run_id = study, stage, run_id
        self._spool = Path(spool)

    def log_trained_model(
        self,
        *,
        arm: str,
        seed: int,
        history: pd.DataFrame,
        params: Mapping[str, Any],
        key: str = "",
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """As `StageRun.log_trained_model`, later."""
        rows = _rows_of(history, arm, int(seed)).to_dict(orient="list")
        self._write("log_trained_model", arm=arm, seed=int(seed), history=rows, params=params, key=key, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """As `StageRun.log_metrics`, later."""
        self._write("log_metrics", metrics={name: float(value) for name, value in metrics.items()}, step=step)

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """As `StageRun.log_dataset`, later."""
        self._write("log_dataset", name=name, digest=digest, context=context)

    def _write(self, call: str, **arguments: Any) -> None:
        line = json.dumps({"call": call, "arguments": arguments}, default=float) + "\n"
        with open(self._spool, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a writer that was killed: its torn line must not swallow this one
                    line = "\n" + line
            file.write(line.encode())


def ingest(spool: Path, run: StageRun) -> None:
    """Log what a notebook spooled, and remove the spool; torn lines of a killed notebook are left out.

    Raises TrackingError when something could not be logged: the spool then holds just that, for another try. The second
    failure in a row ends a try, so that a store that is away is not waited for at every line. Models and data sets that
    are logged again are found again; metrics of the notebook itself are logged a second time, which happens only when
    the process is killed in here, or a call fails that was half done.
    """
    if not spool.exists():
        return
    run = replace(run, strict=True)
    with _one_line_errors(f"{spool} cannot be read"):
        lines = spool.read_text(encoding="utf-8", errors="replace").splitlines()
    left: list[str] = []
    error, in_a_row = None, 0
    for number, line in enumerate(lines):
        try:
            _log_line(line, run)
            in_a_row = 0
        except TrackingError as failure:
            left.append(line)
            error, in_a_row = failure, in_a_row + 1
            if in_a_row == 2:
                left += lines[number + 1 :]
                break
    if error is not None:
        with contextlib.suppress(OSError), written_whole(spool) as temporary:  # else the older spool stays, whole
            temporary.write_text("".join(line + "\n" for line in left), encoding="utf-8")
        raise TrackingError(f"{error}; what is not logged is kept in {spool}") from error
    with _one_line_errors(f"{spool} cannot be removed"):
        spool.unlink()


def _log_line(line: str, run: StageRun) -> None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return
    with _one_line_errors(f"a line for {run.stage} was not logged"):
        arguments = entry["arguments"]
        if "history" in arguments:
            arguments["history"] = pd.DataFrame(arguments["history"])
        getattr(run, entry["call"])(**arguments)


_LAB_RUNS: dict[tuple[str, str], tuple[str, dict]] = {}  # of this process: cells of one notebook share one run


@contextlib.contextmanager
def stage_run(study: str, stage: str, params: Mapping[str, Any]) -> Iterator[StageRun | SpooledRun]:
    """The run of this notebook, for a ``with`` block in one or several of its cells.

    Under `pipeline` it is the driver's run, which the driver closes. In JupyterLab it is created at the first block
    and is FINISHED after each block that ends well, FAILED after one that raises; the stage's files become its
    artifacts.
    """
    joined, spool = os.environ.get("MLFLOW_RUN_ID"), os.environ.get(SPOOL)
    if joined and spool:
        yield SpooledRun(study, stage, joined, Path(spool))
        return
    if joined:
        yield StageRun(study, stage, joined)
        return
    run_id = ""
    with _goes_on("this notebook's run"):
        run_id = _lab_run(study, stage, dict(params))
    try:
        yield StageRun(study, stage, run_id)
    except BaseException as error:
        _close_lab_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    with _goes_on("the stage's files"):
        log_stage_files(run_id, run_folder(study, stage))
        save_table(run_table(study, stage), run_folder(study, stage) / LAB_TABLE)
        retire_other_models(study, stage, run_id)
    _close_lab_run(run_id, "FINISHED")


def _lab_run(study: str, stage: str, params: dict) -> str:
    sweep_dead_runs(study)
    run_id, old_params = _LAB_RUNS.get((study, stage), ("", {}))
    if run_id and old_params == params:
        _client().update_run(run_id, status="RUNNING")
        return run_id
    run_id = create_run(study, stage, tags={"driver": "JupyterLab"}, params=params)
    _LAB_RUNS[study, stage] = (run_id, params)
    return run_id


def _close_lab_run(run_id: str, status: str) -> None:
    with _goes_on(f"the end ({status}) of this notebook's run"):
        finish_run(run_id, status)


# --- Helpers


def _search(client: Any, experiment_id: str, filter_string: str) -> Iterable[Any]:
    page = client.search_runs([experiment_id], filter_string=filter_string, max_results=1000)
    yield from page
    while page.token:
        page = client.search_runs([experiment_id], filter_string=filter_string, max_results=1000, page_token=page.token)
        yield from page


def _stage_tags(study: str, stage: str) -> dict[str, str]:
    # MlflowClient.create_run fills in no source, user or commit; a kernel's would be ipykernel_launcher.py.
    source, machine, package = _source(), hardware(), versions()
    return {
        "study": study,
        "stage": stage,
        "mlflow.source.name": f"notebooks/{stage}.ipynb",
        "mlflow.source.type": "NOTEBOOK",
        "mlflow.source.git.commit": source["commit"],
        "mlflow.user": _user(),
        "git.dirty": str(source["dirty"]).lower(),
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "pid_started": str(_started(os.getpid())),
        "device": ", ".join(machine["gpu"]) or machine["cpu"],
        "threads": os.environ.get("OMP_NUM_THREADS", str(machine["cores"])),
        "python": package["python"],
        "torch": package.get("torch", "none"),
    }


@functools.cache
def _source() -> dict[str, Any]:
    return source_state()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return "unknown"


def _started(pid: int) -> int | None:
    """UNIX second in which a process was started: with it, a process number that is used again is told apart."""
    import psutil

    try:
        return round(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _alive(tags: Mapping[str, str]) -> bool:
    started = _started(int(tags.get("pid", "0")))
    return started is not None and abs(started - int(tags.get("pid_started", "0"))) <= 2


def _rows_of(history: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
    for column, value in (("arm", arm), ("seed", seed)):
        if column in history:
            history = history[history[column] == value]
    if history.empty:
        raise ValueError(f"the history has no row of {arm} seed {seed}")
    return history.sort_values("epoch")


def _curve(history: pd.DataFrame, finals: bool) -> list[tuple[str, float, float, int]]:
    """(name, value, UNIX time, epoch) of every number in the history, and, if wanted, of the last ones again as
    ``final/...``.
    """
    points = []
    columns = [name for name in history if name not in _NOT_METRICS and pd.api.types.is_numeric_dtype(history[name])]
    now = time.time()
    for row in history.to_dict("records"):
        when = row.get("finished", now)
        for column in columns:
            if not math.isnan(row[column]):  # a term that this arm does not have
                points.append((_METRICS.get(column, f"train/{column}"), float(row[column]), when, int(row["epoch"])))
    last = int(history["epoch"].iloc[-1])
    return points + [
        (f"final/val_{name[4:]}", value, when, 0)
        for name, value, when, epoch in points
        if finals and epoch == last and name.startswith("val/")
    ]


def _identity(
    study: str, stage: str, arm: str, seed: int, key: str, metrics: list[tuple[str, float, float, int]]
) -> str:
    content = [study, stage, arm, seed, key, [(name, value, step) for name, value, _, step in metrics]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _span(history: pd.DataFrame) -> tuple[int, int]:
    """First and last millisecond of a training."""
    if "finished" not in history:
        return int(time.time() * 1000), int(time.time() * 1000)
    first = history["finished"].iloc[0] - (history["seconds"].iloc[0] if "seconds" in history else 0)
    return int(first * 1000), int(history["finished"].iloc[-1] * 1000)


def _log_metrics(run_id: str, points: list[tuple[str, float, float, int]]) -> None:
    client = _client()
    from mlflow.entities import Metric

    metrics = [Metric(_metric_name(name), value, int(when * 1000), step) for name, value, when, step in points]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])


def _metric_name(name: str) -> str:
    """A name that MLflow accepts: "wsld+at" and "crd@last" become "wsld and at" and "crd of last". No two names become
    one, because the names of arms hold no space.
    """
    return name.replace("+", " and ").replace("@", " of ")


def _log_params(run_id: str, params: Mapping[str, Any]) -> None:
    client = _client()
    from mlflow.entities import Param

    flat = [Param(name, text[:6000]) for name, text in _flat(params)]
    for start in range(0, len(flat), 100):
        client.log_batch(run_id, params=flat[start : start + 100])


def _flat(params: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", json.dumps(value) if isinstance(value, (list, tuple)) else str(value)


# --- The page


def main(arguments: list[str] | None = None) -> int:
    """``python -m pursuhint_lib.tracking ui [--port 5000]``: MLflow's page on this machine, lean."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.tracking", description="The studies' runs in MLflow."
    )
    page = parser.add_subparsers(required=True, metavar="ui").add_parser(
        "ui", help="serve MLflow's page on this machine"
    )
    page.add_argument("--port", type=int, default=5000)
    port = parser.parse_args(arguments).port
    try:
        relocate()
        _client()
    except TrackingError as error:
        print(error, file=sys.stderr)
        return 1
    # By default the server also starts seven consumers for GenAI jobs: 3 GB and 18 s instead of 0.5 GB and 7 s.
    os.environ.update(QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    print(f"MLflow: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning (Ctrl-C ends it)", flush=True)
    server = ["server", "--backend-store-uri", tracking_uri(), "--default-artifact-root", _artifacts()]
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", *server, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
    )


if __name__ == "__main__":
    sys.exit(main())

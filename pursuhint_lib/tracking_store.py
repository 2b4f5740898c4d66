"""MLflow's store: where it lies, how it is opened and written to in batches, and what happens when that fails.

The store is a SQLite file in the repository (or `PURSUHINT_HOME`) with an explicit artifact folder beside it;
``MLFLOW_TRACKING_URI`` overrides. It only mirrors what studies keep in their folders: a damaged one is set aside and
made anew. Nothing is sent anywhere: telemetry is off before mlflow is imported. That takes seconds, so it happens
inside functions, when something is logged.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import sqlite3
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pursuhint_lib.storage import home

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
_LOCKED_S = 20  # how long a locked store is waited for; MLflow's own time


class TrackingError(RuntimeError):
    """The tracker cannot be used. The text is one line."""


def tracking_uri() -> str:
    """``$MLFLOW_TRACKING_URI``, else the SQLite file below `home`, by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri()


def default_uri() -> str:
    """The embedded store."""
    return f"sqlite:///{_database()}"


def _database() -> Path:
    return home() / "mlflow.db"


def artifact_root() -> str:
    """Address of the folder below which each experiment keeps its files."""
    return (home() / "mlartifacts").as_uri()


def open_client() -> Any:
    """An MlflowClient. Raises TrackingError when the store cannot be opened."""
    uri = tracking_uri()
    place = uri.removeprefix("sqlite:///").removeprefix("file://").removeprefix("file:")
    if uri != default_uri() and "://" not in place and not Path(place).parent.is_dir():  # MLflow would make it
        raise TrackingError(f"MLFLOW_TRACKING_URI = {uri!r}: there is no folder {Path(place).parent}")
    with one_line_errors(f"the run tracker {uri} cannot be opened"):
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
        _create_store()
    return MlflowClient(tracking_uri=uri)


def _create_store() -> None:
    """Make the embedded store where none is that can be used. One process at a time: two at once break each other."""
    path = _database()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name("mlflow.db.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (damage := _damage(path)):
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        for old in path.parent.glob("mlflow.db-new-*"):  # of processes that were killed
            old.unlink()
        # A name of its own: MLflow keeps what it has opened, for as long as the process lives.
        new, aside = Path(f"{path}-new-{time.time_ns()}"), Path(f"{path}-damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        SqlAlchemyStore(f"sqlite:///{new}", artifact_root()).engine.dispose()
        with contextlib.closing(sqlite3.connect(new)) as database:
            database.execute("PRAGMA journal_mode=WAL")  # lets readers and writers meet
        for suffix in ("", "-wal", "-shm"):  # SQLite would play an old journal into a new file
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{suffix}", f"{aside}{suffix}")
        os.replace(new, path)
    if aside.exists():
        warnings.warn(f"{path} cannot be used ({damage}): moved to {aside.name}, a new one was made", stacklevel=4)


def _damage(path: Path) -> str:
    """Why the embedded store has to be made anew, "" if it is whole. Raises TrackingError when it is locked, and
    sqlite3.OperationalError when the system does not let it be read.
    """
    if not path.is_file():
        return "it is no file"
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_LOCKED_S)) as database:
            if (found := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                return found.splitlines()[0]
            if not database.execute("SELECT 1 FROM experiments").fetchone():  # MLflow makes its first one last
                return "it was left half made"
            for table in ("alembic_version", "runs", "metrics", "latest_metrics", "params", "tags"):
                database.execute(f"SELECT 1 FROM {table} LIMIT 1")
            return ""
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise TrackingError(f"{path} is locked by another process, for {_LOCKED_S} s now") from None
        if _means_damage(error):
            return str(error)
        raise


def _means_damage(error: sqlite3.Error) -> bool:
    """Whether the file is to blame, not the system or another process. SQLITE_ERROR: a table is not there."""
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def missing_runs(run_ids: Iterable[str]) -> set[str]:
    """Those that the embedded store does not have, or not as FINISHED; all, when it is gone or damaged.

    Imports no MLflow. Another store is not asked, and one that cannot be read now counts as whole.
    """
    path, wanted = _database(), set(run_ids)
    if tracking_uri() != default_uri():
        return set()
    if not path.is_file():
        return wanted
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1)) as database:
            return wanted.difference(*database.execute("SELECT run_uuid FROM runs WHERE status = 'FINISHED'"))
    except sqlite3.DatabaseError as error:
        return wanted if _means_damage(error) else set()


def relocate() -> str | None:
    """Point a store that was moved with its folder at its artifacts again. Returns the old root when it changed one.

    MLflow keeps absolute addresses and shows an empty artifact list, without an error, when the folder has moved.
    Raises TrackingError.
    """
    if tracking_uri() != default_uri():
        return None
    open_client()
    new = artifact_root()
    with (
        one_line_errors(f"the addresses of MLflow's artifacts in {_database()} cannot be read"),
        contextlib.closing(sqlite3.connect(_database(), timeout=_LOCKED_S)) as database,
        database,
    ):
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
def one_line_errors(what: str) -> Iterator[None]:
    """Make any error in the block a TrackingError of one line that begins with `what`."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # mlflow raises its own, SQLAlchemy's, requests' and the system's errors
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TrackingError(f"{what}: {first[:300]}") from error


@contextlib.contextmanager
def goes_on(what: str) -> Iterator[None]:
    """In a notebook: say in one line that something was not logged, and go on."""
    try:
        with one_line_errors(f"{what} was not logged"):
            yield
    except TrackingError as error:
        warnings.warn(str(error), stacklevel=4)


def search_runs(client: Any, experiment_id: str, filter_string: str) -> Iterable[Any]:
    """Every run of an experiment that the filter lets through, page by page."""
    page = client.search_runs([experiment_id], filter_string=filter_string, max_results=1000)
    yield from page
    while page.token:
        page = client.search_runs([experiment_id], filter_string=filter_string, max_results=1000, page_token=page.token)
        yield from page


def log_points(run_id: str, points: list[tuple[str, float, float, int]], tags: Mapping[str, str] | None = None) -> None:
    """Log (name, value, UNIX time, step), and tags beside them, in as few calls as MLflow allows."""
    client = open_client()
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(_metric_name(name), value, int(when * 1000), step) for name, value, when, step in points]
    marks = [RunTag(name, value) for name, value in (tags or {}).items()]
    for start in range(0, max(len(metrics), 1 if marks else 0), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH], tags=() if start else marks)


def log_new_points(run: Any, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None) -> None:
    """Log numbers, as of now, that the run has not with this very value, and tags beside them."""
    there, now = run.data.metrics, time.time()
    points = [(name, float(value), now, 0) for name, value in metrics.items()]
    log_points(run.info.run_id, [point for point in points if there.get(_metric_name(point[0])) != point[1]], tags)


def _metric_name(name: str) -> str:
    """A name that MLflow accepts: "wsld+at" and "crd@last" become "wsld and at" and "crd of last". No two names become
    one, because the names of arms hold no space.
    """
    return name.replace("+", " and ").replace("@", " of ")


def log_params(run_id: str, params: Mapping[str, Any]) -> None:
    """Log parameters, nested ones as ``outer.inner``, cut at the length that MLflow allows."""
    client = open_client()
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

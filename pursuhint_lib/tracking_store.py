"""MLflow's store: where it lies, how it is opened and written to in batches, and what happens when that fails.

The store is a SQLite file in the repository (or `PURSUHINT_HOME`) with an explicit artifact folder beside it;
``MLFLOW_TRACKING_URI`` overrides. Nothing is sent anywhere: telemetry is off before mlflow is imported. That takes
seconds, so it happens inside functions, when something is logged.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import sqlite3
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
    new = artifact_root()
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

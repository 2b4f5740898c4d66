"""Experiments and runs in MLflow, as the driver and a notebook in JupyterLab make, close and list them.

One experiment per study (``pursuhint-<study>``), one run per notebook, one child run per trained model; one level only,
because MLflow's page draws no more. Runs carry host, process and its start; `sweep_dead_runs` closes those whose
process is gone.
"""

import functools
import getpass
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pursuhint_lib.provenance import hardware, source_state, versions
from pursuhint_lib.tracking_page import BASE, DISTILLED, HEADLINE, SAVED_VIEW, chart_link, experiment_tags
from pursuhint_lib.tracking_store import (
    artifact_root,
    log_params,
    one_line_errors,
    open_client,
    search_runs,
    tracking_uri,
)

_SHOWN = (".csv", ".json", ".png", ".pdf", ".html", ".ipynb")  # what is kept as artifacts: no checkpoints


def open_experiment(study: str) -> str:
    """Id of the experiment ``pursuhint-<study>``, created when missing. Raises TrackingError."""
    client, name = open_client(), f"pursuhint-{study}"
    with one_line_errors(f"experiment {name} cannot be opened"):
        found = client.get_experiment_by_name(name)
        if found is None:
            embedded = not tracking_uri().startswith(("http:", "https:", "databricks"))
            location = f"{artifact_root()}/{study}" if embedded else None
            try:
                experiment_id = client.create_experiment(name, artifact_location=location)
            except Exception:
                if (found := client.get_experiment_by_name(name)) is None:  # else another process was first
                    raise
                return found.experiment_id
            for tag, value in ({"study": study} | experiment_tags(experiment_id)).items():
                client.set_experiment_tag(experiment_id, tag, value)
            return experiment_id
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        for tag, value in experiment_tags(found.experiment_id).items():
            # Views of an earlier version are renewed; a note that is there may be the reader's own.
            if found.tags.get(tag, "") != value and (tag.startswith(SAVED_VIEW) or tag not in found.tags):
                client.set_experiment_tag(found.experiment_id, tag, value)
        return found.experiment_id


def create_run(
    study: str,
    stage: str,
    name: str = "",
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> str:
    """Create the run of a notebook, with source, versions, host and process. Returns its id. Raises TrackingError.

    made: as of `stage_tags`.
    """
    experiment_id = open_experiment(study)
    with one_line_errors(f"the run of {stage} cannot be created"):
        run = open_client().create_run(
            experiment_id,
            run_name=name or stage.replace("_", " "),
            # Not of networks: the driver, which logs them, has other threads than the notebook that trained them.
            tags=stage_tags(study, stage, made)
            | {"threads": os.environ.get("OMP_NUM_THREADS", str(hardware()["cores"]))}
            | {key: str(value) for key, value in (tags or {}).items()},
        )
        log_params(run.info.run_id, params or {})
        return run.info.run_id


def has_run(study: str, run_id: str) -> bool:
    """Whether the store has a study's run, and it was not deleted there. Raises TrackingError."""
    with one_line_errors(f"run {run_id} cannot be looked for"):
        return any(search_runs(open_client(), open_experiment(study), f"attributes.run_id = '{run_id}'"))


def finish_run(run_id: str, status: str) -> None:
    """Close a run: FINISHED, FAILED or KILLED. Raises TrackingError."""
    with one_line_errors(f"run {run_id} cannot be closed"):
        open_client().set_terminated(run_id, status)


def sweep_dead_runs(study: str) -> list[str]:
    """Close, as KILLED, the RUNNING runs here whose process is gone. Returns their ids, raises TrackingError."""
    client, experiment_id = open_client(), open_experiment(study)
    with one_line_errors(f"the runs of {study} cannot be read"):
        dead = [
            run.info.run_id
            for run in search_runs(client, experiment_id, "attributes.status = 'RUNNING'")
            if run.data.tags.get("host") == socket.gethostname() and not _alive(run.data.tags)
        ]
        for run_id in dead:
            client.set_terminated(run_id, "KILLED")
    return dead


def run_table(study: str, stage: str) -> pd.DataFrame:
    """The trained models of a stage's last run, sorted: arm, seed, run_id, status. Raises TrackingError."""
    with one_line_errors(f"the runs of {stage} cannot be read"):
        runs = search_runs(open_client(), open_experiment(study), f"tags.stage = '{stage}' and tags.current = 'yes'")
        rows = [(run.data.tags["arm"], int(run.data.tags["seed"]), run.info.run_id, run.info.status) for run in runs]
        return pd.DataFrame(sorted(rows), columns=["arm", "seed", "run_id", "status"])


def retire_other_models(study: str, stage: str, run_id: str) -> None:
    """Mark the models of a stage that are not children of the run `run_id` as not current. Raises TrackingError."""
    client = open_client()
    with one_line_errors(f"the runs of {stage} cannot be read"):
        for run in search_runs(client, open_experiment(study), f"tags.stage = '{stage}' and tags.current = 'yes'"):
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
    with one_line_errors(f"files of run {run_id} cannot be logged"):
        for path in paths:
            open_client().log_artifact(run_id, str(path), under or None)


def compare_link(study: str, metric: str = HEADLINE, *, stage: str = DISTILLED, base: str = BASE) -> str:
    """Address that opens MLflow's compare chart: the present runs of a stage, flat, best first by `metric`.

    Sorting by a metric is what makes the page show child runs at all; workflowType hides its GenAI side.
    """
    if tracking_uri().startswith(("http:", "https:")):
        base = tracking_uri().rstrip("/")
    return chart_link(open_experiment(study), metric, stage, base)


def stage_tags(study: str, stage: str, made: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Where a run comes from: notebook, commit, user, process, machine, versions.

    made: source, hardware and versions of a stage's record; those of now, if not given.
    """
    # MlflowClient.create_run fills in no source, user or commit; a kernel's would be ipykernel_launcher.py.
    made = made or {"source": _source(), "hardware": hardware(), "versions": versions()}
    source, machine, package = made["source"], made["hardware"], made["versions"]
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

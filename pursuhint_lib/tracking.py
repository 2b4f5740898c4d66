"""Runs in MLflow: what notebooks, the driver and the report use of it.

One experiment per study, one run per notebook, one child run per trained model. MLflow is the lab book; the numbers of
record are the tables in ``reports/``.

Who owns a run. A notebook that logs into its own run leaves it FINISHED after an error and RUNNING for ever after a
kill, so `pipeline` creates the run of a notebook, hands it down (``MLFLOW_RUN_ID``) and closes it. In JupyterLab
there is no driver: then `stage_run` creates the run and closes it.

When it is written. Under a driver a notebook only spools, and the driver logs the spool when the notebook has ended,
and again where a store does not have it. In JupyterLab the same calls log at once. A tracker that fails must not cost a
training: what notebooks call warns in one line and goes on.

The parts: `tracking_store` opens the store, `tracking_runs` makes and lists runs, `tracking_notebook` is what a
notebook logs, `tracking_models` keeps networks and data sets for it, `tracking_spool` is how all this waits for the
driver, `tracking_page` serves and addresses MLflow's page.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pursuhint_lib.provenance import hardware, source_state, versions
from pursuhint_lib.records import trained_at
from pursuhint_lib.storage import run_folder, save_json, save_table
from pursuhint_lib.tracking_notebook import StageRun
from pursuhint_lib.tracking_runs import (
    compare_link,
    create_run,
    finish_run,
    has_run,
    log_files,
    log_stage_files,
    open_experiment,
    retire_other_models,
    run_table,
    sweep_dead_runs,
)
from pursuhint_lib.tracking_spool import SPOOL, SpooledRun, environment, ingest
from pursuhint_lib.tracking_store import TrackingError, goes_on, open_client, relocate

__all__ = [
    "LAB_RECORD",
    "LAB_TABLE",
    "SPOOL",
    "SpooledRun",
    "StageRun",
    "TrackingError",
    "compare_link",
    "create_run",
    "environment",
    "finish_run",
    "has_run",
    "ingest",
    "log_files",
    "log_stage_files",
    "open_experiment",
    "relocate",
    "retire_other_models",
    "run_table",
    "stage_run",
    "sweep_dead_runs",
]

LAB_RECORD = ".record.json"  # of a notebook that was run in JupyterLab: its run, source, versions and hardware
LAB_TABLE = ".runs.csv"  # run ids of the networks of a notebook that was run in JupyterLab, for the report


_LAB_RUNS: dict[tuple[str, str], tuple[str, dict]] = {}  # of this process: cells of one notebook share one run


@contextlib.contextmanager
def stage_run(study: str, stage: str, params: Mapping[str, Any]) -> Iterator[StageRun | SpooledRun]:
    """The run of this notebook, for a ``with`` block in one or several of its cells.

    Under `pipeline` it is the driver's run, which the driver closes. In JupyterLab it is created at the first block
    and is FINISHED after each block that ends well, FAILED after one that raises; the stage's files become its
    artifacts.
    """
    joined, spool = os.environ.get("MLFLOW_RUN_ID", ""), os.environ.get(SPOOL)
    if spool:
        yield SpooledRun(study, stage, joined, Path(spool))
        return
    if joined:
        yield StageRun(study, stage, joined)
        return
    run_id = ""
    with goes_on("this notebook's run"):
        run_id = _lab_run(study, stage, dict(params))
    try:
        yield StageRun(study, stage, run_id)
    except BaseException as error:
        _close_lab_run(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    runs = {"notebook": run_id, "trained_at": trained_at(run_folder(study, stage))}
    about = {"runs": runs, "source": source_state(), "versions": versions(), "hardware": hardware()}
    save_json(about, run_folder(study, stage) / LAB_RECORD)
    with goes_on("the stage's files"):
        log_stage_files(run_id, run_folder(study, stage))
        save_table(run_table(study, stage), run_folder(study, stage) / LAB_TABLE)
        retire_other_models(study, stage, run_id)
    _close_lab_run(run_id, "FINISHED")


def _lab_run(study: str, stage: str, params: dict) -> str:
    sweep_dead_runs(study)
    run_id, old_params = _LAB_RUNS.get((study, stage), ("", {}))
    if run_id and old_params == params:
        open_client().update_run(run_id, status="RUNNING")
        return run_id
    run_id = create_run(study, stage, tags={"driver": "JupyterLab"}, params=params)
    _LAB_RUNS[study, stage] = (run_id, params)
    return run_id


def _close_lab_run(run_id: str, status: str) -> None:
    with goes_on(f"the end ({status}) of this notebook's run"):
        finish_run(run_id, status)

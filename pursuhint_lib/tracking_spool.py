"""What a notebook logs under a driver: written to a file, the spool, which the driver logs when the notebook has ended.

The spool stays in the stage's folder, from which a store that is new, or was away, is given the same runs.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pursuhint_lib.storage import home
from pursuhint_lib.tracking_notebook import StageRun, rows_of
from pursuhint_lib.tracking_store import QUIET, TrackingError, one_line_errors, tracking_uri

SPOOL = "PURSUHINT_SPOOL"  # names the file that a notebook writes to when a driver will log for it


def environment(run_id: str, spool: Path) -> dict[str, str]:
    """Environment variables by which a notebook finds the store, its run `run_id` ("" where there is none), and the
    spool that it writes to.
    """
    return QUIET | {"MLFLOW_TRACKING_URI": tracking_uri(), "MLFLOW_RUN_ID": run_id, SPOOL: str(spool)}


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
        rows = rows_of(history, arm, int(seed)).to_dict(orient="list")
        self._write("log_trained_model", arm=arm, seed=int(seed), history=rows, params=params, key=key, tags=tags)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """As `StageRun.log_metrics`, later."""
        self._write("log_metrics", metrics={name: float(value) for name, value in metrics.items()})

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """As `StageRun.log_dataset`, later."""
        self._write("log_dataset", name=name, digest=digest, context=context)

    def log_network(self, *, name: str, arm: str, seed: int, file: Path | str, example: Any) -> None:
        """As `StageRun.log_network`, later; only the file's name and the example are kept."""
        path = Path(file).resolve()
        path = (
            path.relative_to(home()) if path.is_relative_to(home()) else path
        )  # the home may move before it is logged
        pixels = np.asarray(example, dtype=float).round(4).tolist()
        self._write("log_network", name=name, arm=arm, seed=int(seed), file=str(path), example=pixels)

    def log_evaluation(self, results: pd.DataFrame) -> None:
        """As `StageRun.log_evaluation`, later."""
        self._write("log_evaluation", results=results.to_dict(orient="list"))

    def _write(self, call: str, **arguments: Any) -> None:
        line = json.dumps({"call": call, "arguments": arguments}, default=float) + "\n"
        with open(self._spool, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # of a writer that was killed: its torn line must not swallow this one
                    line = "\n" + line
            file.write(line.encode())


def ingest(spool: Path, run: StageRun) -> None:
    """Log what a notebook spooled, as often as it is asked for; torn lines of a killed notebook are left out.

    Raises TrackingError when something could not be logged: the next call logs it. The second failure in a row ends
    this one, so that a store that is away is not waited for at every line.
    """
    if not spool.exists():
        return
    run = replace(run, strict=True)
    with one_line_errors(f"{spool} cannot be read"):
        lines = spool.read_text(encoding="utf-8", errors="replace").splitlines()
    error, in_a_row = None, 0
    for line in lines:
        try:
            _log_line(line, run)
            in_a_row = 0
        except TrackingError as failure:
            error, in_a_row = failure, in_a_row + 1
            if in_a_row == 2:
                break
    if error is not None:
        raise error


def _log_line(line: str, run: StageRun) -> None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return
    with one_line_errors(f"a line for {run.stage} was not logged"):
        arguments = entry["arguments"]
        for table in {"history", "results"} & arguments.keys():
            arguments[table] = pd.DataFrame(arguments[table])
        getattr(run, entry["call"])(**arguments)

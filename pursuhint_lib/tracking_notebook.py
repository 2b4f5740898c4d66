"""What a notebook logs, straight to MLflow: its trained models, its numbers, its data sets.

A model's whole curve is logged in one go, with the real time of each epoch: a few transactions instead of hundreds of
slow calls, and an interrupted training that goes on from its checkpoint cannot leave doubled points (MLflow keeps both
points of a step that is logged twice). `StageRun.log_trained_model` may be called again with the same model: it finds
the run by its key and attaches it to the present notebook run.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pursuhint_lib.tracking_runs import open_experiment, stage_tags
from pursuhint_lib.tracking_store import goes_on, log_params, log_points, one_line_errors, open_client, search_runs

_METRICS = {"val_accuracy": "val/acc1", "val_loss": "val/loss", "learning_rate": "train/lr"}  # others: train/<column>
_NOT_METRICS = ("arm", "seed", "epoch", "seconds", "finished", "status")


@dataclass(frozen=True)
class StageRun:
    """The run of a notebook. When the tracker fails its methods warn and go on, or raise TrackingError if `strict`."""

    study: str
    stage: str
    run_id: str
    strict: bool = False

    def _logging(self, what: str) -> contextlib.AbstractContextManager[None]:
        return one_line_errors(f"{what} was not logged") if self.strict else goes_on(what)

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
            return self._log_trained_model(arm, int(seed), rows_of(history, arm, seed), params, key, tags or {})
        return None

    def _log_trained_model(
        self, arm: str, seed: int, history: pd.DataFrame, params: Mapping[str, Any], key: str, tags: Mapping[str, Any]
    ) -> str:
        client, experiment_id = open_client(), open_experiment(self.study)
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
        for run in search_runs(client, experiment_id, filter_string):
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
            tags=stage_tags(self.study, self.stage) | {name: str(value) for name, value in tags.items()} | own,
        )
        run_id = run.info.run_id
        log_params(run_id, {"arm": arm, "seed": seed} | dict(params))
        log_points(run_id, metrics)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED", end_time=end)
        return run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers of the notebook itself, in one call."""
        with self._logging("metrics"):
            now = time.time()
            log_points(self.run_id, [(name, float(value), now, step) for name, value in metrics.items()])

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Say which images were used, and as what (training, test). The digest is cut: MLflow allows 36 characters."""
        with self._logging(f"data set {name}"):
            client = open_client()
            from mlflow.data.code_dataset_source import CodeDatasetSource
            from mlflow.data.meta_dataset import MetaDataset
            from mlflow.entities import DatasetInput, InputTag

            dataset = MetaDataset(CodeDatasetSource({}), name=name, digest=digest[:32])
            entry = DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
            client.log_inputs(self.run_id, [entry])


def rows_of(history: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
    """The epochs of one trained model, in order. Raises ValueError when there is none."""
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

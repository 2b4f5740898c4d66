"""What a notebook logs, straight to MLflow: its trained models, its numbers, its data sets, what it evaluated.

A model's whole curve is logged in one go, with the real time of each epoch: a few transactions instead of hundreds of
slow calls, and an interrupted training that goes on from its checkpoint cannot leave doubled points (MLflow keeps both
points of a step that is logged twice). `StageRun.log_trained_model` may be called again with the same model: it finds
the run by its key and attaches it to the present notebook run.
"""

import contextlib
import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pursuhint_lib.params import LANDSCAPE
from pursuhint_lib.storage import home
from pursuhint_lib.tracking_models import NotExported, link_inputs, log_datasets, log_network
from pursuhint_lib.tracking_page import run_link
from pursuhint_lib.tracking_runs import open_experiment, stage_tags
from pursuhint_lib.tracking_store import (
    goes_on,
    log_new_points,
    log_params,
    log_points,
    one_line_errors,
    open_client,
    search_runs,
)

_METRICS = {"val_accuracy": "val/acc1", "val_loss": "val/loss", "learning_rate": "train/lr"}  # others: train/<column>
# Columns of results.csv; MLflow's tiles show some ten letters behind the slash.
_TEST_METRICS = {
    "test_accuracy": "test/acc1",
    "top5": "test/top5",
    "test_loss": "test/nll",
    "agreement": "test/agreement",
    "kl": "test/kl",
    "ece": "test/ece",
}
_NOT_METRICS = ("arm", "seed", "epoch", "seconds", "finished", "status")


@dataclass(frozen=True)
class StageRun:
    """The run of a notebook. When the tracker fails its methods warn and go on, or raise TrackingError if `strict`.

    Each may be called again with the same, and logs nothing twice. made: as of `stage_tags`, for the trained models.
    """

    study: str
    stage: str
    run_id: str
    strict: bool = False
    datasets: list[tuple[str, str, str]] = field(default_factory=list, repr=False)  # its models were made with
    made: Mapping[str, Any] | None = field(default=None, repr=False)

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
                existing = run
            else:
                client.set_tag(run.info.run_id, "current", "no")
        facets = {"arm": arm, "seed": seed} | dict(params)
        of_landscape = str(params.get("strategy", "")).startswith(LANDSCAPE)
        tags = {**tags, "of_landscape": "yes" if of_landscape else "no"}
        if "strategy" in params:
            facets["metric"] = _measure(str(params["strategy"]))
        if existing is not None:
            run_id = existing.info.run_id
            for name, value in {**tags, "mlflow.parentRunId": self.run_id}.items():
                client.set_tag(run_id, name, str(value))
            if "metric" not in existing.data.params and "metric" in facets:  # logged by an earlier version
                log_params(run_id, {"metric": facets["metric"]})
            log_datasets(run_id, self.datasets)
            return run_id
        start, end = _span(history)
        tags = {name: str(value) for name, value in tags.items()}
        own = {"arm": arm, "seed": str(seed), "key": identity, "current": "yes", "mlflow.parentRunId": self.run_id}
        run = client.create_run(
            experiment_id,
            start_time=start,
            run_name=f"{self.stage[:2]} {arm} s{seed}",
            tags=stage_tags(self.study, self.stage, self.made) | tags | own,
        )
        run_id = run.info.run_id
        log_params(run_id, facets)
        # The compare page begins with the metric that was logged first.
        log_points(run_id, sorted(metrics, key=lambda point: not point[0].startswith("final/")))
        log_datasets(run_id, self.datasets)
        client.set_terminated(run_id, "FAILED" if failed else "FINISHED", end_time=end)
        return run_id

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log numbers of the notebook itself, in one call; not those that its run has already."""
        with self._logging("metrics"):
            log_new_points(open_client().get_run(self.run_id), metrics)

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Say which images were used, and as what: "train", "validation" or "test".

        The models that are logged afterwards have the same inputs, but for the test images.
        """
        with self._logging(f"data set {name}"):
            log_datasets(self.run_id, [(name, digest, context)])
            if context != "test":
                self.datasets.append((name, digest, context))

    def log_network(self, *, name: str, arm: str, seed: int, file: Path | str, example: Any) -> str | None:
        """Keep a trained model's network as the MLflow model `name`, with signature and input example.

        Returns what ``mlflow.pytorch.load_model`` takes, None after a warning. file: what `models.save_model` wrote, in
        `home` if relative. example: (2 or more, C, H, W), images as the network sees them. The model belongs to the run
        that `log_trained_model` made for this arm and seed; the same file is not logged twice. A network that cannot be
        exported costs nothing else: a warning, and the tag "model" of its run says why.
        """
        with self._logging(f"the network of {arm} seed {seed}"):
            run = self._current_runs(f"tags.stage = '{self.stage}'").get((arm, int(seed)))
            if run is None:
                warnings.warn(f"the network of {arm} seed {seed} was not logged: it has no run", stacklevel=2)
                return None
            client, example = open_client(), np.asarray(example, dtype=np.float32)
            try:
                address = log_network(open_experiment(self.study), run, name, home() / file, example)
            except NotExported as error:
                client.set_tag(run.info.run_id, "model", f"not exported: {error}")
                warnings.warn(f"the network of {arm} seed {seed} was not logged: {error}", stacklevel=2)
                return None
            client.set_tag(run.info.run_id, "model", address)
            return address
        return None

    def log_evaluation(self, results: pd.DataFrame) -> None:
        """Put test measures on the runs of the networks, whichever notebook trained them, and link both ways.

        results: one row per network with arm, seed and any of test_accuracy, top5, test_loss (nats), agreement, kl
        (nats), ece; they become ``test/acc1``, ``top5``, ``nll``, ``agreement``, ``kl``, ``ece``. Rows with a `same_as`
        are left out: the other arm's run speaks for both. A measure whose run has this very value is not logged again;
        another value is a later point of the same step, and the one that the page shows. The networks' runs get the tag
        evaluated_in, this one the tag evaluates and links to the notebooks that trained them.
        """
        with self._logging("test measures"):
            self._log_evaluation(results)

    def _log_evaluation(self, results: pd.DataFrame) -> None:
        client, experiment_id = open_client(), open_experiment(self.study)
        runs, without, parents, models = self._current_runs(""), [], {}, []
        for row in results.to_dict("records"):
            if isinstance(row.get("same_as"), str) and row["same_as"]:
                continue
            run = runs.get((row["arm"], int(row["seed"])))
            if run is None:
                without.append(f"{row['arm']} seed {row['seed']}")
                continue
            values = {name: row[column] for column, name in _TEST_METRICS.items() if pd.notna(row.get(column))}
            log_new_points(run, values, {"evaluated_in": self.run_id})
            parents[run.data.tags["mlflow.parentRunId"]] = run.data.tags["stage"]
            models += [output.model_id for output in run.outputs.model_outputs] if run.outputs else []
        link_inputs(self.run_id, models)
        links = [f"[{stage}]({run_link(experiment_id, run_id)})" for run_id, stage in sorted(parents.items())]
        client.set_tag(self.run_id, "evaluates", ", ".join(sorted(parents)))
        client.set_tag(self.run_id, "mlflow.note.content", f"Evaluates the networks of {' and '.join(sorted(links))}.")
        if without:
            text = f"test measures were not logged for {', '.join(without[:5])}"
            warnings.warn(f"{text}{' and more' if len(without) > 5 else ''}: no run of theirs", stacklevel=3)

    def _current_runs(self, also: str) -> dict[tuple[str, int], Any]:
        """(arm, seed) -> run, of the trained models that count, as far as they pass the filter."""
        filter_string = " and ".join(filter(None, ["tags.current = 'yes'", also]))
        runs = search_runs(open_client(), open_experiment(self.study), filter_string)
        return {(run.data.tags["arm"], int(run.data.tags["seed"])): run for run in runs}


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
    # Sorted: the order of columns depends on which other models a history tells of.
    content = [study, stage, arm, seed, key, sorted((name, step, value) for name, value, _, step in metrics)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _span(history: pd.DataFrame) -> tuple[int, int]:
    """First and last millisecond of a training."""
    if "finished" not in history:
        return int(time.time() * 1000), int(time.time() * 1000)
    first = history["finished"].iloc[0] - (history["seconds"].iloc[0] if "seconds" in history else 0)
    return int(first * 1000), int(history["finished"].iloc[-1] * 1000)


def _measure(strategy: str) -> str:
    """The similarity measure by which a strategy chose, read from its name; "none" where none had a say.

    "clustered_r2_cca" and "clustered_first_r2_cca" give "r2_cca". Controls that repeat the clusters carry no measure in
    their names, but have always those of the study's first: "main".
    """
    found = []
    for part in strategy.split("+"):  # of a method with several choices of its own
        if match := re.fullmatch(r"clustered_(?:(?:medoid|first|last)_)?(.+)", part):
            found.append(match[1])
        elif part in ("reversed", "untrained", "shuffled"):
            found.append("main")
    return "+".join(dict.fromkeys(found)) or "none"

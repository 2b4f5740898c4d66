"""MLflow's page: serving it on this machine, and addresses that open it where a study is compared."""

import argparse
import json
import os
import socket
import sys
import urllib.parse
import warnings
from typing import NamedTuple

from pursuhint_lib.command import run_command
from pursuhint_lib.tracking_store import QUIET, TrackingError, artifact_root, open_client, relocate, tracking_uri

HEADLINE = "final/val_acc1"
DISTILLED = "04_distill_students"
BASE = "http://127.0.0.1:5000"
_STUDENTS = f'tags.stage = "{DISTILLED}" and tags.current = "yes" and tags.of_landscape = "no"'
SAVED_VIEW = "mlflow.sharedViewState."  # what the tag of a saved view starts with
_FACETS = ("strategy", "method", "metric", "seed")
_MEASURES = (HEADLINE, "test/acc1", "test/agreement", "test/kl", "test/ece")


class _View(NamedTuple):
    """What a saved view shows. groups: parameters whose runs are averaged; lines: one per run through its choices."""

    name: str
    mode: str
    groups: tuple[str, ...] = ()
    lines: bool = False


VIEWS = {  # by their key in addresses
    "arms": _View("Arms, mean over seeds", "CHART", ("arm",)),
    "strategies": _View("Strategies, mean over arms", "CHART", ("strategy",)),
    "choices": _View("Choices, one line per student", "CHART", lines=True),
    "students": _View("Students, one row each", "TABLE"),
}


def experiment_tags(experiment_id: str) -> dict[str, str]:
    """Tags of a new experiment: the note above its runs, in Markdown, and the saved views that it links to."""
    links = " · ".join(f"[{view.name}]({view_link(experiment_id, key)})" for key, view in VIEWS.items())
    best_first = chart_link(experiment_id, HEADLINE, DISTILLED, base="")
    note = (
        f"[Compare the distilled students, best on validation first]({best_first}) · {links}. "
        "One run per notebook, one child run per trained model."
    )
    return {"mlflow.note.content": note} | {f"{SAVED_VIEW}{key}": _saved_view(key) for key in VIEWS}


def _saved_view(key: str) -> str:
    """A view as MLflow 3.17's page saves it ("Save view" in its menu): what is shown, in which columns and groups."""
    view = VIEWS[key]
    columns = [f"params.`{facet}`" for facet in _FACETS] + [f"metrics.`{measure}`" for measure in _MEASURES]
    state: dict = {
        "searchFilter": _STUDENTS,
        # The page loads the first 100 runs: of the best ones, means would flatter every arm that has one among them.
        "orderByKey": f"metrics.`{HEADLINE}`" if view.mode == "TABLE" else "params.`seed`",
        "orderByAsc": view.mode != "TABLE",
        "selectedColumns": [*columns, "attributes.`Models`"],
        "runsHiddenMode": "SHOW_ALL",  # else the chart leaves out all but ten
    }
    if view.groups:
        keys = [{"mode": "param", "groupByData": group} for group in view.groups]
        state["groupBy"] = {"aggregateFunction": "average", "groupByKeys": keys}
    if view.lines:
        kept = {"deleted": False, "isGenerated": False}
        section = kept | {"uuid": "choices", "name": "choices", "display": True, "isReordered": True, "columns": 1}
        chart = kept | {"uuid": "lines", "type": "PARALLEL", "metricSectionId": "choices", "showAllRuns": False}
        chart |= {"selectedParams": list(_FACETS), "selectedMetrics": ["test/acc1"]}
        state |= {"isAccordionReordered": True, "compareRunSections": [section], "compareRunCharts": [chart]}
    return json.dumps({"name": view.name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def view_link(experiment_id: str, key: str) -> str:
    """Address of one of the VIEWS, from another page of the same server."""
    query = {"workflowType": "machine_learning", "compareRunsMode": VIEWS[key].mode, "viewStateShareKey": key}
    return f"/#/experiments/{experiment_id}/runs?{urllib.parse.urlencode(query)}"


def run_link(experiment_id: str, run_id: str) -> str:
    """Address of a run's page, from another page of the same server."""
    return f"/#/experiments/{experiment_id}/runs/{run_id}"


def chart_link(experiment_id: str, metric: str, stage: str, base: str = BASE) -> str:
    """Address of the chart page: the present runs of a stage, best first by `metric`."""
    query = {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": f'tags.stage = "{stage}" and tags.current = "yes"',
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": "false",
    }
    return f"{base}/#/experiments/{experiment_id}/runs?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


def _refusal(port: int) -> str:
    """Why nothing can be served at a port, "" if it can: MLflow's server would say so late, and end with status 0."""
    if not 0 < port < 2**16:
        return "should be from 1 to 65535"
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        return f"{os.strerror(error.errno)} (another one: make ui ARGS='--port 5001')"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """``python -m pursuhint_lib.tracking_page [--port 5000]``: MLflow's page on this machine, lean."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.tracking_page", description="Serves the studies' runs in MLflow's page."
    )
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args(arguments).port
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if refusal := _refusal(port):
        print(f"--port {port}: {refusal}", file=sys.stderr)
        return 1
    try:
        relocate()
        open_client()
    except TrackingError as error:
        print(error, file=sys.stderr)
        return 1
    # By default the server also starts seven consumers for GenAI jobs: 3 GB and 18 s instead of 0.5 GB and 7 s.
    os.environ.update(QUIET | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    print(f"MLflow: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning (Ctrl-C ends it)", flush=True)
    server = ["server", "--backend-store-uri", tracking_uri(), "--default-artifact-root", artifact_root()]
    os.execv(
        sys.executable,
        [sys.executable, "-m", "mlflow", *server, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
    )


if __name__ == "__main__":
    sys.exit(run_command(main))

"""MLflow's page: serving it on this machine, and addresses that open it where a study is compared."""

import argparse
import os
import sys
import urllib.parse

from pursuhint_lib.tracking_store import QUIET, TrackingError, artifact_root, open_client, relocate, tracking_uri

HEADLINE = "final/val_acc1"
DISTILLED = "04_distill_students"


def experiment_note(experiment_id: str) -> str:
    """What stands above the table of an experiment's runs, in Markdown."""
    return (
        f"[Compare the distilled students, best first]({chart_link(experiment_id, HEADLINE, DISTILLED)}). "
        "One run per notebook, one child run per trained model; group by `arm` to see means over seeds."
    )


def chart_link(experiment_id: str, metric: str, stage: str, base: str = "http://127.0.0.1:5000") -> str:
    """Address of the chart page: the present runs of a stage, best first by `metric`."""
    query = {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": f'tags.stage = "{stage}" and tags.current = "yes"',
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": "false",
    }
    return f"{base}/#/experiments/{experiment_id}/runs?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


def main(arguments: list[str] | None = None) -> int:
    """``python -m pursuhint_lib.tracking_page [--port 5000]``: MLflow's page on this machine, lean."""
    parser = argparse.ArgumentParser(
        prog="python -m pursuhint_lib.tracking_page", description="Serves the studies' runs in MLflow's page."
    )
    parser.add_argument("--port", type=int, default=5000)
    port = parser.parse_args(arguments).port
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
    sys.exit(main())

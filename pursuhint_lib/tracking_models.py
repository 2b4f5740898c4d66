"""What only MLflow's own formats hold: a network that `mlflow.pytorch.load_model` loads, and the data sets of a run.

A network is kept as an exported program (torch.export, MLflow's "pt2"), not as a pickle: loading it runs no code of the
file's, and needs torch alone. It is fixed in evaluation mode: its layers can no longer be hooked, so what notebooks
profile and train with are the files below ``networks/``.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pursuhint_lib.provenance import versions
from pursuhint_lib.storage import sha256
from pursuhint_lib.tracking_store import open_client

_FACTS = ("arm", "seed", "method", "strategy", "metric", "network")  # parameters of the run that a model repeats


class NotExported(ValueError):
    """A network cannot be written as an exported program, now or later. The text is one line."""


def log_datasets(run_id: str, datasets: Iterable[tuple[str, str, str]]) -> None:
    """Make data sets (name, digest, what they were used as) inputs of a run; those that are it already stay so."""
    client = open_client()
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    entries = []
    for name, digest, context in datasets:
        dataset = MetaDataset(CodeDatasetSource({}), name=name, digest=digest[:32])  # MLflow allows 36 characters
        entries.append(DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)]))
    if entries:
        client.log_inputs(run_id, entries)


def log_network(experiment_id: str, run: Any, name: str, file: Path, example: np.ndarray) -> str:
    """Keep the network of `file` as the model `name` of an MLflow run. Returns its address, ``models:/...``.

    example: (2 or more, C, H, W), images as the network sees them. A run that has the same file as its model is left as
    it is. Other models of this name in the experiment get the tag current = "no". Raises NotExported.
    """
    if not file.exists():
        raise NotExported(f"{file.name} is gone")
    client, key, found = open_client(), sha256(file), None
    for model in _models(client, experiment_id, name):
        if model.source_run_id == run.info.run_id and model.tags.get("key") == key:
            if str(model.status) == "READY":
                found = model
            else:  # of a process that was killed
                client.delete_logged_model(model.model_id)
        elif model.tags.get("current") == "yes":
            client.set_logged_model_tags(model.model_id, {"current": "no"})
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            description = _save(file, np.asarray(example, dtype=np.float32), Path(folder) / "model")
            facts = {fact: run.data.params[fact] for fact in _FACTS if fact in run.data.params}
            tags = {"key": key, "current": "yes"}
            found = client.create_logged_model(experiment_id, name, run.info.run_id, tags, facts, "classifier")
            description.model_id = description.model_uuid = found.model_id
            description.run_id, description.artifact_path = run.info.run_id, found.artifact_location
            description.save(Path(folder) / "model" / "MLmodel")
            client.log_model_artifacts(found.model_id, str(Path(folder) / "model"))
        _link(client, run, found.model_id)
        client.finalize_logged_model(found.model_id, "READY")
    elif found.tags.get("current") != "yes":
        client.set_logged_model_tags(found.model_id, {"current": "yes"})
    return f"models:/{found.model_id}"


def link_inputs(run_id: str, model_ids: Iterable[str]) -> None:
    """Make models inputs of a run: it has looked at them."""
    client = open_client()
    from mlflow.entities import LoggedModelInput

    if models := [LoggedModelInput(model_id) for model_id in model_ids]:
        client.log_inputs(run_id, models=models)


def _models(client: Any, experiment_id: str, name: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_logged_models([experiment_id], filter_string=f"name = '{name}'", page_token=token)
        yield from page
        if not (token := page.token):
            return


def _save(file: Path, example: np.ndarray, folder: Path) -> Any:
    """Write the model's folder; return MLflow's description of it."""
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from pursuhint_lib.models import load_model

    description = Model()
    try:
        network = load_model(file)[0]
        with torch.no_grad():
            logits = network(torch.from_numpy(example))
        dtype = np.dtype(np.float32)
        signature = ModelSignature(
            Schema([TensorSpec(dtype, (-1, *example.shape[1:]), "images")]),
            Schema([TensorSpec(dtype, (-1, *logits.shape[1:]), "logits")]),
        )
        with _silent():
            mlflow.pytorch.save_model(
                network,
                str(folder),
                mlflow_model=description,
                signature=signature,
                input_example=example,
                pip_requirements=[f"torch=={versions()['torch'].partition('+')[0]}"],  # else MLflow runs it to find out
                serialization_format="pt2",
            )
    except OSError:  # a full disk: another time it may work
        raise
    except Exception as error:  # torch.export raises many kinds
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NotExported(f"torch.export: {first[:200]}") from error
    return description


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _link(client: Any, run: Any, model_id: str) -> None:
    """The model is an output of the run and shows its final metrics: the same points, said of the model as well."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, 0)])
    points = [
        Metric(point.key, point.value, point.timestamp, point.step, model_id=model_id, run_id=run.info.run_id)
        for name in run.data.metrics
        if name.startswith("final/")
        for point in client.get_metric_history(run.info.run_id, name)
    ]
    if points:
        client.log_batch(run.info.run_id, metrics=points)

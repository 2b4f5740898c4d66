"""How alike the layers of the teachers are that never teach: for notebook 02, found out by a job or on the spot."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from pursuhint_lib.arithmetic import cpu_capability
from pursuhint_lib.arms import kept_file
from pursuhint_lib.data import BatchSource
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.models import candidate_layers, load_model, state_hash
from pursuhint_lib.params import ProfileLayers
from pursuhint_lib.profiling import profile_layers
from pursuhint_lib.progress import Progress
from pursuhint_lib.storage import read_table, run_folder, save_table
from pursuhint_lib.study import StudyImages, probe_batches

SIMILARITIES = "similarities.csv"  # in a job's folder; columns: key, metric, layer, and every layer


def teacher_similarities(
    params: ProfileLayers, images: StudyImages, probe: BatchSource, model: str, seed: int
) -> dict[str, pd.DataFrame]:
    """Similarity of all layers of a teacher that notebook 01 trained, under each of the study's measures.

    Taken from the file that a job has left, when it was made from the very same things, else computed. model and seed:
    the teacher's, as ``other_teachers.csv`` has them. Raises what `models.load_model` and `profiling.profile_layers`
    raise.
    """
    network = _load(params, model, seed)
    layers = _layers(params, images, network)
    kept = _kept(params, model, _key(params, images, network, layers, probe.device))
    return kept or _measure(params, network, layers, probe)


def keep_similarities(
    params: ProfileLayers, images: StudyImages, device: torch.device, model: str, seed: int, folder: Path
) -> Path:
    """Compute what `teacher_similarities` then finds, with a heartbeat, and keep it in `folder`. Returns the file."""
    network = _load(params, model, seed)
    layers = _layers(params, images, network)
    key = _key(params, images, network, layers, device)
    probe = probe_batches(params, images, params.probe_images, device)
    progress = Progress(folder, 1, f"layers of {model}")
    tables = _measure(params, network, layers, probe)
    table = pd.concat(tables, names=["metric", "layer"]).reset_index()
    table.insert(0, "key", key)
    save_table(table, folder / SIMILARITIES)
    progress.advance(f"{len(layers)} layers under {len(tables)} measures")
    return folder / SIMILARITIES


def _load(params: ProfileLayers, model: str, seed: int) -> nn.Module:
    return load_model(kept_file(run_folder(params.study, "01_train_teacher"), model, seed))[0]


def _layers(params: ProfileLayers, images: StudyImages, network: nn.Module) -> list[str]:
    layers = params.layers or candidate_layers(network, before_activation=params.before_activation)
    return list(layer_table(network, layers, images.shape)["layer"])


def _measure(
    params: ProfileLayers, network: nn.Module, layers: list[str], probe: BatchSource
) -> dict[str, pd.DataFrame]:
    profile = profile_layers(FrozenTeacher(network.to(probe.device), layers), probe, grid=params.pooling_grid)
    return {metric: profile.similarity(metric) for metric in params.similarity_metrics}


def _kept(params: ProfileLayers, model: str, key: str) -> dict[str, pd.DataFrame]:
    file = run_folder(params.study, f"jobs/02_profile_layers/{model}") / SIMILARITIES
    if not file.exists():
        return {}
    table = read_table(file)
    if list(table["key"].unique()) != [key]:
        return {}
    groups = table.drop(columns="key").groupby("metric", sort=False)
    return {metric: rows.drop(columns="metric").set_index("layer").rename_axis(None) for metric, rows in groups}


def _key(
    params: ProfileLayers, images: StudyImages, network: nn.Module, layers: list[str], device: torch.device
) -> str:
    """Hash of everything that decides the similarities, and of all code, most of which does not."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
    facts = {
        "network": state_hash(network),
        "layers": layers,
        "images": images.facts(),
        **params.model_dump(include={"noise", "split_seed", "streaming"}),
        **params.model_dump(include={"probe_images", "pooling_grid", "similarity_metrics"}),
        "arithmetic": {"device": device.type, "threads": torch.get_num_threads(), "cpu": cpu_capability()},
        "code": hashlib.sha256(code).hexdigest(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

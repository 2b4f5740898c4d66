"""Weights that were trained elsewhere."""

import contextlib
import http.client
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pursuhint_lib import storage
from pursuhint_lib.arms import kept_file, training_key
from pursuhint_lib.data import BatchSource
from pursuhint_lib.evaluation import accuracy, check_says_something
from pursuhint_lib.models import check_fit, save_model, state_hash
from pursuhint_lib.training import predict

_SUFFIXES = (".safetensors", ".pth", ".pt")


def load_weights(model: nn.Module, source: str) -> nn.Module:
    """The model of `build_model` with weights that were trained elsewhere, in eval mode. Runs no code from a file.

    source: a file that holds a state_dict, ``.safetensors``, ``.pth`` or ``.pt``; a relative one hangs below the home
    (`storage.home`). Or torchvision's name of weights for this network, "IMAGENET1K_V1", which are downloaded once.

    Raises FileNotFoundError for weights that are not there, or ValueError, with one line: unknown weights, a file that
    cannot be read, or weights that do not fit (for another number of classes, say).
    """
    state = _read(_file(source)) if source.endswith(_SUFFIXES) else _download(model.spec["name"], source)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 do not have it
            state.setdefault(name, tensor)
    check_fit(model, state, source)
    model.load_state_dict(state)
    return model.eval()


def check_source(network: str, source: str) -> None:
    """Raise what `load_weights` raises for weights of this network that are not there or unknown. Reads and downloads
    nothing.
    """
    if source.endswith(_SUFFIXES):
        _file(source)
    else:
        _published(network, source)


def _file(source: str) -> Path:
    path = storage.home() / Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} are not there")
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a file of weights ({_first_line(error)})") from None
    except Exception:  # pickle's errors, of which the one that refuses code explains itself in twenty lines
        raise ValueError(f"{path} is not a file of weights alone, which is all that is read") from None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is not a state_dict: save model.state_dict() and nothing else")
    return dict(state)


def _published(network: str, name: str) -> Any:
    """torchvision's entry of these weights."""
    import torchvision.models

    if network not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"weights {name!r}: torchvision has none of {network}; name a file ({', '.join(_SUFFIXES)})")
    known = torchvision.models.get_model_weights(network)
    if name not in known.__members__:
        raise ValueError(
            f"weights {name!r}: torchvision has {', '.join(known.__members__)} of {network}; or name a file "
            f"({', '.join(_SUFFIXES)})"
        )
    return known[name]


def _download(network: str, name: str) -> dict[str, Tensor]:
    weights = _published(network, name)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"weights {name} of {network} could not be downloaded from {weights.url} ({_first_line(error)}): fetch "
            "that file by other means and name it instead"
        ) from None


def keep_pretrained(
    folder: Path,
    teacher: nn.Module,
    seed: int,
    validation: BatchSource,
    dtype: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """Keep a teacher that was trained elsewhere where `arms.train_and_keep` keeps one that was trained here, under a
    key that depends on the weights alone.

    Returns its history, one row as of `training.fit` for an epoch 0 (what it does on validation, untouched). Raises
    what `evaluation.check_says_something` raises.
    """
    key = training_key(network=teacher.spec, weights=state_hash(teacher))
    started = time.perf_counter()
    logits, labels = predict(teacher.to(validation.device), validation, dtype)
    check_says_something(logits, teacher.spec["name"])
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    row = {"arm": "teacher", "seed": seed, "epoch": 0}
    row |= {"val_accuracy": accuracy(logits, labels), "val_loss": loss, "status": "trained"}
    row |= {"seconds": time.perf_counter() - started, "finished": time.time()}
    facts = {name: row[name] for name in ("arm", "seed", "status", "val_accuracy")}
    save_model(teacher, kept_file(folder, "teacher", seed), key=key, **facts)
    return pd.DataFrame([row])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

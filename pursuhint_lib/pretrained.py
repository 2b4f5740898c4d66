"""Weights that were trained elsewhere."""

import argparse
import contextlib
import http.client
import io
import time
import warnings
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
from pursuhint_lib.errors import first_line
from pursuhint_lib.evaluation import accuracy, check_says_something
from pursuhint_lib.models import check_fit, save_model, state_hash
from pursuhint_lib.training import predict

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # so begins what Git LFS leaves in place of a file


def load_weights(model: nn.Module, source: str) -> nn.Module:
    """The model of `build_model` with weights that were trained elsewhere, in eval mode. Runs no code from a file.

    source: a file, ``.safetensors`` or one of torch.save under any suffix; a relative one hangs below the home
    (`storage.home`). Or torchvision's name of weights for this network, "IMAGENET1K_V1", which are downloaded once.

    A file holds a state_dict, or a training program's checkpoint of which one entry is a state_dict. A prefix that all
    names share ("module.", "_orig_mod.", "model.") is dropped, and entries of parts that this network is built without
    are left out: auxiliary heads, which play no part in evaluation. googlenet and inception_v3 turn `transform_input`
    on with the weights that torchvision publishes, as torchvision does, and with no others. A warning says in one line
    which of these was done.

    Raises FileNotFoundError for weights that are not there, or ValueError, with one line: unknown weights, a file that
    cannot be read, or weights that do not fit (for another number of classes, say).
    """
    if source.isidentifier():
        state, done = _download(model.spec["name"], source), []
        published = True
    else:
        path = _file(source)
        state, done = _opened(_read(path), path)
        published = hasattr(model, "transform_input") and _is_published(model.spec["name"], path)
    done += _rename(state, model)
    check_fit(model, state, source)
    model.load_state_dict(state)
    if hasattr(model, "transform_input"):
        if published:
            model.transform_input = model.spec["transform_input"] = True
        done.append(f"transform_input is {'on, as' if published else 'off: these are not'} torchvision's own weights")
    if done:
        warnings.warn(f"weights {source}: {'; '.join(done)}", stacklevel=2)
    return model.eval()


def check_source(network: str, source: str) -> None:
    """Raise what `load_weights` raises for weights of this network that are not there or unknown. Downloads nothing,
    and reads no more of a file than its beginning.
    """
    if source.isidentifier():  # torchvision's names are; a file's has a dot or a slash in it
        _published(network, source)
    else:
        _file(source)


def _file(source: str) -> Path:
    path = storage.home() / Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} are not there")
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS, not the weights: fetch them with git lfs pull")
    return path


def _read(path: Path) -> Any:
    """What the file holds: tensors, and whatever plain values a training program keeps beside them."""
    try:
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the program's options
            return torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole file of weights ({first_line(error)})") from None
    except Exception:  # pickle's errors, of which the one that refuses code explains itself in twenty lines
        raise ValueError(
            f"{path} holds more than weights alone, which is all that is read: save model.state_dict() and nothing else"
        ) from None


def _opened(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict in what a file holds, and a line on where it was found, if it is not all of it."""
    entries = content if isinstance(content, Mapping) else {}
    if _is_state(entries):
        return dict(entries), []
    states = [name for name, entry in entries.items() if _is_state(entry)]
    if len(states) != 1:
        found = f"holds several state_dicts ({', '.join(map(str, states))})" if states else "is not a state_dict"
        raise ValueError(f"{path} {found}: save model.state_dict() and nothing else")
    return dict(entries[states[0]]), [f"{states[0]} taken of its entries {', '.join(map(str, entries))}"]


def _is_state(content: Any) -> bool:
    """Whether it is names and tensors, one at least."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


def _rename(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Give the entries of `state` the names that they have in the model. Returns a line on each thing done."""
    done, expected = [], model.state_dict()
    first = next(iter(expected))
    prefix = min((name.removesuffix(first) for name in state if name.endswith(f".{first}")), key=len, default="")
    if prefix and first not in state and all(name.startswith(prefix) for name in state):
        for name in list(state):
            state[name.removeprefix(prefix)] = state.pop(name)
        done.append(f"prefix {prefix} dropped")
    without = [name for name in state if "." in name and getattr(model, name.partition(".")[0], model) is None]
    for name in without:
        del state[name]
    if without:
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in without))
        done.append(f"{len(without)} entries of {parts} left out, which this network is built without")
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 do not have it
            state.setdefault(name, tensor)
    return done


def _published(network: str, name: str) -> Any:
    """torchvision's entry of these weights."""
    import torchvision.models

    if network not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"weights {name!r}: torchvision has none of {network}; name a file, with its suffix")
    known = torchvision.models.get_model_weights(network)
    if name not in known.__members__:
        raise ValueError(
            f"weights {name!r}: torchvision has {', '.join(known.__members__)} of {network}; or name a file, with its "
            "suffix"
        )
    return known[name]


def _is_published(network: str, path: Path) -> bool:
    """Whether torchvision publishes this very file for the network: its names end with the beginning of the hash."""
    import torchvision.models

    digest = storage.sha256(path)[:8]
    return any(f"-{digest}." in weights.url for weights in torchvision.models.get_model_weights(network))


def _download(network: str, name: str) -> dict[str, Tensor]:
    weights = _published(network, name)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"weights {name} of {network} could not be downloaded from {weights.url} ({first_line(error)}): fetch "
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

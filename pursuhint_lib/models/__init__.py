"""The networks of the study: build them, name their candidate layers, save and load them.

`build_model` knows this package's networks for small images (MODELS) and every classifier of torchvision by its name.
`candidate_layers` works on any module; its rules are in `candidates`.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pursuhint_lib.errors import first_line
from pursuhint_lib.features import check_model
from pursuhint_lib.models.candidates import candidate_layers
from pursuhint_lib.models.mobilenet_cifar import MOBILENETS
from pursuhint_lib.models.resnet_cifar import RESNETS
from pursuhint_lib.models.shufflenet_cifar import SHUFFLENETS
from pursuhint_lib.models.vgg_cifar import VGGS
from pursuhint_lib.models.wrn_cifar import WIDE_RESNETS
from pursuhint_lib.storage import written_whole

__all__ = ["MODELS", "build_model", "candidate_layers", "load_model", "save_model", "state_hash"]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {  # name -> f(classes, channels)
    **RESNETS,
    **WIDE_RESNETS,
    **VGGS,
    **MOBILENETS,
    **SHUFFLENETS,
}

# ---------------------------------------------------------------------------------------------------------- building


def build_model(name: str, classes: int, *, channels: int = 3, transform_input: bool = False) -> nn.Module:
    """A network with fresh random weights: images (B, channels, H, W) -> logits (B, classes).

    name: a key of MODELS, or a classifier of torchvision ("resnet34", "vgg13_bn", "vit_b_16"), which needs 3 channels.
    transform_input: as torchvision's googlenet and inception_v3 take it; see `pretrained.load_weights`.
    The model remembers how it was built in `model.spec`, so that `save_model` can write it down.

    Raises ValueError for an unknown name (naming the nearest ones), fewer than one class, impossible channels, or
    `transform_input` of another network.
    """
    if classes < 1 or channels < 1:
        raise ValueError(f"{name} needs at least one class and one channel, not {classes=}, {channels=}")
    model = MODELS[name](classes, channels) if name in MODELS else _torchvision_model(name, classes, channels)
    model.spec = {"name": name, "classes": classes, "channels": channels}
    if transform_input:  # named only then: other networks keep the keys and files that they had
        if not hasattr(model, "transform_input"):
            raise ValueError(f"{name} cannot transform its input: googlenet and inception_v3 can")
        model.transform_input = model.spec["transform_input"] = True
    return model


def _torchvision_model(name: str, classes: int, channels: int) -> nn.Module:
    import torchvision.models  # a heavy import that this package's own networks do not need

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        begin_so = [there for there in MODELS if there.startswith(name)] if name else []  # "vgg8" -> "vgg8_cifar"
        nearest = dict.fromkeys([*begin_so, *difflib.get_close_matches(name, [*MODELS, *known], n=3, cutoff=0.0)])
        raise ValueError(f"there is no model {name!r}; the nearest names are {', '.join(list(nearest)[:3])}")
    if channels != 3:
        raise ValueError(f"{name} is torchvision's and takes 3 channels, not {channels}: take a network of MODELS")
    # These two would return a tuple with auxiliary logits in train mode.
    plain_output = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **plain_output)


# ------------------------------------------------------------------------------------------------- saving and loading


def save_model(model: nn.Module, path: Path, **facts: Any) -> Path:
    """Write weights, buffers and facts to one safetensors file, whole or not at all.

    facts: whatever JSON can hold (seed, epochs, accuracy), NumPy's numbers included. Equal models and facts give equal
    bytes.
    A network that torch.compile or DataParallel wraps is written without its wrapper.
    Raises TypeError, one line, for other facts, and for a model whose state holds more than tensors; and what
    `check_model` raises.
    """
    check_model(model)
    while "_orig_mod" in model._modules or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        (model,) = model.children()
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):  # a quantized module's packed weights, what get_extra_state returns
            kind = type(model).__name__
            raise TypeError(f"{kind} cannot be saved: its {name} is a {type(value).__name__}, and not a tensor")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    about = json.dumps({"model": getattr(model, "spec", None), "facts": facts}, default=_plain)
    # One metadata key, because safetensors writes several in no fixed order.
    metadata = {"pursuhint": json.dumps({"about": about, "sha256": _file_hash(state, about)})}
    with written_whole(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata=metadata)
    return Path(path)


def _plain(fact: Any) -> Any:
    if isinstance(fact, np.generic):
        return fact.item()
    raise TypeError(f"a fact is a {type(fact).__name__}: JSON holds numbers, texts, lists and dicts")


def load_model(path: Path, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Read what `save_model` wrote: (model in eval mode on the CPU, facts). Runs no code from the file.

    model: the module to load into, on whatever device it is. Needed for a module that `build_model` did not build;
    otherwise the network is built by its name, without touching torch's random state.

    Raises FileNotFoundError, or ValueError with one line: the file is damaged (any changed byte counts), was not
    written by `save_model`, or does not fit `model`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: train and save the model first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if "pursuhint" not in metadata:
            raise ValueError("it was not written by save_model")
        written = json.loads(metadata["pursuhint"])
        if _file_hash(state, written["about"]) != written["sha256"]:
            raise ValueError("its content is not what was saved")
        about = json.loads(written["about"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ValueError(f"{path} is not a whole model file ({reason}): delete it and train the model again") from None
    if model is None:
        if about["model"] is None:
            raise ValueError(f"{path} holds a module that build_model does not know: build it and pass it as model=")
        with torch.random.fork_rng(devices=[]):
            model = build_model(**about["model"])
    check_fit(model, state, path)
    model.load_state_dict(state)
    return model.eval(), about["facts"]


def check_fit(model: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Raise ValueError naming the first entry in which the model and the state read from `path` differ: in its shape,
    or as numbers that are whole or complex in one and floating-point in the other.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            kind, there, here = type(model).__name__, found.get(name, "nothing"), expected.get(name, "nothing")
            raise ValueError(f"{path} does not fit {kind}: {name} is {there} there, {here} in the model")
    for name, tensor in model.state_dict().items():
        counts = name.endswith("num_batches_tracked")  # which a file that was converted as a whole holds as floats
        if tensor.is_floating_point() != state[name].is_floating_point() and not counts:
            there, here, kind = state[name].dtype, tensor.dtype, type(model).__name__
            raise ValueError(f"{path} does not fit {kind}: {name} is {there} there, {here} in the model")


def state_hash(model: nn.Module) -> str:
    """Hex sha256 of everything a model has learned: names, dtypes, shapes and bytes of all weights and buffers."""
    return _hash_of(model.state_dict())


def _file_hash(state: dict[str, Tensor], about: str) -> str:
    return hashlib.sha256(f"{_hash_of(state)} {about}".encode()).hexdigest()


def _hash_of(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

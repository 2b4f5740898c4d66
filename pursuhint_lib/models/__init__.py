"""The networks of the study: build them, name their candidate layers, save and load them.

`build_model` knows this package's networks for small images (MODELS) and every classifier of torchvision by its name.
`candidate_layers` works on any module.
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.fx
from torch import Tensor, nn

from pursuhint_lib.features import layer_table
from pursuhint_lib.models.resnet_cifar import RESNETS
from pursuhint_lib.models.wrn_cifar import WIDE_RESNETS
from pursuhint_lib.storage import written_whole

MODELS: dict[str, Callable[[int, int], nn.Module]] = {**RESNETS, **WIDE_RESNETS}  # name -> f(classes, channels)

# ---------------------------------------------------------------------------------------------------------- building


def build_model(name: str, classes: int, *, channels: int = 3) -> nn.Module:
    """A network with fresh random weights: images (B, channels, H, W) -> logits (B, classes).

    name: a key of MODELS, or a classifier of torchvision ("resnet34", "vgg13_bn", "vit_b_16"), which needs 3 channels.
    The model remembers how it was built in `model.spec`, so that `save_model` can write it down.

    Raises ValueError for an unknown name (naming the nearest ones), fewer than one class, or impossible channels.
    """
    if classes < 1 or channels < 1:
        raise ValueError(f"{name} needs at least one class and one channel, not {classes=}, {channels=}")
    model = MODELS[name](classes, channels) if name in MODELS else _torchvision_model(name, classes, channels)
    model.spec = {"name": name, "classes": classes, "channels": channels}
    return model


def _torchvision_model(name: str, classes: int, channels: int) -> nn.Module:
    import torchvision.models  # a heavy import that this package's own networks do not need

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        nearest = difflib.get_close_matches(name, [*MODELS, *known], n=3, cutoff=0.0)
        raise ValueError(f"there is no model {name!r}; the nearest names are {', '.join(nearest)}")
    if channels != 3:
        raise ValueError(f"{name} is torchvision's and takes 3 channels, not {channels}: take a network of MODELS")
    # These two would return a tuple with auxiliary logits in train mode.
    plain_output = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **plain_output)


# -------------------------------------------------------------------------------------------------- candidate layers


def candidate_layers(
    model: nn.Module, *, before_activation: bool = False, image_shape: tuple[int, int, int] | None = None
) -> list[str]:
    """The layers a hint may come from, as module paths in execution order. The first rule that fits decides:

    1. A model with a method `candidate_layers(before_activation)` answers itself. This package's networks do: the
       outputs of their residual blocks, after the activation or before it.
    2. Repeated blocks: modules of one class that appears at least twice on one level, and holds two weight layers or
       more. Plain containers (Sequential, ModuleList, ModuleDict) are looked through, and the outermost level with such
       a class wins. These are the residual blocks of ResNets, RegNets, MobileNets, EfficientNets, ShuffleNets and
       ConvNeXts, the encoder blocks of vision transformers, the dense blocks (not layers) of DenseNets.
    3. Chains: in a Sequential of plain layers, the stage outputs: in each stretch between poolings the last
       convolution with the normalization and activation that follow it (VGG, AlexNet).

    The order comes from tracing the forward pass symbolically: nothing is run or changed, and layers that the forward
    pass never calls are left out. Where a forward pass cannot be traced, `image_shape` (C, H, W) orders the layers by
    one dry run instead.

    before_activation: the value before the last activation, known for rules 1 and 3 only.
    Raises ValueError when no rule fits, when the order cannot be found, or where `before_activation` is not known.
    """
    if hasattr(model, "candidate_layers"):
        return model.candidate_layers(before_activation)
    kind, blocks = type(model).__name__, _repeated_blocks(model)
    if blocks and before_activation:
        raise ValueError(f"the value before the last activation has no name in {kind}: pass a list of layers by hand")
    layers = blocks or _stage_outputs(model, before_activation)
    if not layers:
        parts = ", ".join(name for name, _ in model.named_children()) or "(nothing)"
        raise ValueError(f"{kind} has no repeated blocks: pass a list of layers by hand, from inside {parts}")
    return _in_execution_order(model, layers, image_shape)


def _repeated_blocks(model: nn.Module) -> list[str]:
    """Rule 2: level by level, the modules whose class repeats. Paths in order of declaration; [] if there are none."""
    level = [("", model)]
    while level:
        level = [found for path, module in level for found in _composite_modules(module, path)]
        count = Counter(type(module) for _, module in level)
        # By class, not by instance: the first MBConv of some EfficientNets holds one convolution only.
        deep = {type(module) for _, module in level if sum(p.ndim >= 2 for p in module.parameters()) >= 2}
        blocks = [path for path, module in level if count[type(module)] >= 2 and type(module) in deep]
        if blocks:
            return blocks
    return []


def _composite_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules below `module` that are made of others, looking through plain containers."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_plain_container(child):
            yield from _composite_modules(child, child_path)
        elif any(True for _ in child.children()):
            yield child_path, child


def _is_plain_container(module: nn.Module) -> bool:
    """Whether it only holds others. A subclass with a forward of its own (torchvision's dense block) does more."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in containers)


def _stage_outputs(model: nn.Module, before_activation: bool) -> list[str]:
    """Rule 3: paths in order of declaration; [] when there are fewer than two."""
    outputs = []
    for path, chain in model.named_modules():
        if not isinstance(chain, nn.Sequential):
            continue
        end, after_convolution = None, False
        for name, layer in chain.named_children():
            family = type(layer).__module__.removeprefix("torch.nn.modules.")
            follows = family in ("batchnorm", "instancenorm", "normalization")
            follows |= family == "activation" and not before_activation
            after_convolution = family == "conv" or (after_convolution and follows)
            if after_convolution:
                end = f"{path}.{name}" if path else name
            if family == "pooling" and end:
                outputs.append(end)
                end = None
        if end:
            outputs.append(end)
    return outputs if len(outputs) >= 2 else []


class _CallOrder(torch.fx.Tracer):
    """Traces a model symbolically and writes down which of `layers` are called, in order, without looking into them."""

    def __init__(self, layers: list[str]) -> None:
        super().__init__()
        self.layers = set(layers)
        self.called: list[str] = []

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return path in self.layers or super().is_leaf_module(module, path)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(module)
        if path in self.layers and path not in self.called:
            self.called.append(path)
        return super().call_module(module, forward, args, kwargs)


def _in_execution_order(model: nn.Module, layers: list[str], image_shape: tuple[int, int, int] | None) -> list[str]:
    if image_shape is not None:
        return layer_table(model, layers, image_shape)["layer"].tolist()
    tracer = _CallOrder(layers)
    try:
        tracer.trace(model)
    except Exception as error:  # whatever a foreign forward pass raises when it is handed a symbol instead of an image
        kind, reason = type(model).__name__, (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot trace the order of {kind}'s layers ({reason}): pass image_shape=(C, H, W)") from error
    return tracer.called


# ------------------------------------------------------------------------------------------------- saving and loading


def save_model(model: nn.Module, path: Path, **facts: Any) -> Path:
    """Write weights, buffers and facts to one safetensors file, whole or not at all.

    facts: whatever JSON can hold (seed, epochs, accuracy). Equal models and facts give equal bytes.
    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    about = json.dumps({"model": getattr(model, "spec", None), "facts": facts})
    # One metadata key, because safetensors writes several in no fixed order.
    metadata = {"pursuhint": json.dumps({"about": about, "sha256": _file_hash(state, about)})}
    with written_whole(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata=metadata)
    return Path(path)


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
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a whole model file ({reason}): delete it and train the model again") from None
    if model is None:
        if about["model"] is None:
            raise ValueError(f"{path} holds a module that build_model does not know: build it and pass it as model=")
        with torch.random.fork_rng(devices=[]):
            model = build_model(about["model"]["name"], about["model"]["classes"], channels=about["model"]["channels"])
    _check_fit(model, state, path)
    model.load_state_dict(state)
    return model.eval(), about["facts"]


def _check_fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError naming the first entry in which the model and the file differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            kind, there, here = type(model).__name__, found.get(name, "nothing"), expected.get(name, "nothing")
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

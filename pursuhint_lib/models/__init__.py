"""The networks of the study: build them, name their candidate layers, save and load them.

`build_model` knows this package's networks for small images (MODELS) and every classifier of torchvision by its name.
`candidate_layers` works on any module.
"""

import contextlib
import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.fx
from torch import Tensor, nn

from pursuhint_lib.features import blank_image, check_model, undisturbed
from pursuhint_lib.models.mobilenet_cifar import MOBILENETS
from pursuhint_lib.models.resnet_cifar import RESNETS
from pursuhint_lib.models.shufflenet_cifar import SHUFFLENETS
from pursuhint_lib.models.vgg_cifar import VGGS
from pursuhint_lib.models.wrn_cifar import WIDE_RESNETS
from pursuhint_lib.storage import written_whole

MODELS: dict[str, Callable[[int, int], nn.Module]] = {  # name -> f(classes, channels)
    **RESNETS,
    **WIDE_RESNETS,
    **VGGS,
    **MOBILENETS,
    **SHUFFLENETS,
}

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
        begin_so = [there for there in MODELS if there.startswith(name)] if name else []  # "vgg8" -> "vgg8_cifar"
        nearest = dict.fromkeys([*begin_so, *difflib.get_close_matches(name, [*MODELS, *known], n=3, cutoff=0.0)])
        raise ValueError(f"there is no model {name!r}; the nearest names are {', '.join(list(nearest)[:3])}")
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
       outputs of their residual or shuffle units (of a VGG, its stages), after the activation or before it.
    2. Repeated blocks: on one level, the modules of every class that appears there at least twice, and whatever runs
       between them. Plain containers (Sequential, ModuleList, ModuleDict) are looked through, and the outermost level
       with two such blocks wins. Blocks hold two weight layers or more; failing that, one.
    3. Stages: in a Sequential of plain layers, in each stretch between poolings the last convolution with the
       normalization and activation that follow it; where there are at least three.
    4. Weight layers: every convolution and linear layer with the normalization and activation modules that follow it.
       Not the last one, which makes the model's own output.

    What the rules give for torchvision's families:

        (wide_)resnet, resnext, mobilenet, efficientnet, mnasnet,   2: residual blocks
        regnet, shufflenet, convnext
        vit, swin                                                   2: encoder blocks
        googlenet, inception_v3, squeezenet                         2: inception and fire modules
        densenet, maxvit                                            2: dense blocks and stages, not the layers inside
        vgg, vgg_bn (5 layers), alexnet (3 layers)                  3: stages

    Layers that one forward pass in eval mode never calls (auxiliary heads), or calls more than once (shared weights),
    have no one feature and are left out. The order comes from tracing that pass symbolically: nothing is run or
    changed. Where the pass cannot be traced, one dry run on a blank image of `image_shape` (C, H, W) gives the order.

    before_activation: the value before the last activation, known for all rules but 2.
    Raises ValueError when no rule fits, when the order cannot be found, or where `before_activation` is not known: then
    write the list by hand, of any module paths. And the errors of `check_model`.
    """
    check_model(model)
    if hasattr(model, "_orig_mod"):  # what torch.compile returns: a shell around the model, which it holds by this name
        original = candidate_layers(model._orig_mod, before_activation=before_activation, image_shape=image_shape)
        return [f"_orig_mod.{layer}" for layer in original]
    if hasattr(model, "candidate_layers"):
        return model.candidate_layers(before_activation)
    kind = type(model).__name__
    if blocks := _repeated_blocks(model, image_shape):
        if before_activation:
            raise ValueError(f"the value before the last activation has no name in {kind}: pass layers by hand")
        return blocks
    stages = _called_once(model, _stage_outputs(model, before_activation), image_shape)
    layers = stages if len(stages) >= 3 else _weight_layers(model, before_activation, image_shape)
    if len(layers) < 2:
        parts = ", ".join(name for name, _ in model.named_children()) or "(nothing)"
        raise ValueError(f"{kind} has no two blocks or layers that run once each: pass layers by hand, from {parts}")
    return layers


def _repeated_blocks(model: nn.Module, image_shape: tuple[int, int, int] | None) -> list[str]:
    """Rule 2; [] if it does not fit."""
    for weight_layers in (2, 1):
        level = {model: ""}
        while level := _level_below(level):
            # By class, not by instance: the first MBConv of some EfficientNets holds one convolution only.
            deep = {type(part) for part in level if _n_weights(part) >= weight_layers}
            count = Counter(type(part) for part in level)
            if not any(count[kind] >= 2 for kind in deep):
                continue
            watched = {name: part for part, name in level.items() if type(part) in deep}
            called = _called_once(model, list(watched), image_shape)
            repeated = [name for name in called if count[type(watched[name])] >= 2]
            if len(repeated) >= 2:
                return called[called.index(repeated[0]) : called.index(repeated[-1]) + 1]
    return []


def _level_below(level: dict[nn.Module, str]) -> dict[nn.Module, str]:
    """The composite modules below those of `level`, each with the first of its paths."""
    below: dict[nn.Module, str] = {}
    for module, path in level.items():
        for part, part_path in _composite_modules(module, path):
            below.setdefault(part, part_path)
    return below


def _composite_modules(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The outermost modules below `module` that are made of others, looking through plain containers."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if _is_plain_container(child):
            yield from _composite_modules(child, child_path)
        elif not _is_one_layer(child):
            yield child, child_path


def _is_plain_container(module: nn.Module) -> bool:
    """Whether it only holds others. A subclass with a forward of its own (torchvision's dense block) does more."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in containers)


def _is_one_layer(module: nn.Module) -> bool:
    """Whether there are no modules inside that a hook could see."""
    # Attention holds a Linear that never runs, and returns a pair; parametrizations (weight norm) belong to a weight.
    opaque = isinstance(module, (nn.MultiheadAttention, torch.jit.ScriptModule))
    return opaque or not [name for name, _ in module.named_children() if name != "parametrizations"]


def _n_weights(module: nn.Module) -> int:
    return sum(parameter.ndim >= 2 for parameter in module.parameters())


def _family(layer: nn.Module) -> str:
    """The file of torch.nn.modules that defines the layer or the class it inherits from: "conv", "pooling", ..."""
    if isinstance(layer, nn.MultiheadAttention):  # in the file "activation"
        return "attention"
    homes = [kind.__module__ for kind in type(layer).__mro__]
    return next((home.split(".")[-1] for home in homes if home.startswith("torch.nn.modules.")), "")


def _is_weight_layer(layer: nn.Module) -> bool:
    return _family(layer) in ("conv", "linear") and not _passes_on(layer)  # Identity is in the file "linear"


def _passes_on(layer: nn.Module) -> bool:
    """Whether it returns its input as it is, in eval mode."""
    return _family(layer) == "dropout" or isinstance(layer, nn.Identity)


def _finishes(layer: nn.Module, before_activation: bool) -> bool:
    """Whether it completes the weight layer that it follows."""
    normalizes = _family(layer) in ("batchnorm", "instancenorm", "normalization")
    return normalizes or (_family(layer) == "activation" and not before_activation)


def _stage_outputs(model: nn.Module, before_activation: bool) -> list[str]:
    """Rule 3: paths in order of declaration."""
    outputs = []
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for path, chain in model.named_modules():
        if not isinstance(chain, nn.Sequential):
            continue
        end, after_convolution = None, False
        for name, layer in chain._modules.items():  # named_children leaves out one ReLU's second appearance
            if _passes_on(layer):
                continue
            follows = _finishes(layer, before_activation) and names[layer] == 1
            after_convolution = _family(layer) == "conv" or (after_convolution and follows)
            if after_convolution:
                end = f"{path}.{name}" if path else name
            if _family(layer) == "pooling" and end:
                outputs.append(end)
                end = None
        if end:
            outputs.append(end)
    return outputs


def _weight_layers(model: nn.Module, before_activation: bool, image_shape: tuple[int, int, int] | None) -> list[str]:
    """Rule 4, in execution order."""
    parts = {
        name: part
        for name, part in model.named_modules()
        if _is_weight_layer(part) or _finishes(part, before_activation)
    }
    calls = _calls(model, list(parts), image_shape)
    count = Counter(name for name, _ in calls)
    ends, open_end = [], False
    for name, follows in calls:
        if _is_weight_layer(parts[name]):
            ends.append(name)
            open_end = True
        elif open_end := open_end and follows and count[name] == 1:
            ends[-1] = name
    return [name for name in ends[:-1] if count[name] == 1]


def _called_once(model: nn.Module, layers: list[str], image_shape: tuple[int, int, int] | None) -> list[str]:
    """Those of `layers` that one forward pass calls once, in execution order."""
    called = [name for name, _ in _calls(model, layers, image_shape)]
    return [name for name in called if called.count(name) == 1]


def _calls(model: nn.Module, layers: list[str], image_shape: tuple[int, int, int] | None) -> list[tuple[str, bool]]:
    """The calls of `layers` in one forward pass: (name, whether its input is what the call before it returned)."""
    names = {model.get_submodule(layer): layer for layer in layers}
    calls: list[tuple[str, bool]] = []
    returned = None

    def note(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal returned
        calls.append((names[module], bool(inputs) and inputs[0] is returned))
        returned = output

    if not layers:
        return []
    kind = type(model).__name__
    if image_shape is not None:
        try:
            with undisturbed(model), contextlib.ExitStack() as hooks:
                for module in names:
                    hooks.callback(module.register_forward_hook(note).remove)
                model(blank_image(model, image_shape))
        except Exception as error:  # whatever a foreign network says of images that it cannot take
            size = "x".join(map(str, image_shape))
            raise ValueError(f"{kind} cannot take an image of {size} ({_first_line(error)})") from error
        return calls
    try:
        with undisturbed(model):
            _CallTracer(names, note).trace(_OneImage(model))
    except Exception as error:  # whatever a foreign forward pass raises when it is handed a symbol instead of an image
        reason = _first_line(error)
        raise ValueError(f"cannot trace the order of {kind}'s layers ({reason}): pass image_shape=(C, H, W)") from error
    return calls


class _OneImage(nn.Module):
    """The model with everything but the images left at its default (masks, flags), which a tracer would not do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.forward(images)  # past __call__, which `model.compile()` has replaced


class _CallTracer(torch.fx.Tracer):
    """Traces a model in eval mode symbolically and reports the calls of some modules, without looking into these."""

    def __init__(self, watched: Container[nn.Module], note: Callable[[nn.Module, tuple, Any], None]) -> None:
        super().__init__()
        self.watched, self.note = watched, note

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return module in self.watched or _is_one_layer(module) or not any(p in self.watched for p in module.modules())

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if _passes_on(module) and args:
            return args[0]
        output = super().call_module(module, forward, args, kwargs)
        if module in self.watched:
            self.note(module, args, output)
        return output


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    check_fit(model, state, path)
    model.load_state_dict(state)
    return model.eval(), about["facts"]


def check_fit(model: nn.Module, state: dict[str, Tensor], path: Path | str) -> None:
    """Raise ValueError naming the first entry in which the model and the state read from `path` differ."""
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

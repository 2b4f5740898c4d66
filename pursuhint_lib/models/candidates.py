"""Which layers of a network a hint may come from: found in any module, by four rules."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from pursuhint_lib.errors import first_line
from pursuhint_lib.features import blank_image, check_model, is_feature, undisturbed

ENOUGH = 8  # with fewer layers to choose from there is little to choose


def candidate_layers(
    model: nn.Module, *, before_activation: bool = False, image_shape: tuple[int, ...] | None = None
) -> list[str]:
    """The layers a hint may come from, as module paths in execution order. The first rule that fits decides:

    1. A model with a method `candidate_layers(before_activation)` answers itself. This package's networks do: the
       outputs of their residual or shuffle units (of a VGG, its stages), after the activation or before it.
    2. Repeated blocks: on one level, the modules of every class that appears there at least twice, and whatever runs
       between them. Plain containers (Sequential, ModuleList, ModuleDict) are looked through, and the outermost level
       with two such blocks wins. Blocks hold two weight layers or more; failing that, one. Where that gives fewer than
       ENOUGH blocks, and they are stages, which hold such blocks in turn: the blocks inside, should these be more.
    3. Stages: in a Sequential of plain layers, in each stretch between poolings the last convolution with the
       normalization and activation that follow it; where there are at least three. Fewer than ENOUGH: every
       convolution.
    4. Weight layers: every convolution and linear layer with the normalization and activation modules that follow it.
       Not the last one, which makes the model's own output.

    What the rules give for torchvision's families:

        (wide_)resnet, resnext, mobilenet, efficientnet, mnasnet,   2: residual blocks
        regnet, shufflenet, convnext
        vit, swin                                                   2: encoder blocks
        googlenet, inception_v3, squeezenet                         2: inception and fire modules
        densenet, maxvit                                            2: dense and MaxViT layers, inside four stages
        vgg, vgg_bn, alexnet                                        3: convolutions, inside five or three stages

    and for timm's convnext, swin, regnet, maxvit and others that hold their blocks in stages: these blocks. A warning
    says in one line where stages were looked into.

    Layers that one forward pass in eval mode never calls (auxiliary heads), or calls more than once (shared weights),
    have no one feature and are left out. The order comes from tracing that pass symbolically: nothing is run or
    changed. Where the pass cannot be traced, one dry run on a blank image of `image_shape` (C, H, W), or (C, L) of
    signals, gives the order; it leaves out what returns no feature, as `features.is_feature` has it.

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
    layers, inside = _repeated_blocks(model, image_shape)
    if layers and before_activation:
        raise ValueError(f"the value before the last activation has no name in {kind}: pass layers by hand")
    if not layers:
        layers = _called_once(model, _stage_outputs(model, before_activation), image_shape)
        if len(layers) < 3:
            layers = _weight_layers(model, before_activation, image_shape)
        elif len(layers) < ENOUGH:
            inside = _called_once(model, _stage_outputs(model, before_activation, every=True), image_shape)
    if len(inside) > len(layers):
        few = f"{kind} has {len(layers)} stages, fewer than {ENOUGH}"
        warnings.warn(
            f"{few}: candidates are the {len(inside)} layers inside, {inside[0]} to {inside[-1]}", stacklevel=2
        )
        return inside
    if len(layers) < 2:
        parts = ", ".join(name for name, _ in model.named_children()) or "(nothing)"
        raise ValueError(f"{kind} has no two blocks or layers that run once each: pass layers by hand, from {parts}")
    return layers


def _repeated_blocks(model: nn.Module, image_shape: tuple[int, ...] | None) -> tuple[list[str], list[str]]:
    """Rule 2, and what it gives inside, if these are stages and too few; [] where it does not fit."""
    for weight_layers in (2, 1):
        level = {model: ""}
        while level := _level_below(level):
            if blocks := _repeated_on(level, weight_layers, model, image_shape):
                few = len(blocks) < ENOUGH
                return blocks, _inside_stages(blocks, weight_layers, model, image_shape) if few else []
    return [], []


def _inside_stages(
    blocks: list[str], weight_layers: int, model: nn.Module, image_shape: tuple[int, ...] | None
) -> list[str]:
    """The repeated blocks inside `blocks`; [] if none of these is a stage, which holds two of a class: the block of a
    transformer, of one attention and one MLP, is none.
    """
    within = [_level_below({model.get_submodule(name): name}) for name in blocks]
    kinds = [Counter(type(part) for part in parts if _n_weights(part) >= weight_layers) for parts in within]
    if not any(count >= 2 for counts in kinds for count in counts.values()):
        return []
    below = {part: name for parts in within for part, name in parts.items()}
    try:
        return _repeated_on(below, weight_layers, model, image_shape)
    except ValueError as error:  # what calls the stages can be traced, the stages cannot
        warnings.warn(f"{error}, to have more candidates than {len(blocks)} stages", stacklevel=4)
        return []


def _repeated_on(
    level: dict[nn.Module, str], weight_layers: int, model: nn.Module, image_shape: tuple[int, ...] | None
) -> list[str]:
    """The repeated blocks among the modules of one level and what runs between them; [] if there are no two."""
    # By class, not by instance: the first MBConv of some EfficientNets holds one convolution only.
    deep = {type(part) for part in level if _n_weights(part) >= weight_layers}
    count = Counter(type(part) for part in level)
    if not any(count[kind] >= 2 for kind in deep):
        return []
    watched = {name: part for part, name in level.items() if type(part) in deep}
    called = _called_once(model, list(watched), image_shape)
    repeated = [name for name in called if count[type(watched[name])] >= 2]
    return called[called.index(repeated[0]) : called.index(repeated[-1]) + 1] if len(repeated) >= 2 else []


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


def _stage_outputs(model: nn.Module, before_activation: bool, every: bool = False) -> list[str]:
    """Rule 3: paths in order of declaration. every: of each convolution, not of the last of each stage."""
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
            if end and (_family(layer) == "pooling" or (every and _family(layer) == "conv")):
                outputs.append(end)
                end = None
            after_convolution = _family(layer) == "conv" or (after_convolution and follows)
            if after_convolution:
                end = f"{path}.{name}" if path else name
        if end:
            outputs.append(end)
    return outputs


def _weight_layers(model: nn.Module, before_activation: bool, image_shape: tuple[int, ...] | None) -> list[str]:
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


def _called_once(model: nn.Module, layers: list[str], image_shape: tuple[int, ...] | None) -> list[str]:
    """Those of `layers` that one forward pass calls once, in execution order."""
    called = [name for name, _ in _calls(model, layers, image_shape)]
    return [name for name in called if called.count(name) == 1]


def _calls(model: nn.Module, layers: list[str], image_shape: tuple[int, ...] | None) -> list[tuple[str, bool]]:
    """The calls of `layers` in one forward pass: (name, whether its input is what the call before it returned)."""
    names = {model.get_submodule(layer): layer for layer in layers}
    calls: list[tuple[str, bool]] = []
    returned = None

    def note(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal returned
        calls.append((names[module], bool(inputs) and inputs[0] is returned))
        returned = output

    def note_feature(module: nn.Module, inputs: tuple, output: Any) -> None:
        if is_feature(output, rows=1):
            note(module, inputs, output)

    if not layers:
        return []
    kind = type(model).__name__
    if image_shape is not None:
        try:
            with undisturbed(model), contextlib.ExitStack() as hooks:
                for module in names:
                    hooks.callback(module.register_forward_hook(note_feature).remove)
                model(blank_image(model, image_shape))
        except Exception as error:  # whatever a foreign network says of images that it cannot take
            size = "x".join(map(str, image_shape))
            raise ValueError(f"{kind} cannot take an image of {size} ({first_line(error)})") from error
        return calls
    try:
        with undisturbed(model):
            _CallTracer(names, note).trace(_OneImage(model))
    except Exception as error:  # whatever a foreign forward pass raises when it is handed a symbol instead of an image
        reason = first_line(error)
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

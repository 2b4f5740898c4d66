"""Activations by layer name, from any module.

A layer is addressed by its module path ("stage2.3"), and results are keyed by it, never by position. What is captured
is what the module *returned*: `relu` gives the map after the ReLU, the layer before it the map before the ReLU, even
where a later in-place operation overwrites that map; of a tuple or list, the first tensor in it. Maps come channels
first, see `_channel_axis`.
"""

import contextlib
import copy
import difflib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.errors import first_line
from pursuhint_lib.reading import logits_of


class FeatureExtractor:
    """Runs a model and hands out what some of its layers return.

        with FeatureExtractor(model, ["stage1.0", "stage3.2"]) as extract:
            logits, features = extract(images)

    The hooks are set at once and stay until the block ends (or `close`), so one extractor serves a whole training run,
    in train or eval mode, with or without autograd. They change nothing in the model's output, and are deaf whenever
    the model is called by other means.

    Cost: no copies, but of layers that a later in-place operation overwrites. Which those are is learnt from the first
    call, which copies every map once; from then on only maps that were overwritten before are copied, and all
    are checked (by their autograd version). What is left is the memory that all the maps take together: without a
    place in the cache, and new from the system at every batch, it can take longer than the hooks by far. Where a part
    of every map will do, such as its mean, `reduce` takes it while the map is still warm, and lets the map go.

    Whatever of the model is compiled (torch.compile) runs uncompiled here, since compiled code does not call hooks.

    Errors, one line each: those of `check_model`; ValueError for a layer that the model does not have, that is named
    twice, or that lies in a ScriptModule; while running, RuntimeError for a layer that never runs, runs more than once,
    or does not return a row per image, TypeError for one that does not return a tensor, ValueError where it cannot be
    known which axis holds the channels.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        check_model(model)
        self.model = model
        self._by_path = dict(model.named_modules(remove_duplicate=False))
        self.layers = _checked_layers(layers, [name for name in self._by_path if name])
        for layer in self.layers:
            if isinstance(self._by_path[layer], torch.jit.ScriptModule):
                raise ValueError(f"{layer}: lies in a torch.jit.ScriptModule, which no hook can look into")
        self._compiled = _is_compiled(self._by_path.values())
        self._overwritten: dict[str, bool] = {}  # learnt: which layers' maps do not outlive the forward pass
        self._wanted: set[str] = set()  # empty between calls: the hooks are deaf
        self._reduce: Callable[[Tensor], Tensor] | None = None
        self._captured: dict[str, _Captured] = {}
        self._handles = [self._hook(layer) for layer in self.layers]
        self._closed = False

    def __call__(
        self,
        images: Tensor,
        layers: Sequence[str] | None = None,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """The model's output, unchanged, and layer name -> tensor in execution order.

        layers: capture only these, a part of the extractor's layers. None: all of them.
        reduce: a function of one feature that returns what to keep of it, still with a row per image: `pool_features`.
        images (B, C, H, W); features (B, C, H, W) for maps, (B, C, 1, L) for signals (B, C, L), (B, T, D) for tokens,
        (B, D) for vectors.
        """
        if self._closed:
            raise RuntimeError("this FeatureExtractor is closed: call it inside its with block, or make a new one")
        wanted = self.layers if layers is None else _checked_layers(layers, self.layers)
        self._wanted, self._reduce = set(wanted), reduce
        try:
            with _uncompiled(self._compiled):
                output = self.model(images)
            missing = [layer for layer in wanted if layer not in self._captured]
            if missing:
                raise RuntimeError(f"{', '.join(missing)}: never called in the forward pass, so there is no feature")
            features = {layer: self._settled(layer, captured) for layer, captured in self._captured.items()}
            for layer, feature in features.items():
                _check_rows(layer, feature, images)
            return output, features
        finally:
            self._wanted, self._captured = set(), {}

    def close(self) -> None:
        """Remove all hooks. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"FeatureExtractor({type(self.model).__name__}, {len(self.layers)} layers)"

    def _hook(self, layer: str) -> torch.utils.hooks.RemovableHandle:
        module = self._by_path[layer]
        path = [self._by_path[layer.rsplit(".", n)[0]] for n in range(layer.count(".") + 1)]
        axis_of = functools.cache(functools.partial(_channel_axis, [*path, self.model]))

        # A closure, not a bound method: deepcopy(model) must not drag a copy of this extractor along.
        def capture(module: nn.Module, inputs: Any, output: Any) -> None:
            if layer not in self._wanted:
                return
            if layer in self._captured:
                raise RuntimeError(f"{layer}: called more than once in one forward pass, so its feature is ambiguous")
            output = _first_tensor(output)
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise TypeError(f"{layer}: returns {kind}, but a feature is one tensor: name a layer inside it")
            if output.ndim in (3, 4):
                _check_batch_first(layer, module, output)
                output = _channels_first(layer, output, axis_of(output.shape[1:]))
            if self._reduce is not None:
                output = self._reduce(output)  # maybe a view of the map, so what follows is as needful
            if output.is_inference():  # such tensors keep no version, so there is no other way to be sure
                self._captured[layer] = _Captured(output, None, output.clone())
            else:
                clone = output.clone() if self._overwritten.get(layer, True) else None
                self._captured[layer] = _Captured(output, output._version, clone)

        return module.register_forward_hook(capture)

    def _settled(self, layer: str, captured: "_Captured") -> Tensor:
        """The captured tensor if nothing has overwritten it since, else the copy. Remembers which it was."""
        if captured.version is None:
            return captured.clone
        overwritten = captured.tensor._version != captured.version
        if overwritten and captured.clone is None:
            # Only a model that changes its path between calls comes here.
            self._overwritten[layer] = True
            raise RuntimeError(f"{layer}: overwritten in place, but not so in earlier calls: extract this batch again")
        if self._reduce is None:  # what is kept of a map says nothing of the map
            self._overwritten[layer] = overwritten or self._overwritten.get(layer, False)
        return captured.clone if overwritten else captured.tensor


class _Captured(NamedTuple):
    tensor: Tensor
    version: int | None  # autograd's count of in-place writes at capture time
    clone: Tensor | None


@dataclass(frozen=True)
class Observation:
    """What a teacher says about one batch: its output, and layer name -> feature in execution order. No autograd."""

    output: Any
    features: dict[str, Tensor]

    @property
    def logits(self) -> Tensor:
        """(B, K), see `logits_of`. Raises TypeError for a network that returns something else."""
        return logits_of(self.output)


class FrozenTeacher(nn.Module):
    """A teacher that cannot learn.

    It holds its own copy of the model: in eval mode for ever, without gradients, and out of sight of `parameters()`,
    `state_dict()` and `train()`, its own and those of a module that holds it. So no optimizer or checkpoint can reach
    it, and whatever happens to the caller's model later does not change it. It does follow `to(device)`.

    model: any module. layers: the module paths that `observe` captures, see FeatureExtractor for the errors.
    Raises ValueError, one line, for a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        # Straight into __dict__: as an ordinary attribute the model would be registered, and its parameters shown.
        self.__dict__["model"] = _frozen_copy(model)
        self._extract = FeatureExtractor(self.model, layers)
        self._all_modules = list(self.model.modules())
        self.training = False

    @property
    def layers(self) -> list[str]:
        """The layers that `observe` captures, as given."""
        return list(self._extract.layers)

    def observe(
        self,
        images: Tensor,
        layers: Sequence[str] | None = None,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Observation:
        """Output and features of images (B, C, H, W), normalized as the teacher was trained.

        layers: capture only these, a part of the teacher's layers. None: all of them.
        reduce: what to keep of each feature, as in FeatureExtractor.
        """
        if any(module.training for module in self._all_modules):  # somebody reached in through `.model`
            self.model.eval()
        with torch.no_grad():  # not inference_mode: a student's loss may save these tensors for its backward pass
            output, features = self._extract(images, layers, reduce=reduce)
        return Observation(output, features)

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher stays in eval mode, also when the module that holds it is set to train."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)  # torch's one door for to(), cuda(), half(): the hidden model follows
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        return FrozenTeacher(self.model, self.layers)  # hooks of its own

    def extra_repr(self) -> str:
        return f"{type(self.model).__name__}, {len(self.layers)} layers"


def layer_table(model: nn.Module, layers: Sequence[str], image_shape: tuple[int, ...]) -> pd.DataFrame:
    """Where the layers sit in the model: one row per layer, in execution order, found by one dry run on a blank image.

    image_shape: (C, H, W), or (C, L) of signals. The run is in eval mode without autograd; each module's mode is put
    back, no buffer changes.

    Columns: layer; stage, from 1, which grows when (channels, height, width) differs from the layer before; depth, 1 to
    L; channels, height, width; stage_end, True for the last layer of its stage. Tokens (B, T, D) count as D channels on
    a map of 1 x T, as signals do, vectors (B, D) as D channels on a map of 1 x 1.

    Raises the errors of FeatureExtractor, and ValueError where a feature has another number of dimensions.
    """
    with undisturbed(model), FeatureExtractor(model, layers) as extract:
        _, features = extract(blank_image(model, image_shape))
    table = pd.DataFrame(
        [(layer, *_map_shape(layer, feature)) for layer, feature in features.items()],
        columns=["layer", "channels", "height", "width"],
    )
    shape = table[["channels", "height", "width"]]
    stage = (shape != shape.shift()).any(axis=1).cumsum()
    table.insert(1, "stage", stage)
    table.insert(2, "depth", range(1, len(table) + 1))
    table["stage_end"] = stage != stage.shift(-1)
    return table


def is_feature(output: Any, rows: int) -> bool:
    """Whether what a layer returned for so many images is a feature: a tensor, or the first one in a tuple or list,
    with a row for each image, as a map, a signal, tokens or a vector.
    """
    output = _first_tensor(output)
    return isinstance(output, Tensor) and 2 <= output.ndim <= 4 and len(output) == rows


def _first_tensor(output: Any) -> Any:
    """Of several things that a layer returns (its map, and the map's size, attention, class tokens) the first tensor,
    if there is one; anything else as it is.
    """
    several = output if isinstance(output, (tuple, list)) else ()
    return next((part for part in several if isinstance(part, Tensor)), output)


def _check_rows(layer: str, feature: Tensor, images: Tensor) -> None:
    """Raise RuntimeError where tokens come first, say, as from a transformer without batch_first."""
    if isinstance(images, Tensor) and feature.shape[:1] != images.shape[:1]:
        shape, n_images = tuple(feature.shape), len(images)
        raise RuntimeError(f"{layer}: returns shape {shape} for {n_images} images: a feature has a row for each")


def _map_shape(layer: str, feature: Tensor) -> tuple[int, int, int]:
    """(channels, height, width) of a feature with a batch in front."""
    match tuple(feature.shape):
        case (_, channels, height, width):
            return channels, height, width
        case (_, tokens, channels):
            return channels, 1, tokens
        case (_, channels):
            return channels, 1, 1
    raise ValueError(f"{layer}: returns shape {tuple(feature.shape)}; allowed are (B, C, H, W), (B, T, D) and (B, D)")


def check_model(model: nn.Module) -> None:
    """Raise TypeError for what is no plain module, ValueError for one whose weights are not there yet."""
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        raise TypeError(f"{kind} cannot be looked into: pass a torch.nn.Module (not scripted or traced by torch.jit)")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{kind}: {name} is lazy and has no value yet: run the model once on a batch")


def blank_image(model: nn.Module, image_shape: tuple[int, ...]) -> Tensor:
    """Zeros (1, C, H, W) or (1, C, L), on the device and of the type of the model's weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, *image_shape, device=weight.device, dtype=weight.dtype)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, without autograd and compiled code.

    Afterwards every module has its own mode and every buffer its own value again, also in a half-frozen model, and
    random numbers go on as before.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # eval mode does not stop a module that counts
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices), _uncompiled(_is_compiled(model.modules())):
        for module, _ in modes:
            module.training = False  # not by eval(), which some models answer by rewriting their weights
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)


def _is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is what torch.compile returned, or was told to `compile()` itself."""
    return any("_orig_mod" in module._modules or module._compiled_call_impl for module in modules)


def _uncompiled(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside the block torch.compile has no effect. One switch for all threads, so it is not turned needlessly."""
    return torch.compiler.set_stance("force_eager") if needed else contextlib.nullcontext()


def _frozen_copy(model: nn.Module) -> nn.Module:
    check_model(model)
    try:
        with torch.no_grad():  # else a ScriptModule inside would come back with weights that cannot be frozen
            twin = copy.deepcopy(model)
    except Exception as error:  # whatever a foreign module keeps that cannot be copied
        kind, reason = type(model).__name__, first_line(error)
        raise ValueError(f"{kind} cannot be copied, so it cannot be frozen ({reason})") from error
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin.eval()


def _channel_axis(path: Sequence[nn.Module], shape: torch.Size) -> int | None:
    """Which axis of a feature (B, *shape), of three or four axes, holds the channels: 1, -1, or None for unknown.

    path: the layer that returned it and the modules around it, from the inside out. Where one of them has an attribute
    `channel_axis`, that is the answer. Else the first of them whose parts tell: convolutions have their channels first,
    LayerNorm and Linear last, and the axis that is as wide as one of them is theirs. Should both axes be, convolutions
    count before Linear layers, of which a squeeze-and-excitation on (B, C, H, W) has some, and for maps before
    LayerNorms, of which a ConvNeXt block has one; and LayerNorms before Linear layers, as in an MLP-Mixer. Recurrent
    layers count as LayerNorms do; a Linear layer alone may as well mix the positions of a (B, C, L) whose C is that of
    a convolution anywhere in the model: unknown. Of maps nobody tells anything of the channels are first, as in all of
    torch; of (B, C, L) or (B, T, D) it is unknown.
    """
    for module in path:
        if hasattr(module, "channel_axis"):
            return module.channel_axis
    second, end, space = shape[0], shape[-1], len(shape) - 1
    of_model = _convolved(path[-1], space)
    for module in path:
        parts = list(module.modules())
        linear = [part for part in parts if isinstance(part, nn.Linear)]
        # By attribute, for RMSNorm; and LayerNorm2d inherits from LayerNorm, but has its channels first.
        norms = [part for part in parts if hasattr(part, "normalized_shape") and "2d" not in type(part).__name__]
        first = _convolved(module, space)
        normalized = {part.normalized_shape[-1] for part in norms}
        for part in parts:
            if isinstance(part, nn.RNNBase) and space == 1:
                normalized |= {part.input_size, (part.proj_size or part.hidden_size) * (1 + part.bidirectional)}
        last = normalized | {width for part in linear for width in (part.in_features, part.out_features)}
        if second in first:
            if space > 1 or end not in normalized:
                return 1
        elif end in (normalized if second in last else last):
            return None if space == 1 and second in of_model and end not in normalized else -1
    if space == 1 and end in last and not first:  # of the whole model: nothing in it has channels first
        return -1
    return 1 if space > 1 else None


def _convolved(module: nn.Module, space: int) -> set[int]:
    """How many channels the module's convolutions over so many axes take and return."""
    convolutions = (part for part in module.modules() if isinstance(part, nn.modules.conv._ConvNd))
    alike = [part for part in convolutions if len(part.kernel_size) == space]
    return {width for part in alike for width in (part.in_channels, part.out_channels)}


def _channels_first(layer: str, feature: Tensor, axis: int | None) -> Tensor:
    """(B, C, H, W) of (B, H, W, C), and (B, C, 1, L) of a signal (B, C, L). Tokens (B, T, D) stay as they are."""
    if axis not in (1, -1):
        raise ValueError(
            f"{layer}: returns shape {tuple(feature.shape)}, and which axis holds the channels is not known: set "
            "channel_axis = 1 or -1 on that module or on the model"
        )
    if feature.ndim == 3:
        return feature.unsqueeze(2) if axis == 1 else feature
    return feature.permute(0, 3, 1, 2) if axis == -1 else feature


def _check_batch_first(layer: str, module: nn.Module, feature: Tensor) -> None:
    """Raise RuntimeError where a row may be a token as well as an image, which `_check_rows` cannot notice."""
    alike = feature.ndim == 3 and feature.shape[0] == feature.shape[1] > 1
    if alike and any(getattr(part, "batch_first", True) is False for part in module.modules()):
        raise RuntimeError(
            f"{layer}: returns as many tokens as images and is not batch_first, so which comes first is not known: "
            "take another batch size"
        )


def _checked_layers(layers: Sequence[str], known: list[str]) -> list[str]:
    """`layers` as a list, each of them among `known`, none twice. Raises ValueError with one line."""
    if isinstance(layers, str):
        raise ValueError(f"layers must be a list of names, not the name {layers!r}: write [{layers!r}]")
    layers = list(layers)
    for layer in layers:
        if layer not in known:
            nearest = difflib.get_close_matches(layer, known, n=3, cutoff=0.0)
            raise ValueError(f"there is no layer {layer!r}; the nearest names are {', '.join(nearest) or '(none)'}")
        if layers.count(layer) > 1:
            raise ValueError(f"layer {layer!r} is named twice: name each layer once")
    return layers

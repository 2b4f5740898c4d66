"""How this machine computes, and whether it computes rightly.

    python -m pursuhint_lib.arithmetic [NETWORK ...]    check the package's networks (all of them) on this machine

Kernels of convolutions differ from one kind of CPU to another, and some are faulty on some of them. So the memory
format is chosen by a rule that names the known fault, and before a study trains anything, the gradients of its own
networks are compared with float64, layer by layer.
"""

import contextlib
import copy
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Relative error that a gradient may have, by precision: some hundred times what rounding leaves in one layer.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
ALLOWED_TF32 = 5e-3  # of float32 on CUDA, where cuDNN's convolutions round their inputs to ten bits, if allowed to
BLOCK = 16  # channels that oneDNN computes at a time with AVX-512; with AVX2 8
PIXELS = 2**13  # of the images that a check looks at: 8 of 32 x 32, 128 of 8 x 8


class WrongArithmetic(ArithmeticError):
    """This machine computes a layer wrongly."""


def suited_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format in which `model` is trained on `device`: channels last, if that is safe.

    On a CPU channels last is the faster one for nearly all networks (measured: reports/bench/memory_format.md, so far
    on AVX2). But there oneDNN's weight gradient of a strided 1x1 convolution of fewer input channels than its block
    (of one group; a single channel is fine) writes past a buffer: with one thread the heap is damaged, with several the
    gradient is wrong (oneDNN issue 6035; seen with torch 2.15.0 and its oneDNN 3.13.3 on AVX2, not in the contiguous
    format). A model that has such a layer is contiguous as a whole, on every CPU alike, so that machines stay
    comparable. This rule can go when every torch that is allowed here brings a oneDNN with the mend.

    A strided 1x1 convolution that is no `nn.Conv2d` (a call of `torch.nn.functional.conv2d`) is not seen.
    """
    return torch.contiguous_format if _faulty_layers(model, device) else torch.channels_last


def _faulty_layers(model: nn.Module, device: torch.device) -> list[nn.Module]:
    """Layers that must not compute in channels last there, see `suited_format`."""
    return [
        layer
        for layer in (model.modules() if device.type == "cpu" else ())
        if isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.groups == 1
        and 1 < layer.in_channels < BLOCK
    ]


@contextlib.contextmanager
def contiguous_where_faulty(models: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the block, layers that must not compute in channels last are given contiguous inputs, even where the
    network itself has made them otherwise (by a permutation around a LayerNorm, say).
    """
    with contextlib.ExitStack() as hooks:
        for layer in (layer for model in models for layer in _faulty_layers(model, device)):
            handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
            hooks.callback(handle.remove)
        yield


def laid_out(images: Tensor, model: nn.Module) -> Tensor:
    """Images (B, C, H, W) in the memory format that suits `model`; of other shapes, as they are. A layer computes in
    channels last when its input or its weight is laid out so.
    """
    return images.to(memory_format=suited_format(model, images.device)) if images.ndim == 4 else images


def facts(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the last bits of a training: device, precision, threads, memory format, and the CPU's instructions
    that torch uses (with ONEDNN_MAX_CPU_ISA, where that limits them for convolutions).
    """
    about = {"device": device.type, "precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    about["memory_format"] = str(suited_format(model, device)).removeprefix("torch.")
    if device.type == "cpu":
        about["cpu_capability"] = cpu_capability()
    return about


def cpu_capability() -> str:
    """Instructions that torch computes with on this CPU: "AVX2", "AVX512", "AVX512 (oneDNN: AVX2)"."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return torch.backends.cpu.get_cpu_capability() + (f" (oneDNN: {limit})" if limit else "")


def gradient_errors(
    model: nn.Module, images: Tensor, dtype: torch.dtype = torch.float32, known: set[tuple] | None = None
) -> dict[str, float]:
    """Layer -> how far its output and gradients are from float64, in train mode, in `dtype` and the model's own memory
    format: the largest of |computed - float64| / |float64| over the output, the gradient of the input and those of the
    weights (Euclidean norms), for a random gradient of the output.

    Each layer is compared on the very input that it has in the model, so no error comes from the layers before it, and
    no kink of an activation makes rounding look like a fault. Layers: every module with weights of its own that takes
    one floating-point tensor and returns one. Of layers that are computed alike (same settings and
    same shape and layout of the input) the first is looked at; `known` keeps them from call to call. `images` (B, C, H,
    W) on the model's device. The model is left as it was.
    """
    known = set() if known is None else known
    errors: dict[str, float] = {}
    network = copy.deepcopy(model).train()

    def compare(name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.is_floating_point() for t in (*inputs, output)):
            return
        x = inputs[0].detach()
        weights = tuple((weight.shape, weight.stride()) for weight in layer.parameters())
        alike = (repr(layer), weights, x.shape, x.stride(), x.dtype, dtype, x.device, torch.get_num_threads())
        if alike not in known:
            known.add(alike)
            errors[name] = _error(layer, x, dtype)

    for name, layer in network.named_modules():
        if list(layer.parameters(recurse=False)):
            layer.register_forward_hook(lambda layer, inputs, output, name=name: compare(name, layer, inputs, output))
    with torch.random.fork_rng(), torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        torch.manual_seed(0)
        network(images)
    return errors


def _error(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
    """See `gradient_errors`. The layer's own `forward` is called, past its hooks."""
    single, exact = copy.deepcopy(layer).requires_grad_(), copy.deepcopy(layer).double().requires_grad_()
    x_single, x_exact = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.enable_grad():
        y = single.forward(x_single)
        gradient = torch.randn_like(y)
        computed = _with_gradients(y, gradient, [x_single, *single.parameters()])
        with torch.autocast(x.device.type, enabled=False):
            true = _with_gradients(exact.forward(x_exact), gradient.double(), [x_exact, *exact.parameters()])
    # A gradient may be next to nothing beside the one that it comes from (of two images, batch norm's is zero).
    least = 1e-3 * float(gradient.double().norm())
    return max(
        float((a.double() - b).norm()) / max(float(b.norm()), least) for a, b in zip(computed, true, strict=True)
    )


def _with_gradients(y: Tensor, gradient: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    # Of a sum, for torch imports sympy, which takes seconds, to look at the shape of a gradient that it is given.
    return [y.detach(), *torch.autograd.grad((y * gradient).sum(), inputs, materialize_grads=True)]


def check_arithmetic(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare the gradients of `model`, layer by layer, with float64 on a batch of random images (C, H, W), as many of
    `batch_size` as have PIXELS pixels, at least 2. Takes less than two seconds for images of 32 x 32 or less, some more
    for larger ones. A kind of layer that was found right is not looked at again in this process.

    On a CPU it is looked at with two threads first, or more: with one, a kernel that writes past its buffer may give
    right numbers and end the process a little later.

    Raises WrongArithmetic, one line, for the layer that is furthest from float64, where that is more than is allowed.
    """
    tf32 = device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    allowed = ALLOWED_TF32 if tf32 else ALLOWED[dtype]
    n = min(batch_size, max(2, PIXELS // (image_shape[1] * image_shape[2])))
    images = torch.randn(n, *image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    model = model.to(device, memory_format=suited_format(model, device))
    threads, errors = torch.get_num_threads(), {}
    try:
        with contiguous_where_faulty([model], device):
            for count in dict.fromkeys((max(2, threads), threads) if device.type == "cpu" else (threads,)):
                torch.set_num_threads(count)
                found = gradient_errors(model, laid_out(images, model), dtype, _known)
                errors |= {layer: max(found[layer], errors.get(layer, 0.0), key=_order) for layer in found}
                if errors and max(map(_order, errors.values())) > allowed:
                    break
    finally:
        torch.set_num_threads(threads)
    worst = max(errors, key=lambda layer: _order(errors[layer]), default=None)
    if worst is not None and not errors[worst] <= allowed:
        _known.clear()
        about = ", ".join(f"{name} {value}" for name, value in facts(model, device, dtype).items())
        way_out = (
            "set ONEDNN_MAX_CPU_ISA=AVX, which takes other kernels," if device.type == "cpu" else "take device: cpu"
        )
        raise WrongArithmetic(
            f"this machine computes {worst} ({model.get_submodule(worst)}) wrongly: {errors[worst]:.1e} from float64, "
            f"allowed {allowed:.0e} ({about}); {way_out} or another version of torch"
        )


_known: set[tuple] = set()  # kinds of layers that this process has looked at


def _order(error: float) -> float:
    return error if error == error else float("inf")  # nan is as wrong as can be


def main(names: Sequence[str]) -> int:
    """Check networks for small images, with one thread and with several, and say what was found."""
    from pursuhint_lib.models import MODELS, build_model

    torch.set_num_threads(1)
    wrong = 0
    for name in names or MODELS:
        try:
            check_arithmetic(build_model(name, 10), (3, 32, 32), 16, torch.device("cpu"))
        except WrongArithmetic as error:
            print(f"{name}: {error}")
            wrong += 1
    print(
        f"{len(names or MODELS)} networks, {len(_known)} kinds of layers, {cpu_capability()}: {wrong or 'none'} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

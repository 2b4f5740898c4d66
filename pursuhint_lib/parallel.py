"""Several processes that train the same networks together.

Every process of a group draws the same batches, sees a part of each, and takes the step that the whole batch asks for:
torch's DistributedDataParallel brings the gradients together. What is decided on the way is decided by the first
process, which alone writes files. Outside of a group nothing here does anything.

What a process computes from its part alone: batch norm's statistics, unless they are synchronized; losses that relate
images to each other (of hints sp, cc, rkd and pkt, of logits dist); and hints that come from another image of the batch
("shuffled"). All else is that of the whole batch.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

_part: float | None = None  # this process's part of the present batch's images, while it is divided


def size() -> int:
    """Number of processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def join(device: torch.device) -> None:
    """Become one of the processes that torchrun has started. On GPUs each takes the one of its own number."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


# ---- What all agree on ----


def from_first(find: Callable[[], Any]) -> Any:
    """What `find` gives in the first process, for all; the others do not call it."""
    if size() == 1:
        return find()
    found = [find() if rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if size() > 1:
        dist.barrier()


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Each value, summed over the processes, which must have the same names in the same order."""
    if size() == 1:
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


# ---- Whose images are whose ----


def part_of(images: int) -> slice:
    """The rows of a batch of so many images that are this process's: no image is another's, some may have none."""
    return slice(images * rank() // size(), images * (rank() + 1) // size())


def training_part_of(images: int) -> slice:
    """As `part_of`; but a batch that does not give each process two images is seen whole by all.

    Batch norm cannot train on one image. As all then have the same gradients, their mean is that of the batch.
    """
    return part_of(images) if images >= 2 * size() else slice(0, images)


@contextlib.contextmanager
def divided(own: int, images: int) -> Iterator[None]:
    """Inside the block this process computes on `own` of a batch's `images`, see `training_part_of`."""
    global _part
    _part = own / images if own < images else None
    try:
        yield
    finally:
        _part = None


def counts_here() -> bool:
    """Whether this process's images are to be counted: of a batch that all see whole, the first process's are."""
    return _part is not None or rank() == 0


def part_of_mean(value: Tensor) -> Tensor:
    """Mean over this process's part of a divided batch -> what it adds to the mean over the whole batch."""
    return value if _part is None else value * _part


def batch_mean(values: Tensor) -> Tensor:
    """Means over this process's part of a divided batch -> over the whole batch. Without a gradient."""
    return values if _part is None else _summed(part_of_mean(values.detach()))


def batch_sum(values: Tensor) -> Tensor:
    """Sums over this process's part of a divided batch -> over the whole batch. Without a gradient."""
    return values if _part is None else _summed(values.detach())


def _summed(values: Tensor) -> Tensor:
    values = values.clone(memory_format=torch.contiguous_format)  # in the same order everywhere
    dist.all_reduce(values)
    return values


# ---- Gradients ----


def losses_of(learner: nn.Module) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    """f(batch, observation, progress) -> the terms of `learner.losses`, and the loss to go backward from.

    In a group the terms are means over this process's images; from the loss come gradients of the whole batch's. All
    processes go on with the first one's parameters and buffers. Raises ValueError for a learner that several processes
    cannot train.
    """
    if size() == 1:

        def losses(*inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
            terms = learner.losses(*inputs)
            return terms, terms["loss"]

        return losses

    alone = [type(module).__name__ for module in learner.modules() if getattr(module, "one_process", False)]
    if alone:
        raise ValueError(f"{alone[0]} remembers what each image was: train it with one process, not {size()}")
    part = _PartOfLoss(learner)
    requires_grad = {parameter: parameter.requires_grad for parameter in learner.parameters()}
    learner.requires_grad_(True)  # also of parameters that learn at another time: only these are looked after
    together = DistributedDataParallel(part, find_unused_parameters=True)
    together.broadcast_buffers = False  # only now: at every step it would undo what others' batch norms have seen
    for parameter, required in requires_grad.items():
        parameter.requires_grad_(required)

    def divided_losses(*inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
        loss = together(*inputs)
        return part.terms, loss

    return divided_losses


class _PartOfLoss(nn.Module):
    """What this process adds to the loss. The terms stay here: torch takes all that is returned for a loss."""

    def __init__(self, learner: nn.Module):
        super().__init__()
        self.learner = learner

    def forward(self, *inputs: Any) -> Tensor:
        self.terms = self.learner.losses(*inputs)
        loss = self.terms["loss"]
        # torch will take the mean over the processes, whatever their numbers of images.
        return loss if _part is None else part_of_mean(loss) * size()


# ---- Batch norm ----


@contextlib.contextmanager
def synchronized_batch_norm(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, batch norm in train mode normalizes a divided batch by the statistics of the whole.

    The modules stay what they are, with their names and hooks: torch's SyncBatchNorm, which needs a GPU, would put
    others in their place, which nobody listens to.
    """
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm)]
    for norm in norms:
        norm.forward = MethodType(_synchronized, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class _Sum(torch.autograd.Function):
    """A tensor, summed over the processes. All of them use the sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _synchronized(norm: _BatchNorm, x: Tensor) -> Tensor:
    """(B, C, ...) -> the same, normalized by mean and variance of all processes' images."""
    if _part is None or not norm.training:
        return type(norm).forward(norm, x)
    exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    others = [dim for dim in range(x.ndim) if dim != 1]
    column = [1, -1] + [1] * (x.ndim - 2)  # (C,) beside x
    n = _summed(torch.tensor(x.numel() / x.shape[1], dtype=torch.float64, device=x.device)).to(exact.dtype)
    mean = _Sum.apply(exact.sum(others)) / n
    centered = exact - mean.view(column)
    variance = _Sum.apply(centered.square().sum(others)) / n
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            rate = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            norm.running_mean += rate * (mean - norm.running_mean)
            norm.running_var += rate * (variance * n / (n - 1) - norm.running_var)
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight
    y = centered * scale.view(column)
    if norm.affine:
        y = y + norm.bias.view(column)
    return y.to(x.dtype)


@torch.no_grad()
def average_batch_norm(module: nn.Module) -> None:
    """Give all processes the mean of what their batch norms have seen, where they are not synchronized."""
    if size() > 1:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm) and norm.track_running_stats:
                for statistic in (norm.running_mean, norm.running_var):
                    statistic.copy_(_summed(statistic / size()))

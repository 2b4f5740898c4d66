"""What networks and arms cost.

Sizes and counts are facts of the networks and equal in every run. Times and memory are measured, and belong to the
machine they were measured on.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pursuhint_lib.arithmetic import laid_out, suited_format
from pursuhint_lib.arms import Arm
from pursuhint_lib.evaluation import count_macs, count_parameters
from pursuhint_lib.learners import Distilled
from pursuhint_lib.provenance import hardware
from pursuhint_lib.training import autocast

LARGE_BATCH = 64
LONGEST_PASS = 1.0  # seconds: `speed_table` takes a smaller batch rather than wait longer for one pass


def cost_table(networks: Mapping[str, tuple[str, nn.Module]], image_shape: tuple[int, int, int]) -> pd.DataFrame:
    """One row per network: role, network (its name), parameters, macs (multiply-accumulates of one image (C, H, W)).

    networks: role -> (name, model).
    """
    rows = [
        {
            "role": role,
            "network": name,
            "parameters": count_parameters(model),
            "macs": count_macs(model, image_shape),
        }
        for role, (name, model) in networks.items()
    ]
    return pd.DataFrame(rows, columns=["role", "network", "parameters", "macs"])


def adapter_table(
    arms: Sequence[Arm], student: nn.Module, teacher_table: pd.DataFrame, student_table: pd.DataFrame, labels: Tensor
) -> pd.DataFrame:
    """What each arm needs in training beyond the student, and throws away afterwards.

    student: any network of the study's kind. teacher_table, student_table: see `features.layer_table`. labels: (N,) of
    all training images, as methods remember each of them. Columns: arm; adapter_parameters, trainable ones; state_bytes
    of what adapters remember without a gradient (their buffers: banks of embeddings, batch-norm statistics). A redrawn
    hint has an adapter for every pair that can be drawn. Raises what `learners.Distilled` raises.
    """
    costs = {}
    for arm in arms:
        costs[arm.name] = (
            costs[arm.same_as] if arm.same_as else _adapter_cost(arm, student, teacher_table, student_table, labels)
        )
    rows = [(name, *cost) for name, cost in costs.items()]
    return pd.DataFrame(rows, columns=["arm", "adapter_parameters", "state_bytes"])


def _adapter_cost(
    arm: Arm, student: nn.Module, teacher_table: pd.DataFrame, student_table: pd.DataFrame, labels: Tensor
) -> tuple[int, int]:
    learner = Distilled(
        student,
        ce_weight=1.0,
        logit_loss=arm.logit_loss,
        logit_weight=1.0,
        temperature=1.0,
        hints=arm.hints,
        teacher_table=teacher_table,
        student_table=student_table,
        labels=labels,
    )
    learner.close()
    parameters = sum(p.numel() for p in learner.adapters.parameters() if p.requires_grad)
    return parameters, sum(b.nbytes for b in learner.adapters.buffers())


def speed_table(
    networks: Mapping[str, nn.Module], image_shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> pd.DataFrame:
    """Each network (role -> model) on one image and on a batch: one row per role and batch, see `measure_speed`.

    The batch is LARGE_BATCH images, or the largest power of two that takes the slowest network no longer than
    LONGEST_PASS seconds, at its time for one image; where that is 1, there are no rows of a batch.
    """
    single = {role: measure_speed(model, image_shape, 1, device, dtype) for role, model in networks.items()}
    slowest = max(row["latency_ms"] for row in single.values()) / 1000
    batch = LARGE_BATCH
    while batch * slowest > LONGEST_PASS:
        batch //= 2
    rows = []
    for role, model in networks.items():
        rows.append({"role": role, **single[role]})
        if batch > 1:
            rows.append({"role": role, **measure_speed(model, image_shape, batch, device, dtype)})
    return pd.DataFrame(rows)


def measure_speed(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 0.3,
) -> dict[str, Any]:
    """Time and memory of one forward pass of `batch` random images (C, H, W), in eval mode, in `suited_format`, under
    `training.autocast` with dtype, in inference mode, with torch's present number of threads. `model` is left as it is.

    seconds: for how long to measure, after a warm-up; one pass is measured at least. Returns batch; latency_ms of a
    pass, the median over blocks of passes (`torch.utils.benchmark.Timer.blocked_autorange`), with latency_low and
    latency_high, the quartiles, in ms too; images_per_second, by the median; peak_memory_bytes; device (its
    model); threads; precision.

    peak_memory_bytes is the most that the pass held at one time beyond what was there before it: activations, without
    the weights and the images. On CUDA it is what torch's allocator counts, with the workspaces of its libraries. On a
    CPU it is the sum over the tensors that are alive at one time, as torch's MemTracker sees them: without what an
    operator allocates and frees within itself.
    """
    # Its import tells wherever there is CUDA's compiler and no GPU that it found no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    network = copy.deepcopy(model).eval().to(device, memory_format=suited_format(model, device))
    images = torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(0))
    images = laid_out(images.to(device), network)
    threads = torch.get_num_threads()
    with torch.inference_mode(), autocast(device, dtype):
        timer = Timer("network(images)", globals={"network": network, "images": images}, num_threads=threads)
        times = timer.blocked_autorange(min_run_time=seconds).times
        peak = _peak_memory(network, images)
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "batch": batch,
        "latency_ms": 1000 * median,
        "latency_low": 1000 * low,
        "latency_high": 1000 * high,
        "images_per_second": batch / median,
        "peak_memory_bytes": peak,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"],
        "threads": threads,
        "precision": str(dtype).removeprefix("torch."),
    }


def _peak_memory(network: nn.Module, images: Tensor) -> int:
    """See `measure_speed`. torch's profiler would count on a CPU too, but its start takes seconds and writes to stderr
    where there is no GPU.
    """
    if images.is_cuda:
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        network(images)
        return torch.cuda.max_memory_allocated(images.device) - before
    from torch.distributed._tools.mem_tracker import MemTracker  # takes seconds to import

    tracker = MemTracker()
    tracker.track_external(network, images)
    before = tracker.get_tracker_snapshot("current")[images.device]["Total"]
    with tracker:
        network(images)
    return tracker.get_tracker_snapshot("peak")[images.device]["Total"] - before

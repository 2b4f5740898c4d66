"""Channels last against the contiguous format, one training step of a network at a time: `make bench`.

Written to reports/bench/memory_format.md. Nothing is asserted about time: a loaded machine must not turn a test red.
"""

import copy
import statistics
import time

import pytest
import torch
from torch import nn

from pursuhint_lib.arithmetic import cpu_capability, suited_format
from pursuhint_lib.models import build_model
from pursuhint_lib.provenance import hardware, versions
from pursuhint_lib.storage import report_folder, written_whole
from pursuhint_lib.training import torch_threads

# Networks without the layer for which `suited_format` gives up channels last: there it cannot be timed safely.
NETWORKS = {
    "resnet8": (3, 32, 32),
    "resnet32": (1, 8, 8),
    "wrn_16_2": (3, 32, 32),
    "vgg8_cifar": (3, 32, 32),
    "mobilenet_v2_cifar": (3, 32, 32),
    "shufflenet_v2_cifar": (3, 32, 32),
    "resnet18": (3, 64, 64),
}
BATCH, ROUNDS = 64, 7
LINES: list[str] = []


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_in_both_formats(name):
    shape = NETWORKS[name]
    network = build_model(name, 10, channels=shape[0]).train()
    assert suited_format(network, torch.device("cpu")) == torch.channels_last
    steps = [_step(network, shape, form) for form in (torch.contiguous_format, torch.channels_last)]
    ratios = []
    with torch_threads(1):
        for _ in range(ROUNDS):
            contiguous, last = (_seconds(step) for step in steps)
            ratios.append(last / contiguous)
    ratios = ratios[1:]  # the first warms up
    size = " x ".join(map(str, shape))
    LINES.append(f"| {name} | {size} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


def _step(network, shape, form):
    network = copy.deepcopy(network).to(memory_format=form)
    images = torch.randn(BATCH, *shape).contiguous(memory_format=form)
    labels = torch.arange(BATCH) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def _seconds(step):
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def test_write_the_table():
    lines = [
        "# Memory formats on a CPU",
        "",
        f"Time of one training step (forward, backward, SGD) of {BATCH} images in channels last, over that in the",
        f"contiguous format: median and range of {ROUNDS - 1} rounds, in each of which both had their turn. Float32,",
        "one thread. Below 1, channels last is faster. `arithmetic.suited_format` takes it wherever it is safe.",
        "",
        "| network | image | ratio | range |",
        "|---|---|---|---|",
        *LINES,
        "",
        f"{hardware()['cpu']}, {cpu_capability()}; torch {versions()['torch']}.",
    ]
    path = report_folder("bench") / "memory_format.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert LINES

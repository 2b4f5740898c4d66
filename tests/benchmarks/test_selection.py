"""Speed and memory of layer profiling as ratios to plain references, measured in one go: `make bench`.

Written to reports/bench/selection.md. Nothing is asserted about time: a loaded machine must not turn a test red.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.models import build_model, candidate_layers
from pursuhint_lib.profiling import LayerProfile, profile_layers
from pursuhint_lib.provenance import hardware, versions
from pursuhint_lib.storage import report_folder, written_whole

IMAGES = 10_000
WIDTHS = [16] * 18 + [32] * 18 + [64] * 18  # of ResNet-110's 54 residual blocks
PAIRS = Counter(itertools.combinations_with_replacement(WIDTHS, 2))
PAIRS.subtract({(width, width): WIDTHS.count(width) for width in set(WIDTHS)})  # no layer with itself
THREADS = os.cpu_count() or 1
LINES: dict[str, list[str]] = {"pairs": [], "pass": [], "memory": []}


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def features():
    """Layer -> (N, D_l) float64, related to their neighbors as layers are."""
    generator = torch.Generator().manual_seed(0)
    layers, state = {}, torch.randn(IMAGES, 64, generator=generator, dtype=torch.float64)
    for number, width in enumerate(WIDTHS):
        state = state + 0.3 * torch.randn(IMAGES, 64, generator=generator, dtype=torch.float64)
        mix = torch.randn(64, width, generator=generator, dtype=torch.float64)
        layers[f"block{number}"] = (state @ mix).relu()
    return layers


# ---- Plain references: one pair at a time, as the papers write them ----


def gram_cka(k, l):
    """Biased HSIC of two N x N kernel matrices, centered by their means."""
    k, l = (g - g.mean(0) - g.mean(1)[:, None] + g.mean() for g in (k, l))
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def linear_reference(x, y):
    return gram_cka(x @ x.T, y @ y.T)


def rbf_reference(x, y):
    def gram(z):
        squares = (z * z).sum(1)
        distances = squares[:, None] + squares - 2 * z @ z.T
        return np.exp(-distances / (2 * np.median(distances)))

    return gram_cka(gram(x), gram(y))


def qr_reference(x, y):
    q_x, q_y = (np.linalg.qr(z - z.mean(0))[0] for z in (x, y))
    return np.linalg.norm(q_y.T @ q_x) ** 2 / min(x.shape[1], y.shape[1])


def seconds(do, repeats=1):
    """Seconds that do() takes, the least of some tries, and what it gave."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = do()
        taken.append(time.perf_counter() - started)
    return min(taken), result


@pytest.mark.parametrize(
    ("metric", "reference", "how", "repeats"),
    [
        ("linear_cka", linear_reference, "two N x N Gram matrices", 1),
        ("rbf_cka", rbf_reference, "two N x N Gram matrices", 1),
        ("r2_cca", qr_reference, "two QR decompositions", 3),
    ],
)
def test_all_pairs_against_one_pair_at_a_time(features, metric, reference, how, repeats):
    # From pooled features to the table, so that making the moments counts.
    ours, table = seconds(lambda: LayerProfile.from_features(features).similarity(metric), repeats)
    of_width = {width: [name for name, rows in features.items() if rows.shape[1] == width] for width in set(WIDTHS)}
    scaled = timed = 0
    for (a, b), count in PAIRS.items():
        first, second = of_width[a][0], of_width[b][-1]
        x, y = features[first].numpy(), features[second].numpy()
        taken, value = seconds(lambda x=x, y=y: reference(x, y), repeats)
        assert table.loc[first, second] == pytest.approx(value, rel=1e-8)
        scaled, timed = scaled + taken * count, timed + 1
    per_pair = scaled / sum(PAIRS.values())
    LINES["pairs"].append(
        f"| `{metric}` | {how} | {per_pair:.3g} | {scaled:,.0f} | {ours:.2f} | {scaled / ours:,.0f} |"
    )


def test_one_pass_against_the_bare_forward_pass():
    network = build_model("resnet110", 100).eval()
    teacher = FrozenTeacher(network, candidate_layers(network))
    images = torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = [type("Batch", (), {"images": part}) for part in images.split(250)]

    def bare():
        with torch.no_grad():
            for batch in batches:
                teacher.model(batch.images)

    rounds = []
    for _ in range(6):  # in turn, because a machine's speed drifts; the first round warms up
        rounds.append((seconds(bare)[0], seconds(lambda: profile_layers(teacher, batches))[0], seconds(bare)[0]))
    ratios = [profiled / ((before + after) / 2) for before, profiled, after in rounds[1:]]
    plain = statistics.median(before for before, _, _ in rounds[1:])
    ratio = statistics.median(ratios)
    LINES["pass"].append(
        f"| {len(images)} | {plain:.2f} | {100 * (ratio - 1):+.1f} % | {100 * (min(ratios) - 1):+.1f} to "
        f"{100 * (max(ratios) - 1):+.1f} % |"
    )


MEMORY = """
import re, torch
from pathlib import Path
from types import SimpleNamespace
from pursuhint_lib.profiling import profile_layers
widths, n, options = {widths}, {n}, {options}
class Teacher:
    layers = [str(i) for i in range(len(widths))]
    def observe(self, images, reduce):
        return SimpleNamespace(features={{str(i): torch.randn(len(images), d) for i, d in enumerate(widths)}})
# Not getrusage: its peak is also that of the process which this one was forked from.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
torch.ones(1000, 1000, dtype=torch.float64) @ torch.ones(1000, 1000, dtype=torch.float64)
before = peak()
profile_layers(Teacher(), (SimpleNamespace(images=torch.zeros(250)) for _ in range(n // 250)), **options)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize(
    ("kept", "options"),
    [
        ("features of 10 000 images (default)", {}),
        ("moments only", {"keep_images": 0}),
        ("moments of 16 chunks", {"keep_images": 0, "chunks": 16}),
    ],
)
def test_peak_memory_for_few_and_many_images(kept, options):
    peaks = []
    for n in (10_000, 50_000):
        script = MEMORY.format(widths=WIDTHS, n=n, options=options)
        peaks.append(float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout))
    LINES["memory"].append(f"| {kept} | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] / peaks[0]:.2f} |")


def test_write_the_table():
    lines = [
        "# Layer profiling and selection",
        "",
        "Everything was measured in one run on one machine; the ratios are what counts.",
        "",
        f"## All pairs of {len(WIDTHS)} layers of ResNet-110's widths, {IMAGES:,} images",
        "",
        "Ours: seconds from pooled features to the whole table, moments included. Reference: numpy, one pair at a",
        f"time; one pair of each of the {len(PAIRS)} combinations of widths was timed and scaled to all",
        f'{sum(PAIRS.values()):,} pairs, so the column "reference, all pairs" is an estimate. Both gave the same',
        "numbers for the timed pairs, to 1e-8 relative.",
        "",
        "| metric | reference | one pair (s) | reference, all pairs (s) | ours (s) | ratio |",
        "|---|---|---|---|---|---|",
        *LINES["pairs"],
        "",
        "## One pass over the images against the bare forward pass",
        "",
        "ResNet-110, 32 x 32 pixels, 54 candidate layers, float32, batches of 250. Median and range of five rounds,",
        "each with the bare pass before and after the profiled one. Profiling includes pooling and the moments.",
        "",
        "| images | bare pass (s) | profiling costs on top | range |",
        "|---|---|---|---|",
        *LINES["pass"],
        "",
        "## Peak memory of a profile, beyond the process before it (MB)",
        "",
        f"The {sum(WIDTHS)} channels of ResNet-110's blocks; the features are drawn at random in batches of 250,",
        "without a network, so that only the profile counts.",
        "",
        "| what is kept | 10 000 images | 50 000 images | ratio |",
        "|---|---|---|---|",
        *LINES["memory"],
        "",
        f"{hardware()['cpu']}, {hardware()['cores']} cores, {THREADS} threads; torch {versions()['torch']}.",
    ]
    path = report_folder("bench") / "selection.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert all(LINES.values())

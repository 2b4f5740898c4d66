"""Speed of the lockstep loop as a ratio to separate runs, measured in one go: `make bench`.

Written to reports/bench/lockstep.md. Nothing is asserted about time: a loaded machine must not turn a test red.
"""

import time

import pytest
import torch

from pursuhint_lib.arms import Distillation, study_arms
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import select_hint_points
from pursuhint_lib.models import candidate_layers
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.provenance import hardware, versions
from pursuhint_lib.storage import report_folder, written_whole
from pursuhint_lib.study import fresh_network, study_images
from pursuhint_lib.training import Schedule, fit

ROWS = []


@pytest.fixture(scope="module")
def setting():
    params = DistillStudents(
        study="bench", teacher="resnet32", student="resnet8_w4", seeds=[0], methods=["at", "fitnet"]
    )
    images = study_images(params)
    networks = [fresh_network(name, images, 0) for name in (params.teacher, params.student)]
    tables = [layer_table(network, candidate_layers(network), images.shape) for network in networks]
    teacher = FrozenTeacher(networks[0], list(tables[0]["layer"]))
    setting = Distillation(params, images, teacher, *tables, torch.device("cpu"), torch.float32)
    points = {
        f"{name}_{seed}": select_hint_points(name, None, tables[0], 3, seed)
        for name, seed in (("stage_ends", 0), ("uniform", 0), ("random", 0), ("random", 1))
    }
    return setting, study_arms(points, params.methods, *tables)[1:]


def seconds(setting, arms, **options):
    """Seconds for two epochs of `arms` together, the second of two tries."""
    for _ in range(2):
        learners = {arm.name: setting.learner(arm, 0) for arm in arms}
        started = time.perf_counter()
        fit(learners, setting.batches(0), Schedule("fast", 2, 0.1), teacher=setting.teacher, **options)
        taken = time.perf_counter() - started
    return taken


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (2, 1)])
def test_eight_arms_in_lockstep_against_eight_runs_of_one(setting, workers, threads):
    distillation, arms = setting
    torch.set_num_threads(threads)
    alone = sum(seconds(distillation, [arm]) for arm in arms)
    together = seconds(distillation, arms, workers=workers)
    ROWS.append((len(arms), workers, threads, alone, together, alone / together))
    assert together > 0 and len(arms) == 8


def test_write_the_table():
    lines = [
        "# Lockstep against separate runs",
        "",
        "Eight arms (AT and FitNet, four choices of hint points) of the digits study's networks, two epochs each:",
        "trained one by one, the teacher run for each, against together. Same process, same machine; the ratio is what",
        "counts.",
        "",
        "| arms | workers | threads each | one by one (s) | together (s) | ratio |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {a} | {w} | {t} | {x:.1f} | {y:.1f} | {r:.2f} |" for a, w, t, x, y, r in ROWS]
    lines += ["", f"{hardware()['cpu']}, {hardware()['cores']} cores; torch {versions()['torch']}."]
    path = report_folder("bench") / "lockstep.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert ROWS

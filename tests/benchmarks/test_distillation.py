"""Speed of the distillation engine as ratios to plain loops, measured in one go: `make bench`.

Written to reports/bench/distillation.md. Nothing is asserted about time: a loaded machine must not turn a test red.
What is asserted is that both sides of a ratio compute the same loss.
"""

import copy
import functools
import importlib.metadata
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from torch import nn
from torchdistill.core.distillation import get_distillation_box

from pursuhint_lib import arms as arms_module
from pursuhint_lib import training
from pursuhint_lib.arms import Distillation, study_arms
from pursuhint_lib.comparison import paired_interval, verdict
from pursuhint_lib.data import ImageSet, channel_stats
from pursuhint_lib.evaluation import accuracy
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import pair_layers, select_hint_points
from pursuhint_lib.learners import Supervised, seeded
from pursuhint_lib.losses import at_loss, cls_loss, hint_mse, kd_loss, match_size
from pursuhint_lib.models import candidate_layers
from pursuhint_lib.params import PARAMS_FOLDER, DistillStudents, load_params
from pursuhint_lib.provenance import hardware, versions
from pursuhint_lib.storage import report_folder, written_whole
from pursuhint_lib.study import StudyImages, fixed_batches, fresh_network, study_images, training_batches
from pursuhint_lib.training import Schedule, fit, predict, resolve_precision

NETWORKS = [("wrn_40_2", "wrn_16_2"), ("resnet32x4", "resnet8x4")]
BATCH = 64
ROUNDS = 2  # all rivals in turn, because a machine's speed drifts
PLAIN_STEPS, STEPS = 1, 2  # timed per round and arm, of the plain loop and in lockstep
PEER_STEPS = 8  # timed per round, of one arm
ACCURACY_SEEDS = list(range(8))
ACCURACY_EPOCHS = 20
GPU_STEPS = 200
CIFAR_IMAGES, CIFAR_EPOCHS = 50_000, 240

CPU = torch.device("cpu")
CORES = hardware()["cores"]
TOGETHER = [(1, CORES), (2, max(1, CORES // 2))]  # workers, threads of each
WEIGHTS = {"at": 1000.0, "fitnet": 100.0}
LEARNING_RATE = 0.01
LINES: dict[str, list[str]] = {"lockstep": [], "shares": [], "accuracy": [], "peer": [], "gpu": []}


@pytest.fixture(autouse=True)
def threads_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def setting(teacher_name, student_name, n_images, device):
    """A study of random images of CIFAR's size; the teacher has random weights, too."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(100, (n_images,), generator=generator)
    train = ImageSet(pixels, labels, [str(number) for number in range(100)])
    images = StudyImages(train, train, train, *channel_stats(train))
    params = DistillStudents(
        study="bench",
        data="cifar100",
        noise=0,
        crop_padding=4,
        flip=True,
        teacher=teacher_name,
        student=student_name,
        seeds=[0],
        batch_size=BATCH,
        methods=list(WEIGHTS),
        balance="none",
        hint_weights=WEIGHTS,
    )
    networks = [fresh_network(name, images, 0) for name in (teacher_name, student_name)]
    tables = [layer_table(network, candidate_layers(network), images.shape) for network in networks]
    settle(networks[0], images)
    teacher = FrozenTeacher(networks[0], list(tables[0]["layer"])).to(device)
    return Distillation(params, images, teacher, *tables, device, torch.float32)


@torch.no_grad()
def settle(network, images):
    """Give batch norm the statistics of some images: without them a deep network's random features grow and grow."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    shown = (images.train.images[:BATCH] / 255 - images.mean[:, None, None]) / images.std[:, None, None]
    network.train()(shown.float())
    network.eval()


def hint_choices(distillation):
    chosen = {
        f"{name}_{seed}": select_hint_points(name, None, distillation.teacher_table, 3, seed)
        for name, seed in (("stage_ends", 0), ("uniform", 0), ("random", 0), ("random", 1))
    }
    assert len({tuple(points.layers) for points in chosen.values()}) == len(chosen)
    return chosen


def eight_arms(distillation):
    tables = distillation.teacher_table, distillation.student_table
    return study_arms(hint_choices(distillation), list(WEIGHTS), *tables)[1:]


class Prepared:
    """Batches made beforehand, as `fit` takes them. Epoch 0 is one batch, to warm up; epoch 1 is timed."""

    seed, device = 0, CPU

    def __init__(self, distillation, steps):
        self.first, *self.timed = list(distillation.batches(0))[: 1 + steps]
        assert len(self.timed) == steps

    def __len__(self):
        return len(self.timed)

    def epoch(self, epoch):
        return iter([self.first] if epoch == 0 else self.timed)


def fit_seconds(distillation, arms, batches, dtype, workers=1, shares=False):
    """Seconds of the second epoch of `fit`, and the first epoch's mean loss of each arm.

    shares: with the shares of the gradient. They take some backward passes at the first step of an epoch: one step of
    hundreds in a study, but of a few here, so that they are timed by themselves.
    """
    finished = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms_module, "check_hints", lambda *of_a_learner: None)  # once per student, and not timed
        learners = {arm.name: distillation.learner(arm, 0) for arm in arms}
        if not shares:
            patch.setattr(training, "shares_of_gradient", lambda learner, terms: {})
        history = fit(
            learners,
            batches,
            Schedule("paper", 2, LEARNING_RATE),
            teacher=distillation.teacher,
            on_epoch=lambda epoch, rows: finished.append(time.perf_counter()),
            dtype=dtype,
            workers=workers,
        )
    assert (history["status"] == "trained").all()  # a failed arm would be left out of the second epoch
    first = history[history["epoch"] == 1].set_index("arm")["loss"]
    return finished[1] - finished[0], first


# ---- Eight arms in lockstep against eight runs of the plain loop ----


def observed(network, layers):
    """A dictionary that holds what the layers returned last."""
    features = {}
    for layer in layers:

        def keep(module, inputs, output, layer=layer):
            features[layer] = output

        network.get_submodule(layer).register_forward_hook(keep)
    return features


def bare_teacher(distillation):
    """The teacher's network without our hooks."""
    network = fresh_network(distillation.params.teacher, distillation.images, 0)
    network.load_state_dict(distillation.teacher.model.state_dict())
    return network.eval()


class PlainRun:
    """One arm as the field's scripts train it: float32, torch's default memory format, a teacher pass of its own."""

    def __init__(self, distillation, method, points):
        self.params = distillation.params
        self.pairs = pair_layers(points, distillation.teacher_table, distillation.student_table)
        self.teacher = bare_teacher(distillation)
        self.student = fresh_network(self.params.student, distillation.images, 0).train()
        self.teacher_features = observed(self.teacher, [pair.teacher_layer for pair in self.pairs])
        self.student_features = observed(self.student, [pair.student_layer for pair in self.pairs])
        self.weight = WEIGHTS[method]
        self.regressors = None
        parameters = list(self.student.parameters())
        if method == "fitnet":
            with seeded(0):
                self.regressors = nn.ModuleList(self.regressor(distillation, pair) for pair in self.pairs)
            parameters += self.regressors.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)

    @staticmethod
    def regressor(distillation, pair):
        student = distillation.student_table.set_index("layer")["channels"][pair.student_layer]
        teacher = distillation.teacher_table.set_index("layer")["channels"][pair.teacher_layer]
        return nn.Sequential(nn.Conv2d(int(student), int(teacher), 1, bias=False), nn.BatchNorm2d(int(teacher)))

    def step(self, images, labels):
        """One step; returns the loss before it."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        logits = self.student(images)
        loss = self.params.ce_weight * cls_loss(logits, labels)
        loss = loss + self.params.kd_weight * kd_loss(logits, teacher_logits, self.params.temperature)
        for number, pair in enumerate(self.pairs):
            features = match_size(self.student_features[pair.student_layer], self.teacher_features[pair.teacher_layer])
            if self.regressors is None:
                loss = loss + self.weight * at_loss(*features)
            else:
                loss = loss + self.weight * hint_mse(self.regressors[number](features[0]), features[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def plain_seconds(runs, batches, at_once):
    """Seconds for all runs, `at_once` of them side by side, one after the other on the same batches."""

    def run(plain):
        for images, labels in batches:
            plain.step(images, labels)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(at_once, initializer=lambda: torch.set_num_threads(threads)) as pool:
        started = time.perf_counter()
        list(pool.map(run, runs))
        return time.perf_counter() - started


@pytest.mark.parametrize("names", NETWORKS, ids=lambda names: "-".join(names))
def test_eight_arms_in_lockstep_against_eight_runs_of_the_plain_loop(names):
    distillation = setting(*names, (1 + STEPS) * BATCH, CPU)
    arms, batches = eight_arms(distillation), Prepared(distillation, STEPS)
    plain_batches = [(batch.images.contiguous(), batch.labels) for batch in (batches.first, *batches.timed)]
    runs = {
        f"{method}_{choice}": PlainRun(distillation, method, points)
        for method in WEIGHTS
        for choice, points in hint_choices(distillation).items()
    }
    assert list(runs) == [arm.name for arm in arms] and len(runs) == 8

    torch.set_num_threads(CORES)
    first = pd.Series({name: run.step(*plain_batches[0]) for name, run in runs.items()})
    auto = resolve_precision("auto", CPU)
    rivals = {("eight plain runs", torch.float32, *layout): [] for layout in TOGETHER}
    rivals |= {("lockstep", torch.float32, *TOGETHER[0]): []}
    rivals |= {("lockstep", auto, *layout): [] for layout in TOGETHER}
    for _ in range(ROUNDS):
        for (kind, dtype, workers, threads), rates in rivals.items():
            torch.set_num_threads(threads)
            if kind == "lockstep":
                seconds, losses = fit_seconds(distillation, arms, batches, dtype, workers)
                if dtype == torch.float32:
                    assert losses.to_numpy() == pytest.approx(first[losses.index].to_numpy(), rel=1e-4)
                rates.append(len(arms) * STEPS * BATCH / seconds)
            else:
                seconds = plain_seconds(runs.values(), plain_batches[1 : 1 + PLAIN_STEPS], workers)
                rates.append(len(runs) * PLAIN_STEPS * BATCH / seconds)

    torch.set_num_threads(CORES)
    without, with_shares = (
        min(fit_seconds(distillation, arms, batches, auto, shares=shares)[0] for _ in range(2))
        for shares in (False, True)
    )
    an_epoch = without / STEPS * CIFAR_IMAGES / BATCH
    LINES["shares"].append(f"{' -> '.join(names)}: {100 * (with_shares - without) / an_epoch:.1f} %.")

    plain = next(iter(rivals.values()))
    for (kind, dtype, workers, threads), rates in rivals.items():
        ratios = [rate / reference for rate, reference in zip(rates, plain, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if rates is not plain else ""
        LINES["lockstep"].append(
            f"| {' -> '.join(names)} | {kind} | {shown(dtype)} | {workers} x {threads} | "
            f"{statistics.median(rates):,.0f} | {statistics.median(ratios):.2f} | {spread} |"
        )


def shown(dtype):
    return str(dtype).removeprefix("torch.")


# ---- The same accuracy in bfloat16 as in float32 ----


def test_accuracy_in_bfloat16_is_that_of_float32_within_seed_noise():
    study = load_params(PARAMS_FOLDER / "digits.yaml")
    # Validation images, because a test set is for a study's last notebook; more of them than the study has.
    more = {"validation_per_class": 40, "evaluation_repeats": 5}
    params = study["04_distill_students"].model_copy(
        update=more | {"methods": list(WEIGHTS), "seeds": ACCURACY_SEEDS, "epochs": ACCURACY_EPOCHS}
    )
    images = study_images(params)
    validation = fixed_batches(params, images, "validation", CPU)
    torch.set_num_threads(params.threads)

    recipe = study["01_train_teacher"]
    network = fresh_network(params.teacher, images, recipe.teacher_seed)
    schedule = Schedule(recipe.schedule, recipe.teacher_epochs, recipe.teacher_learning_rate)
    batches = training_batches(params, images, recipe.batch_size, recipe.teacher_seed, CPU)
    fit({"teacher": Supervised(network)}, batches, schedule)
    taught_by = 100 * accuracy(*predict(network, validation))
    student = fresh_network(params.student, images, 0)
    tables = [layer_table(model, candidate_layers(model), images.shape) for model in (network, student)]
    teacher = FrozenTeacher(network, list(tables[0]["layer"]))
    arms = study_arms({"uniform": select_hint_points("uniform", None, tables[0], 3)}, params.methods, *tables)

    accuracies = {}
    for dtype in (torch.float32, torch.bfloat16):
        distillation = Distillation(params, images, teacher, *tables, CPU, dtype)
        rows = {}
        for seed in params.seeds:
            learners = {arm.name: distillation.learner(arm, seed) for arm in arms}
            batches = distillation.batches(seed)
            fit(learners, batches, distillation.schedule, teacher=teacher, dtype=dtype, workers=params.workers)
            rows[seed] = {
                name: accuracy(*predict(learner.model, validation, dtype)) for name, learner in learners.items()
            }
        accuracies[dtype] = pd.DataFrame.from_dict(rows, orient="index")

    full, half = (table.assign(mean=table.mean(axis="columns")) for table in accuracies.values())
    for arm in [*(arm.name for arm in arms), "mean"]:
        mean, low, high = paired_interval(half[arm], full[arm])
        assert abs(mean) < full[arm].std()  # seed noise
        name = "mean of the arms" if arm == "mean" else f"`{arm}`"
        LINES["accuracy"].append(
            f"| {name} | {len(full)} | {100 * full[arm].mean():.2f} | {100 * full[arm].std():.2f} | "
            f"{100 * half[arm].mean():.2f} | {100 * mean:+.2f} | {100 * low:+.2f} to {100 * high:+.2f} | "
            f"{verdict(low, high)} |"
        )
    native = resolve_precision("auto", CPU) == torch.bfloat16
    computes = "computes" if native else "does not compute"
    LINES["accuracy"] += [
        "",
        f"The teacher names {taught_by:.2f} % of these {len(images.validation):,} noisy images. This machine",
        f"{computes} bfloat16 natively (where that is not so, a study takes float32 by itself).",
    ]


# ---- The same loss and loop in torchdistill ----


def torchdistill_box(distillation, student, points, batches):
    """Their training box for CE + KD + AT on the batches' images, in order."""
    params = distillation.params
    pairs = pair_layers(points, distillation.teacher_table, distillation.student_table)
    # An image as it comes from a file; the views of a channels-last batch would be stacked to one that is so, too.
    dataset = [
        (image.contiguous(), int(label))
        for batch in batches
        for image, label in zip(batch.images, batch.labels, strict=True)
    ]
    at_pairs = {
        f"pair{number}": {
            "teacher": {"io": "output", "path": pair.teacher_layer},
            "student": {"io": "output", "path": pair.student_layer},
            "weight": 1,
        }
        for number, pair in enumerate(pairs)
    }
    logits = {"module_path": ".", "io": "output"}
    label_wrapper = {"input": logits | {"is_from_teacher": False}, "target": {"uses_label": True}}
    terms = {
        "ce": {
            "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": label_wrapper},
            "weight": params.ce_weight,
        },
        "kd": {
            "criterion": {
                "key": "KDLoss",
                "kwargs": {
                    "student_module_path": ".",
                    "student_module_io": "output",
                    "teacher_module_path": ".",
                    "teacher_module_io": "output",
                    "temperature": params.temperature,
                    "alpha": None,  # without labels, which leaves out T^2 as well
                    "beta": 1,
                },
            },
            "weight": params.kd_weight * params.temperature**2,
        },
        "at": {
            "criterion": {"key": "ATLoss", "kwargs": {"at_pairs": at_pairs, "mode": "code"}},
            "weight": WEIGHTS["at"],
        },
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.SequentialSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": 0},
        },
        "teacher": {
            "requires_grad": False,
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [pair.teacher_layer for pair in pairs]},
        },
        "student": {
            "forward_proc": "forward_batch_only",
            "forward_hook": {"output": [pair.student_layer for pair in pairs]},
        },
        "optimizer": {"key": "SGD", "kwargs": {"lr": LEARNING_RATE, "momentum": 0.9, "weight_decay": 5e-4}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    teacher = bare_teacher(distillation)
    return get_distillation_box(teacher, student, {"train": dataset}, config, CPU, None, False, 1)


def torchdistill_losses(box):
    """One epoch as their example scripts run it; the losses, step by step."""
    losses = []
    box.pre_epoch_process(epoch=0)
    for images, labels, more in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(images, labels, more)
        box.post_forward_process(loss=loss)
        losses.append(loss.item())
    box.post_epoch_process()
    return losses


def test_the_same_loss_and_loop_against_torchdistill():
    names = NETWORKS[0]
    distillation = setting(*names, (1 + PEER_STEPS) * BATCH, CPU)
    points = hint_choices(distillation)["stage_ends_0"]  # their AT wants maps of one size
    tables = distillation.teacher_table, distillation.student_table
    arms = study_arms({"stage_ends": points}, ["at"], *tables)[1:]
    batches = Prepared(distillation, PEER_STEPS)
    taken = {"ours": [], "theirs": []}
    torch.set_num_threads(CORES)
    for _ in range(ROUNDS):
        seconds, ours = fit_seconds(distillation, arms, batches, torch.float32)
        taken["ours"].append(seconds)
        student = fresh_network(names[1], distillation.images, 0)
        # The same warm-up as ours: one batch, then the rest is timed.
        theirs = torchdistill_losses(torchdistill_box(distillation, copy.deepcopy(student), points, [batches.first]))
        assert float(ours.iloc[0]) == pytest.approx(theirs[0], rel=1e-4)
        box = torchdistill_box(distillation, student, points, batches.timed)
        started = time.perf_counter()
        torchdistill_losses(box)
        taken["theirs"].append(time.perf_counter() - started)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(taken["ours"], taken["theirs"], strict=True)]
    rates = [BATCH * PEER_STEPS / statistics.median(taken[side]) for side in ("theirs", "ours")]
    LINES["peer"].append(
        f"| {' -> '.join(names)} | {theirs[0]:.5f} | {float(ours.iloc[0]):.5f} | {rates[0]:,.0f} | {rates[1]:,.0f} | "
        f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
    )


# ---- On a GPU ----


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("names", NETWORKS, ids=lambda names: "-".join(names))
def test_images_per_second_on_a_gpu(names):
    gpu_rows(names, torch.device("cuda"))


def gpu_rows(names, device):
    distillation = setting(*names, GPU_STEPS * BATCH, device)
    arms, dtype = eight_arms(distillation), resolve_precision("auto", device)
    for number in (1, len(arms)):
        rates = []
        for _ in range(ROUNDS):
            seconds, _ = fit_seconds(distillation, arms[:number], distillation.batches(0), dtype)
            rates.append(number * GPU_STEPS * BATCH / seconds)
        rate = statistics.median(rates)
        hours = number * CIFAR_EPOCHS * CIFAR_IMAGES / rate / 3600
        LINES["gpu"].append(
            f"| {' -> '.join(names)} | {number} | {shown(dtype)} | {rate:,.0f} | {hours:.2f} | {hours / number:.2f} |"
        )


def test_write_the_table():
    lines = [
        "# The distillation engine",
        "",
        "Everything was measured in one run on one machine; the ratios are what counts. Images are random, of CIFAR's",
        f"size, in batches of {BATCH}. A speed is the median of {ROUNDS} rounds, in each of which all rivals had",
        "their turn.",
        "",
        "## Eight arms in lockstep against eight runs of the plain loop",
        "",
        "Four choices of three hint points, each with AT and with FitNet, beside CE and KD. A plain run is one arm as",
        "the field's scripts train it: float32, torch's default memory format, the teacher run again for every arm.",
        "Ratios are to such runs one after the other on all cores, the first row; the second row has two of them at a",
        "time. Lockstep is `training.fit`: one teacher pass for all arms, channels-last. In float32 the losses of the",
        f"first batch agree to 1e-4, arm by arm. Per arm and round {PLAIN_STEPS} plain and {STEPS} lockstep steps",
        "are timed, after one that is not. Images are counted for every arm.",
        "",
        "| networks | how | precision | workers x threads | images per second | ratio | range of the rounds |",
        "|---|---|---|---|---|---|---|",
        *LINES["lockstep"],
        "",
        "Once an epoch `fit` also measures every term's share of the gradient, which is not in the table. It costs, of",
        f"an epoch of {CIFAR_IMAGES:,} images:",
        *LINES["shares"],
        "",
        "## Accuracy in bfloat16 and in float32",
        "",
        f"Students of the digits study ({ACCURACY_EPOCHS} epochs), trained twice from the same initial weights on",
        "the same batches. Accuracy on validation images in percent, with its standard deviation over seeds; the",
        "difference is bfloat16 - float32 in points, paired by seed, with its 95 % interval.",
        "",
        "| arm | seeds | float32 | deviation | bfloat16 | difference | interval | which |",
        "|---|---|---|---|---|---|---|---|",
        *LINES["accuracy"],
        "",
        f"## The same loss and loop in torchdistill {importlib.metadata.version('torchdistill')}",
        "",
        "One arm, CE + KD + AT at the stage ends, float32 on both sides, the same images in the same order, the same",
        f"initial weights, SGD with momentum; {PEER_STEPS} steps per round are timed. Theirs: `DistillationBox` with",
        "its forward hooks and loss modules, fed by a data loader in the same process. Ours: `training.fit`.",
        "",
        "| networks | their first loss | our first loss | their images per second | ours | ratio | range |",
        "|---|---|---|---|---|---|---|",
        *LINES["peer"],
        "",
        "## On a GPU",
        "",
    ]
    if LINES["gpu"]:
        lines += [
            f"{', '.join(hardware()['gpu'])}. {GPU_STEPS} steps are timed, after as many that are not. Images are",
            f"counted for every arm. Hours are projected: {CIFAR_EPOCHS} epochs of {CIFAR_IMAGES:,} images, as many as",
            "CIFAR-100 has for training.",
            "",
            "| networks | arms | precision | images per second | hours for all | hours per student |",
            "|---|---|---|---|---|---|",
            *LINES["gpu"],
        ]
    else:
        lines += ["Not measured: torch found no GPU on this machine."]
    lines += ["", f"{hardware()['cpu']}, {CORES} cores; torch {versions()['torch']}."]
    path = report_folder("bench") / "distillation.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    assert all(rows for section, rows in LINES.items() if section != "gpu")

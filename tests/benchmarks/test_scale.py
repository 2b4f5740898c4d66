"""What larger studies cost, from parts measured and counted in one go: `make bench ARGS='-k test_scale'`.

Written to reports/scale.md. Part A: the ImageNet study on 1, 8 and 64 GPUs. Part B: what limits a grid of 10 000
students. A number of the page is measured here, counted exactly, quoted with its source, assumed by name, or computed
from those. Nothing is asserted about time. The sizes that are measured can be set: SCALE_STORE=100,1000 make bench ...
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import os
import sqlite3
import statistics
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pursuhint_lib.arms import FIRST_COLUMNS, kept_file, study_arms
from pursuhint_lib.comparison import contrast, main_strategy, summarize
from pursuhint_lib.data import Batch, Batches, ImageSet, count_batches
from pursuhint_lib.evaluation import count_macs, count_parameters
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.folders import IMAGENET_MEAN, IMAGENET_STD, FolderBatches, load_folders
from pursuhint_lib.hints import name_choices, select_hint_points
from pursuhint_lib.learners import Distilled
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import build_model, candidate_layers, load_model, save_model
from pursuhint_lib.params import PARAMS_FOLDER, load_params
from pursuhint_lib.progress import Progress, read_progress
from pursuhint_lib.provenance import hardware, versions
from pursuhint_lib.storage import read_table, report_folder, save_table, sha256, written_whole
from pursuhint_lib.tracking_notebook import StageRun
from pursuhint_lib.tracking_page import DISTILLED, HEADLINE
from pursuhint_lib.tracking_runs import create_run, open_experiment, run_table
from pursuhint_lib.tracking_spool import SpooledRun, ingest
from pursuhint_lib.tracking_store import log_points, open_client
from pursuhint_lib.training import Schedule, autocast, fit, resolve_precision


def sizes(name, default):
    """Whole numbers; the environment variable SCALE_<NAME> replaces them ("100,1000")."""
    return [int(number) for number in os.environ.get(f"SCALE_{name}", default).split(",")]


# ---- What is measured, and how much of it ----

[JPEGS] = sizes("JPEGS", "256")
[ROUNDS] = sizes("ROUNDS", "7")  # of the teacher's pass and the student's step
[STUDENTS] = sizes("STUDENTS", "64")  # whose files are written and read
ARMS = sizes("ARMS", "100,200,400")  # of one study, for the tables
STORE = sizes("STORE", "0,1000,10000")  # runs that are in the store before some more are logged
[LOGGED] = sizes("LOGGED", "8")  # students that are logged at each size of the store
WORKERS = sizes("WORKERS", "64,512,4096")
[GRID] = sizes("GRID", "10000")
[FILES] = sizes("FILES", "10000")  # in one folder

IMAGENET, PAIR = "imagenet_resnet34_resnet18", "cifar100_wrn_40_2_wrn_16_2"
IMAGENET_IMAGES, IMAGENET_CLASSES, IMAGENET_TEST = 1_281_167, 1000, 50_000  # of the data set, ILSVRC 2012
CIFAR_IMAGES, CIFAR_CLASSES = 50_000, 100
GROUPS = [1, 8, 16, 32]  # arms in lockstep
GROUP = 8
TABLE_SEEDS = 5
GPU_LAYOUTS = [(1, 1), (1, 8), (8, 1), (1, 64), (8, 8), (64, 1)]  # jobs, GPUs of each

# ---- Quoted ----

TRAIN_TAR = 147_897_477_120  # bytes of ILSVRC2012_img_train.tar
FFCV_SIDE = (0.75 * 160**2 + 0.25 * 192**2) ** 0.5  # pixels: 160 for three quarters of the training, then 192
PUBLISHED = [  # GPU, network, GPUs, images per second, side of an image, source
    ("A100", "resnet50", 1, 2470, 224, 1),
    ("A100", "resnet50", 8, 16_621, 224, 1),
    ("A100", "resnet18", 1, 88 * IMAGENET_IMAGES / (187.3 * 60), FFCV_SIDE, 2),
    ("RTX 3090", "resnet18", 1, 3481.78, 224, 3),
    ("RTX 3090", "resnet34", 1, 2036.51, 224, 3),
    ("RTX 3090", "resnet50", 1, 1218.01, 224, 3),
]
H100_OVER_A100 = 14.4 / 7.8  # minutes of ResNet-50 on 16 of each
NVLINK = 300e9  # bytes per second and direction, of an A100
SOURCES = [
    "NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md, commit 291f0d0, DGX A100 80 "
    "GB, mixed precision",
    "libffcv/ffcv-imagenet, README.md, commit 038bc26: ResNet-18, 88 epochs in 187.3 minutes on one A100, 160 pixels "
    "for 75 % of the epochs, then 192; evaluation included",
    "huggingface/pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, commit 5e7d47c",
    "MLPerf Training 3.0, two of Dell's entries, as compared at silvertonconsulting.com, 2023-07-12: ResNet-50 in 14.4 "
    "minutes on 16 A100, 7.8 minutes on 16 H100",
    "NVIDIA A100 datasheet: NVLink 600 GB/s, both directions together",
    "the size of ILSVRC2012_img_train.tar as image-net.org serves it",
]

# ---- Assumed ----

OURS = (0.5, 1.0)  # our loop's share of a published speed, slow and fast end
LAUNCH = (10e-6, 5e-6)  # seconds an operation takes at least, from Python to the GPU, slow and fast end
INSIDE = (NVLINK / 3, NVLINK)  # bytes per second that an all-reduce reaches in a node, slow and fast end
BETWEEN = (100e9 / 8 / 8, 200e9 / 8)  # one 100 Gbit/s adapter for eight GPUs; one of 200 Gbit/s for each
PHOTOGRAPH = (500, 375)  # pixels
SHORTER_SIDE = 256  # of smaller copies
SMALLER = f"copies, shorter side {SHORTER_SIDE}"
STUDY = 100  # students of one study of a grid
POLL = 0.2  # seconds between two looks of the driver

CPU = torch.device("cpu")
CORES = hardware()["cores"]
PARTS = {}  # what the tests measure, for the page


@pytest.fixture(autouse=True)
def threads_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PURSUHINT_SPOOL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def taken(do, rounds=1):
    """Seconds that do() takes, the median of some rounds."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        do()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# ---- Counting ----


def macs_of(do):
    """Multiply-accumulates of do(), backward passes included, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops() // 2


class Operations(TorchDispatchMode):
    """Counts what would each be sent to a GPU: operations that are no view."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_of(do):
    with Operations() as counter:
        do()
    return counter.count


def saved_bytes(do, besides):
    """Bytes that do() keeps for its backward pass, each storage once, without those of the tensors `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    held = {}  # the tensors themselves, too, as the storage of one that is gone may be used again

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = do()
    del result
    return sum(size for size, _ in held.values())


class Learning:
    """A teacher and one student of a study file with hints at the stage ends, both with random weights."""

    def __init__(self, study, method, classes, shape):
        self.params = load_params(PARAMS_FOLDER / f"{study}.yaml")
        self.students, self.cluster = self.params["04_distill_students"], self.params["03_cluster_layers"]
        self.shape, self.classes = shape, classes
        networks = [build_model(name, classes) for name in (self.students.teacher, self.students.student)]
        self.tables = [layer_table(network, candidate_layers(network), shape) for network in networks]
        points = select_hint_points("stage_ends", None, self.tables[0], self.cluster.n_hints)
        self.arm = study_arms({"stage_ends": points}, [method], *self.tables)[1]
        settle(networks[0], shape)
        self.teacher = FrozenTeacher(networks[0], list(self.tables[0]["layer"]))
        self.learner = self.learner_of(networks[1])
        self.optimizer = torch.optim.SGD(self.learner.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def learner_of(self, network):
        return Distilled(
            network,
            ce_weight=self.students.ce_weight,
            logit_weight=self.students.kd_weight,
            temperature=self.students.temperature,
            hints=[dataclasses.replace(hint, weight=1.0) for hint in self.arm.hints],
            teacher_table=self.tables[0],
            student_table=self.tables[1],
        ).to(memory_format=torch.channels_last)

    def count_arms(self):
        """Of the study file, kd included; strategies that choose the same layers share their students."""
        cluster, teacher_table = self.cluster, self.tables[0]
        names = name_choices(
            cluster.strategies, cluster.cluster_metrics, len(teacher_table), cluster.n_hints, cluster.random_draws
        )
        points = select_hint_points("stage_ends", None, teacher_table, cluster.n_hints)
        stand_ins = {name: dataclasses.replace(points, strategy=name) for name in names}
        return len(study_arms(stand_ins, self.students.methods, *self.tables))

    def batch(self, size):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, *self.shape, generator=generator).to(memory_format=torch.channels_last)
        return Batch(images, torch.arange(size) % self.classes, torch.arange(size))

    def observe(self, batch, dtype=torch.float32, layers=None):
        with autocast(CPU, dtype):
            return self.teacher.observe(batch.images, layers=self.learner.teacher_layers if layers is None else layers)

    def loss(self, batch, observation, dtype=torch.float32):
        with autocast(CPU, dtype):
            return self.learner.losses(batch, observation, 0.5)["loss"]

    def step(self, batch, observation, dtype=torch.float32):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batch, observation, dtype).backward()
        self.optimizer.step()

    def activation_bytes(self, dtype):
        """Per image, and whatever the number of images, of one student's step."""
        self.learner.train()
        own = [*self.learner.parameters(), *self.learner.buffers()]
        small, large = (
            saved_bytes(lambda batch=batch: self.loss(batch, self.observe(batch, dtype), dtype), own)
            for batch in (self.batch(2), self.batch(4))
        )
        return (large - small) / 2, small - (large - small)

    def counts(self):
        """What is the same on every machine; of one image where not said otherwise."""
        batch = self.batch(2)
        self.learner.train()
        observation = self.observe(batch)
        found = {
            "teacher_parameters": count_parameters(self.teacher.model),
            "student_parameters": count_parameters(self.learner.model),
            "adapter_parameters": sum(p.numel() for p in self.learner.adapters.parameters()),
            "teacher_macs": count_macs(self.teacher.model, self.shape),
            "student_macs": count_macs(self.learner.model, self.shape),
            "step_macs": macs_of(lambda: self.step(batch, observation)) / 2,
            "teacher_operations": operations_of(lambda: self.observe(batch)),  # a pass
            "step_operations": operations_of(lambda: self.step(batch, observation)),
        }
        features = self.observe(batch, layers=self.teacher.layers).features.values()
        found["feature_bytes"] = 2 * sum(feature[0].numel() for feature in features)  # in bfloat16
        state = io.BytesIO()
        torch.save({"learner": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()}, state)
        found["checkpoint_bytes"] = len(state.getvalue())
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            found[f"{name}_bytes"], found[f"{name}_fixed_bytes"] = self.activation_bytes(dtype)
        return found


@torch.no_grad()
def settle(network, shape):
    """Give batch norm the statistics of some images: without them a deep network's random features grow and grow."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    network.eval()


def training_macs(name):
    """Multiply-accumulates of forward and backward pass of one image of 224 x 224 pixels."""
    with torch.device("meta"):  # shapes are enough
        network, images = build_model(name, IMAGENET_CLASSES).train(), torch.zeros(2, 3, 224, 224)
    return macs_of(lambda: network(images).sum().backward()) / 2


# ---- A. What is measured and counted ----


def test_the_imagenet_study_is_counted():
    torch.set_num_threads(CORES)
    side = load_params(PARAMS_FOLDER / f"{IMAGENET}.yaml")["04_distill_students"].image_size
    learning = Learning(IMAGENET, "at", IMAGENET_CLASSES, (3, side, side))
    PARTS["imagenet"] = learning.counts() | {
        "arms": learning.count_arms(),
        "students": learning.students,
        "candidates": len(learning.tables[0]),
        "hints": learning.cluster.n_hints,
        "probe_images": learning.params["02_profile_layers"].probe_images,
    }
    PARTS["training_macs"] = {name: training_macs(name) for name in ("resnet18", "resnet34", "resnet50")}
    counted = PARTS["imagenet"]
    assert counted["bfloat16_bytes"] < counted["float32_bytes"]
    assert 2.9 < counted["step_macs"] / counted["student_macs"] < 3.1


def photograph(size, noise, generator):
    """An image with coarse shapes and grain, as JPEG bytes."""
    coarse = generator.integers(0, 256, (size[1] // 40, size[0] // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=float)
    pixels = smooth + noise * generator.normal(size=(size[1], size[0], 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def grain_for(target, generator):
    low, high = 0.0, 100.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if len(photograph(PHOTOGRAPH, middle, generator)) < target else (low, middle)
    return low


def test_images_are_decoded(tmp_path):
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    grain = grain_for(TRAIN_TAR / IMAGENET_IMAGES, generator)
    pictures = [photograph(PHOTOGRAPH, grain, generator) for _ in range(JPEGS)]
    PARTS["decoding"] = {}
    for kind in ("as they come", SMALLER):
        folder = tmp_path / kind.split(",")[0].replace(" ", "_")
        for split, number in (("train", JPEGS), ("val", 2)):
            for i in range(number):
                path = folder / split / f"class{i % 2}" / f"{i}.jpeg"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "as they come":
                    path.write_bytes(pictures[i])
                else:
                    picture = Image.open(io.BytesIO(pictures[i]))
                    share = SHORTER_SIDE / min(picture.size)
                    smaller = picture.resize([round(side * share) for side in picture.size], Image.Resampling.BICUBIC)
                    smaller.save(path, quality=90)
        train = load_folders(folder, image_size=224)["train"]

        def rate(loaders, train=train):
            batches = FolderBatches(
                train, 32, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop=True, flip=True, shuffle=True, loaders=loaders
            )
            return len(train) / taken(lambda: [None for _ in batches.epoch(0)], 3)

        PARTS["decoding"][kind] = {
            "bytes": float(train.sizes.double().mean()),
            "rate": rate(0),
            "with_loaders": rate(CORES),
        }


# ---- B. What is measured ----


def test_a_teachers_pass_and_a_students_step():
    torch.set_num_threads(CORES)
    dtype = resolve_precision("auto", CPU)
    learning = Learning(PAIR, "at", CIFAR_CLASSES, (3, 32, 32))
    size = learning.students.batch_size
    batch = learning.batch(size)
    learning.learner.train()
    learning.step(batch, learning.observe(batch, dtype), dtype)  # warm-up
    rounds = []
    for _ in range(ROUNDS):  # in turn, because a machine's speed drifts
        seen = []
        teacher = taken(lambda seen=seen: seen.append(learning.observe(batch, dtype)))
        rounds.append((teacher, taken(lambda seen=seen: learning.step(batch, seen[0], dtype))))
    pass_s, step_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    # Forward passes of the student, for validation.
    learning.learner.eval()
    with torch.no_grad(), autocast(CPU, dtype):
        forward_s = taken(lambda: learning.learner.model(batch.images), 3)
    PARTS["pair"] = learning.counts() | {
        "students": learning.students,
        "arms": learning.count_arms(),
        "pass_s": pass_s,
        "step_s": step_s,
        "forward_s": forward_s,
        "precision": str(dtype).removeprefix("torch."),
    }


def two_epochs(folder):
    """With AT and with FitNet, trained for two short epochs: history, bytes of a checkpoint, a network."""
    learners = {}
    for method in ("at", "fitnet"):
        learning = Learning(PAIR, method, CIFAR_CLASSES, (3, 32, 32))
        learners[learning.arm.name] = learning.learner
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (32, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(32) % CIFAR_CLASSES, [str(number) for number in range(CIFAR_CLASSES)])
    batches = Batches(images, 16, mean=[0.5] * 3, std=[0.25] * 3, shuffle=True)
    checkpoint = folder / "group.ckpt"
    history = fit(
        learners,
        batches,
        Schedule("paper", 2, 1e-3),
        teacher=learning.teacher,
        validation=batches,
        checkpoint=checkpoint,
    )
    assert (history["status"] == "trained").all()
    return history, checkpoint.stat().st_size / len(learners), learning.learner.model


def long_history(history, arm, epochs, generator):
    """As many epochs as a study has, of full digits, made of one that was trained."""
    own = history[history["arm"] == arm].dropna(axis="columns", how="all").tail(1)
    own = pd.concat([own] * epochs, ignore_index=True).assign(epoch=range(1, epochs + 1))
    for column in own.select_dtypes("float"):
        if column not in ("learning_rate", "finished"):
            own[column] *= generator.uniform(0.5, 1.5, epochs)
    own["finished"] += np.cumsum(own["seconds"])
    first = [column for column in FIRST_COLUMNS if column in own]
    return own[first + sorted(set(own) - set(first))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return two_epochs(tmp_path_factory.mktemp("trained"))


@functools.cache
def pair_students():
    return load_params(PARAMS_FOLDER / f"{PAIR}.yaml")["04_distill_students"]


def grid_history(trained, number):
    history, epochs = trained[0], pair_students().epochs
    arm = history["arm"].unique()[number % 2]
    return long_history(history, arm, epochs, np.random.default_rng(number)).assign(arm=f"{arm}_{number}", seed=0)


def test_files_of_students_are_written_and_read(trained, tmp_path):
    _, checkpoint_bytes, student = trained
    histories = [grid_history(trained, number) for number in range(STUDENTS)]
    tables = [tmp_path / "histories" / f"{number}.csv" for number in range(STUDENTS)]
    networks = [kept_file(tmp_path, f"arm_{number}", 0) for number in range(STUDENTS)]
    groups = [tmp_path / "groups" / f"{number}.csv" for number in range(0, STUDENTS, GROUP)]
    for history, table, network in zip(histories, tables, networks, strict=True):
        save_table(history, table)
        save_model(student, network, arm="arm", seed=0, key="0" * 16, status="trained", val_accuracy=0.5)
    for number, path in enumerate(groups):
        save_table(pd.concat(histories[number * GROUP : (number + 1) * GROUP]), path)
    whole = pd.concat(histories, ignore_index=True)
    times = {
        "read": taken(lambda: pd.concat([read_table(path) for path in tables], ignore_index=True), 3),
        "read_groups": taken(lambda: pd.concat([read_table(path) for path in groups], ignore_index=True), 3),
        "write": taken(lambda: save_table(whole, tmp_path / "histories.csv"), 3),
        "load": taken(lambda: [load_model(path) for path in networks]),
        "hash": taken(lambda: [sha256(path) for path in [*networks, *tables]], 3),
    }
    PARTS["files"] = {name: seconds / STUDENTS for name, seconds in times.items()} | {
        "network_bytes": networks[0].stat().st_size,
        "history_bytes": statistics.mean(path.stat().st_size for path in tables),
        "checkpoint_bytes": checkpoint_bytes,
    }


def results_of(arms):
    """A made-up results table: as many arms as asked for, ten of a method."""
    strategies = ["stage_ends", "uniform", *(f"random_{draw}" for draw in range(4)), "reversed"]
    strategies += ["clustered_r2_cca", "clustered_linear_cka", "clustered_first_r2_cca"]
    hints = [name for name in METHODS if name not in LOGIT_LOSSES]
    sums = [*hints, *("+".join(pair) for pair in itertools.combinations(hints, 2))]
    methods = [f"{logit_loss}+{hint}" for hint in sums for logit_loss in LOGIT_LOSSES]
    kinds = list(itertools.islice(itertools.product(methods, strategies), arms))
    assert len(kinds) == arms, f"made-up names are enough for {len(kinds)} arms"
    generator = np.random.default_rng(0)
    rows = [
        {"arm": arm, "method": method, "strategy": strategy, "same_as": "", "seed": seed}
        | dict.fromkeys(("val_accuracy", "test_accuracy"), generator.normal(0.7, 0.005))
        for arm, method, strategy in [
            ("unaided", "unaided", "none"),
            ("kd", "kd", "none"),
            *((f"{method}_{strategy}", method, strategy) for method, strategy in kinds),
        ]
        for seed in range(TABLE_SEEDS)
    ]
    return pd.DataFrame(rows), main_strategy(strategies)


def test_tables_of_many_arms():
    PARTS["tables"] = {}
    results, main = results_of(20)
    contrast(results, main), summarize(results, 0.75)  # pays for what is remembered between calls
    for arms in ARMS:
        results, main = results_of(arms)
        PARTS["tables"][arms] = {
            "summarize": taken(lambda results=results: summarize(results, 0.75), 3),
            "contrast": taken(lambda results=results, main=main: contrast(results, main)),
        }


def fill_store(database, run_id, first, last):
    """Copies number first to last - 1 of a logged run: its row, tags, parameters and latest metrics, not its curves."""
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table in ("runs", "tags", "params", "latest_metrics"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            made = {"run_uuid": "printf('%032x', n.i)"}
            if table == "tags":
                made["value"] = "CASE key WHEN 'arm' THEN 'copy_' || n.i WHEN 'key' THEN 'copy_' || n.i ELSE value END"
            values = ", ".join(made.get(column, column) for column in columns)
            connection.execute(
                f"WITH RECURSIVE n(i) AS (VALUES(?) UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?) "
                f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}, n WHERE run_uuid = ?",
                (first, last, run_id),
            )


def store_bytes(database):
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database.stat().st_size


class Grid:
    """Students of one stage's run, logged as a notebook and its driver do: spooled, then ingested."""

    def __init__(self, study, folder, trained):
        self.study, self.spool, self.trained, self.students = study, folder / f"{study}.jsonl", trained, 0
        self.run = StageRun(study, DISTILLED, create_run(study, DISTILLED), strict=True)

    def log(self, count, epochs=None):
        """Log so many more students, their last `epochs` only: seconds of spooling and of ingesting one, bytes of one
        in the spool, their arms."""
        spooled, arms = SpooledRun(self.study, DISTILLED, self.run.run_id, self.spool), []
        facts = {
            "network": "wrn_16_2",
            "teacher": "wrn_40_2",
            "method": "at",
            "strategy": "stage_ends",
            "logit_loss": "kd",
            "hint_points": "block1.4, block2.4, block3.4",
            "epochs": pair_students().epochs,
        }
        for name in ("train", "validation"):
            spooled.log_dataset(f"cifar100 {name}", "0" * 64, name)
        spool_s = 0.0
        for _ in range(count):
            history = grid_history(self.trained, self.students)
            self.students += 1
            arms.append(history["arm"].iloc[0])
            history = history.tail(epochs or len(history))
            spool_s += taken(
                lambda history=history: spooled.log_trained_model(
                    arm=arms[-1], seed=0, history=history, params=facts, key="0" * 16, tags={"also": "none"}
                )
            )
        size = self.spool.stat().st_size
        run = StageRun(self.study, DISTILLED, self.run.run_id, strict=True)
        return {
            "spool": spool_s / count,
            "ingest": taken(lambda: ingest(self.spool, run)) / count,
            "bytes": size / count,
            "arms": arms,
        }


def test_runs_are_logged_and_found(a_home, trained):
    grid, client = Grid("grid", a_home, trained), open_client()
    database, experiment = a_home / "mlflow.db", open_experiment("grid")
    grid.log(1, epochs=1)  # a first run pays for imports
    before = store_bytes(database)
    first = grid.log(LOGGED)
    full_bytes = (store_bytes(database) - before) / LOGGED
    before = store_bytes(database)
    grid.log(LOGGED, epochs=1)
    summary_bytes = (store_bytes(database) - before) / LOGGED
    example = client.search_runs([experiment], "tags.current = 'yes'", max_results=1)[0].info.run_id
    PARTS["store"] = {
        "spool": first["spool"],
        "spool_bytes": first["bytes"],
        "full_bytes": full_bytes,
        "summary_bytes": summary_bytes,
        "sizes": {},
    }
    filled = 0
    for number in STORE:
        if number > filled:
            fill_store(database, example, filled + 1, number + 1)
            filled = number
        full, summary = grid.log(LOGGED), grid.log(LOGGED, epochs=1)
        names = full["arms"]
        students = f"tags.stage = '{DISTILLED}' and tags.current = 'yes' and tags.of_landscape = 'no'"
        listed = taken(lambda: run_table("grid", DISTILLED))
        runs = run_table("grid", DISTILLED).set_index("arm")["run_id"]
        points = [(name, 0.5, time.time(), 0) for name in ("test/acc1", "test/top5", "test/nll", "test/kl", "test/ece")]
        PARTS["store"]["sizes"][number] = {
            "ingest": full["ingest"],
            "summary": summary["ingest"],
            "list": listed,
            "evaluate": taken(
                lambda runs=runs, names=names, points=points: [
                    log_points(runs[name], points, {"evaluated_in": grid.run.run_id}) for name in names
                ]
            )
            / LOGGED,
            "page": taken(
                lambda students=students: client.search_runs(
                    [experiment], students, max_results=100, order_by=[f"metrics.`{HEADLINE}` DESC"]
                ),
                3,
            ),
        }
    assert len(run_table("grid", DISTILLED)) == filled + grid.students
    other = Grid("another", a_home, trained)
    PARTS["store"]["elsewhere"] = other.log(LOGGED)["ingest"]


def test_a_driver_looks_at_its_workers(tmp_path, capsys):
    for number in range(max(WORKERS)):
        Progress(tmp_path / "jobs" / str(number), 240, "student epochs").advance("seed 0 epoch 1/240: 8 students")
    capsys.readouterr()
    poll = {
        workers: taken(lambda workers=workers: [read_progress(tmp_path / "jobs" / str(n)) for n in range(workers)], 3)
        for workers in WORKERS
    }
    folder = tmp_path / "networks"
    folder.mkdir()
    for number in range(FILES):
        (folder / f"arm_{number}-s0.safetensors").touch()
    listed = taken(lambda: sum(not path.name.startswith(".") for path in folder.glob("*.safetensors")), 3)
    PARTS["driver"] = {"poll": poll, "listed": listed}


# ---- A. Arithmetic ----


class Ends(tuple):
    """The slow and the fast end of a range."""

    def __new__(cls, slow, fast):
        return super().__new__(cls, (slow, fast))

    def shown(self, form):
        slow, fast = (form(value) for value in self)
        return slow if slow == fast else f"{fast} to {slow}" if self[1] <= self[0] else f"{slow} to {fast}"


def gpu_rates():
    """GPU -> multiply-accumulates per second that our loop is taken to reach."""
    published = [rate for gpu, *_, rate in published_rates() if gpu == "A100"]
    a100 = Ends(OURS[0] * min(published), OURS[1] * max(published))
    return {"A100": a100, "H100": Ends(*(H100_OVER_A100 * rate for rate in a100))}


def published_rates():
    """The rows of PUBLISHED, and multiply-accumulates per second and GPU."""
    macs = PARTS["training_macs"]
    return [(*row, row[3] / row[2] * macs[row[1]] * (row[4] / 224) ** 2) for row in PUBLISHED]


def step_seconds(part, end, rate, arms, batch, gpus=1, taught=True, launch=LAUNCH):
    """One step of `arms` students in lockstep on `batch` images of each GPU; end: 0 for slow, 1 for fast."""
    macs = batch * (taught * part["teacher_macs"] + arms * part["step_macs"])
    operations = taught * part["teacher_operations"] + arms * part["step_operations"]
    computing = max(macs / rate, operations * launch[end])
    exchange = arms * exchange_seconds(part, end, gpus)
    return computing + exchange if end == 0 else max(computing, exchange)


def exchange_seconds(part, end, gpus):
    """All-reduce of one student's gradients in a ring: each GPU sends 2 (n - 1) / n of their bytes."""
    bandwidth = (INSIDE if gpus <= 8 else BETWEEN)[end]
    return 2 * (gpus - 1) / gpus * 4 * (part["student_parameters"] + part["adapter_parameters"]) / bandwidth


def group_seconds(part, end, rate, arms, gpus, taught):
    """The whole training of a group of ImageNet students, validation included."""
    students, (images, held_out) = part["students"], imagenet_images(part)
    batch = students.batch_size
    steps = students.epochs * count_batches(images, batch, True)
    seconds = steps * step_seconds(part, end, rate, arms, batch / gpus, gpus, taught)
    return seconds + students.epochs * held_out * arms * part["student_macs"] / (rate * gpus)


def imagenet_images(part):
    """Images to train on, and held out of them for validation."""
    held_out = part["students"].validation_per_class * IMAGENET_CLASSES
    return IMAGENET_IMAGES - held_out, held_out


def layout_of(part, rates, jobs, gpus):
    """The best way to share the study's groups among jobs: hours (slow, fast), students in the largest group, groups.

    Every seed has its arms in `pieces` groups in lockstep, and a student without a teacher. The longest group goes to
    the job that is free first.
    """
    found = []
    for pieces in range(1, part["arms"] + 1):
        small, more = divmod(part["arms"], pieces)
        groups = [(small + (number < more), True) for number in range(pieces)] + [(1, False)]
        groups = sorted(groups * len(part["students"].seeds), reverse=True)
        hours = []
        for end in (0, 1):
            busy = [0.0] * jobs
            for arms, taught in groups:
                free = busy.index(min(busy))
                busy[free] += group_seconds(part, end, rates[end], arms, gpus, taught) / 3600
            hours.append(max(busy))
        found.append((hours[0], hours[1], -(-part["arms"] // pieces), len(groups)))
    slow, fast, largest, groups = min(found)
    return Ends(slow, fast), largest, groups


def memory_bytes(part, arms, batch, gpus):
    """Of one GPU: weights, gradients and momentum of all arms (and what DDP gathers), the teacher's weights, the
    activations of one student at a time, features of all candidate layers and images of two batches."""
    weights = 4 * (part["student_parameters"] + part["adapter_parameters"])
    side = part["students"].image_size
    return (
        arms * weights * (3 + (gpus > 1))
        + 4 * part["teacher_parameters"]
        + part["bfloat16_fixed_bytes"]
        + batch * (part["bfloat16_bytes"] + 2 * part["feature_bytes"] + 2 * 3 * side**2 * 4)
    )


# ---- B. Arithmetic ----


def student_seconds(part, arms, launch=LAUNCH):
    """Worker -> seconds that one of `arms` students in lockstep takes on it (slow, fast), and the teacher's share."""
    students = part["students"]
    validation = students.validation_per_class * CIFAR_CLASSES
    steps = students.epochs * count_batches(CIFAR_IMAGES - validation, students.batch_size, True)
    looks = students.epochs * validation / students.batch_size
    cpu = steps * (part["step_s"] + part["pass_s"] / arms) + looks * part["forward_s"]
    found = {"this machine": (Ends(cpu, cpu), steps * part["pass_s"] / arms / cpu)}
    for gpu, rates in gpu_rates().items():
        seconds, shares = [], []
        for end, rate in enumerate(rates):
            together = step_seconds(part, end, rate, arms, students.batch_size, launch=launch)
            alone = step_seconds(part, end, rate, arms, students.batch_size, taught=False, launch=launch)
            look = max(part["student_macs"] * students.batch_size / rate, part["step_operations"] / 3 * launch[end])
            seconds.append(steps * together / arms + looks * look)
            shares.append(steps * (together - alone) / arms / seconds[-1])
        found[gpu] = Ends(*seconds), max(shares)
    return found


def mean_over_store(what):
    """Mean of a measure while the store grows from its smallest to its largest measured size: trapezoids."""
    measured = PARTS["store"]["sizes"]
    numbers, values = list(measured), [row[what] for row in measured.values()]
    if len(numbers) == 1:
        return values[0]
    return float(np.trapezoid(values, numbers)) / (numbers[-1] - numbers[0])


def table_seconds(what):
    """Of the tables of GRID students as one study, by the power law through the two largest sizes, and its exponent."""
    (some, before), (many, after) = list(PARTS["tables"].items())[-2:]
    exponent = float(np.log(after[what] / before[what]) / np.log(many / some))
    return after[what] * (GRID / TABLE_SEEDS / many) ** exponent, exponent


def collector_parts():
    """(part, seconds per student, how it is known) of what one process does for the whole grid."""
    files, summaries = PARTS["files"], {what: table_seconds(what) for what in ("summarize", "contrast")}
    largest = PARTS["store"]["sizes"][max(STORE)]
    parts = [
        (
            "curves into the tracking store (`ingest`)",
            mean_over_store("ingest"),
            "measured, mean over the store's sizes",
        ),
        ("test measures into the store", mean_over_store("evaluate"), "measured, mean over the store's sizes"),
        ("finished networks recognized (`load_model`)", files["load"], "measured"),
        ("outputs hashed for the stage's record", files["hash"], "measured"),
        ("histories read and joined", files["read"], "measured"),
        ("table of all histories written", files["write"], "measured"),
        ("runs listed once, at the end", largest["list"] / max(1, max(STORE)), f"measured with {max(STORE):,} runs"),
    ]
    for what, (seconds, exponent) in summaries.items():
        parts.append((f"`{what}`, all arms in one study", seconds / GRID, f"extrapolated, arms^{exponent:.2f}"))
    return sorted(parts, key=lambda part: -part[1])


# ---- The page ----


def paragraph(*sentences):
    return [*textwrap.wrap(" ".join(sentences), 115, break_long_words=False, break_on_hyphens=False), ""]


def table(columns, rows):
    rows = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def rounded(value):
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def percent(share):
    return f"{rounded(100 * share)} %"


def gigabytes(size):
    return f"{size / 1e9:,.1f}" if abs(size) >= 1e9 else f"{size / 1e9:.3f}"


def megabytes(size):
    return f"{size / 1e6:,.1f} MB"


def imagenet_lines():
    students = PARTS["imagenet"]["students"]
    return [
        f"## A. ImageNet, {students.teacher} -> {students.student}",
        "",
        *counted_lines(),
        *speed_lines(),
        *decoding_lines(),
        *layout_lines(),
    ]


def counted_lines():
    part = PARTS["imagenet"]
    students, (images, held_out) = part["students"], imagenet_images(part)
    seeds, arms = len(students.seeds), part["arms"]
    step, forward, teacher = part["step_macs"], part["student_macs"], part["teacher_macs"]
    once, for_every_arm = teacher / (teacher + arms * step), teacher / (teacher + step)
    trained = seeds * students.epochs * (images * (teacher + (arms + 1) * step) + held_out * (arms + 1) * forward)
    besides = part["probe_images"] * teacher + IMAGENET_TEST * (teacher + seeds * (arms + 1) * forward)
    rows = [
        ("arms of a seed, `kd` among them; each seed has one student without a teacher besides", arms),
        ("seeds; students in all", f"{seeds}; {seeds * (arms + 1)}"),
        ("images to train on; held out of them for validation", f"{images:,}; {held_out:,}"),
        ("multiply-accumulates (MACs) of an image: teacher; student", f"{teacher / 1e9:.2f} G; {forward / 1e9:.2f} G"),
        ("a student's step with hints, in its forward passes", f"{step / forward:.2f}"),
        ("the teacher's share of all MACs of a step, once for all arms", percent(once)),
        ("the same, were it run for every arm", percent(for_every_arm)),
        ("profiling and the test set, in MACs of all training", percent(besides / trained)),
        (
            "operations of a student's step; of a teacher's pass",
            f"{part['step_operations']}; {part['teacher_operations']}",
        ),
        (
            "parameters: teacher; student",
            f"{part['teacher_parameters'] / 1e6:.2f} M; {part['student_parameters'] / 1e6:.2f} M",
        ),
        ("weights, gradients and momentum of an arm", megabytes(12 * part["student_parameters"])),
        (
            "checkpoint of an arm; of a seed",
            f"{megabytes(part['checkpoint_bytes'])}; {megabytes(arms * part['checkpoint_bytes'])}",
        ),
        (
            "activations of a student's step, an image: float32; bfloat16",
            f"{megabytes(part['float32_bytes'])}; {megabytes(part['bfloat16_bytes'])}",
        ),
        (
            f"features of all {part['candidates']} candidate layers of the teacher, an image, bfloat16",
            megabytes(part["feature_bytes"]),
        ),
    ]
    return [
        *paragraph(
            f"`params/{IMAGENET}.yaml`: {students.epochs} epochs, batch {students.batch_size}, {students.image_size}",
            "pixels; the teacher's weights are given. All of this table is counted: MACs by torch's counter, arms",
            "from the file (fewer are trained where two strategies choose the same layers), activations as the bytes",
            "that autograd saves for the backward pass, each storage once (on a CPU; a GPU adds workspaces).",
        ),
        *table(("what", "counted"), rows),
    ]


def speed_lines():
    published, rates = published_rates(), gpu_rates()
    spread = [rate for gpu, *_, rate in published if gpu == "RTX 3090"]
    rows = [
        (gpu, network, gpus, f"{speed / gpus:,.0f}", f"{side:.0f}", f"{rate / 1e12:.1f}", source)
        for gpu, network, gpus, speed, side, source, rate in published
    ]
    columns = ("GPU", "network", "GPUs", "images per second and GPU", "side", "T MAC/s and GPU", "source")
    return [
        "### How fast a GPU is: quoted",
        "",
        "Mixed precision. MAC/s are computed with the counted MACs of a training step of that network.",
        "",
        *table(columns, rows),
        *paragraph(
            f"On one GPU the three networks differ by a factor of {max(spread) / min(spread):.2f} in MAC/s, so",
            f"scaling by MACs errs by as much. Assumed: our loop reaches {percent(OURS[0])} of the slowest to",
            f"{percent(OURS[1])} of the fastest row of the A100,",
            f"{rates['A100'].shown(lambda rate: f'{rate / 1e12:.0f}')} T MAC/s; an H100 is {H100_OVER_A100:.2f}",
            f"times as fast (source 4); an operation takes {LAUNCH[1] * 1e6:.0f} to {LAUNCH[0] * 1e6:.0f} µs at",
            "least, from Python to its launch, so that small batches do not pay.",
        ),
    ]


def decoding_lines():
    rows = [
        (
            kind,
            f"{row['bytes'] / 1e3:.0f}",
            f"{row['rate']:,.0f}",
            f"{row['with_loaders']:,.0f}",
            f"{row['rate'] * row['bytes'] / 1e6:.1f}",
        )
        for kind, row in PARTS["decoding"].items()
    ]
    columns = ("images", "KB", "per second, one core", f"per second, {CORES} loaders", "MB per second, one core")
    return [
        "### How fast images come: measured",
        "",
        *paragraph(
            f"`FolderBatches` with random crop to 224 and flip, {JPEGS} made-up JPEGs of {PHOTOGRAPH[0]} x",
            f"{PHOTOGRAPH[1]} pixels (assumed) and the mean size of ImageNet's files",
            f"({TRAIN_TAR / IMAGENET_IMAGES / 1e3:.0f} KB, source 6), read from memory: a disk must give the last",
            "column for every core that decodes.",
        ),
        *table(columns, rows),
    ]


def layout_lines():
    part, rates, decoding = PARTS["imagenet"], gpu_rates(), PARTS["decoding"]
    students, images = part["students"], sum(imagenet_images(part))
    batch, loaders, rate = students.batch_size, students.loaders, decoding["as they come"]["rate"]
    rows, found = [], {}
    for jobs, gpus in GPU_LAYOUTS:
        hours, largest, groups = layout_of(part, rates["A100"], jobs, gpus)
        h100_hours, *_ = layout_of(part, rates["H100"], jobs, gpus)
        decoded = groups * students.epochs * images
        cores = Ends(*(decoded / (3600 * value) / rate for value in hours))
        decoding_hours = -(-groups // jobs) * students.epochs * images / (gpus * loaders * rate) / 3600
        found[jobs, gpus] = hours, cores, decoding_hours
        memory = memory_bytes(part, largest, batch / gpus, gpus)
        row = (jobs * gpus, f"{jobs} x {gpus}", f"{batch / gpus:g}", largest, hours.shown(rounded))
        rows.append((*row, h100_hours.shown(rounded), gigabytes(memory), cores.shown(rounded), rounded(decoding_hours)))
    columns = ("GPUs", "jobs x GPUs", "batch of a GPU", "arms of a group", "hours, A100", "hours, H100")
    columns += ("GB of a GPU", "cores that decode, A100", f"hours to decode, {loaders} loaders a GPU")
    exchanges = []
    for gpus in sorted({gpus for _, gpus in GPU_LAYOUTS}):
        computing = Ends(*(1e3 * batch / gpus * part["step_macs"] / value for value in rates["A100"]))
        launching = Ends(*(1e3 * part["step_operations"] * value for value in LAUNCH))
        exchange = Ends(*(1e3 * exchange_seconds(part, end, gpus) for end in (0, 1)))
        exchanges.append((gpus, f"{batch / gpus:g}", *(of.shown(rounded) for of in (computing, launching, exchange))))
    one, one_cores, one_decoding = found[1, 1]
    most = max(jobs * gpus for jobs, gpus in found)
    of_most = {layout: max(row[0][0], row[2]) for layout, row in found.items() if layout[0] * layout[1] == most}
    best = min(of_most, key=of_most.get)
    return [
        "### Time, memory and cores: computed",
        "",
        *paragraph(
            "A job trains groups of arms in lockstep, one after the other. Several jobs share the arms of a seed as",
            "is best; each runs the teacher and decodes for itself. Hours are those of the GPUs if images come fast",
            "enough; cores are how many must decode all the time for that; the last column is what decoding takes",
            f"with the file's {loaders} loaders for every GPU. The larger of the two counts. Memory: weights,",
            "gradients and momentum of all arms of the group, activations of one student at a time, images and",
            "features of two batches; without CUDA's own.",
        ),
        *table(columns, rows),
        *paragraph(
            f"All-reduce: a student's gradients are {4 * part['student_parameters'] / 1e6:.0f} MB, of which a ring",
            f"sends 2 (n - 1) / n. Assumed, of a GPU: {INSIDE[0] / 1e9:.0f} to {INSIDE[1] / 1e9:.0f} GB/s inside a",
            f"node (a third to all of NVLink, source 5), {BETWEEN[0] / 1e9:.1f} to {BETWEEN[1] / 1e9:.0f} GB/s",
            "between nodes (eight GPUs that share an adapter of 100 Gbit/s, or one of 200 Gbit/s each). Milliseconds",
            "of a step and arm, A100:",
        ),
        *table(("GPUs of a job", "batch of a GPU", "computing", "launching", "all-reduce"), exchanges),
        "### What it comes to",
        "",
        *paragraph(
            f"64 GPUs take {found[1, 64][0].shown(rounded)} hours as one job, {found[8, 8][0].shown(rounded)} as",
            f"eight jobs of eight and {found[64, 1][0].shown(rounded)} as jobs of one",
            f"({len(students.seeds) * (part['arms'] + 1)} students to share); with decoding, and by the slow end,",
            f"best is {best[0]} x {best[1]}. One A100 takes {one.shown(rounded)} hours and",
            f"{one_cores.shown(rounded)} cores, or {rounded(one_decoding)} hours with {loaders} loaders. Copies of",
            f"shorter side {SHORTER_SIDE} come {decoding[SMALLER]['rate'] / rate:.1f} times as fast, but are not the",
            "images that the field trains on.",
        ),
    ]


def grid_lines():
    students = PARTS["pair"]["students"]
    collector = collector_parts()
    return [
        f"## B. A grid of {GRID:,} students",
        "",
        *paragraph(
            f"{students.teacher} -> {students.student} on CIFAR-100, batch {students.batch_size}, {students.epochs}",
            f"epochs, schedule `{students.schedule}`, in groups of arms in lockstep. One driver collects for all",
            "workers.",
        ),
        *teacher_lines(),
        *store_lines(),
        *disk_lines(),
        *collector_lines(collector),
        *limit_lines(collector),
        *advice_lines(collector),
    ]


def teacher_lines():
    part, rows = PARTS["pair"], []
    for arms in GROUPS:
        workers = student_seconds(part, arms)
        (here, share), (a100, a100_share) = workers["this machine"], workers["A100"]
        minutes, hours = (Ends(*(value * factor for value in a100)) for factor in (1 / 60, GRID / 3600))
        row = (arms, percent(share), percent(a100_share), rounded(here[0] / 60), minutes.shown(rounded))
        rows.append((*row, hours.shown(rounded)))
    batch, rates = part["students"].batch_size, gpu_rates()["A100"]
    computing = Ends(*(1e3 * batch * part["step_macs"] / rate for rate in rates))
    launching = Ends(*(1e3 * part["step_operations"] * least for least in LAUNCH))
    columns = ("arms in a group", "teacher's share here", "A100, at most", "minutes a student here", "A100")
    return [
        "### Teacher passes",
        "",
        *paragraph(
            f"Measured here ({part['precision']}, {CORES} threads, median of {ROUNDS}): a teacher's pass",
            f"{1e3 * part['pass_s']:.0f} ms, a student's step with hints {1e3 * part['step_s']:.0f} ms. Counted:",
            f"{part['teacher_macs'] / 1e6:.0f} M and {part['step_macs'] / 1e6:.0f} M MACs an image,",
            f"{part['teacher_operations']} and {part['step_operations']} operations: as in part A, MACs alone would",
            f"take an A100 {computing.shown(rounded)} ms a step, operations alone {launching.shown(rounded)} ms; the",
            "longer counts. Shares are of a student's whole time.",
        ),
        *table((*columns, f"hours of one A100, {GRID:,} students"), rows),
    ]


def store_lines():
    rows = [
        (f"{number:,}", *(f"{row[name]:.3f}" for name in ("ingest", "summary", "evaluate", "list", "page")))
        for number, row in PARTS["store"]["sizes"].items()
    ]
    columns = (
        "runs there",
        "a student",
        "its last epoch only",
        "its test measures",
        "list all",
        "the page's first 100",
    )
    return [
        "### The tracking store",
        "",
        *paragraph(
            "Seconds, measured: students go through the spool and `ingest` into a new sqlite store. It was filled",
            f"with copies of a run (tags, parameters and last metrics, not the curve), then {LOGGED} students were",
            "logged in each way. The page sorts by validation accuracy; its server adds to that time.",
        ),
        *table(columns, rows),
        *paragraph(
            f"Into another experiment of the same store, with {max(STORE):,} copies there:",
            f"{PARTS['store']['elsewhere']:.3f} s a student. Spooling takes a worker {PARTS['store']['spool']:.3f}",
            "s.",
        ),
    ]


def disk_lines():
    files, store, workers = PARTS["files"], PARTS["store"], WORKERS[0]
    kinds = [
        ("networks, float32", files["network_bytes"], GRID, f"{GRID:,} in a folder"),
        ("store, all curves", store["full_bytes"], GRID, "1"),
        ("store, last epochs only", store["summary_bytes"], GRID, "1"),
        ("spools, until they are ingested", store["spool_bytes"], GRID, "1 a job"),
        ("histories", files["history_bytes"], GRID, f"{GRID:,} in a folder"),
        (
            f"checkpoints of {workers} workers, {GROUP} arms each",
            files["checkpoint_bytes"],
            workers * GROUP,
            f"{workers}",
        ),
    ]
    rows = [
        (name, f"{size / 1e3:,.0f}", gigabytes(size * count), many)
        for name, size, count, many in sorted(kinds, key=lambda kind: -kind[1] * kind[2])
    ]
    return [
        "### Disk",
        "",
        *table(("what", "KB a student, measured", f"GB, {GRID:,} students", "files"), rows),
        f"Listing a folder of {FILES:,} files takes {PARTS['driver']['listed']:.2f} s (measured).",
        "",
    ]


def collector_lines(parts):
    total = sum(seconds for _, seconds, _ in parts)
    rows = [
        (name, f"{1e3 * seconds:,.2f}", f"{GRID * seconds / 3600:.2f}", how)
        for name, seconds, how in [*parts, ("all", total, "computed")]
    ]
    tables = "; ".join(
        f"{arms} arms {row['summarize']:.1f} s and {row['contrast']:.1f} s" for arms, row in PARTS["tables"].items()
    )
    polls = "; ".join(f"{workers:,}: {1e3 * seconds:,.0f} ms" for workers, seconds in PARTS["driver"]["poll"].items())
    return [
        "### The one collector",
        "",
        *table(("part", "ms a student", f"hours, {GRID:,} students", "known by"), rows),
        *paragraph(
            f"`summarize` and `contrast`, {TABLE_SEEDS} seeds (measured): {tables}. A look at the heartbeats of all",
            f"workers (measured): {polls}; the driver looks every {1e3 * POLL:.0f} ms.",
        ),
    ]


def limit_lines(parts):
    collector = sum(seconds for _, seconds, _ in parts)
    rows = []
    for worker, (seconds, _) in student_seconds(PARTS["pair"], GROUP).items():
        limit = Ends(*(value / collector for value in seconds))
        hours = [Ends(*(GRID * value / workers / 3600 for value in seconds)).shown(rounded) for workers in WORKERS]
        rows.append((worker, *hours, rounded(GRID * collector / 3600), limit.shown(rounded)))
    columns = ("worker", *(f"hours of training, {workers:,} workers" for workers in WORKERS))
    return [
        f"### Where the collector is the limit, in groups of {GROUP}",
        "",
        *paragraph(
            "Computed. Training takes students x time / workers; the collector works beside it. It is the limit",
            "where it takes longer: from (a student's seconds on a worker) / (a student's seconds in the collector)",
            "workers on.",
        ),
        *table((*columns, "hours of the collector", "limit from, workers"), rows),
    ]


def advice_lines(parts):
    files, store, workers = PARTS["files"], PARTS["store"], WORKERS[0]
    collector = sum(seconds for _, seconds, _ in parts)
    ingested, compared = GRID * mean_over_store("ingest"), table_seconds("contrast")[0]
    hours = [
        ("log last epochs only; curves stay in the histories", ingested, GRID * mean_over_store("summary")),
        ("an experiment a study, not one for all", ingested, GRID * store["elsewhere"]),
        ("ten stores, each with a collector, side by side", GRID * collector, GRID * collector / 10),
        ("training keys in one file: no network is read to be recognized", GRID * files["load"], 0.0),
        (f"a table a group of {GROUP}, not a file a student", GRID * files["read"], GRID * files["read_groups"]),
        (f"compare arms within studies of {STUDY} students", compared, GRID / STUDY * contrast_seconds(STUDY)),
    ]
    hours = [(name, "collector", before, after) for name, before, after in hours]
    whose = f"{workers} A100s, slow end"
    now = GRID * student_seconds(PARTS["pair"], GROUP)["A100"][0][0] / workers
    for arms in GROUPS:
        if arms > GROUP:
            larger = GRID * student_seconds(PARTS["pair"], arms)["A100"][0][0] / workers
            hours.append((f"groups of {arms} arms, not of {GROUP}", whose, now, larger))
    full = GRID * student_seconds(PARTS["pair"], GROUP, (0, 0))["A100"][0][0] / workers
    hours.append(("several groups on one GPU, at best until MACs are its limit", whose, now, full))
    disk = [
        ("delete networks once they are evaluated", files["network_bytes"], 0),
        ("log last epochs only", store["full_bytes"], store["summary_bytes"]),
        ("ingest and remove each spool as its job ends", store["spool_bytes"], 0),
    ]
    hours.sort(key=lambda row: row[3] - row[2])
    disk.sort(key=lambda row: row[2] - row[1])
    in_collector = next(name for name, whose, *_ in hours if whose == "collector")
    return [
        "### What the numbers say to do",
        "",
        *paragraph(
            "Computed from the tables above, each change by itself, the largest saving first. A saving in the",
            "collector shows in the end only from the number of workers on at which it is the limit.",
        ),
        *table(
            ("change", "whose hours", "before", "after", "saved"),
            [
                (name, whose, *(rounded(seconds / 3600) for seconds in (before, after, before - after)))
                for name, whose, before, after in hours
            ],
        ),
        *table(
            ("change", "GB before", "after", "saved"),
            [
                (name, *(gigabytes(GRID * size) for size in (before, after, before - after)))
                for name, before, after in disk
            ],
        ),
        f"In hours first: {hours[0][0]}. In the collector: {in_collector}. On disk: {disk[0][0]}.",
        "",
    ]


def contrast_seconds(students):
    """Of one study of so many students, by the power law from the smallest that was measured."""
    fewest = min(PARTS["tables"])
    _, exponent = table_seconds("contrast")
    return PARTS["tables"][fewest]["contrast"] * (students / TABLE_SEEDS / fewest) ** exponent


def test_write_the_page():
    missing = {"imagenet", "training_macs", "decoding", "pair", "files", "tables", "store", "driver"} - PARTS.keys()
    assert not missing, f"not measured in this run: {', '.join(sorted(missing))}"
    lines = [
        "# Beyond one machine",
        "",
        *paragraph(
            "What larger studies cost, from parts. Every number is *measured* (on this machine, in one run),",
            "*counted* (exact, the same everywhere), *quoted* (with its source), *assumed* (it says so) or",
            "*computed* from those. Nothing of it was run at this scale. Each part ends with what it comes to.",
        ),
        *imagenet_lines(),
        *grid_lines(),
        "## Sources",
        "",
        *(f"{number}. {source}." for number, source in enumerate(SOURCES, 1)),
        "",
        *paragraph(
            f"{hardware()['cpu']}, {CORES} cores, {hardware()['memory_gb']:g} GB; torch {versions()['torch']},",
            f"mlflow {versions()['mlflow']}. Sizes are parameters at the head of `tests/benchmarks/test_scale.py`.",
        ),
        "Written by `make bench ARGS='-k test_scale'`.",
    ]
    path = report_folder("") / "scale.md"
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

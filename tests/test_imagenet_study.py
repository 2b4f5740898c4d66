"""The ImageNet study's whole path, images to report, on a small image folder at its own size."""

import json
import re

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

from pursuhint_lib.models import build_model, load_model, state_hash
from pursuhint_lib.params import PARAMS_FOLDER, check_names, load_params
from pursuhint_lib.pipeline import Sources, main
from pursuhint_lib.storage import REPOSITORY

STUDY = "imagenet_resnet34_resnet18"
CLASSES = ("n01", "n02")
SMALLER = {  # how much is measured and trained, and nothing else
    "common": {"seeds": [0], "epochs": 1, "batch_size": 4, "validation_per_class": 1, "loaders": 1},
    "profile_layers": {"probe_images": 8, "resamples": 1, "similarity_metrics": ["r2_cca", "linear_cka"]},
    "cluster_layers": {"strategies": ["stage_ends", "clustered"], "cluster_metrics": ["r2_cca"]},
}


def write_images(folder):
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 1)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = (int(side) for side in generator.integers(230, 320, 2))
                coarse = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
                coarse[..., label] //= 4
                image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{name}_{i}.JPEG")


def write_weights(path):
    """A teacher "of somebody else", with batch-norm statistics of something."""
    torch.manual_seed(0)
    teacher = build_model("resnet34", len(CLASSES)).train()
    with torch.no_grad():
        teacher(torch.randn(8, 3, 64, 64))
    torch.save(teacher.state_dict(), path)
    return state_hash(teacher)


def test_the_recipe_is_the_published_one(home, monkeypatch):
    params = load_params(PARAMS_FOLDER / f"{STUDY}.yaml")
    students = params["04_distill_students"]
    assert (students.teacher, students.student, students.image_size) == ("resnet34", "resnet18", 224)
    assert (students.batch_size, students.epochs, students.schedule) == (256, 100, "imagenet")
    assert (students.learning_rate, students.momentum, students.weight_decay) == (0.1, 0.9, 1e-4)
    assert (students.temperature, students.ce_weight, students.kd_weight) == (1.0, 0.5, 0.5)
    assert students.streaming and students.flip and students.channel_statistics == "imagenet"
    assert params["01_train_teacher"].teacher_weights == "IMAGENET1K_V1"
    write_images(home)
    monkeypatch.setenv("PURSUHINT_DATA", str(home))
    check_names(params, STUDY)


def test_the_whole_study_runs_from_image_files_to_its_report(home, monkeypatch, capfd):
    write_images(home / "images")
    teacher = write_weights(home / "teacher.pth")
    content = yaml.safe_load((PARAMS_FOLDER / f"{STUDY}.yaml").read_text())
    for section, values in SMALLER.items():
        content[section] |= values
    content["train_teacher"]["teacher_weights"] = "teacher.pth"
    path = home / "params" / f"{STUDY}.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setenv("PURSUHINT_DATA", str(home / "images"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))

    status = main(["reproduce", STUDY], Sources(find=lambda _: path))
    said = capfd.readouterr()
    assert status == 0, said.err + said.out

    runs, reports = home / "runs" / STUDY, home / "reports" / STUDY
    assert state_hash(load_model(runs / "01_train_teacher" / "networks" / "teacher-s0.safetensors")[0]) == teacher
    images = json.loads((runs / "01_train_teacher" / "images.json").read_text())
    assert images["shape"] == [3, 224, 224] and images["mean"] == [0.485, 0.456, 0.406]
    assert {name: of["images"] for name, of in images["sets"].items()} == {"train": 8, "validation": 2, "test": 2}
    assert len(pd.read_csv(runs / "02_profile_layers" / "layers_teacher.csv")) == 16
    hint_points = json.loads((runs / "03_cluster_layers" / "hint_points.json").read_text())
    assert {len(points["layers"]) for points in hint_points.values()} == {4}
    histories = pd.read_csv(runs / "04_distill_students" / "histories.csv")
    assert histories["status"].eq("trained").all() and histories["loss"].notna().all()
    summary = pd.read_csv(reports / "tables" / "summary.csv")
    assert {"unaided", "kd", "at_stage_ends", "at_clustered_r2_cca"} <= set(summary["arm"])
    page = re.sub(r"\s+", " ", (reports / "report.html").read_text())
    assert "candidate layers, trained elsewhere" in page
    assert not (home / "data").exists()  # nothing was decoded to keep

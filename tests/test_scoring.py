"""Students of a study, scored: each network once, by the temperature that validation gave."""

import pandas as pd
import pytest
import torch

from pursuhint_lib import scoring
from pursuhint_lib.arms import kept_file
from pursuhint_lib.data import Batches, ImageSet
from pursuhint_lib.evaluation import accuracy, fit_temperature, score
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.models import build_model, candidate_layers, save_model
from pursuhint_lib.profiling import cross_similarity, profile_layers
from pursuhint_lib.scoring import score_network, score_students, student_similarities, study_students
from pursuhint_lib.storage import run_folder, save_table
from pursuhint_lib.training import predict

ARMS = [("kd", "kd", "none", ""), ("at_uniform", "at", "uniform", ""), ("at_random_0", "at", "random_0", "at_uniform")]


def batches(n, seed):
    generator = torch.Generator().manual_seed(seed)
    images = ImageSet(
        torch.randint(256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8), torch.arange(n) % 6, list("abcdef")
    )
    return Batches(images, 32, mean=[0.5], std=[0.25])


def network(seed):
    torch.manual_seed(seed)
    return build_model("resnet8_w4", 6, channels=1)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two seeds of kd, at_uniform and its twin at_random_0, and two unaided ones; at_uniform of seed 1 failed."""
    monkeypatch.setenv("PURSUHINT_HOME", str(tmp_path))
    teach, distill = (run_folder("toy", stage) for stage in ("01_train_teacher", "04_distill_students"))
    rows = [
        {"arm": arm, "method": method, "strategy": strategy, "same_as": same_as, "seed": seed, "val_accuracy": 0.5}
        | {"status": "failed" if method == "at" and seed == 1 else "trained"}
        for arm, method, strategy, same_as in ARMS
        for seed in (0, 1)
    ]
    save_table(pd.DataFrame(rows), distill / "students.csv")
    baselines = [("teacher", 0), ("unaided", 0), ("unaided", 1)]
    save_table(pd.DataFrame(baselines, columns=["model", "seed"]).assign(val_accuracy=0.4), teach / "baselines.csv")
    for place, (folder, arm, seed) in enumerate(
        [
            (teach, "unaided", 0),
            (teach, "unaided", 1),
            (distill, "kd", 0),
            (distill, "kd", 1),
            (distill, "at_uniform", 0),
        ]
    ):
        save_model(network(place), kept_file(folder, arm, seed), name="resnet8_w4", classes=6, channels=1)
    return "toy"


def test_the_students_of_both_notebooks_stand_in_one_table(study):
    found = study_students(study)
    assert list(found.columns) == scoring.STUDENT_COLUMNS
    assert list(found["arm"]) == ["unaided"] * 2 + ["kd"] * 2 + ["at_uniform"] * 2 + ["at_random_0"] * 2
    assert set(found.loc[found["arm"] != "at_random_0", "same_as"]) == {""}
    assert list(found.loc[found["status"] == "failed", "arm"]) == ["at_uniform", "at_random_0"]


def test_scores_are_those_of_each_network_and_failed_students_have_none(study, capsys):
    validation, test = batches(48, seed=1), batches(60, seed=2)
    teacher_logits = predict(network(9), test)[0]
    found = score_students(study, study_students(study), validation, test, teacher_logits).set_index(["arm", "seed"])
    assert len(found) == 6 and "status" not in found and ("at_uniform", 1) not in found.index
    for place, key in enumerate([("unaided", 0), ("unaided", 1), ("kd", 0), ("kd", 1), ("at_uniform", 0)]):
        logits, labels = predict(network(place), test)
        temperature = fit_temperature(*predict(network(place), validation))
        expected = score(logits, labels, teacher_logits, temperature)
        assert found.loc[key, "test_accuracy"] == accuracy(logits, labels) == expected["accuracy"]
        assert found.loc[key, "test_loss"] == expected["loss"] and found.loc[key, "kl"] == expected["kl"] > 0
        assert found.loc[key, "temperature"] == temperature and found.loc[key, "ece_scaled"] == expected["ece_scaled"]
    assert capsys.readouterr().out.count("seed 1: 2 students") == 1


def test_a_twin_shares_the_numbers_and_its_network_is_looked_at_once(study, monkeypatch):
    loaded = []
    load = scoring.load_student
    monkeypatch.setattr(scoring, "load_student", lambda *which: loaded.append(which) or load(*which))
    test = batches(60, seed=2)
    found = score_students(study, study_students(study), test, test, predict(network(9), test)[0])
    assert sorted(which[1:] for which in loaded) == [
        ("at_uniform", 0),
        ("kd", 0),
        ("kd", 1),
        ("unaided", 0),
        ("unaided", 1),
    ]
    measured = [name for name in found if name not in scoring.STUDENT_COLUMNS]
    own, twin = (found[found["arm"] == arm][measured].iloc[0] for arm in ("at_uniform", "at_random_0"))
    assert own.equals(twin)


def test_the_teacher_agrees_with_itself():
    test = batches(60, seed=2)
    found, logits = score_network(network(9), test, test)
    assert found["agreement"] == 1 and found["kl"] == 0 and torch.equal(logits, predict(network(9), test)[0])


def test_similarities_are_those_of_each_trained_student(study):
    probe = batches(60, seed=3)
    layers = candidate_layers(network(0))
    teacher = profile_layers(FrozenTeacher(network(9), layers), probe)
    found = student_similarities(study, study_students(study), layers, teacher, probe)
    assert set(found) == {("unaided", 0), ("unaided", 1), ("kd", 0), ("kd", 1), ("at_uniform", 0), ("at_random_0", 0)}
    expected = cross_similarity(teacher, profile_layers(FrozenTeacher(network(3), layers), probe))
    pd.testing.assert_frame_equal(found["kd", 1], expected)
    assert not found["kd", 0].equals(found["kd", 1])

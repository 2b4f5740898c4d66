"""Arms: which there are, that each is trained once and kept, and that an interruption costs nothing."""

import dataclasses
import shutil

import pandas as pd
import pytest
import torch

from pursuhint_lib import arms as arms_module
from pursuhint_lib.arms import (
    Arm,
    Distillation,
    kept_file,
    pair_table,
    split_timings,
    student_table_rows,
    study_arms,
    train_and_keep,
    training_key,
)
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPoints
from pursuhint_lib.learners import Supervised
from pursuhint_lib.models import candidate_layers, load_model, state_hash
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import Progress
from pursuhint_lib.study import fixed_batches, fresh_network, study_images, training_batches
from pursuhint_lib.training import Schedule

CPU, F32 = torch.device("cpu"), torch.float32
PARAMS = DistillStudents(
    study="toy", teacher="resnet8_w8", student="resnet8_w4", seeds=[0, 1], epochs=2, methods=["at", "fitnet"], threads=1
)


@pytest.fixture(scope="module")
def images():
    return study_images(PARAMS)


@pytest.fixture(scope="module")
def distillation(images):
    teacher, student = (fresh_network(name, images, 5) for name in (PARAMS.teacher, PARAMS.student))
    tables = [layer_table(net, candidate_layers(net), images.shape) for net in (teacher, student)]
    return Distillation(PARAMS, images, FrozenTeacher(teacher, list(tables[0]["layer"])), *tables, CPU, F32)


POINTS = {
    "first": HintPoints("first", ["stage1.0", "stage2.0", "stage3.0"]),
    "twin": HintPoints("twin", ["stage1.0", "stage2.0", "stage3.0"]),
    "last": HintPoints("last", ["stage3.0"]),
}


def arms_of(distillation, methods=("at",)):
    return study_arms(POINTS, methods, distillation.teacher_table, distillation.student_table)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("networks/*"))}


def test_arms_are_kd_and_every_method_with_every_strategy_and_twins_are_not_trained(distillation):
    arms = arms_of(distillation, ["at", "fitnet"])
    assert [arm.name for arm in arms] == ["kd", *(f"{m}_{s}" for m in ("at", "fitnet") for s in POINTS)]
    assert {arm.name: arm.same_as for arm in arms if arm.same_as} == {
        "at_twin": "at_first",
        "fitnet_twin": "fitnet_first",
    }
    pairs = pair_table(arms, distillation.teacher_table, distillation.student_table)
    row = pairs[(pairs["arm"] == "at_first") & (pairs["hint"] == 2)].iloc[0]
    assert (row["teacher_shape"], row["student_shape"]) == ("16x4x4", "8x4x4")
    assert not (pairs["arm"] == "kd").any()


def test_students_of_a_seed_start_from_the_same_weights_whatever_the_arm(distillation):
    starts = {
        arm.name: state_hash(distillation.learner(arm, 1).model) for arm in arms_of(distillation, ["at", "fitnet"])
    }
    assert len(set(starts.values())) == 1
    assert starts["kd"] != state_hash(distillation.learner(Arm("kd", "kd", "none"), 0).model)


def test_every_key_of_the_recipe_is_in_the_training_key(distillation):
    arms = {arm.name: distillation.key(arm) for arm in arms_of(distillation, ["at", "fitnet"])}
    assert arms["at_first"] == arms["at_twin"] and len(set(arms.values())) == len(arms) - 2
    for change in ({"temperature": 2.0}, {"epochs": 3}, {"noise": 0.1}, {"batch_size": 32}, {"hint_share": 0.1}):
        other = dataclasses.replace(distillation, params=PARAMS.model_copy(update=change))
        assert other.key(Arm("kd", "kd", "none")) != arms["kd"], change
    assert training_key(a=1) != training_key(a=2)


def test_a_finished_arm_is_not_trained_again_and_the_tables_are_the_same(distillation, tmp_path, monkeypatch):
    arms = arms_of(distillation)
    first = distillation.train(arms, tmp_path)
    before = bytes_of(tmp_path)
    assert set(before) == {f"{name}-s{seed}.safetensors" for name in ("kd", "at_first", "at_last") for seed in (0, 1)}
    monkeypatch.setattr(arms_module, "fit", None)  # training would fail
    again = distillation.train(arms, tmp_path)
    pd.testing.assert_frame_equal(first, again)
    assert bytes_of(tmp_path) == before and not list(tmp_path.glob("checkpoints/*"))


def test_the_kept_student_is_the_student_without_adapters_and_says_what_it_is(distillation, tmp_path, images):
    distillation.train(arms_of(distillation, ["fitnet"])[:2], tmp_path)
    student, facts = load_model(kept_file(tmp_path, "fitnet_first", 1))
    plain = fresh_network(PARAMS.student, images, 0)
    assert set(student.state_dict()) == set(plain.state_dict())
    assert (facts["arm"], facts["seed"], facts["status"]) == ("fitnet_first", 1, "trained")


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, at):
    """Make the `at`-th report of progress raise."""
    advance, count = Progress.advance, 0

    def counted(self, text, by=1):
        nonlocal count
        count += 1
        if count == at:
            raise Interrupted
        advance(self, text, by)

    monkeypatch.setattr(Progress, "advance", counted)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(distillation, tmp_path, monkeypatch, at):
    arms = arms_of(distillation)
    whole = distillation.train(arms, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, at)
        distillation.train(arms, tmp_path / "cut")
    resumed = distillation.train(arms, tmp_path / "cut")
    pd.testing.assert_frame_equal(split_timings(whole)[0], split_timings(resumed)[0])
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")


def test_stopped_between_the_saving_of_two_arms_the_rest_goes_on_from_the_checkpoint(
    distillation, tmp_path, monkeypatch
):
    arms = arms_of(distillation)
    whole = distillation.train(arms, tmp_path / "whole")
    keep, kept = arms_module._keep, []

    def keep_one(folder, name, *rest):
        if kept:
            raise Interrupted
        kept.append(name)
        keep(folder, name, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(arms_module, "_keep", keep_one)
        distillation.train(arms, tmp_path / "cut")
    trained = []
    real_fit = arms_module.fit
    monkeypatch.setattr(
        arms_module, "fit", lambda learners, *a, **k: trained.append(list(learners)) or real_fit(learners, *a, **k)
    )
    resumed = distillation.train(arms, tmp_path / "cut")
    assert kept == ["kd"] and trained[0] == ["at_first", "at_last"]
    pd.testing.assert_frame_equal(split_timings(whole)[0], split_timings(resumed)[0])
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")


def test_an_arm_that_is_added_later_is_trained_and_the_others_are_not(distillation, tmp_path, monkeypatch):
    distillation.train(arms_of(distillation)[:2], tmp_path)
    trained = []
    real_fit = arms_module.fit
    monkeypatch.setattr(
        arms_module, "fit", lambda learners, *a, **k: trained.append(list(learners)) or real_fit(learners, *a, **k)
    )
    distillation.train(arms_of(distillation), tmp_path)
    assert trained == [["at_last"], ["at_last"]]  # one seed each


def test_a_student_whose_history_is_gone_is_trained_again(distillation, tmp_path):
    arms = arms_of(distillation)[:2]
    first = distillation.train(arms, tmp_path)
    shutil.rmtree(tmp_path / "histories")
    again = distillation.train(arms, tmp_path)
    pd.testing.assert_frame_equal(split_timings(first)[0], split_timings(again)[0])


def test_a_damaged_student_is_refused_in_one_line_and_left_alone(distillation, tmp_path):
    arms = arms_of(distillation)[:1]
    distillation.train(arms, tmp_path)
    path = kept_file(tmp_path, "kd", 0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"kd-s0\.safetensors") as error:
        distillation.train(arms, tmp_path)
    assert "\n" not in str(error.value) and path.read_bytes() == bytes(content)


def test_the_unaided_student_of_a_seed_sees_the_same_batches_as_the_distilled_ones(distillation, images, tmp_path):
    ours = training_batches(PARAMS, images, PARAMS.batch_size, 1, CPU)
    for a, b in zip(ours.epoch(1), distillation.batches(1).epoch(1)):
        assert torch.equal(a.images, b.images) and torch.equal(a.index, b.index)
    history = train_and_keep(
        tmp_path,
        {"unaided": "key"},
        lambda _: Supervised(fresh_network(PARAMS.student, images, 1)),
        ours,
        Schedule("fast", 1, 0.1),
        validation=fixed_batches(PARAMS, images, "validation", CPU),
        progress=Progress(tmp_path, 1, "test"),
    )
    assert history["arm"].tolist() == ["unaided"] and kept_file(tmp_path, "unaided", 1).exists()


def test_an_arm_that_is_the_same_as_another_has_its_rows_under_its_own_name(distillation, tmp_path):
    arms = arms_of(distillation)
    rows = student_table_rows(distillation.train(arms, tmp_path), arms).set_index(["arm", "seed"])
    assert rows.loc[("at_twin", 1), "val_accuracy"] == rows.loc[("at_first", 1), "val_accuracy"]
    assert rows.loc[("at_twin", 1), "same_as"] == "at_first" and len(rows) == 8


def test_a_network_that_diverged_is_one_line_with_what_to_change():
    history = pd.DataFrame([{"arm": "teacher", "seed": 0, "epoch": 3, "status": "failed"}])
    with pytest.raises(ValueError, match="teacher seed 0: .* epoch 3; lower teacher_learning_rate"):
        arms_module.check_trained(history, "teacher_learning_rate")

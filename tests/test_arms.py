"""Arms: which there are, that each is trained once and kept, and that an interruption costs nothing."""

import copy
import dataclasses
import itertools
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pursuhint_lib import arms as arms_module
from pursuhint_lib.arithmetic import WrongArithmetic, facts
from pursuhint_lib.arms import (
    Arm,
    Distillation,
    kept_file,
    log_students,
    pair_table,
    parse_method,
    split_timings,
    student_table_rows,
    study_arms,
    train_and_keep,
    training_key,
)
from pursuhint_lib.controls import ControlTeacher, control_teacher
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPoints
from pursuhint_lib.learners import SilentHint, Supervised
from pursuhint_lib.models import candidate_layers, load_model, state_hash
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import Progress
from pursuhint_lib.records import trained_at
from pursuhint_lib.study import fixed_batches, fresh_network, study_images, training_batches
from pursuhint_lib.training import Schedule, resolve_precision

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


@pytest.fixture(scope="module")
def controlled(distillation, images):
    """The same study with a deeper teacher, of which a draw has a choice, and one that can give control hints."""
    teacher = fresh_network("resnet14_w8", images, 5)
    table = layer_table(teacher, candidate_layers(teacher), images.shape)
    params = PARAMS.model_copy(update={"teacher": "resnet14_w8"})
    frozen = control_teacher(teacher, list(table["layer"]), params, images)
    return dataclasses.replace(distillation, params=params, teacher=frozen, teacher_table=table)


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


def test_arms_have_keys_of_their_own_and_twins_one(distillation):
    arms = {arm.name: distillation.key(arm) for arm in arms_of(distillation, ["at", "fitnet"])}
    assert arms["at_first"] == arms["at_twin"] and len(set(arms.values())) == len(arms) - 2
    assert training_key(a=1) != training_key(a=2)


FOLDER = {"data": "image_folder", "data_folder": "one", "image_size": 8, "validation_per_class": 1}
STREAMED = FOLDER | {"noise": 0, "crop_padding": 0, "streaming": True}
# Field -> another value than that of a study, and what else that study has.
CHANGES_STUDENTS = {
    "data": (FOLDER["data"], {**FOLDER, "data": "digits", "image_size": 0}, {"image_size": 8}),
    "n_classes": (5, {}),
    "image_size": (16, FOLDER),
    "streaming": (True, STREAMED | {"streaming": False}),
    "channel_statistics": ("imagenet", FOLDER),
    "noise": (0.1, {}),
    "crop_padding": (0, {}),
    "flip": (True, {}),
    "evaluation_repeats": (2, {}),  # changes what is said of a student
    "validation_per_class": (10, {}),
    "split_seed": (1, {}),
    "device": ("cuda", {}),
    "threads": (2, {}),
    "precision": ("bfloat16", {}),
    "teacher": ("resnet8_w4", {}),
    "student": ("resnet8_w8", {}),
    "batch_size": (32, {}),
    "schedule": ("paper", {}),
    "epochs": (3, {}),
    "learning_rate": (0.2, {}),
    "momentum": (0.8, {}),
    "weight_decay": (1e-3, {}),
    "processes": (2, {}),
    "sync_batch_norm": (True, {"processes": 2}),
    "methods": (["fitnet"], {}),
    "ce_weight": (0.5, {}),
    "kd_weight": (0.5, {}),
    "logit_weights": ({"dkd": 5.0}, {"methods": ["dkd+at"]}),
    "temperature": (2.0, {}),
    "balance": ("none", {}),
    "hint_share": (0.1, {}),
    "hint_weights": ({"at": 7.0}, {"balance": "none"}),
}
CHANGES_NO_STUDENT = {
    "study": ("other", {}),
    "data_folder": ("two", FOLDER),  # with the same images
    "loaders": (0, STREAMED),
    "seeds": ([3], {}),  # in the file's name
    "workers": (2, {}),
}


def key_of(params, monkeypatch):
    """Of the last arm of a study, put together as notebook 04 does."""
    images = study_images(params)
    teacher, student = (fresh_network(name, images, 5) for name in (params.teacher, params.student))
    tables = [layer_table(net, candidate_layers(net), images.shape) for net in (teacher, student)]
    dtype = resolve_precision(params.precision, CPU)
    frozen = FrozenTeacher(teacher, list(tables[0]["layer"]))
    setting = Distillation(params, images, frozen, *tables, torch.device(params.device), dtype)
    arm = study_arms(POINTS, params.methods, *tables, params.hint_weights)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: params.threads)
        return setting.key(arm)


@pytest.mark.parametrize("field", DistillStudents.model_fields)
def test_the_training_key_holds_every_parameter_that_changes_a_student_and_no_other(field, home, monkeypatch):
    value, of_the_study, *together = (CHANGES_STUDENTS | CHANGES_NO_STUDENT)[field]
    for folder in ("one", "two"):
        for split, label, number in itertools.product(("train", "test"), ("cat", "dog"), range(3)):
            pixels = np.random.default_rng([ord(label[0]), number, split == "test"]).integers(0, 256, (16, 16, 3))
            path = home / folder / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    params = PARAMS.model_copy(update={"device": "cpu", "methods": ["at"], **of_the_study})
    change = {field: value, **(together[0] if together else {})}
    assert getattr(params, field) != value
    keys = [key_of(of, monkeypatch) for of in (params, params.model_copy(), params.model_copy(update=change))]
    assert keys[0] == keys[1]
    assert (keys[0] != keys[2]) == (field in CHANGES_STUDENTS)


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


def test_beside_a_student_stands_the_commit_that_trained_it_whatever_runs_later(distillation, tmp_path, monkeypatch):
    commits = iter([{"commit": "a" * 40, "dirty": True}, {"commit": "b" * 40, "dirty": False}])
    monkeypatch.setattr(arms_module, "source_state", lambda: next(commits))
    both = arms_of(distillation, ["fitnet"])[:2]
    distillation.train(both[:1], tmp_path, seeds=[1])
    distillation.train(both, tmp_path, seeds=[1])
    found = trained_at(tmp_path)
    arithmetic = facts(fresh_network(PARAMS.student, distillation.images, 0), CPU, torch.float32)
    assert found["kd-s1"] == {"commit": "a" * 40, "dirty": True, "arithmetic": arithmetic}
    assert found["fitnet_first-s1"] == {"commit": "b" * 40, "dirty": False, "arithmetic": arithmetic}
    assert arithmetic["memory_format"] == "contiguous_format" and arithmetic["cpu_capability"]
    (tmp_path / "networks" / "odd-s0.safetensors").write_bytes(b"no network")
    assert trained_at(tmp_path) == found


def test_nothing_is_trained_where_this_machine_computes_a_network_wrongly(distillation, tmp_path, monkeypatch):
    def wrong(*network):
        raise WrongArithmetic("this machine computes conv1 wrongly")

    monkeypatch.setattr(arms_module, "check_arithmetic", wrong)
    with pytest.raises(WrongArithmetic, match="computes conv1 wrongly"):
        distillation.train(arms_of(distillation)[:1], tmp_path)
    assert not list(tmp_path.glob("networks/*"))


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
        "unaided-s1",
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
    history = pd.DataFrame([{"arm": "teacher", "seed": 0, "epoch": 3, "status": "failed", "reason": "why"}])
    with pytest.raises(ValueError, match="teacher seed 0: why in epoch 3; lower teacher_learning_rate"):
        arms_module.check_trained(history, "teacher_learning_rate")


# ---- Methods that are sums ----


def test_a_method_is_a_sum_of_one_logit_loss_and_hints_with_layers_of_their_own():
    assert parse_method("at") == ("kd", (("at", ""),))
    assert parse_method("wsld+crd@last+at") == ("wsld", (("crd", "last"), ("at", "")))
    assert parse_method("dkd_std") == ("dkd_std", ())


@pytest.mark.parametrize(
    "text, reason",
    [
        ("att", "unknown 'att'; did you mean 'at'"),
        ("wsld+cdr@last", "unknown 'cdr'; did you mean 'crd'"),
        ("", "unknown ''"),
        ("at+at", "names at twice"),
        ("at+at@last", "names at twice"),
        ("kd+dkd", "matches logits in 2 ways"),
        ("kd@last", "'kd@last': a logit loss takes no layers .allowed: kd."),
        ("at@", "'at@': names no layers .allowed behind a hint method: @ and a strategy"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(text, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_method(text)
    assert "\n" not in str(error.value)


def test_arms_of_sums_have_hints_logit_losses_and_layers_as_written(distillation):
    arms = arms_of(distillation, ["wsld+at@last+fitnet", "dkd", "crd@last", "kd", "at"])
    names = [f"wsld+at@last+fitnet_{s}" for s in POINTS] + ["dkd", "crd@last", *(f"at_{s}" for s in POINTS)]
    assert [arm.name for arm in arms] == ["kd", *names]
    first = arms[1]
    assert first.logit_loss == "wsld" and [len(hint.pairs) for hint in first.hints] == [1, 3]
    assert [hint.weight for hint in first.hints] == [1000.0, 100.0] and arms[2].same_as == first.name
    assert {arm.name: arm.strategy for arm in arms if arm.name in ("dkd", "crd@last")} == {
        "dkd": "none",
        "crd@last": "last",
    }
    table = pair_table(arms, distillation.teacher_table, distillation.student_table)
    assert table.loc[table["arm"] == first.name, "method"].tolist() == ["at", "fitnet", "fitnet", "fitnet"]
    weighed = study_arms(POINTS, ["at"], distillation.teacher_table, distillation.student_table, {"at": 7.0})
    assert weighed[1].hints[0].weight == 7.0
    with pytest.raises(ValueError, match="'at@lost': no hint points 'lost' .there are first, twin, last"):
        arms_of(distillation, ["at@lost"])


def test_blanks_around_names_change_nothing(distillation):
    assert parse_method(" wsld + crd @ last ") == parse_method("wsld+crd@last")
    arms = arms_of(distillation, ["wsld + at", "at + fitnet @ last", " dkd "])
    names = [*(f"wsld+at_{s}" for s in POINTS), *(f"at+fitnet@last_{s}" for s in POINTS), "dkd"]
    assert [arm.name for arm in arms[1:]] == names
    assert {arm.method for arm in arms} == {"kd", "wsld+at", "at+fitnet@last", "dkd"}


@pytest.mark.parametrize(
    "first, second", [("at+crd", "crd+at"), ("wsld+at@last", "at@last + wsld"), ("at", "kd+at"), ("at", "at ")]
)
def test_one_sum_written_twice_is_refused_in_one_line(distillation, first, second):
    with pytest.raises(ValueError) as error:
        arms_of(distillation, [first, "fitnet", second])
    assert str(error.value) == f"{second!r}: the same sum as {first!r} (allowed: one of the two)"


def test_sums_with_other_layers_or_another_logit_loss_are_methods_of_their_own(distillation):
    methods = ["at+crd", "at+crd@last", "at@last+crd", "wsld+at+crd"]
    assert {arm.method for arm in arms_of(distillation, methods)} == {"kd", *methods}


def test_the_deepest_layer_can_be_named_in_every_study_and_adds_no_arm(distillation):
    tables = distillation.teacher_table, distillation.student_table
    without = {name: POINTS[name] for name in ("first", "twin")}
    arms = study_arms(without, ["at", "crd@last"], *tables)
    assert [arm.name for arm in arms] == ["kd", "at_first", "at_twin", "crd@last"]
    assert arms[-1].hints == study_arms(POINTS, ["crd@last"], *tables)[-1].hints
    assert [pair.teacher_layer for pair in arms[-1].pairs] == [distillation.teacher_table["layer"].iloc[-1]]
    other = {"last": HintPoints("last", ["stage1.0"])}  # what the study chose goes first
    assert study_arms(other, ["at@last"], *tables)[-1].pairs[0].teacher_layer == "stage1.0"


def test_crd_takes_its_negatives_by_the_labels_of_the_training_images(distillation, images):
    arm = arms_of(distillation, ["crd@last"])[1]
    (crd,) = distillation.learner(arm, 0).adapters
    labels = images.train.labels
    for label in labels.unique():
        begin, size = (of[labels == label].unique().item() for of in (crd.class_begin, crd.class_size))
        rows = crd.by_class[begin : begin + size]
        assert torch.equal(rows.sort().values, (labels == label).nonzero().flatten())


def test_logit_losses_are_weighed_as_the_study_says_or_as_published(distillation):
    params = PARAMS.model_copy(update={"kd_weight": 0.3, "logit_weights": {"dist": 4.0}})
    setting = dataclasses.replace(distillation, params=params)
    weights = {
        name: setting.learner(Arm(name, name, "none", logit_loss=name), 0).logit_weight
        for name in ("kd", "kd_std", "dist", "dist_std", "wsld")
    }
    assert weights == {"kd": 0.3, "kd_std": 0.3, "dist": 4.0, "dist_std": 1.0, "wsld": 2.5}


def test_a_hint_without_a_gradient_fails_its_arm_alone(distillation, tmp_path, monkeypatch):
    arms = arms_of(distillation)

    def silent(learner, batches, observations, share):
        if len(learner.pairs) == 1:
            raise SilentHint("the hint a -> b gives the student no gradient")
        return balance(learner, batches, observations, share)

    balance = arms_module.balance_hints
    monkeypatch.setattr(arms_module, "balance_hints", silent)
    history = distillation.train(arms, tmp_path)
    failed = history[history["status"] == "failed"]
    assert set(failed["arm"]) == {"at_last"} and set(failed["reason"]) == {
        "the hint a -> b gives the student no gradient"
    }
    assert (history.loc[history["arm"] != "at_last", "epoch"].max()) == PARAMS.epochs


# ---- Control arms ----


def control_arms(setting, methods=("at",)):
    layers = ["stage1.0", "stage2.0", "stage3.0"]
    points = {
        "fixed": HintPoints("fixed", layers),
        "untrained": HintPoints("untrained", layers, source="untrained"),
        "shuffled": HintPoints("shuffled", layers, source="shuffled"),
        "redrawn": HintPoints("redrawn", list(setting.teacher_table["layer"]), redrawn=3),
    }
    return study_arms(points, methods, setting.teacher_table, setting.student_table)


def test_arms_of_the_same_layers_are_twins_only_if_source_and_redrawing_agree_as_well(distillation):
    # resnet8 has three candidate layers: a draw of three is always all of them, but of nine pairs.
    same = HintPoints("again", ["stage1.0", "stage2.0", "stage3.0"], source="shuffled")
    arms = control_arms(distillation)
    assert not any(arm.same_as for arm in arms)
    redrawn = [(arm.name, hint.redrawn) for arm in arms for hint in arm.hints if hint.redrawn]
    assert redrawn == [("at_redrawn", 3)]
    points = {"shuffled": same, "again": same}
    again = study_arms(points, ["at"], distillation.teacher_table, distillation.student_table)
    assert [arm.same_as for arm in again] == ["", "", "at_shuffled"]
    pairs = {"a": HintPoints("a", ["stage3.0"]), "b": HintPoints("b", ["stage3.0"], redrawn=1)}
    a, b = study_arms(pairs, ["at"], distillation.teacher_table, distillation.student_table)[1:]
    assert a.pairs == b.pairs and not b.same_as


def test_hints_are_numbered_by_the_student_layer_also_where_pairs_are_reversed(controlled):
    teacher, student = controlled.teacher_table, controlled.student_table
    layers = teacher["layer"].tolist()[:3]
    arms = study_arms({"reversed": HintPoints("reversed", layers, pairing="reversed")}, ["at"], teacher, student)
    rows = pair_table(arms, teacher, student)
    assert rows["hint"].tolist() == [1, 2, 3]
    taught = set(rows["student_layer"])
    assert rows["student_layer"].tolist() == [layer for layer in student["layer"] if layer in taught]
    assert rows["teacher_layer"].tolist() == layers[::-1]


def test_the_pair_table_tells_the_source_and_of_redrawn_arms_every_pair_that_can_be_drawn(controlled):
    arms = control_arms(controlled)
    table = pair_table(arms, controlled.teacher_table, controlled.student_table)
    assert table.groupby("arm")["source"].unique().map(list).to_dict() == {
        "at_fixed": ["trained"],
        "at_untrained": ["untrained"],
        "at_shuffled": ["shuffled"],
        "at_redrawn": ["trained"],
    }
    assert (table.loc[table["arm"] != "at_redrawn", "redrawn"] == 0).all()
    redrawn = table[table["arm"] == "at_redrawn"]
    assert (redrawn["redrawn"] == 3).all()
    layers, points = list(controlled.teacher_table["layer"]), ["stage1.0", "stage2.0", "stage3.0"]
    possible = {
        (hint, layer, points[hint - 1])
        for draw in itertools.combinations(layers, 3)
        for hint, layer in enumerate(draw, start=1)
    }
    rows = list(redrawn[["hint", "teacher_layer", "student_layer"]].itertuples(index=False, name=None))
    assert set(rows) == possible and len(rows) == len(possible) == 12


def facts_of_key(setting, arm, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(arms_module, "training_key", lambda **facts: facts)
        return setting.key(arm)


def test_the_training_key_tells_control_arms_apart(controlled, images, monkeypatch):
    arms = {arm.strategy: arm for arm in control_arms(controlled)}
    assert len({controlled.key(arm) for arm in arms.values()}) == len(arms)
    assert "untrained" not in facts_of_key(controlled, arms["fixed"], monkeypatch)
    (hint,) = arms["redrawn"].hints
    for change in ({"redrawn": 2}, {"weight": 3.0}, {"method": "fitnet"}):
        other = dataclasses.replace(arms["redrawn"], hints=(dataclasses.replace(hint, **change),))
        assert controlled.key(other) != controlled.key(arms["redrawn"]), change
    dkd = dataclasses.replace(arms["fixed"], logit_loss="dkd")
    louder = controlled.params.model_copy(update={"logit_weights": {"dkd": 5.0}})
    keys = {controlled.key(arms["fixed"]), controlled.key(dkd)}
    assert len(keys | {dataclasses.replace(controlled, params=louder).key(dkd)}) == 3
    plain = dataclasses.replace(controlled, teacher=controlled.teacher.teacher)
    assert plain.key(arms["fixed"]) == controlled.key(arms["fixed"])
    # Another untrained network: other students for the arm that it teaches, the same for the rest.
    other = fresh_network("resnet14_w8", images, 77)
    layers = controlled.teacher.teacher.layers
    teacher = ControlTeacher(controlled.teacher.teacher, FrozenTeacher(other, layers))
    changed = dataclasses.replace(controlled, teacher=teacher)
    differing = {name for name, arm in arms.items() if changed.key(arm) != controlled.key(arm)}
    assert differing == {"untrained"}
    # Last bits of what was measured: the same students.
    measured = copy.deepcopy(controlled.teacher)
    measured.untrained.model.bn1.running_var *= 1 + 1e-6
    assert dataclasses.replace(controlled, teacher=measured).key(arms["untrained"]) == controlled.key(arms["untrained"])


def test_a_teacher_without_the_source_is_refused_in_one_line_before_anything_is_trained(distillation, tmp_path):
    arms = control_arms(distillation)
    for call in (lambda: distillation.train(arms, tmp_path), lambda: distillation.learner(arms[2], 0)):
        with pytest.raises(ValueError, match="'at_untrained' takes .* 'untrained'.*control_teacher") as error:
            call()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("networks/*"))


def test_control_arms_start_from_the_same_weights_with_the_same_adapters(controlled):
    arms = {arm.strategy: arm for arm in control_arms(controlled, ["fitnet"])}
    learners = {name: controlled.learner(arm, 1) for name, arm in arms.items() if arm.pairs}
    assert len({state_hash(learner.model) for learner in learners.values()}) == 1
    adapters = {name: state_hash(learner.adapters) for name, learner in learners.items()}
    assert adapters["fixed"] == adapters["untrained"] == adapters["shuffled"]
    assert len(learners["redrawn"].adapters) == 18
    first = next(iter(controlled.batches(0).epoch(0)))
    for name, learner in learners.items():
        seen = controlled.teacher.observe(first.images, layers=learner.teacher_layers)
        told = learner.hint_weights.requires_grad_(True)
        (taught,) = torch.autograd.grad(learner.losses(first, seen)["weighted_fitnet"], told)
        assert int((taught != 0).sum()) == 3, name
    weights = {name: tuple(learner.hint_weights.tolist()) for name, learner in learners.items()}
    assert len(set(weights.values())) == 4  # each arm is balanced with its own features


def test_every_control_trains_to_a_student_of_its_own_and_no_teacher_changes(controlled, tmp_path):
    arms = control_arms(controlled, ["fitnet"])
    before = state_hash(controlled.teacher.model), state_hash(controlled.teacher.untrained.model)
    history = controlled.train(arms, tmp_path)
    assert (state_hash(controlled.teacher.model), state_hash(controlled.teacher.untrained.model)) == before
    assert history.groupby("arm").size().to_dict() == {arm.name: 4 for arm in arms}
    assert (history["status"] == "trained").all()
    students = {path.name: state_hash(load_model(path)[0]) for path in tmp_path.glob("networks/*-s1.safetensors")}
    assert len(set(students.values())) == len(students) == len(arms) == 5
    rows = student_table_rows(history, arms)
    assert set(rows["arm"]) == {arm.name for arm in arms}
    hinted = history[history["arm"] != "kd"]
    assert (hinted["fitnet"] > 0).all() and (hinted["loss_share_fitnet"] > 0).all()


def test_interrupted_and_resumed_control_arms_give_the_same_bytes(controlled, tmp_path, monkeypatch):
    controlled = dataclasses.replace(controlled, params=controlled.params.model_copy(update={"seeds": [1]}))
    arms = [arm for arm in control_arms(controlled, ["fitnet"]) if arm.strategy in ("redrawn", "untrained")]
    whole = controlled.train(arms, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 1)
        controlled.train(arms, tmp_path / "cut")
    assert list((tmp_path / "cut").glob("checkpoints/*.ckpt"))
    fresh = dataclasses.replace(controlled, teacher=copy.deepcopy(controlled.teacher))
    resumed = fresh.train(arms, tmp_path / "cut")
    pd.testing.assert_frame_equal(split_timings(whole)[0], split_timings(resumed)[0])
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")


def test_redrawn_arms_give_the_same_bytes_in_threads_and_alone(controlled, tmp_path):
    params = controlled.params.model_copy(update={"seeds": [0]})
    controlled = dataclasses.replace(controlled, params=params)
    arms = [arm for arm in control_arms(controlled, ["at", "fitnet"]) if arm.strategy == "redrawn"]
    controlled.train(arms, tmp_path / "turn")
    threaded = dataclasses.replace(controlled, params=params.model_copy(update={"workers": 3}))
    threaded.train(arms, tmp_path / "threads")
    assert bytes_of(tmp_path / "turn") == bytes_of(tmp_path / "threads")
    controlled.train(arms[1:], tmp_path / "alone")
    for name, content in bytes_of(tmp_path / "alone").items():
        assert bytes_of(tmp_path / "turn")[name] == content


def test_the_record_of_a_control_arm_says_where_its_hints_come_from(controlled, tmp_path):
    arms = control_arms(controlled)
    logged = {}

    class Run:
        def log_trained_model(self, *, arm, params, **rest):
            logged[arm] = params["hint_points"]

    log_students(Run(), arms, pd.DataFrame(), controlled)
    assert logged == {
        "kd": "none",
        "at_fixed": "stage1.0, stage2.0, stage3.0",
        "at_untrained": "untrained/stage1.0, untrained/stage2.0, untrained/stage3.0",
        "at_shuffled": "shuffled/stage1.0, shuffled/stage2.0, shuffled/stage3.0",
        "at_redrawn": "3 drawn of stage1.0, stage1.1, stage2.0, stage2.1, stage3.0, stage3.1",
    }

"""Every method, side by side on digits: it trains, its term falls, and it is the same alone, in threads and resumed."""

import dataclasses

import pytest
import torch

from pursuhint_lib.arms import TIMING_COLUMNS, Distillation, log_students, student_table_rows, study_arms, terms_left
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPoints
from pursuhint_lib.learners import Supervised
from pursuhint_lib.logit_losses import LOGIT_LOSSES
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import candidate_layers, load_model, state_hash
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.progress import Progress
from pursuhint_lib.study import fresh_network, study_images, training_batches
from pursuhint_lib.training import Schedule, fit

SUMS = ["wsld+at", "wsld+crd@last", "at+crd@last"]
WRITTEN = [*METHODS, *(name for name in LOGIT_LOSSES if name != "kd"), *SUMS]
PARAMS = DistillStudents(
    study="toy",
    teacher="resnet14_w8",
    student="resnet8_w4",
    seeds=[0],
    methods=WRITTEN,
    n_classes=4,
    epochs=8,
    batch_size=32,
    learning_rate=0.05,
    noise=0.3,
)
WITH_STATE = ["kd", "dkd", "fitnet_mixed", "crd_mixed", "ofd_mixed", "reviewkd_mixed", "ab_mixed", "ft_mixed"]
WITH_STATE += ["at+crd@last_mixed"]  # adapters, banks, margins, phases: all that an interruption could lose

POINTS = {
    "mixed": HintPoints("mixed", ["stage1.0", "stage2.1", "stage3.0"]),
    "last": HintPoints("last", ["stage3.1"]),
}


@pytest.fixture(scope="module")
def distillation():
    """With a teacher that has learned for six epochs."""
    torch.set_num_threads(1)
    images = study_images(PARAMS)
    teacher, student = (fresh_network(name, images, 5) for name in (PARAMS.teacher, PARAMS.student))
    fit({"teacher": Supervised(teacher)}, training_batches(PARAMS, images, 64, 5, "cpu"), Schedule("fast", 6, 0.1))
    tables = [layer_table(network, candidate_layers(network), images.shape) for network in (teacher, student)]
    frozen = FrozenTeacher(teacher, list(tables[0]["layer"]))
    return Distillation(PARAMS, images, frozen, *tables, torch.device("cpu"), torch.float32)


def all_arms(distillation):
    arms = study_arms(POINTS, WRITTEN, distillation.teacher_table, distillation.student_table)
    return [arm for arm in arms if not (arm.strategy == "last" and "@" not in arm.method)]


@pytest.fixture(scope="module")
def trained(distillation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = state_hash(distillation.teacher.model)
    arms = all_arms(distillation)
    history = distillation.train(arms, folder)
    assert state_hash(distillation.teacher.model) == before
    return arms, folder, history


def test_there_is_an_arm_for_every_way_to_hint_and_to_match_logits(distillation):
    names = {arm.name for arm in all_arms(distillation)}
    assert {f"{name}_mixed" for name in METHODS} | set(LOGIT_LOSSES) <= names
    assert {"wsld+at_mixed", "wsld+crd@last", "at+crd@last_mixed"} <= names


def test_every_arm_trains_to_the_end_with_finite_terms_and_better_than_chance(trained):
    arms, _, history = trained
    assert (history["status"] == "trained").all()
    rows = student_table_rows(history, arms).set_index("arm")
    assert set(rows.index) == {arm.name for arm in arms}
    assert (rows["val_accuracy"] > 0.35).all()  # four classes


def test_every_term_of_the_teachers_falls(trained):
    arms, _, history = trained
    of_arm = dict(list(history.groupby("arm")))
    for arm in arms:
        for term in [arm.logit_loss, *(hint.method for hint in arm.hints)]:
            values = of_arm[arm.name][term].dropna()
            assert len(values) == {"ab": 1, "ft": 7}.get(term, 8), (
                arm.name,
                term,
            )  # a pre-stage is one of eight epochs
            assert term == "ab" or values.iloc[-1] < values.iloc[0], (arm.name, term, values.tolist())


def test_shares_of_loss_and_gradient_are_kept_for_every_term_and_add_up(trained):
    arms, _, history = trained
    for kind in ("loss", "gradient"):
        columns = [name for name in history if name.startswith(f"{kind}_share_")]
        assert {name.removeprefix(f"{kind}_share_") for name in columns} >= {"cls", *LOGIT_LOSSES, *METHODS}
        sums = history[columns].sum(axis="columns")
        assert sums[history["arm"] != "ab_mixed"].to_numpy() == pytest.approx(1.0, rel=1e-5)
        assert history.loc[history["arm"] == "ab_mixed", columns].notna().any(axis=1).all()
    first = history[history["epoch"] == 1].set_index("arm")
    for arm in arms:  # half of the gradient of the others, as the parameters ask
        if arm.hints and {hint.method for hint in arm.hints} <= {"at", "fitnet", "vid", "sp", "pkt", "nst", "crd"}:
            named = sum(first.loc[arm.name, f"gradient_share_{hint.method}"] for hint in arm.hints)
            assert 0.1 < named < 0.5, arm.name


def test_what_is_left_of_a_term_is_told_for_logits_and_hints_of_any_method(trained):
    arms, _, history = trained
    left = terms_left(history, arms).set_index(["arm", "epoch"])
    assert left.loc[("at_mixed", 1), "hints_left"] == 1 and left.loc[("dkd", 1), "logits_left"] == 1
    rows = history[history["arm"] == "at+crd@last_mixed"].set_index("epoch")
    expected = (rows["at"] / rows["at"][1] + rows["crd"] / rows["crd"][1]) / 2
    assert left.loc["at+crd@last_mixed", "hints_left"].to_numpy() == pytest.approx(expected.to_numpy())
    assert left.loc["kd", "hints_left"].isna().all()


def test_students_are_plain_networks_and_differ_from_arm_to_arm(trained, distillation):
    arms, folder, _ = trained
    plain = set(fresh_network(PARAMS.student, distillation.images, 0).state_dict())
    students = {path: load_model(path)[0] for path in folder.glob("networks/*.safetensors")}
    assert len(students) == len(arms) and all(set(student.state_dict()) == plain for student in students.values())
    assert len({state_hash(student) for student in students.values()}) == len(arms)


def test_every_arm_is_recorded_under_its_own_name(trained, distillation):
    arms, _, history = trained
    logged = {}

    class Run:
        def log_trained_model(self, *, arm, params, **rest):
            logged[arm] = params

    log_students(Run(), arms, history, distillation)
    assert list(logged) == [arm.name for arm in arms]
    assert logged["wsld+crd@last"]["logit_loss"] == "wsld" and logged["wsld+crd@last"]["hint_points"] == "stage3.1"
    both = "at: stage1.0, stage2.1, stage3.0; crd: stage3.1"
    assert logged["at+crd@last_mixed"]["hint_points"] == both


class Interrupted(Exception):
    pass


def test_interrupted_in_any_phase_and_taken_up_in_threads_every_arm_ends_with_the_same_bytes(
    trained, distillation, tmp_path, monkeypatch
):
    arms, folder, history = trained
    arms = [arm for arm in arms if arm.name in WITH_STATE]
    advance, count = Progress.advance, 0

    def counted(self, text, by=1):
        nonlocal count
        count += 1
        advance(self, text, by=by)
        if count in (1, 4):  # within the pre-stage, and after it
            raise Interrupted

    monkeypatch.setattr(Progress, "advance", counted)
    threaded = dataclasses.replace(distillation, params=PARAMS.model_copy(update={"workers": 2}))
    for setting in (distillation, threaded):
        with pytest.raises(Interrupted):
            setting.train(arms, tmp_path)
    again = threaded.train(arms, tmp_path)
    ended = {path.name: path.read_bytes() for path in tmp_path.glob("networks/*")}
    assert ended == {name: (folder / "networks" / name).read_bytes() for name in ended}
    assert set(ended) == {f"{name}-s0.safetensors" for name in WITH_STATE}
    before = history[history["arm"].isin(WITH_STATE)].reset_index(drop=True).drop(columns=TIMING_COLUMNS)
    assert again.drop(columns=TIMING_COLUMNS).equals(before[again.columns.drop(TIMING_COLUMNS)])


def test_every_method_trains_in_bfloat16(distillation, tmp_path):
    params = PARAMS.model_copy(update={"epochs": 2})
    half = dataclasses.replace(distillation, params=params, dtype=torch.bfloat16)
    history = half.train(all_arms(distillation), tmp_path)
    assert (history["status"] == "trained").all()

"""The lockstep loop on tiny networks: same bits alone, in company, in threads, and after an interruption."""

import hashlib
import math
import pickle

import pytest
import torch
from torch import nn

from pursuhint_lib.data import Batches, ImageSet
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPair
from pursuhint_lib.learners import Distilled, Hint, Supervised, seeded
from pursuhint_lib.logit_losses import LOGIT_LOSSES, LogitLoss
from pursuhint_lib.losses import at_loss, cls_loss, kd_loss
from pursuhint_lib.models import state_hash
from pursuhint_lib.training import Schedule, _Means, fit, predict, resolve_device, resolve_precision

SHAPE, CLASSES = (1, 6, 6), 3
SCHEDULE = Schedule("fast", epochs=3, learning_rate=0.05)


class Net(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.dropout(self.first(x).mean((2, 3))))


def batches(n=50, seed=3, shuffle=True):
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    images = torch.randint(0, 120, (n, *SHAPE), generator=generator) + 40 * labels.view(-1, 1, 1, 1)
    images = ImageSet(images.to(torch.uint8), labels, ["a", "b", "c"])
    mean, std = torch.tensor([0.5]), torch.tensor([0.25])
    return Batches(images, 16, mean=mean, std=std, crop_padding=int(shuffle), shuffle=shuffle, seed=seed)


def teacher():
    with seeded(7):
        return FrozenTeacher(Net(6), ["first"])


def arms(dropout=0.0, names=("kd", "at", "fitnet", "alone")):
    """Fresh learners, equal at every call; each with weights of its own."""
    frozen = teacher()
    learners = {}
    for number, name in enumerate(names):
        with seeded(number):
            net = Net(4, dropout)
        tables = {
            "teacher_table": layer_table(frozen.model, ["first"], SHAPE),
            "student_table": layer_table(net, ["first"], SHAPE),
        }
        hints = [Hint(name, [HintPair("first", "first")], 2.0)] if name in ("at", "fitnet") else []
        common = {"ce_weight": 1.0, "logit_weight": 1.0, "temperature": 2.0}
        learners[name] = Supervised(net) if name == "alone" else Distilled(net, **common, **tables, hints=hints)
    return learners


def run(learners, **options):
    options = {"teacher": teacher(), "validation": batches(30, shuffle=False)} | options
    history = fit(learners, batches(), options.pop("schedule", SCHEDULE), **options)
    table = history.drop(columns=["seconds", "finished"])
    return table, {name: state_hash(learner) for name, learner in learners.items()}


def same(a, b):
    return a[0].equals(b[0]) and a[1] == b[1]


def test_every_term_and_the_validation_of_every_epoch_stand_in_the_history():
    history, _ = run(arms())
    assert list(history.groupby("arm", sort=False).size()) == [3] * 4
    at = history[history["arm"] == "at"]
    shares = [f"{kind}_share_{term}" for kind in ("loss", "gradient") for term in ("cls", "kd", "at")]
    assert at[["loss", "cls", "kd", "at", *shares, "val_accuracy", "val_loss"]].notna().all(axis=None)
    assert history.loc[history["arm"] == "kd", ["at", "loss_share_at", "gradient_share_at"]].isna().all(axis=None)
    assert history.loc[history["arm"] == "alone", shares].isna().all(axis=None)
    assert at["loss"].iloc[-1] < at["loss"].iloc[0]
    parts = at["loss"] - at["cls"] - at["kd"]
    assert parts.to_numpy() == pytest.approx((at["loss_share_at"] * at["loss"]).to_numpy(), rel=1e-5)  # all positive
    for kind in ("loss", "gradient"):
        total = at[[name for name in shares if name.startswith(kind)]].sum(axis="columns")
        assert total.to_numpy() == pytest.approx(1.0, rel=1e-5)


def test_the_share_of_the_gradient_is_that_of_the_epochs_first_step():
    learners, frozen = arms(), teacher()
    first = next(iter(batches().epoch(0)))
    seen = frozen.observe(first.images)
    model = learners["at"].model.train()
    feature = model.first(first.images)
    logits = model.head(feature.mean((2, 3)))
    terms = {
        "cls": cls_loss(logits, first.labels),
        "kd": kd_loss(logits, seen.logits, 2.0),
        "at": 2.0 * at_loss(feature, seen.features["first"]),
    }
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(model.parameters()), retain_graph=True, allow_unused=True)
        norms[name] = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
    history, _ = run(arms())
    row = history[history["arm"] == "at"].iloc[0]
    for name, norm in norms.items():
        assert row[f"gradient_share_{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_arm_gives_the_same_bytes_alone_as_in_company(dropout):
    history, hashes = run(arms(dropout))
    for name in ("at", "alone"):
        alone = {name: arms(dropout)[name]}
        lonely, lonely_hashes = run(alone)
        assert lonely_hashes[name] == hashes[name]
        assert lonely["loss"].tolist() == history.loc[history["arm"] == name, "loss"].tolist()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_threads_change_no_bit(dropout):
    assert same(run(arms(dropout)), run(arms(dropout), workers=3))


def test_dropout_draws_change_from_step_to_step_and_the_global_generator_is_put_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with_dropout, _ = run(arms(0.5))
    without, _ = run(arms(0.0))
    assert torch.equal(before, torch.get_rng_state())
    assert with_dropout["loss"].tolist() != without["loss"].tolist()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, stop_after, dropout):
    def stop(epoch, rows):
        if epoch == stop_after:
            raise Interrupted

    checkpoint = tmp_path / "a.ckpt"
    with pytest.raises(Interrupted):
        run(arms(dropout), checkpoint=checkpoint, on_epoch=stop)
    epochs = []
    resumed = run(arms(dropout), checkpoint=checkpoint, on_epoch=lambda epoch, rows: epochs.append(epoch))
    assert epochs == list(range(stop_after + 1, 4))
    assert same(resumed, run(arms(dropout)))


def test_some_of_the_arms_of_a_checkpoint_can_go_on_without_the_others(tmp_path):
    def stop(epoch, rows):
        raise Interrupted

    with pytest.raises(Interrupted):
        run(arms(), checkpoint=tmp_path / "a.ckpt", on_epoch=stop)
    some = {name: learner for name, learner in arms().items() if name in ("at", "alone")}
    history, hashes = run(some, checkpoint=tmp_path / "a.ckpt")
    assert set(history["arm"]) == {"at", "alone"} and hashes["at"] == run(arms())[1]["at"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_left_alone(tmp_path, damage):
    path = tmp_path / "a.ckpt"
    run(arms(), checkpoint=path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    broken = {"flip": bytes(content), "cut": bytes(content[:1000]), "empty": b""}[damage]
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"a\.ckpt: damaged checkpoint.*delete it") as error:
        run(arms(), checkpoint=path)
    assert "\n" not in str(error.value) and path.read_bytes() == broken


def test_a_checkpoint_of_other_arms_is_refused(tmp_path):
    run(arms(names=("kd",)), checkpoint=tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="checkpoint without at"):
        run(arms(names=("at",)), checkpoint=tmp_path / "a.ckpt")


def test_loading_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    payload = pickle.dumps(Evil(), protocol=2)
    (tmp_path / "a.ckpt").write_bytes(hashlib.sha256(payload).digest() + payload)
    with pytest.raises(ValueError, match="not a checkpoint of this program") as error:
        run(arms(), checkpoint=tmp_path / "a.ckpt")
    assert not (tmp_path / "owned").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_arm_whose_loss_is_not_finite_is_stopped_and_the_others_go_on(workers):
    learners = arms()
    nn.init.constant_(learners["at"].model.head.weight, math.nan)
    history, hashes = run(learners, workers=workers)
    failed = history[history["arm"] == "at"]
    assert failed["status"].tolist() == ["failed"] and failed["epoch"].tolist() == [1]
    assert failed["reason"].tolist() == ["the loss was no longer finite"]
    healthy = run(arms())
    assert hashes["fitnet"] == healthy[1]["fitnet"]
    assert (history.loc[history["arm"] != "at", "status"] == "trained").all()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "silence, reason",
    [
        (lambda learner: nn.init.zeros_(learner.model.first[1].weight), "the term at gives the student no gradient"),
        (lambda learner: learner.hint_weights.zero_(), "the term at gives the student no gradient"),
        (lambda learner: setattr(learner, "silent", "said so before"), "said so before"),
    ],
)
def test_an_arm_of_which_a_term_teaches_nothing_is_stopped_by_name_and_the_others_go_on(silence, reason, workers):
    learners = arms()
    if reason != "said so before":
        nn.init.constant_(learners["at"].model.first[1].bias, -1.0)  # with a weight of zero: dead after the ReLU
    silence(learners["at"])
    history, hashes = run(learners, workers=workers)
    failed = history[history["arm"] == "at"]
    assert failed[["status", "reason", "epoch"]].to_numpy().tolist() == [["failed", reason, 1]]
    assert hashes["fitnet"] == run(arms())[1]["fitnet"]
    assert history.loc[history["arm"] != "at", "reason"].isna().all()


def fade(monkeypatch, from_progress, factor):
    """AT is multiplied with `factor` from this point of the training on."""
    losses = Distilled.losses

    def fading(self, batch, observation, progress=1.0):
        terms = losses(self, batch, observation, progress)
        if "at" in terms and progress >= from_progress:
            terms["loss"] = terms["loss"] - terms["weighted_at"] * (1 - factor)
            terms |= {"at": terms["at"] * factor, "weighted_at": terms["weighted_at"] * factor}
        return terms

    monkeypatch.setattr(Distilled, "losses", fading)


def test_a_term_may_fall_silent_in_any_epoch(monkeypatch):
    fade(monkeypatch, 1 / 3, 0.0)
    history, _ = run(arms())
    at = history[history["arm"] == "at"]
    assert at["status"].tolist() == ["trained", "failed"] and at["reason"].iloc[1] == "the term at is zero"
    assert (history.loc[history["arm"] != "at", "status"] == "trained").all()


def test_a_term_that_joins_within_an_epoch_is_checked_and_has_its_shares(monkeypatch):
    losses = Distilled.losses

    def late(self, batch, observation, progress=1.0):
        terms = losses(self, batch, observation, progress)
        if "at" in terms and progress == 0:
            terms["loss"] = terms["loss"] - terms["weighted_at"].detach()
            del terms["at"], terms["weighted_at"]
        return terms

    monkeypatch.setattr(Distilled, "losses", late)
    history, _ = run(arms())
    first = history[(history["arm"] == "at") & (history["epoch"] == 1)].iloc[0]
    for kind in ("loss", "gradient"):
        shares = [first[f"{kind}_share_{term}"] for term in ("cls", "kd", "at")]
        assert min(shares) > 0 and sum(shares) == pytest.approx(1.0, rel=1e-5)
    fade(monkeypatch, 0.0, 0.0)  # joins, and is zero
    history, _ = run(arms())
    assert history.loc[history["arm"] == "at", "reason"].tolist() == ["the term at is zero"]


def test_shares_of_the_loss_are_of_what_all_terms_add_signs_aside_and_preparations_count():
    means = _Means()
    parts = {"weighted_cls": 0.3, "weighted_vid": -0.8, "ft_preparation": 0.9}
    terms = {"loss": sum(parts.values()), "logits": 5.0, "cls": 0.3, "vid": -0.8} | parts
    means.add({name: torch.tensor(value) for name, value in terms.items()}, 16)
    row = means.row()
    shares = {name: row[f"loss_share_{name}"] for name in ("cls", "vid", "ft_preparation")}
    assert shares == pytest.approx({"cls": 0.15, "vid": -0.4, "ft_preparation": 0.45})


def test_a_student_that_diverges_in_its_very_last_step_has_failed():
    schedule = Schedule("paper", 1, 1e38)
    images = batches(16).image_set
    one_step = Batches(images, 16, mean=[0.5], std=[0.25], shuffle=True, seed=3)
    history = fit({"kd": arms()["kd"]}, one_step, schedule, teacher=teacher(), validation=batches(30, shuffle=False))
    assert history[["status", "reason"]].to_numpy().tolist() == [["failed", "the loss was no longer finite"]]


def test_a_term_that_is_zero_is_told_from_one_without_a_gradient():
    learners = arms(names=("kd",))
    learners["kd"].logit_loss = "zero"
    with pytest.MonkeyPatch.context() as patch:
        zero = LogitLoss(lambda student, teacher, labels, temperature: 0.0 * student.sum())
        patch.setitem(LOGIT_LOSSES, "zero", zero)
        history, _ = run(learners)
    assert history["reason"].tolist() == ["the term zero is zero"]


def test_students_of_different_networks_can_learn_in_one_group():
    small = run({"at": arms()["at"]})
    with seeded(5):
        wide = Net(9)
    tables = [layer_table(net, ["first"], SHAPE) for net in (teacher().model, wide)]
    hints = [Hint("fitnet", [HintPair("first", "first")], 2.0)]
    common = {"ce_weight": 1.0, "logit_weight": 1.0, "temperature": 2.0}
    other = Distilled(wide, **common, teacher_table=tables[0], student_table=tables[1], hints=hints)
    both = run({"wide": other, "at": arms()["at"]})
    assert both[1]["at"] == small[1]["at"] and (both[0]["status"] == "trained").all()


def test_the_schedules_are_one_cycle_and_steps_and_use_no_best_epoch():
    paper = Schedule("paper", 240, 0.05)
    for epoch, rate in ((0, 0.05), (149, 0.05), (150, 0.005), (179, 0.005), (180, 5e-4), (210, 5e-5), (239, 5e-5)):
        assert paper.learning_rate_at(epoch / 240) == pytest.approx(rate)
    imagenet = Schedule("imagenet", 100, 0.1)
    for epoch, rate in ((0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 1e-3), (89, 1e-3), (90, 1e-4), (99, 1e-4)):
        assert imagenet.learning_rate_at(epoch / 100) == pytest.approx(rate)
    fast = Schedule("fast", 10, 0.4)
    rates = [fast.learning_rate_at(t / 100) for t in range(100)]
    peak = rates.index(max(rates))
    assert peak == 25 and max(rates) == pytest.approx(0.4) and rates[-1] < 1e-3
    assert rates[:26] == sorted(rates[:26]) and rates[25:] == sorted(rates[25:], reverse=True)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"name": "papper"}, "schedule 'papper' is unknown (allowed: fast, paper, imagenet)"),
        ({"epochs": 0}, "epochs must be a whole number, 1 or more, not 0"),
        ({"epochs": 2.5}, "epochs must be a whole number, 1 or more, not 2.5"),
        ({"epochs": True}, "epochs must be a whole number, 1 or more, not True"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, not 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and above 0, not nan"),
        ({"momentum": 1.0}, "momentum must be 0 or more and below 1, not 1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and 0 or more, not nan"),
    ],
)
def test_a_misspelt_or_senseless_schedule_is_refused(changed, says):
    with pytest.raises(ValueError) as error:
        Schedule(**{"name": "fast", "epochs": 3, "learning_rate": 0.05} | changed)
    assert str(error.value) == says


def test_the_name_of_a_schedule_is_none():
    with pytest.raises(TypeError, match="schedule is a str: pass Schedule"):
        fit(arms(names=("alone",)), batches(), "fast")


def test_predict_is_in_order_in_eval_mode_and_puts_the_mode_back():
    with seeded(0):
        net = Net(4, dropout=0.9).train()
    logits, labels = predict(net, batches(40, shuffle=False))
    assert net.training and logits.shape == (40, CLASSES)
    assert torch.equal(labels, batches(40, shuffle=False).image_set.labels)
    assert torch.equal(logits, predict(net, batches(40, shuffle=False))[0])


def test_bfloat16_trains_to_about_the_same_losses_and_keeps_float32_weights():
    half, _ = run(arms(), dtype=torch.bfloat16)
    full, _ = run(arms())
    assert half["loss"].to_numpy() == pytest.approx(full["loss"].to_numpy(), rel=0.03)
    learners = arms()
    run(learners, dtype=torch.bfloat16)
    assert {p.dtype for learner in learners.values() for p in learner.parameters()} == {torch.float32}


def test_a_missing_device_is_named():
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda': this machine offers 0 GPUs"):
            resolve_device("cuda")
    assert resolve_precision("float32", torch.device("cpu")) is torch.float32


def test_when_every_arm_has_failed_training_ends_and_stays_ended(tmp_path):
    learners = arms(names=("kd",))
    nn.init.constant_(learners["kd"].model.head.weight, math.nan)
    told = []
    options = {"checkpoint": tmp_path / "a.ckpt", "on_epoch": lambda epoch, rows: told.append(epoch)}
    history, _ = run(learners, **options)
    again, _ = run(arms(names=("kd",)), **options)
    assert told == [1] and history["status"].tolist() == again["status"].tolist() == ["failed"]

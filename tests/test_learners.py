"""Learners on tiny networks: terms, weights, adapters, balance."""

import pytest
import torch
from torch import nn

from pursuhint_lib.data import Batch
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPair
from pursuhint_lib.learners import Distilled, Hint, Supervised, balance_hints, gradient_norms, seeded
from pursuhint_lib.losses import at_loss, cls_loss, hint_mse, kd_loss
from pursuhint_lib.models import state_hash

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """Two maps of different size and width, then logits."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def scene(seed=0):
    with seeded(seed):
        teacher, student = Net(6), Net(2)
        batch = Batch(torch.randn(5, *SHAPE), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
    layers = ["first", "second"]
    tables = {
        "teacher_table": layer_table(teacher, layers, SHAPE),
        "student_table": layer_table(student, layers, SHAPE),
    }
    frozen = FrozenTeacher(teacher, layers)
    return student, frozen, tables, batch, frozen.observe(batch.images)


def distilled(student, tables, hints, **changed):
    return Distilled(
        student, **({"ce_weight": 0.3, "kd_weight": 0.7, "temperature": 4.0} | tables | changed), hints=hints
    )


CROSSED = [HintPair("first", "second"), HintPair("second", "first")]


def test_supervised_learns_from_labels_alone_and_needs_no_teacher():
    student, _, _, batch, _ = scene()
    terms = Supervised(student).losses(batch, None)
    assert torch.equal(terms["loss"], cls_loss(terms["logits"], batch.labels)) and set(terms) == {
        "loss",
        "logits",
        "cls",
    }


def test_the_loss_is_the_weighted_sum_of_the_terms_over_pairs_of_any_shape():
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("at", CROSSED, 5.0)])
    terms = learner.losses(batch, seen)
    first = student.first(batch.images)
    second = student.second(first)
    pool = nn.functional.adaptive_avg_pool2d
    hints = [
        at_loss(second, pool(seen.features["first"], 4)),
        at_loss(pool(first, 4), seen.features["second"]),
    ]
    kd = kd_loss(terms["logits"], seen.logits, 4.0)
    expected = 0.3 * cls_loss(terms["logits"], batch.labels) + 0.7 * kd + 5.0 * sum(hints)
    assert torch.allclose(terms["loss"], expected, rtol=1e-5)
    assert torch.allclose(terms["hint"], sum(hints) / 2) and torch.allclose(terms["hint_part"], 5.0 * sum(hints))


def test_fitnet_regressors_live_beside_the_student_and_are_trained_but_not_part_of_it():
    student, _, tables, batch, seen = scene()
    names = set(student.state_dict())
    learner = distilled(student, tables, [Hint("fitnet", CROSSED, 1.0)])
    regressor = learner.adapters[0].regressor
    assert regressor[0].weight.shape == (6, 4, 1, 1)  # student's second (4 channels) -> teacher's first (6)
    learner.losses(batch, seen)["loss"].backward()
    assert regressor[0].weight.grad.abs().sum() > 0
    assert set(learner.model.state_dict()) == names
    mapped = regressor(student.second(student.first(batch.images)))
    assert hint_mse(mapped, nn.functional.adaptive_avg_pool2d(seen.features["first"], 4)).isfinite()


def test_adapters_are_drawn_from_the_seed_and_leave_the_global_generator_alone():
    student, _, tables, _, _ = scene()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (distilled(student, tables, [Hint("fitnet", CROSSED, 1.0)], seed=s).adapters for s in (3, 3, 4))
    assert state_hash(a) == state_hash(b) != state_hash(c)
    assert torch.equal(before, torch.get_rng_state())


def test_building_and_closing_a_learner_changes_neither_the_student_nor_its_hooks():
    student, _, tables, batch, seen = scene()
    before = state_hash(student)
    learner = distilled(student, tables, [Hint("at", CROSSED, 1.0)])
    learner.close()
    assert state_hash(student) == before
    assert not any(module._forward_hooks for module in student.modules())
    with pytest.raises(RuntimeError, match="closed"):
        learner.losses(batch, seen)


def norm_of(learner, term):
    gradients = torch.autograd.grad(term, list(learner.model.parameters()), retain_graph=True, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5


def test_balanced_pairs_have_equal_gradients_that_sum_to_the_share_of_the_others():
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("at", CROSSED, 1.0)])
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    weights = balance_hints(learner, [batch], [seen], share=0.8)
    after = learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "hint_weights")
    _, cls, kd, hints = learner._terms(batch, seen)
    base = norm_of(learner, 0.3 * cls + 0.7 * kd)
    for weight, hint in zip(weights, hints, strict=True):
        assert norm_of(learner, weight * hint) == pytest.approx(0.8 / 2 * base, rel=1e-4)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    heard = gradient_norms(learner, batch, seen)
    assert heard["first -> second"] == pytest.approx(heard["second -> first"], rel=1e-4)
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())


def test_a_hint_without_a_gradient_is_refused_by_name():
    student, _, tables, batch, seen = scene()
    nn.init.zeros_(student.first[1].weight)
    nn.init.constant_(student.first[1].bias, -1.0)  # the first layer is dead after its ReLU: nothing can reach it
    learner = distilled(student, tables, [Hint("at", CROSSED[1:], 1.0)])
    with pytest.raises(ValueError, match="second -> first gives the student no gradient"):
        balance_hints(learner, [batch], [seen], share=0.5)


def test_unknown_methods_and_layers_are_refused_by_name():
    student, _, tables, _, _ = scene()
    with pytest.raises(ValueError, match=r"'atention' \(allowed: at, fitnet\)"):
        distilled(student, tables, [Hint("atention", CROSSED, 1.0)])
    with pytest.raises(ValueError, match="'third' is not in the layer table"):
        distilled(student, tables, [Hint("at", [HintPair("third", "first")], 1.0)])


def test_the_teacher_is_the_same_to_the_last_bit_after_students_learned_from_it():
    student, frozen, tables, batch, seen = scene()
    before = state_hash(frozen.model)
    learner = distilled(student, tables, [Hint("fitnet", CROSSED, 1.0)])
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    frozen.train()
    for _ in range(5):
        optimizer.zero_grad()
        learner.losses(batch, frozen.observe(batch.images))["loss"].backward()
        optimizer.step()
    assert state_hash(frozen.model) == before
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held.isdisjoint(id(p) for p in frozen.model.parameters())

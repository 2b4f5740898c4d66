"""Learners on tiny networks: terms, weights, adapters, balance, hints of other sources, redrawn hints."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import nn

from pursuhint_lib.data import Batch
from pursuhint_lib.features import FeatureExtractor, FrozenTeacher, Observation, layer_table
from pursuhint_lib.hint_losses import sp_loss
from pursuhint_lib.hints import HintPair
from pursuhint_lib.learners import (
    Distilled,
    Hint,
    SilentHint,
    Supervised,
    balance_hints,
    check_hints,
    feature_key,
    gradient_norms,
    seeded,
    shares_of_gradient,
)
from pursuhint_lib.logit_losses import LOGIT_LOSSES, dist_loss, dkd_loss, standardize_logits, wsld_loss
from pursuhint_lib.losses import at_loss, cls_loss, hint_mse, kd_loss
from pursuhint_lib.methods import METHODS, HintMethod
from pursuhint_lib.models import state_hash
from pursuhint_lib.training import _step

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
        student, **({"ce_weight": 0.3, "logit_weight": 0.7, "temperature": 4.0} | tables | changed), hints=hints
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
    assert torch.allclose(terms["at"], sum(hints) / 2) and torch.allclose(terms["weighted_at"], 5.0 * sum(hints))
    assert torch.equal(terms["weighted_kd"], 0.7 * terms["kd"])


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


def test_balanced_pairs_have_equal_gradients_and_together_the_share_of_the_others():
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("at", CROSSED, 1.0)])
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    weights = balance_hints(learner, [batch], [seen], share=0.8)
    after = learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "hint_weights")
    _, cls, kd, hints = learner._terms(batch, seen, range(2))
    base = norm_of(learner, 0.3 * cls + 0.7 * kd)
    assert norm_of(learner, sum(weight * hints[number] for number, weight in enumerate(weights))) == pytest.approx(
        0.8 * base, rel=1e-4
    )
    single = [norm_of(learner, weight * hints[number]) for number, weight in enumerate(weights)]
    assert single[0] == pytest.approx(single[1], rel=1e-4) and sum(single) > 0.8 * base  # they partly cancel
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
    with pytest.raises(ValueError, match=r"'atention' \(allowed: at, fitnet, "):
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


def test_balancing_looks_at_all_batches_that_it_is_given():
    student, frozen, tables, batch, seen = scene()
    other = Batch(3 * batch.images.flip(0) + 1, batch.labels, batch.index)
    batches, observations = [batch, other], [seen, frozen.observe(other.images)]
    weights = [
        balance_hints(distilled(student, tables, [Hint("at", CROSSED, 1.0)]), batches[:n], observations[:n], 0.5)
        for n in (1, 2)
    ]
    assert not torch.allclose(*weights, rtol=1e-2)


class Whisper(HintMethod):
    """A term of one, with a gradient as small as rounding leaves it."""

    published_weight = 1.0

    def forward(self, student_feature, teacher_feature, batch):
        return 1 + 1e-8 * student_feature.mean()


def test_a_gradient_that_is_only_rounding_is_none(monkeypatch):
    monkeypatch.setitem(METHODS, "whisper", Whisper)
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("whisper", [HintPair("first", "second")], 1.0)])
    for look in (lambda: balance_hints(learner, [batch], [seen], 0.5), lambda: check_hints(learner, [batch], [seen])):
        with pytest.raises(SilentHint, match="first -> second gives the student no gradient"):
            look()
    assert shares_of_gradient(learner, learner.losses(batch, seen))["whisper"] == 0


def test_a_hint_that_is_not_finite_is_told_from_one_that_is_silent():
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("fitnet", CROSSED, 1.0)])
    nn.init.constant_(learner.adapters[1].regressor[0].weight, float("nan"))
    with pytest.raises(SilentHint, match="the gradient of the hint second -> first is not finite"):
        balance_hints(learner, [batch], [seen], share=0.5)


# ---- Hints of other sources ----


def test_a_pair_is_taught_by_the_feature_of_its_source_and_the_logits_by_the_teacher():
    student, _, tables, batch, seen = scene()
    pairs = [HintPair("first", "second", "untrained"), HintPair("first", "second"), HintPair("second", "first", "odd")]
    assert list(map(feature_key, pairs)) == ["untrained/first", "first", "odd/second"]
    learner = distilled(student, tables, [Hint("at", pairs, 2.0)])
    assert learner.teacher_layers == ("untrained/first", "first", "odd/second")
    generator = torch.Generator().manual_seed(1)
    features = {
        key: torch.randn(shape, generator=generator)
        for key, shape in (("untrained/first", (5, 6, 8, 8)), ("first", (5, 6, 8, 8)), ("odd/second", (5, 12, 4, 4)))
    }
    terms = learner.losses(batch, Observation(seen.logits, features))
    first = student.first(batch.images)
    second = student.second(first)
    pool = nn.functional.adaptive_avg_pool2d
    hints = [at_loss(second, pool(features[key], 4)) for key in ("untrained/first", "first")]
    hints.append(at_loss(pool(first, 4), features["odd/second"]))
    assert float(terms["weighted_at"].detach()) == pytest.approx(2 * float(sum(hints).detach()))
    assert torch.equal(terms["kd"], kd_loss(terms["logits"], seen.logits, 4.0))
    norms = gradient_norms(learner, batch, Observation(seen.logits, features))
    assert list(norms)[2:] == ["untrained/first -> second", "first -> second", "odd/second -> first"]


# ---- Redrawn hints ----

POOL = ["a", "b", "c", "d"]
POINTS = ["first", "second"]


class Deep(nn.Module):
    """A pool of four maps of equal shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Sequential(nn.Conv2d(width, 4, 3, padding=1), nn.ReLU()) for width in (1, 4, 4, 4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


def redrawn_scene(method="at", seed=0, weight=1.0):
    """A learner whose two points are taught by two of four layers, drawn anew; a batch and what the teacher sees."""
    with seeded(11):
        teacher, student = Deep(), Net(2)
        batch = Batch(torch.randn(5, *SHAPE), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
    tables = {"teacher_table": layer_table(teacher, POOL, SHAPE), "student_table": layer_table(student, POINTS, SHAPE)}
    pairs = [HintPair(layer, point) for layer in POOL for point in POINTS]
    learner = distilled(student, tables, [Hint(method, pairs, weight, redrawn=2)], seed=seed)
    return learner, batch, FrozenTeacher(teacher, POOL).observe(batch.images)


def drawn(learner, batch, seen, steps):
    """Which pairs had a gradient in so many steps: a set of (teacher layer, student layer) each."""
    marked = []
    for _ in range(steps):
        learner.hint_weights.requires_grad_(True).grad = None
        learner.losses(batch, seen)["loss"].backward()
        told = learner.hint_weights.grad.nonzero().flatten().tolist()
        marked.append(tuple((learner.pairs[i].teacher_layer, learner.pairs[i].student_layer) for i in told))
    return marked


def test_at_every_step_the_points_are_taught_by_layers_drawn_anew_in_order_of_depth_and_all_draws_are_as_likely():
    draws = Counter(drawn(*redrawn_scene(), steps=300))
    expected = {tuple(zip(layers, POINTS)) for layers in combinations(POOL, 2)}
    assert set(draws) == expected  # all six subsets, the shallower layer for the shallower point
    # Of 300 draws of one in six: 50 each, standard deviation 6.5; four of them are 26.
    assert all(24 <= count <= 76 for count in draws.values())


def test_a_draw_depends_on_seed_and_step_alone():
    first = drawn(*redrawn_scene(seed=3), steps=12)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    assert drawn(*redrawn_scene("fitnet", seed=3), steps=12) == first  # whatever the method, whatever else is drawn
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(first)) > 3
    other = drawn(*redrawn_scene(seed=4), steps=12)
    assert other != first and other[:-1] != first[1:]  # nor are seeds the same draws a step later


def test_the_step_is_part_of_the_state_and_a_learner_without_redrawn_hints_has_none():
    learner, batch, seen = redrawn_scene()
    whole = drawn(learner, batch, seen, 10)
    begun, *_ = redrawn_scene()
    assert drawn(begun, batch, seen, 4) == whole[:4]
    resumed, *_ = redrawn_scene()
    resumed.load_state_dict(begun.state_dict())
    assert drawn(resumed, batch, seen, 6) == whole[4:]
    student, _, tables, batch, seen = scene()
    plain = distilled(student, tables, [Hint("at", CROSSED, 1.0)])
    assert set(plain.state_dict()) == {"hint_weights"} | {f"model.{name}" for name in student.state_dict()}
    assert plain.losses(batch, seen)["loss"].isfinite() and plain.step is None


def test_a_hints_term_is_the_mean_and_weighted_the_weighted_sum_of_the_pairs_that_teach():
    learner, batch, seen = redrawn_scene()
    weights = {pair: 1.0 + i for i, pair in enumerate(learner.pairs)}
    learner.hint_weights.copy_(torch.tensor(list(weights.values())))
    pool = nn.functional.adaptive_avg_pool2d
    for teaching in drawn(*redrawn_scene(), steps=4):
        terms = {name: term.detach() for name, term in learner.losses(batch, seen).items()}
        first = learner.model.first(batch.images)
        second = learner.model.second(first)
        (shallow, _), (deep, _) = teaching
        hints = [at_loss(first, seen.features[shallow]), at_loss(second, pool(seen.features[deep], 4))]
        part = sum(weights[HintPair(*pair)] * float(hint.detach()) for pair, hint in zip(teaching, hints))
        assert float(terms["at"]) == pytest.approx(float(sum(hints).detach()) / 2)
        assert float(terms["weighted_at"]) == pytest.approx(part)
        assert float(terms["loss"]) == pytest.approx(float(0.3 * terms["cls"] + 0.7 * terms["kd"]) + part)


def test_balanced_redrawn_pairs_have_the_share_of_those_that_teach_at_one_time_and_nothing_is_drawn():
    learner, batch, seen = redrawn_scene("fitnet")
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    weights = balance_hints(learner, [batch], [seen], share=0.8)
    heard = gradient_norms(learner, batch, seen)
    after = learner.state_dict()
    assert len(weights) == 8 and int(learner.step) == 0
    assert all(torch.equal(before[name], after[name]) for name in before if name != "hint_weights")
    _, cls, kd, _ = learner._terms(batch, seen, [])
    base = norm_of(learner, 0.3 * cls + 0.7 * kd)
    names = [f"{layer} -> {point}" for layer in POOL for point in POINTS]
    assert [heard[name] for name in names] == pytest.approx([heard[names[0]]] * 8, rel=1e-3)
    assert set(heard) == {*names, "cls", "kd"}
    assert norm_of(learner, learner.losses(batch, seen)["weighted_fitnet"]) == pytest.approx(0.8 * base, rel=1e-3)


def test_adapters_that_rest_have_a_gradient_of_zero_so_that_the_optimizer_can_step_all_of_them():
    learner, batch, seen = redrawn_scene("fitnet")
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9, fused=True)
    told = set()
    for _ in range(6):
        _step(optimizer, learner.losses(batch, seen)["loss"], 0.1)
        norms = [float(adapter.regressor[0].weight.grad.norm()) for adapter in learner.adapters]
        teaching = tuple(i for i, norm in enumerate(norms) if norm > 0)
        assert len(teaching) == 2 and teaching[0] % 2 == 0 and teaching[1] % 2 == 1
        told.add(teaching)
    assert len(told) > 1


@pytest.mark.parametrize("pairs, redrawn", [(5, 2), (2, 2)])
def test_pairs_that_are_no_pool_with_every_point_are_refused(pairs, redrawn):
    with pytest.raises(ValueError, match=f"'at': {pairs} pairs are not 2 student layers with each layer of a pool"):
        Hint("at", [HintPair("a", "first")] * pairs, 1.0, redrawn)


# ---- Sums of terms, warm-ups and pre-stages ----


def value(term):
    return float(term.detach())


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_any_logit_loss_takes_the_place_of_kd_under_its_own_name(name):
    student, _, tables, batch, seen = scene()
    terms = distilled(student, tables, [], logit_loss=name).losses(batch, seen)
    logits, teacher_logits = terms["logits"], seen.logits
    if name.endswith("_std"):
        logits, teacher_logits = standardize_logits(logits), standardize_logits(teacher_logits)
    expected = {
        "kd": lambda: kd_loss(logits, teacher_logits, 4.0),
        "dkd": lambda: dkd_loss(logits, teacher_logits, batch.labels, 4.0),
        "wsld": lambda: wsld_loss(logits, teacher_logits, batch.labels, 4.0),
        "dist": lambda: dist_loss(logits, teacher_logits, 4.0),
    }[name.removesuffix("_std")]()
    assert set(terms) == {"loss", "logits", "cls", name, "weighted_cls", f"weighted_{name}"}
    assert torch.equal(terms[name], expected)
    assert value(terms["loss"]) == pytest.approx(0.3 * value(terms["cls"]) + 0.7 * value(expected), rel=1e-5)


def test_an_unknown_logit_loss_is_refused_by_name():
    student, _, tables, _, _ = scene()
    with pytest.raises(ValueError, match="logit loss 'kdd' .allowed: kd, dkd, wsld, dist, kd_std"):
        distilled(student, tables, [], logit_loss="kdd")


def test_several_methods_add_up_each_on_its_own_pairs():
    student, _, tables, batch, seen = scene()
    hints = [Hint("at", CROSSED, 5.0), Hint("sp", [HintPair("second", "second")], 7.0)]
    terms = distilled(student, tables, hints, logit_loss="wsld").losses(batch, seen)
    at = distilled(student, tables, hints[:1]).losses(batch, seen)["at"]
    sp = sp_loss(student.second(student.first(batch.images)), seen.features["second"])
    assert torch.equal(terms["at"], at) and value(terms["sp"]) == pytest.approx(value(sp))
    assert value(terms["weighted_at"]) == pytest.approx(5 * 2 * value(at))
    parts = [value(term) for name, term in terms.items() if name.startswith("weighted_")]
    assert len(parts) == 4 and value(terms["loss"]) == pytest.approx(sum(parts))


def test_a_method_that_joins_its_pairs_gives_each_a_term_with_a_weight_of_its_own():
    student, _, tables, batch, seen = scene()
    pairs = [HintPair("first", "first"), HintPair("second", "second")]
    learner = distilled(student, tables, [Hint("reviewkd", pairs, 1.0)])
    assert len(learner.adapters) == 1
    learner.hint_weights.copy_(torch.tensor([2.0, 30.0]))
    terms = learner.losses(batch, seen)
    _, features = FeatureExtractor(student, ["first", "second"]).__enter__()(batch.images)
    own = learner.adapters[0](list(features.values()), [seen.features[name] for name in features], batch)
    assert value(terms["weighted_reviewkd"]) == pytest.approx(2 * value(own[0]) + 30 * value(own[1]), rel=1e-5)
    backwards = distilled(student, tables, [Hint("reviewkd", pairs[::-1], 1.0)])
    backwards.hint_weights.copy_(torch.tensor([30.0, 2.0]))
    assert value(backwards.losses(batch, seen)["weighted_reviewkd"]) == pytest.approx(value(terms["weighted_reviewkd"]))
    with pytest.raises(ValueError, match="'reviewkd' joins all its pairs"):
        distilled(student, tables, [Hint("reviewkd", pairs * 2, 1.0, redrawn=2)])


def test_hints_of_several_methods_are_balanced_to_the_same_share_whatever_their_numbers_of_pairs():
    student, _, tables, batch, seen = scene()
    hints = [Hint("at", CROSSED, 1.0), Hint("fitnet", [HintPair("second", "second")], 1.0)]
    learner = distilled(student, tables, hints)
    balance_hints(learner, [batch], [seen], share=0.8)
    heard = gradient_norms(learner, batch, seen)
    names = ["at: first -> second", "at: second -> first", "fitnet: second -> second"]
    assert list(heard) == ["cls", "kd", *names]
    _, cls, kd, _ = learner._terms(batch, seen, [])
    base = norm_of(learner, 0.3 * cls + 0.7 * kd)
    assert [heard[name] / heard[names[2]] for name in names] == pytest.approx([0.5, 0.5, 1.0], rel=1e-3)
    terms = learner.losses(batch, seen)
    assert norm_of(learner, terms["weighted_at"] + terms["weighted_fitnet"]) == pytest.approx(0.8 * base, rel=1e-3)


@pytest.mark.parametrize("method, logit_loss, warmed", [("reviewkd", "kd", "reviewkd"), ("at", "dkd", "dkd")])
def test_a_warm_up_raises_the_weight_from_nothing_over_a_twelfth_of_the_training(method, logit_loss, warmed):
    student, _, tables, batch, seen = scene()
    pairs = [HintPair("first", "first"), HintPair("second", "second")]
    learner = distilled(student, tables, [Hint(method, pairs, 3.0)], logit_loss=logit_loss)
    whole = value(learner.losses(batch, seen)[f"weighted_{warmed}"])
    assert f"weighted_{warmed}" not in learner.losses(batch, seen, 0.0)
    for progress, volume in ((1 / 24, 0.5), (1 / 12, 1.0), (0.5, 1.0)):
        assert value(learner.losses(batch, seen, progress)[f"weighted_{warmed}"]) == pytest.approx(volume * whole)


def test_in_the_pre_stage_of_ab_the_student_learns_from_it_alone_and_afterwards_from_all_else():
    student, _, tables, batch, seen = scene()
    hints = [Hint("ab", CROSSED, 2.0), Hint("at", CROSSED, 3.0)]
    learner = distilled(student, tables, hints)
    early, late = learner.losses(batch, seen, 0.124), learner.losses(batch, seen, 0.125)
    assert {name for name in early if name.startswith("weighted_")} == {"weighted_ab"}
    assert value(early["loss"]) == pytest.approx(2 * 2 * value(early["ab"])) and "at" not in early
    assert {name for name in late if name.startswith("weighted_")} == {"weighted_cls", "weighted_kd", "weighted_at"}
    assert "ab" not in late


def test_in_the_pre_stage_of_ft_the_paraphraser_learns_and_the_student_has_no_hint_of_it():
    student, _, tables, batch, seen = scene()
    learner = distilled(student, tables, [Hint("ft", CROSSED, 2.0)])
    early = learner.losses(batch, seen, 0.1)
    assert {name for name in early if name.startswith("weighted_")} == {"weighted_cls", "weighted_kd"}
    rest = early["weighted_cls"] + early["weighted_kd"]
    assert value(early["loss"]) == pytest.approx(value(rest + early["ft_preparation"]))
    for parameter in learner.model.parameters():
        gradients = torch.autograd.grad([early["ft_preparation"]], [parameter], retain_graph=True, allow_unused=True)
        assert gradients == (None,)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)
    paraphrasers = nn.ModuleList(adapter.paraphraser for adapter in learner.adapters)
    translators = nn.ModuleList(adapter.translator for adapter in learner.adapters)
    hashes = []
    for progress in (0.0, 0.1, 0.2, 0.3):
        _step(optimizer, learner.losses(batch, seen, progress)["loss"], 0.1)
        hashes.append((state_hash(paraphrasers), state_hash(translators)))
    assert len({paraphraser for paraphraser, _ in hashes}) == 2  # learned twice, then frozen
    assert hashes[0][0] != hashes[1][0] == hashes[2][0] == hashes[3][0]
    assert hashes[2][1] != hashes[3][1] and "ft_preparation" not in learner.losses(batch, seen, 0.2)


def test_a_term_of_weight_zero_is_shown_and_no_part_of_the_loss():
    student, _, tables, batch, seen = scene()
    terms = distilled(student, tables, [], logit_weight=0.0).losses(batch, seen)
    assert "kd" in terms and "weighted_kd" not in terms
    assert value(terms["loss"]) == pytest.approx(0.3 * value(terms["cls"]))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ce_weight": 0.0, "logit_weight": 0.0}, "nothing teaches"),
        ({"ce_weight": -1.0}, "0 or more, temperature above 0, all finite, not -1.0, 0.7 and 4.0"),
        ({"temperature": 0.0}, "not 0.3, 0.7 and 0.0"),
        ({"ce_weight": float("nan")}, "all finite, not nan, 0.7 and 4.0"),
        ({"logit_weight": float("nan")}, "not 0.3, nan and 4.0"),
        ({"temperature": float("inf")}, "not 0.3, 0.7 and inf"),
    ],
)
def test_a_student_that_nothing_would_teach_is_refused(changed, says):
    student, _, tables, _, _ = scene()
    with pytest.raises(ValueError, match=says):
        distilled(student, tables, [], **changed)


@pytest.mark.parametrize(
    ("pairs", "weight", "redrawn"), [(0, 1.0, 0), (1, -1.0, 0), (1, float("nan"), 0), (1, 1.0, -1)]
)
def test_a_hint_of_nothing_or_of_an_impossible_weight_is_refused(pairs, weight, redrawn):
    with pytest.raises(ValueError, match=f"hint 'at' needs one pair or more, .*not {pairs}, {weight} and {redrawn}"):
        Hint("at", [HintPair("a", "b")] * pairs, weight, redrawn)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_vectors_are_refused_where_a_hint_needs_maps(method):
    student, frozen, _, batch, _ = scene()
    tables = {f"{who}_table": layer_table(frozen.model, ["head"], SHAPE) for who in ("teacher", "student")}
    learner = distilled(student, tables, [Hint(method, [HintPair("head", "head")], 1.0)], labels=batch.labels)
    seen = FrozenTeacher(frozen.model, ["head"]).observe(batch.images)
    if method == "sp":
        assert learner.losses(batch, seen)["loss"].isfinite()
    else:
        with pytest.raises(ValueError, match=rf"'{method}' needs maps .*, and head -> head has float32 \(5, 3\)"):
            learner.losses(batch, seen, progress=0.0 if method == "ab" else 1.0)  # ab has a pre-stage only


def test_pairs_that_are_plain_tuples_are_refused():
    with pytest.raises(TypeError, match=r"hint 'at': \('first', 'second'\) must be a HintPair"):
        Hint("at", [("first", "second")], 1.0)

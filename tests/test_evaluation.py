"""Measures of networks, against their formulas in numpy and by hand."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special

from pursuhint_lib.evaluation import TEMPERATURES, accuracy, count_macs, count_parameters, fit_temperature, score
from pursuhint_lib.models import build_model


def test_accuracy_loss_agreement_and_divergence_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    found = score(logits, labels, teacher, 2.0)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert accuracy(logits, labels) == found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx((right + wrong) / 2)
    assert found["loss_scaled"] == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2)
    assert found["agreement"] == 0.5
    assert found["agreement_wrong"] == 0.5  # of the second and third image
    p = 1 / (1 + math.exp(-2))
    assert found["kl"] == pytest.approx((p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)) / 2)
    assert math.isnan(found["top5"])  # two classes


def test_calibration_error_by_hand():
    # Of 15 bins, 0.9 and 0.91 are in one (13/15 to 14/15), 0.95 and 0.6 have others; only 0.91 is wrong.
    confidences = torch.tensor([0.9, 0.91, 0.95, 0.6], dtype=torch.float64)
    logits = torch.stack([confidences, 1 - confidences], dim=1).log()
    expected = 2 / 4 * abs(0.5 - 0.905) + 1 / 4 * abs(1 - 0.95) + 1 / 4 * abs(1 - 0.6)
    found = score(logits, torch.tensor([0, 1, 0, 0]), logits, 1.0)
    assert found["ece"] == found["ece_scaled"] == pytest.approx(expected, abs=1e-6)


def test_calibration_error_equals_its_formula_where_gaps_have_both_signs():
    student, _, teacher = drawn()
    labels = torch.multinomial(student.softmax(1), 1, generator=torch.Generator().manual_seed(2))[:, 0]
    expected = by_formula(student, labels, teacher, 1.0)["ece"]
    assert score(student, labels, teacher, 1.0)["ece"] == pytest.approx(expected, rel=1e-4)


def test_a_confidence_of_one_counts_in_the_last_bin():
    logits = torch.tensor([[1000.0, 0.0], [3.0, 0.0]])  # certain and wrong, 0.95 and right
    expected = abs(0.5 - (1 + 1 / (1 + math.exp(-3))) / 2)
    assert score(logits, torch.tensor([1, 0]), logits, 1.0)["ece"] == pytest.approx(expected, abs=1e-6)


def by_formula(logits, labels, teacher, temperature):
    """The measures again in numpy."""
    z, t, y = (np.asarray(x, dtype=np.float64) for x in (logits, teacher, labels))
    y = y.astype(int)

    def calibration(z):
        p = special.softmax(z, axis=1)
        bins = np.minimum((p.max(1) * 15).astype(int), 14)
        hit = z.argmax(1) == y
        return sum(abs(hit[bins == b].sum() - p.max(1)[bins == b].sum()) for b in range(15)) / len(y)

    def loss(z):
        return -special.log_softmax(z, axis=1)[np.arange(len(y)), y].mean()

    log_q, log_p = special.log_softmax(z, axis=1), special.log_softmax(t, axis=1)
    same, wrong = z.argmax(1) == t.argmax(1), t.argmax(1) != y
    return {
        "accuracy": (z.argmax(1) == y).mean(),
        "top5": ((z > z[np.arange(len(y)), y][:, None]).sum(1) < 5).mean(),
        "loss": loss(z),
        "agreement": same.mean(),
        "agreement_wrong": same[wrong].mean(),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(1).mean(),
        "ece": calibration(z),
        "ece_scaled": calibration(z / temperature),
        "loss_scaled": loss(z / temperature),
    }


def drawn(n=2000, classes=12, scale=2.0, seed=0):
    """Logits of a student and a teacher that are often right, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    truth = torch.nn.functional.one_hot(labels, classes)
    student, teacher = (scale * (truth + torch.randn(n, classes, generator=generator)) for _ in range(2))
    return student, labels, teacher


@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0])
def test_measures_equal_their_formulas(scale):
    student, labels, teacher = drawn(scale=scale)
    found, expected = score(student, labels, teacher, 1.7), by_formula(student, labels, teacher, 1.7)
    assert list(found) == list(expected)
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    assert 0 < found["accuracy"] < found["top5"] < 1 and found["ece"] != found["ece_scaled"]


def test_a_student_with_the_teachers_logits_agrees_and_does_not_diverge():
    _, labels, teacher = drawn()
    found = score(teacher.clone(), labels, teacher, 1.0)
    assert found["agreement"] == found["agreement_wrong"] == 1
    assert found["kl"] == 0 and found["ece"] == found["ece_scaled"] and found["loss"] == found["loss_scaled"]


def test_a_teacher_that_is_never_wrong_leaves_no_images_to_agree_on():
    student, labels, _ = drawn()
    assert math.isnan(score(student, labels, torch.nn.functional.one_hot(labels, 12).float(), 1.0)["agreement_wrong"])


def test_five_classes_have_no_top_five_and_six_have():
    tops = [score(*drawn(classes=classes), 1.0)["top5"] for classes in (5, 6)]
    assert math.isnan(tops[0]) and 0.8 < tops[1] < 1


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_huge_logits_give_finite_measures(scale):
    student, labels, teacher = drawn(scale=scale)
    found, expected = score(student, labels, teacher, 0.01), by_formula(student, labels, teacher, 0.01)
    assert all(math.isfinite(value) for value in found.values())
    assert found["ece"] == pytest.approx(expected["ece"], abs=1e-6) == pytest.approx(1 - found["accuracy"], abs=1e-3)


def test_logits_between_zero_and_one_are_logits_all_the_same():
    logits = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    confidences = special.softmax(logits.double().numpy(), axis=1)[:, 0]
    found = score(logits, torch.tensor([0, 0]), logits, 1.0)
    assert found["ece"] == pytest.approx((1 - confidences).mean(), abs=1e-6)


def test_measures_change_nothing_that_they_look_at():
    inputs = drawn()
    copies = [tensor.clone() for tensor in inputs]
    score(*inputs, 2.0)
    fit_temperature(*inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_the_fitted_temperature_minimizes_the_cross_entropy(scale):
    logits, labels, _ = drawn(scale=scale)

    def loss(log_temperature):
        scaled = special.log_softmax(logits.double().numpy() / np.exp(log_temperature), axis=1)
        return -scaled[np.arange(len(labels)), labels].mean()

    theirs = optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-9})
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(math.exp(theirs.x), rel=1e-5)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * found)


def test_a_temperature_is_known_again():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(2.5, rel=0.03)
    scores = score(logits, labels, logits, found)
    assert scores["ece_scaled"] < 0.015 < 0.1 < scores["ece"] and scores["loss_scaled"] < scores["loss"]


def test_temperatures_without_a_best_one_end_at_a_bound():
    logits, labels, _ = drawn()
    right = torch.nn.functional.one_hot(labels, 12).float()
    for separable in (1e-3 * right, right, 1e4 * right, 1e30 * right + logits):
        assert fit_temperature(separable, labels) == TEMPERATURES[0]
    assert fit_temperature(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64)) == TEMPERATURES[0]
    assert fit_temperature(-right, labels) == TEMPERATURES[1]


def test_sizes_of_a_published_network():
    network = build_model("resnet20", 100)
    assert count_parameters(network) == 278_324
    assert round(count_macs(network, (3, 32, 32)) / 1e6, 2) == 40.82

"""Every loss against an independent float64 formula (numpy, loops) and against torchdistill."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchdistill.losses.mid_level import ATLoss, KDLoss

from pursuhint_lib.losses import at_loss, attention_map, cls_loss, hint_mse, kd_loss, match_size

B, K = 6, 5


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_kl_divergence_of_softened_probabilities_times_t_squared(temperature):
    student, teacher = random(B, K, seed=1), random(B, K, seed=2)
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = sum(p[i, k] * np.log(p[i, k] / q[i, k]) for i in range(B) for k in range(K)) / B * temperature**2
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-12)


def test_kd_equals_torchdistill_once_its_missing_t_squared_is_put_back():
    student, teacher, temperature = random(B, K, seed=1), random(B, K, seed=2), 4.0
    peer = KDLoss("s", "output", "t", "output", temperature=temperature, alpha=None, beta=1)
    theirs = peer({"s": {"output": student}}, {"t": {"output": teacher}})
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(float(theirs) * temperature**2, rel=1e-12)


def test_kd_of_equal_logits_is_zero_and_ignores_a_shift_of_the_logits():
    logits = random(B, K)
    assert float(kd_loss(logits, logits, 4.0)) == 0
    assert float(kd_loss(logits + 7.0, logits, 4.0)) == pytest.approx(0, abs=1e-12)


def test_cls_is_the_mean_negative_log_probability_of_the_label():
    logits, labels = random(B, K), torch.tensor([0, 1, 2, 3, 4, 0])
    p = softmax(logits.numpy())
    expected = -np.mean([np.log(p[i, labels[i]]) for i in range(B)])
    assert float(cls_loss(logits, labels)) == pytest.approx(expected, rel=1e-12)


def slow_attention(feature):
    b, _, h, w = feature.shape
    maps = np.zeros((b, h * w))
    for i in range(b):
        maps[i] = [np.mean(feature[i, :, y, x] ** 2) for y in range(h) for x in range(w)]
        maps[i] /= np.sqrt((maps[i] ** 2).sum())
    return maps


def test_at_is_the_mean_squared_difference_of_unit_attention_maps():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 7, 4, 5, seed=2)
    expected = np.mean((slow_attention(student.numpy()) - slow_attention(teacher.numpy())) ** 2)
    assert float(at_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_at_equals_torchdistill():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 7, 4, 5, seed=2)
    place = {"path": "l", "io": "output"}
    peer = ATLoss({"pair": {"teacher": place, "student": place}}, mode="code")
    theirs = peer({"l": {"output": student}}, {"l": {"output": teacher}})
    assert float(at_loss(student, teacher)) == pytest.approx(float(theirs), rel=1e-12)


def test_at_ignores_the_scale_of_a_feature_and_is_at_most_two_over_the_map_size():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 7, 4, 5, seed=2)
    assert float(at_loss(100 * student, teacher)) == pytest.approx(float(at_loss(student, teacher)), rel=1e-12)
    left, right = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    left[0, 0, 0, 0] = right[0, 0, 1, 1] = 1.0  # the two look at different places: the largest loss there is
    assert float(at_loss(left, right)) == pytest.approx(2 / 4)


def test_hint_mse_is_the_mean_of_squares_and_zero_for_equal_features():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 3, 4, 5, seed=2)
    expected = np.mean((student.numpy() - teacher.numpy()) ** 2)
    assert float(hint_mse(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(hint_mse(student, student)) == 0


def test_match_size_averages_the_larger_map_in_blocks_and_leaves_the_smaller_alone():
    large, small = random(2, 3, 8, 8, seed=1), random(2, 5, 4, 4, seed=2)
    blocks = large.reshape(2, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    for first, second in ((large, small), (small, large)):
        a, b = match_size(first, second)
        pooled, kept = (a, b) if first is large else (b, a)
        assert torch.allclose(pooled, blocks) and torch.equal(kept, small)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: kd_loss(x.flatten(1), random(2, 24, seed=5), 4.0),
        lambda x: cls_loss(x.flatten(1), torch.tensor([3, 7])),
        lambda x: at_loss(x, random(2, 4, 4, 3, seed=5)),
        lambda x: hint_mse(x, random(2, 2, 4, 3, seed=5)),
    ],
    ids=["kd", "cls", "at", "hint_mse"],
)
def test_gradients_pass_gradcheck(loss):
    assert torch.autograd.gradcheck(loss, random(2, 2, 4, 3, seed=4).requires_grad_())


@pytest.mark.parametrize(
    "make",
    [torch.zeros, lambda *s: torch.full(s, 1e4), lambda *s: torch.randn(*s).bfloat16()],
    ids=["zeros", "huge", "bf16"],
)
def test_losses_and_gradients_are_finite_float32_for_zeros_huge_values_and_bfloat16(make):
    torch.manual_seed(0)
    student, teacher = make(2, 3, 4, 4).requires_grad_(), make(2, 3, 4, 4)
    logits, other = make(2, 10).requires_grad_(), make(2, 10)
    for loss, leaf in (
        (at_loss(student, teacher), student),
        (hint_mse(student, teacher), student),
        (kd_loss(logits, -other, 1.0), logits),
        (cls_loss(logits, torch.tensor([1, 2])), logits),
    ):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_losses_leave_autocast_so_that_sums_are_not_made_in_half_precision():
    feature = torch.rand(4, 64, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_map(feature), F.normalize((feature**2).mean(1).flatten(1), dim=1))

"""Every loss against an independent float64 formula (numpy, loops) and against torchdistill."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchdistill.losses.mid_level import (
    AltActTransferLoss,
    ATLoss,
    CCKDLoss,
    CRDLoss,
    DISTLoss,
    FTLoss,
    HierarchicalContextLoss,
    KDLoss,
    LogitStdKDLoss,
    PKTLoss,
    RKDLoss,
    SPKDLoss,
    VIDLoss,
)

from pursuhint_lib.hint_losses import (
    ab_loss,
    cc_loss,
    crd_log_normalization,
    crd_loss,
    crd_scores,
    ft_loss,
    hcl_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    sp_loss,
    vid_loss,
)
from pursuhint_lib.logit_losses import LOGIT_LOSSES, dist_loss, dkd_loss, standardize_logits, wsld_loss
from pursuhint_lib.losses import at_loss, attention_map, cls_loss, hint_mse, kd_loss, match_size, unit_length

B, K = 6, 5
PLACE = {"path": "l", "io": "output"}
PAIR = {"pair": {"teacher": PLACE, "student": PLACE}}
PLACES = ("l", "output", "l", "output")


def ask(peer, student, teacher):
    """What a loss of torchdistill says of one pair of tensors."""
    return float(peer({"l": {"output": student}}, {"l": {"output": teacher}}))


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


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_weighs_the_divergence_of_label_against_rest_and_that_of_the_rest_among_themselves(temperature):
    student, teacher, labels = random(B, K, seed=1), random(B, K, seed=2), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = 0.0
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    for i, y in enumerate(labels.tolist()):
        rest = [k for k in range(K) if k != y]
        pairs = [(p[i, y], q[i, y]), (1 - p[i, y], 1 - q[i, y])]
        expected += 1.5 * sum(a * np.log(a / b) for a, b in pairs)
        pairs = [(p[i, k] / (1 - p[i, y]), q[i, k] / (1 - q[i, y])) for k in rest]
        expected += 6.0 * sum(a * np.log(a / b) for a, b in pairs)
    ours = dkd_loss(student, teacher, labels, temperature, alpha=1.5, beta=6.0)
    assert float(ours) == pytest.approx(expected / B * temperature**2, rel=1e-10)


def test_dkd_of_one_image_is_plain_kd_when_beta_is_what_the_teacher_leaves_to_the_other_classes():
    student, teacher = random(1, K, seed=1), random(1, K, seed=2)
    left = 1 - softmax(teacher.numpy() / 4)[0, 3]
    ours = dkd_loss(student, teacher, torch.tensor([3]), 4.0, beta=left)
    assert float(ours) == pytest.approx(float(kd_loss(student, teacher, 4.0)), rel=1e-10)


def test_dkd_is_zero_for_equal_probabilities_and_has_no_second_term_for_two_classes():
    logits, labels = random(B, K), torch.tensor([0, 1, 2, 3, 4, 0])
    assert float(dkd_loss(logits, logits, labels, 4.0)) == 0
    assert float(dkd_loss(logits + 7.0, logits, labels, 4.0)) == pytest.approx(0, abs=1e-12)
    student, teacher, labels = random(B, 2, seed=1), random(B, 2, seed=2), torch.tensor([0, 1, 0, 1, 0, 1])
    assert float(dkd_loss(student, teacher, labels, 4.0, beta=100.0)) == float(dkd_loss(student, teacher, labels, 4.0))


def test_dkd_is_right_where_the_label_takes_all_probability_and_where_its_logit_is_thousands():
    # float32: 1 - p(label) underflows at a lead of 104; the benchmark's offset of 1000 does not hide a logit of 10000
    teacher = torch.tensor([[0.0, 0.0, 0.0]])
    for lead in (200.0, 1e4):
        student = torch.tensor([[lead, 1.0, 0.0]])
        target_term = np.log(1 / 3) / 3 + np.log(2 / 3) * 2 / 3 + (lead - np.log(1 + np.e)) * 2 / 3
        others_term = -np.log(2) + np.log(1 + np.e) - 0.5
        ours = dkd_loss(student, teacher, torch.tensor([0]), 1.0, alpha=1.0, beta=0.0)
        assert float(ours) == pytest.approx(target_term, rel=1e-5)
        ours = dkd_loss(student, teacher, torch.tensor([0]), 1.0, alpha=0.0, beta=1.0)
        assert float(ours) == pytest.approx(others_term, rel=1e-5)


def wsld_parts(student, teacher, labels, temperature):
    """Per image: the weight, and the softened probabilities of student and teacher."""
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    weight = [1 - np.exp(-np.log(q[i, y]) / (np.log(p[i, y]) - 1e-7)) for i, y in enumerate(labels.tolist())]
    return np.array(weight), softmax(student.numpy() / temperature), softmax(teacher.numpy() / temperature)


def test_wsld_is_the_soft_cross_entropy_weighted_by_what_the_student_has_yet_to_learn():
    student, teacher, labels = random(B, K, seed=1), random(B, K, seed=2), torch.tensor([0, 1, 2, 3, 4, 0])
    weight, q, p = wsld_parts(student, teacher, labels, 2.0)
    expected = -sum(weight[i] * p[i, k] * np.log(q[i, k]) for i in range(B) for k in range(K)) / B * 4
    assert float(wsld_loss(student, teacher, labels, 2.0)) == pytest.approx(expected, rel=1e-10)


def test_the_gradient_of_wsld_leaves_its_weight_alone_and_is_zero_where_both_agree():
    # gradcheck would move the weight as well, so the gradient is compared to the formula
    student, teacher, labels = random(B, K, seed=1), random(B, K, seed=2), torch.tensor([0, 1, 2, 3, 4, 0])
    weight, q, p = wsld_parts(student, teacher, labels, 2.0)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(wsld_loss(leaf, teacher, labels, 2.0), leaf)
    np.testing.assert_allclose(gradient.numpy(), weight[:, None] * (q - p) / B * 2, rtol=1e-10)
    (gradient,) = torch.autograd.grad(wsld_loss(leaf, student, labels, 2.0), leaf)
    assert gradient.abs().max() < 1e-15


def test_wsld_is_zero_for_a_student_that_knows_its_labels_whatever_the_teacher_says():
    student = torch.tensor([[1e3, 0.0, 0.0], [0.0, 1e3, 0.0]])
    assert float(wsld_loss(student, -student, torch.tensor([0, 1]), 2.0)) == 0


def test_dist_is_one_minus_pearson_along_rows_and_columns_times_t_squared():
    student, teacher = random(B, K, seed=1), random(B, K, seed=2)
    p, q = softmax(teacher.numpy() / 3), softmax(student.numpy() / 3)
    inter = 1 - np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(B)])
    intra = 1 - np.mean([np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(K)])
    ours = dist_loss(student, teacher, 3.0, beta=2.0, gamma=0.5)
    assert float(ours) == pytest.approx((2 * inter + 0.5 * intra) * 9, rel=1e-10)


def test_dist_equals_torchdistill():
    student, teacher = random(B, K, seed=1), random(B, K, seed=2)
    theirs = ask(DISTLoss(*PLACES, beta=2.0, gamma=0.5, tau=3.0), student, teacher)
    assert float(dist_loss(student, teacher, 3.0, beta=2.0, gamma=0.5)) == pytest.approx(theirs, rel=1e-10)


def test_dist_is_zero_for_a_student_that_is_only_less_certain():
    teacher = random(B, K)
    vaguer = (0.3 * F.softmax(teacher, dim=1) + 0.7 / K).log()
    assert float(dist_loss(vaguer, teacher)) == pytest.approx(0, abs=1e-12)


def test_dist_hears_a_class_that_is_rare_in_the_batch_as_well_as_any_other():
    # Where the authors' code differs: its 1e-8 beside norms of 1e-6 leaves a hundred-millionth of that correlation.
    student, teacher = random(B, K, seed=1), random(B, K, seed=2)
    student[:, 0] -= 14
    teacher[:, 0] -= 14
    q, p = softmax(student.numpy()), softmax(teacher.numpy())
    expected = 1 - np.mean([np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(K)])
    assert float(dist_loss(student, teacher, beta=0.0)) == pytest.approx(expected, rel=1e-10)


def test_standardized_logits_have_mean_zero_and_deviation_one_and_forget_scale_and_shift():
    logits = random(B, K, seed=1, scale=3.0)
    z = standardize_logits(logits)
    expected = [[(x - np.mean(row)) / np.std(row, ddof=1) for x in row] for row in logits.numpy()]
    np.testing.assert_allclose(z.numpy(), expected, rtol=1e-12)
    assert torch.allclose(standardize_logits(5 * logits + 7), z, rtol=1e-12, atol=0)
    assert torch.allclose(standardize_logits(logits + 1e8), z, rtol=1e-5, atol=0)  # nearly equal is not equal


def test_kd_of_standardized_logits_equals_torchdistill_once_its_missing_t_squared_is_put_back():
    student, teacher = random(B, K, seed=1), random(B, K, seed=2)
    theirs = ask(LogitStdKDLoss(*PLACES, temperature=2.0, alpha=None, beta=1, eps=0.0), student, teacher)
    ours = kd_loss(standardize_logits(student), standardize_logits(teacher), 2.0)
    assert float(ours) == pytest.approx(theirs * 4, rel=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4])
def test_equal_logits_become_zeros_without_a_gradient_rather_than_magnified_rounding(level):
    logits = torch.full((2, 7), level, requires_grad=True)
    z = standardize_logits(logits)
    (gradient,) = torch.autograd.grad((z * torch.arange(7.0)).sum(), logits)
    assert torch.equal(z, torch.zeros(2, 7)) and torch.equal(gradient, torch.zeros(2, 7))


def test_vid_is_the_mean_negative_log_likelihood_without_its_constant():
    prediction, target, raw = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2), random(3, seed=3)
    v = np.log(1 + np.exp(raw.numpy())) + 1e-5
    expected = np.mean(
        [
            0.5 * (float(prediction[i, c, y, x]) - float(target[i, c, y, x])) ** 2 / v[c] + 0.5 * np.log(v[c])
            for i, c, y, x in product(range(2), range(3), range(4), range(5))
        ]
    )
    assert float(vid_loss(prediction, target, raw)) == pytest.approx(expected, rel=1e-10)
    theirs = ask(VIDLoss(PAIR), (prediction, torch.tensor(v).reshape(1, 3, 1, 1)), target)
    assert float(vid_loss(prediction, target, raw)) == pytest.approx(theirs, rel=1e-10)
    vectors = vid_loss(prediction[..., 0, 0], target[..., 0, 0], raw)
    assert float(vectors) == pytest.approx(
        float(vid_loss(prediction[..., :1, :1], target[..., :1, :1], raw)), rel=1e-12
    )


def test_vid_of_a_met_target_is_zero_at_variance_one_and_large_variances_do_not_overflow():
    target = random(2, 3, 4, 5)
    start = np.log(np.exp(1 - 1e-5) - 1)
    assert float(vid_loss(target, target, torch.full((3,), start))) == pytest.approx(0, abs=1e-7)
    target, raw = target.float(), torch.full((3,), 1e4)  # exp(1e4) is inf
    assert float(vid_loss(target, target, raw)) == pytest.approx(np.log(1e4) / 2, rel=1e-6)


def test_hcl_is_the_weighted_mean_of_the_errors_at_full_size_and_at_three_grids():
    student, teacher = random(2, 3, 8, 8, seed=1), random(2, 3, 8, 8, seed=2)
    gap = (student - teacher).numpy()  # averaging is linear
    blocks = {n: gap.reshape(2, 3, n, 8 // n, n, 8 // n).mean(axis=(3, 5)) for n in (8, 4, 2, 1)}
    expected = sum(w * np.mean(blocks[n] ** 2) for n, w in ((8, 1), (4, 1 / 2), (2, 1 / 4), (1, 1 / 8))) / 1.875
    assert float(hcl_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(hcl_loss(student, student)) == 0


@pytest.mark.parametrize("side", [8, 5, 4, 2, 1])
def test_hcl_equals_torchdistill_down_to_maps_of_a_single_pixel(side):
    student, teacher = random(2, 3, side, side, seed=1), random(2, 3, side, side, seed=2)
    theirs = ask(HierarchicalContextLoss(*PLACES), (student, None), teacher)
    assert float(hcl_loss(student, teacher)) == pytest.approx(theirs, rel=1e-12)


def test_hcl_never_enlarges_the_shorter_side():
    student, teacher = random(2, 3, 8, 3, seed=1), random(2, 3, 8, 3, seed=2)
    sizes = [(student - teacher), *(F.adaptive_avg_pool2d(student - teacher, n) for n in (2, 1))]
    expected = sum(w * float(gap.square().mean()) for gap, w in zip(sizes, (1, 1 / 2, 1 / 4))) / 1.75
    assert float(hcl_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_ofd_counts_an_entry_unless_both_stay_below_zero_and_lifts_targets_to_the_margin():
    student, teacher, margin = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2), -random(3, seed=3).abs()
    expected = 0.0
    for i, c, y, x in product(range(2), range(3), range(4), range(5)):
        s, t = float(student[i, c, y, x]), max(float(teacher[i, c, y, x]), float(margin[c]))
        expected += 0.0 if s <= t <= 0 else (s - t) ** 2
    assert float(ofd_loss(student, teacher, margin)) == pytest.approx(expected / 2, rel=1e-12)


def test_ofd_is_zero_for_the_target_itself_and_for_anything_below_the_margin():
    teacher, margin = random(2, 3, 4, 5), torch.full((3,), -0.5, dtype=torch.float64)
    assert float(ofd_loss(teacher.clamp(min=-0.5), teacher, margin)) == 0
    assert float(ofd_loss(torch.full_like(teacher, -0.5), -teacher.abs(), margin)) == 0
    assert float(ofd_loss(torch.full_like(teacher, -9.0), -teacher.abs(), margin)) == 0


def test_ab_is_a_squared_hinge_on_the_side_of_the_teachers_sign():
    student, teacher = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    teacher[0, 0] = 0.0  # a teacher at zero is silent
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist()):
        expected += max(0.0, 0.7 - s) ** 2 if t > 0 else max(0.0, s + 0.7) ** 2
    assert float(ab_loss(student, teacher, 0.7)) == pytest.approx(expected / 2, rel=1e-12)


def test_ab_equals_torchdistill():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 3, 4, 5, seed=2)
    theirs = ask(AltActTransferLoss(PAIR, margin=1.0, reduction="mean"), student, teacher)
    assert float(ab_loss(student, teacher)) == pytest.approx(theirs, rel=1e-12)


def test_ab_is_zero_a_margin_beyond_the_boundary_on_the_teachers_side():
    teacher = random(2, 3, 4, 5)
    assert float(ab_loss(torch.where(teacher > 0, 1.0, -1.0), teacher)) == 0
    assert float(ab_loss(torch.where(teacher > 0, 0.9, -1.0), teacher)) > 0


def test_ft_is_the_mean_absolute_difference_of_unit_attention_maps():
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 7, 4, 5, seed=2)
    expected = np.mean(np.abs(slow_attention(student.numpy()) - slow_attention(teacher.numpy())))
    assert float(ft_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(ft_loss(student, -3 * student)) == pytest.approx(0, abs=1e-15)


def test_ft_equals_torchdistill_on_channel_means_of_squares_which_it_leaves_out():
    # torchdistill follows the paper and normalizes the whole factor; the benchmark (and its weight) has maps
    student, teacher = random(B, 3, 4, 5, seed=1), random(B, 3, 4, 5, seed=2)
    peer = FTLoss(p=1, reduction="mean", paraphraser_path="l", translator_path="l")
    theirs = ask(peer, student.square().mean(1), teacher.square().mean(1))
    assert float(ft_loss(student, teacher)) == pytest.approx(theirs, rel=1e-12)
    assert float(ft_loss(-student, student)) == 0 and ask(peer, -student, student) > 0.1


def test_nst_is_the_squared_distance_of_the_mean_outer_products_of_unit_channels():
    # <a, b>^2 is the inner product of a a' and b b', so the discrepancy is a distance of two means
    student, teacher = random(2, 3, 2, 4, seed=1), random(2, 5, 2, 4, seed=2)
    expected = 0.0
    for i in range(2):
        means = []
        for feature in (student[i], teacher[i]):
            channels = [channel.flatten().numpy() / np.linalg.norm(channel.numpy()) for channel in feature]
            means.append(np.mean([np.outer(a, a) for a in channels], axis=0))
        expected += np.sum((means[0] - means[1]) ** 2) / 2
    assert float(nst_loss(student, teacher)) == pytest.approx(expected, rel=1e-10)


def test_nst_ignores_the_order_the_sign_and_the_scale_of_channels():
    feature = random(2, 3, 4, 5)
    other = feature[:, [2, 0, 1]] * torch.tensor([2.0, -0.1, 30.0]).reshape(3, 1, 1)
    assert float(nst_loss(other, feature)) == pytest.approx(0, abs=1e-12)


def rotation(size, seed=9):
    return torch.linalg.qr(random(size, size, seed=seed)).Q


def slow_sp(student, teacher, order):
    tables = []
    for feature in (student, teacher):
        rows = [x.flatten().numpy() for x in feature]
        table = np.array([[sum(a * b) for b in rows] for a in rows])
        tables.append(np.array([row / sum(abs(row) ** order) ** (1 / order) for row in table]))
    return np.sum((tables[0] - tables[1]) ** 2) / B**2


def test_sp_is_the_mean_squared_difference_of_inner_products_in_rows_of_unit_length():
    student, teacher = random(B, 2, 3, 2, seed=1), random(B, 9, seed=2)
    assert float(sp_loss(student, teacher)) == pytest.approx(slow_sp(student, teacher, 2), rel=1e-12)
    assert float(sp_loss(3 * teacher @ rotation(9), teacher)) == pytest.approx(0, abs=1e-12)


def test_sp_is_torchdistills_but_for_its_rows_which_sum_to_one_in_absolute_value():
    # torchdistill 1.1.5 hands `normalize` the axis where the order of the norm goes; paper and benchmark have order 2
    student, teacher = random(B, 2, 3, 2, seed=1), random(B, 9, seed=2)
    theirs = ask(SPKDLoss("l", "l", reduction="batchmean"), student, teacher)
    assert theirs == pytest.approx(slow_sp(student, teacher, 1), rel=1e-12)
    assert float(sp_loss(student, teacher)) != pytest.approx(theirs, rel=0.5)


def test_cc_is_the_mean_product_of_neighboring_gaps_and_zero_when_every_second_image_is_met():
    student, teacher = random(B, 4, seed=1), random(B, 4, seed=2)
    gaps = np.abs((student - teacher).numpy())
    expected = np.mean([sum(a[d] * b[d] for d in range(4)) for a, b in pairwise(gaps)])
    assert float(cc_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    student[::2] = teacher[::2]
    assert float(cc_loss(student, teacher)) == 0
    assert float(cc_loss(teacher[:1] + 1, teacher[:1])) == 0  # no neighbors: zero, not nan


def test_cc_is_another_loss_than_torchdistills_which_compares_kernel_tables_as_the_paper_does():
    teacher = random(B, 4, seed=2)
    turned = teacher @ rotation(4)
    peer = CCKDLoss("l", "l", kernel_config={"type": "bilinear"}, reduction="batchmean")
    assert ask(peer, turned, teacher) == pytest.approx(0, abs=1e-12) and float(cc_loss(turned, teacher)) > 0.1
    skipping = teacher.clone()
    skipping[1::2] += 1
    assert ask(peer, skipping, teacher) > 0.1 and float(cc_loss(skipping, teacher)) == 0


def huber(gaps):
    gaps = np.abs(np.array(gaps))
    return np.mean(np.where(gaps < 1, gaps**2 / 2, gaps - 0.5))


def slow_distances(feature):
    rows = [x.flatten().numpy() for x in feature]
    table = np.array([[np.sqrt(sum((a - b) ** 2)) for b in rows] for a in rows])
    return table / table[~np.eye(len(rows), dtype=bool)].mean()


def test_rkd_distance_is_smooth_l1_of_distances_over_their_mean():
    student, teacher = random(B, 2, 3, 2, seed=1), random(B, 9, seed=2)
    student[0] *= 9  # an image far from all others: some differences exceed 1, the linear part
    gaps = slow_distances(student) - slow_distances(teacher)
    assert np.abs(gaps).max() > 1
    assert float(rkd_distance_loss(student, teacher)) == pytest.approx(huber(gaps), rel=1e-12)


def test_rkd_angle_is_smooth_l1_of_the_cosines_of_all_triples():
    student, teacher = random(B, 2, 1, 1, seed=1), random(B, 3, seed=2)
    cosines = []
    for feature in (student, teacher):
        rows = [x.flatten().numpy() for x in feature]
        table = np.zeros((B, B, B))
        for i, j, k in product(range(B), repeat=3):
            a, b = rows[j] - rows[i], rows[k] - rows[i]
            table[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b) if i not in (j, k) else 0.0
        cosines.append(table)
    assert np.abs(cosines[0] - cosines[1]).max() > 1  # the linear part as well
    assert float(rkd_angle_loss(student, teacher)) == pytest.approx(huber(cosines[0] - cosines[1]), rel=1e-10)


def test_both_terms_of_rkd_equal_torchdistill_and_ignore_a_move_a_rotation_and_a_scale():
    student, teacher = random(B, 2, 3, 2, seed=1), random(B, 9, seed=2)
    moved = 3 * teacher @ rotation(9) + 5
    for loss, factors in ((rkd_distance_loss, (1, 0)), (rkd_angle_loss, (0, 1))):
        theirs = ask(RKDLoss("l", "l", *factors, reduction="mean"), student, teacher)
        assert float(loss(student, teacher)) == pytest.approx(theirs, rel=1e-9)
        assert float(loss(moved, teacher)) == pytest.approx(0, abs=1e-12)


def test_rkd_distance_takes_its_mean_over_pairs_that_differ_where_torchdistill_counts_coinciding_ones():
    teacher = random(4, 3, seed=2)
    student = torch.tensor([[0.0], [0.0], [3.0], [6.0]], dtype=torch.float64)
    distances = np.array([[0, 0, 3, 6], [0, 0, 3, 6], [3, 3, 0, 3], [6, 6, 3, 0]])
    expected = huber(distances / (2 * (3 + 6 + 3 + 6 + 3) / 10) - slow_distances(teacher))
    assert float(rkd_distance_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    theirs = ask(RKDLoss("l", "l", 1, 0, reduction="mean"), student, teacher)
    assert float(rkd_distance_loss(student, teacher)) != pytest.approx(theirs, rel=1e-3)


def test_rkd_distance_sees_small_distances_far_from_the_origin():
    teacher = random(B, 4).float()
    assert float(rkd_distance_loss(teacher + 1000, teacher)) < 1e-6
    assert ask(RKDLoss("l", "l", 1, 0, reduction="mean"), teacher + 1000, teacher) > 1e-4


def slow_affinities(feature):
    rows = [x.flatten().numpy() for x in feature]
    table = [[0.5 + 0.5 * (a @ b) / np.linalg.norm(a) / np.linalg.norm(b) for b in rows] for a in rows]
    return np.array([row / np.sum(row) for row in table])


def test_pkt_is_the_mean_over_the_table_of_the_terms_of_a_kl_divergence():
    student, teacher = random(B, 2, 3, 2, seed=1), random(B, 9, seed=2)
    p, q = slow_affinities(teacher), slow_affinities(student)
    expected = sum(p[i, j] * np.log((p[i, j] + 1e-7) / (q[i, j] + 1e-7)) for i in range(B) for j in range(B)) / B**2
    assert float(pkt_loss(student, teacher)) == pytest.approx(expected, rel=1e-10)


def test_pkt_equals_torchdistill_up_to_the_constant_beside_its_norms_and_ignores_rotation_and_scale():
    student, teacher = random(B, 12, seed=1), random(B, 9, seed=2)
    theirs = ask(PKTLoss(*PLACES), student.clone(), teacher.clone())  # it writes into what it makes of them
    assert float(pkt_loss(student, teacher)) == pytest.approx(theirs, rel=1e-6)
    assert float(pkt_loss(3 * teacher @ rotation(9), teacher)) == pytest.approx(0, abs=1e-12)


def test_pkt_is_finite_for_opposite_features_whose_cosine_rounds_to_below_minus_one():
    finite = []
    for seed in range(300):
        vector = random(1, 7, seed=seed).float()
        student, teacher = torch.cat([vector, -vector]), torch.eye(2)
        assert torch.isfinite(pkt_loss(student, teacher))
        finite.append(np.isfinite(ask(PKTLoss(*PLACES), student, teacher)))
    assert not all(finite)  # in torchdistill, as in the authors' code, it happens


def crd_setting():
    """Embeddings of three images, banks of all eight images' earlier ones, and who is compared to whom."""
    student, teacher = (F.normalize(random(3, 4, seed=seed), dim=1) for seed in (1, 2))
    student_bank, teacher_bank = (F.normalize(random(8, 4, seed=seed), dim=1) for seed in (3, 4))
    positives = torch.tensor([5, 0, 2])
    negatives = torch.tensor([[1, 2, 3], [4, 4, 7], [0, 1, 6]])
    return student, teacher, student_bank, teacher_bank, positives, negatives


def crd_one_way(embedding, bank, positives, negatives, temperature=0.125):
    positive = crd_scores(embedding, bank[positives][:, None], temperature)[:, 0]
    negative = crd_scores(embedding, bank[negatives], temperature)
    return crd_loss(positive, negative, len(bank), crd_log_normalization(positive, negative, len(bank)))


def test_crd_is_noise_contrastive_estimation_with_one_positive_and_k_negatives():
    student, _, _, bank, positives, negatives = crd_setting()
    scores = np.array(
        [
            [np.exp(float(s @ bank[j]) / 0.125) for j in (p, *others)]
            for s, p, others in zip(student, positives.tolist(), negatives.tolist())
        ]
    )
    h = scores / (scores.mean() * 8)
    h = h / (h + 3 / 8)
    expected = -sum(np.log(h[i, 0]) + sum(np.log(1 - h[i, k]) for k in (1, 2, 3)) for i in range(3)) / 3
    assert float(crd_one_way(student, bank, positives, negatives)) == pytest.approx(expected, rel=1e-10)


def test_crd_in_both_directions_equals_torchdistill():
    student, teacher, student_bank, teacher_bank, positives, negatives = crd_setting()
    peer = CRDLoss("l", "empty", "l", 4, 8, 3, 8, temperature=0.125, eps=0.0)  # its eps is not needed here
    peer.memory_v1, peer.memory_v2 = student_bank.clone(), teacher_bank.clone()
    indices = {"pos_idx": positives, "contrast_idx": torch.cat([positives[:, None], negatives], dim=1)}
    theirs = peer({"l": {"output": student}, "empty": {"input": indices}}, {"l": {"output": teacher}})
    ours = crd_one_way(student, teacher_bank, positives, negatives)
    ours = ours + crd_one_way(teacher, student_bank, positives, negatives)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)  # it keeps Z in float32


def test_crd_is_zero_when_the_positive_is_certain_and_finite_when_it_is_certainly_wrong():
    positive, negative = torch.full((3,), 1e4), torch.full((3, 5), -1e4)
    assert float(crd_loss(positive, negative, 50, 0.0)) == 0
    assert float(crd_loss(-positive, -negative, 50, 0.0)) == pytest.approx(6e4, rel=1e-3)


LABELS = torch.tensor([0, 1, 5, 0])
MARGIN = torch.tensor([-0.5, -0.125, -2.0])


def crd_of(student, teacher):
    student, teacher = unit_length(student, dim=1), unit_length(teacher, dim=1)
    others = teacher[torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])]
    return crd_loss(crd_scores(student, teacher[:, None])[:, 0], crd_scores(student, others), 50, 3.0)


def crd_of_scores(positive, negatives):
    return crd_loss(positive, negatives, 50, crd_log_normalization(positive, negatives, 50))


LOSSES = {  # of two features (4, 3, 4, 2)
    "kd": lambda s, t: kd_loss(s.flatten(1), t.flatten(1), 4.0),
    "kd at one": lambda s, t: kd_loss(s.flatten(1), t.flatten(1), 1.0),
    "kd standardized": lambda s, t: kd_loss(standardize_logits(s.flatten(1)), standardize_logits(t.flatten(1)), 2.0),
    "cls": lambda s, t: cls_loss(s.flatten(1), LABELS),
    "dkd": lambda s, t: dkd_loss(s.flatten(1), t.flatten(1), LABELS, 4.0),
    "dkd at one": lambda s, t: dkd_loss(s.flatten(1), t.flatten(1), LABELS, temperature=1.0, beta=2.0),
    "wsld": lambda s, t: wsld_loss(s.flatten(1), t.flatten(1), LABELS, 2.0),
    "dist": lambda s, t: dist_loss(s.flatten(1), t.flatten(1), 1.0),
    "at": at_loss,
    "hint_mse": hint_mse,
    "vid": lambda s, t: vid_loss(s, t, s[0, :, 0, 0]),
    "hcl": hcl_loss,
    "ofd": lambda s, t: ofd_loss(s, t, MARGIN.to(t.dtype)),
    "ab": ab_loss,
    "ft": ft_loss,
    "nst": nst_loss,
    "sp": sp_loss,
    "cc": lambda s, t: cc_loss(s.flatten(1), t.flatten(1)),
    "rkd distance": rkd_distance_loss,
    "rkd angle": rkd_angle_loss,
    "pkt": pkt_loss,
    "crd": lambda s, t: crd_of(s.flatten(1), t.flatten(1)),
    "crd of scores": lambda s, t: crd_of_scores(s[:, 0, 0, 0], t.flatten(1)),
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "wsld"])
def test_gradients_pass_gradcheck(name):
    student, teacher = random(4, 3, 4, 2, seed=4).requires_grad_(), random(4, 3, 4, 2, seed=5)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student)
    (gradient,) = torch.autograd.grad(LOSSES[name](student, teacher), student)
    assert LOSSES[name](student, teacher).dtype == torch.float64 and gradient.abs().max() > 1e-6


def noise(seed):
    return random(4, 3, 4, 2, seed=seed).float()


CASES = {  # (student, teacher)
    "zeros": lambda: (torch.zeros(4, 3, 4, 2), torch.zeros(4, 3, 4, 2)),
    "zero student": lambda: (torch.zeros(4, 3, 4, 2), noise(1)),
    "zero teacher": lambda: (noise(1), torch.zeros(4, 3, 4, 2)),
    "a silent image": lambda: (noise(1) * torch.tensor([0.0, 1, 1, 1]).reshape(4, 1, 1, 1), noise(2)),
    "a silent channel": lambda: (noise(1) * torch.tensor([0.0, 1, 1]).reshape(3, 1, 1), noise(2)),
    "huge": lambda: (1e4 * noise(1), 1e4 * noise(2)),
    "huge and equal": lambda: (torch.full((4, 3, 4, 2), 1e4), torch.full((4, 3, 4, 2), -1e4)),
    "huge student": lambda: (1e4 * noise(1), noise(2)),
    "all rows coincide": lambda: (noise(1)[:1].repeat(4, 1, 1, 1), noise(2)),
    "all rows of both coincide": lambda: (noise(1)[:1].repeat(4, 1, 1, 1), noise(2)[:1].repeat(4, 1, 1, 1)),
    "two rows coincide": lambda: (noise(1)[[0, 0, 2, 3]], noise(2)),
    "the same": lambda: (noise(1), noise(1)),
    "opposite": lambda: (noise(1), -noise(1)),
    "bf16": lambda: (noise(1).bfloat16(), noise(2).bfloat16()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_finite_float32_for_zeros_huge_values_coinciding_rows_and_bfloat16(name, case):
    student, teacher = CASES[case]()
    student.requires_grad_()
    loss = LOSSES[name](student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(gradient).all()
    if "huge" not in case:  # a degenerate vector is ignored, its gradient not divided by a tiny constant
        assert gradient.abs().max() < 1e3
    if case == "bf16":
        assert torch.equal(loss, LOSSES[name](student.float(), teacher.float()))


def test_a_vector_without_direction_becomes_zero_without_a_gradient_and_any_other_one_of_unit_length():
    x = torch.tensor([[0.0, 0.0], [3e-22, 4e-22], [3e-12, 4e-12], [3.0, 4.0]], requires_grad=True)
    unit = unit_length(x, dim=1)
    (gradient,) = torch.autograd.grad(unit[:, 0].sum(), x)
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    torch.testing.assert_close(unit, expected)
    assert torch.equal(gradient[:2], torch.zeros(2, 2)) and gradient[2:].abs().min() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_leave_autocast_so_that_sums_are_not_made_in_half_precision(name):
    outside = LOSSES[name](noise(1), noise(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](noise(1), noise(2)), outside)


def test_losses_are_computed_in_float32_however_their_tensors_are_handed_over():
    student, teacher = noise(1).flatten(1).bfloat16(), noise(2).flatten(1).bfloat16()
    named = kd_loss(student_logits=student, teacher_logits=teacher, temperature=4.0)
    assert torch.equal(named, kd_loss(student.float(), teacher.float(), 4.0))


def test_an_attention_map_is_computed_in_float32_too():
    feature = torch.rand(4, 64, 8, 8).bfloat16()
    expected = F.normalize((feature.float() ** 2).mean(1).flatten(1), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_map(feature), expected)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_no_logit_loss_takes_different_classes_nor_standardizes_two(name):
    student, teacher, labels = torch.randn(4, 2), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="student and teacher know 2 and 3 classes"):
        LOGIT_LOSSES[name](student, torch.randn(4, 3), labels, 4.0)
    if not name.endswith("_std"):
        assert LOGIT_LOSSES[name](student, teacher, labels, 4.0).isfinite()
        return
    with pytest.raises(ValueError, match="standardized logits of two classes .* teach nothing"):
        LOGIT_LOSSES[name](student, teacher, labels, 4.0)

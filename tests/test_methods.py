"""Hint methods: what all of them keep to, then what each does beyond calling its loss."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pursuhint_lib import methods
from pursuhint_lib.data import Batch
from pursuhint_lib.hint_losses import (
    ab_loss,
    ft_loss,
    hcl_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
)
from pursuhint_lib.losses import at_loss, hint_mse, match_size
from pursuhint_lib.methods import METHODS, scores_of_rows

N, B = 12, 6
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 2, 2, 0, 0, 1, 2])  # classes of unequal size, in no order
INDEX = torch.tensor([3, 0, 7, 11, 5, 4])
STUDENT, TEACHER = (3, 6, 6), (5, 4, 4)
SHAPES = {  # (student, teacher)
    "equal": ((4, 6, 6), (4, 6, 6)),
    "student larger": ((3, 8, 8), (6, 4, 4)),
    "student smaller": ((6, 4, 4), (3, 8, 8)),
    "odd": ((3, 7, 7), (5, 4, 4)),
    "not square": ((3, 3, 8), (5, 6, 2)),
    "one channel": ((1, 4, 4), (1, 4, 4)),
    "student 1x1": ((3, 1, 1), (5, 4, 4)),
    "teacher 1x1": ((3, 4, 4), (5, 1, 1)),
    "both 1x1": ((3, 1, 1), (5, 1, 1)),
}
SILENT = {shapes: {"at", "nst", "ft"} for shapes in SHAPES if "1x1" in shapes} | {"one channel": {"pkt"}}


def build(name, student=STUDENT, teacher=TEACHER, labels=LABELS, seed=0):
    """A method that is joint gets two pairs of these shapes."""
    torch.manual_seed(seed)
    method = METHODS[name]
    return method([student] * 2, [teacher] * 2, labels) if method.joint else method(student, teacher, labels)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(student=STUDENT, teacher=TEACHER, seed=0, n=B):
    return random(n, *student, seed=2 * seed).requires_grad_(), random(n, *teacher, seed=2 * seed + 1)


def batch_of(index):
    return Batch(torch.zeros(len(index), 1, 1, 1), LABELS[index], index)


BATCH = batch_of(INDEX)


def term(method, student, teacher, batch=BATCH):
    """The one scalar of a method; of a joint one the sum over its two pairs, which see the same features."""
    if method.joint:
        return sum(method([student] * 2, [teacher] * 2, batch))
    return method(student, teacher, batch)


def gradients(method, loss, student):
    """Of the student's feature, then of the parameters by name; None where there is none."""
    names, parameters = zip(*[("student", student), *method.named_parameters()])
    needed = [p for p in parameters if p.requires_grad]
    found = dict(zip(map(id, needed), torch.autograd.grad(loss, needed, allow_unused=True)))
    return {name: found.get(id(p)) for name, p in zip(names, parameters)}


def is_finite(loss, found):
    return bool(torch.isfinite(loss)) and all(g is None or torch.isfinite(g).all() for g in found.values())


# ---- All methods ----


def test_every_method_has_the_weight_that_belongs_to_its_loss_and_the_stages_of_its_publication():
    weights = {name: method.published_weight for name, method in METHODS.items()}
    assert weights == {
        **{"at": 1000, "fitnet": 100, "vid": 1, "sp": 3000, "cc": 0.02, "rkd": 1, "pkt": 30000, "nst": 50},
        **{"crd": 0.8, "ofd": 1e-3, "reviewkd": 1, "ab": 0.003, "ft": 200},
    }
    assert {name for name, method in METHODS.items() if method.joint} == {"reviewkd"}
    assert {name: m.warm_up for name, m in METHODS.items() if m.warm_up} == {"reviewkd": 20 / 240}
    assert {name: m.pre_stage for name, m in METHODS.items() if m.pre_stage} == {"ab": 30 / 240, "ft": 30 / 240}
    assert {name for name, method in METHODS.items() if hasattr(method, "prepare")} == {"ft"}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_any_two_shapes_give_one_finite_float32_number_and_a_gradient(name, shapes):
    student, teacher = features(*SHAPES[shapes])
    method = build(name, *SHAPES[shapes])
    loss = term(method, student, teacher)
    found = gradients(method, loss, student)
    assert loss.shape == () and loss.dtype == torch.float32 and is_finite(loss, found)
    if name in SILENT.get(shapes, ()):
        assert found["student"].abs().max() < 1e-6
    else:
        assert found["student"].abs().max() > 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_terms_are_float32_and_finite_for_bfloat16_features_under_autocast(name):
    student, teacher = features()
    method = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = term(method, student.bfloat16(), teacher.bfloat16())
    found = gradients(method, loss, student)
    assert loss.dtype == torch.float32 and is_finite(loss, found) and found["student"].abs().max() > 0
    exact = term(build(name), student.bfloat16().float(), teacher.bfloat16().float())
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)


CASES = {  # factors of the two features
    "zeros": (0.0, 0.0),
    "zero student": (0.0, 1.0),
    "zero teacher": (1.0, 0.0),
    "huge": (1e4, 1e4),
    "huge student": (1e4, 1.0),
    "huge teacher": (1.0, 1e4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_terms_and_gradients_are_finite_for_zeros_and_huge_features(name, case):
    student, teacher = (factor * x.detach() for factor, x in zip(CASES[case], features()))
    student.requires_grad_()
    method = build(name)
    for _ in range(2):  # what the first call leaves behind must be sound as well
        loss = term(method, student, teacher)
        assert is_finite(loss, gradients(method, loss, student))
    if hasattr(method, "prepare"):
        loss = method.prepare(teacher)
        assert is_finite(loss, gradients(method, loss, student))


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_reaches_the_student_and_every_parameter_that_learns_and_not_the_teacher(name):
    student, teacher = features()
    method = build(name)
    loss = term(method, student, teacher)
    assert teacher.grad_fn is None and not teacher.requires_grad
    for part, gradient in gradients(method, loss, student).items():
        if part.startswith("paraphraser"):
            assert gradient is None
        else:
            assert gradient.abs().max() > 0, part


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_weights_and_calls_leave_the_global_generator_and_the_features_alone(name):
    student, teacher = features()
    a, b = build(name), build(name)
    assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
    before, kept = torch.get_rng_state(), (student.clone(), teacher.clone())
    term(a, student, teacher).backward()
    if hasattr(a, "prepare"):
        a.prepare(teacher)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(student, kept[0]) and torch.equal(teacher, kept[1])
    drawn = {key for key, x in a.state_dict().items() if not torch.equal(x, build(name, seed=1).state_dict()[key])}
    assert bool(drawn) == bool(list(a.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_mode_remembers_nothing(name):
    method = build(name)
    for seed in range(2):
        term(method, *features(seed=seed))
    method.eval()
    before = copy.deepcopy(method.state_dict())
    first, second = (term(method, *features(seed=3)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(x, before[key]) for key, x in method.state_dict().items())


def train_on(method, optimizer, steps):
    terms = []
    for step in steps:
        student, teacher = features(seed=step)
        rows = batch_of(torch.randperm(N, generator=torch.Generator().manual_seed(step))[:B])
        loss = term(method, student, teacher, rows)
        if hasattr(method, "prepare") and step < 3:
            loss = method.prepare(teacher)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        terms.append(loss.detach())
    return terms


def optimizer_of(method):
    parameters = list(method.parameters())
    return torch.optim.SGD(parameters, lr=1e-3) if parameters else None


@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_bit_for_bit_from_a_state_dict(name):
    method = build(name)
    train_on(method, optimizer_of(method), range(5))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    expected = train_on(method, optimizer_of(method), range(5, 9))
    file.seek(0)
    other = build(name, seed=1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.stack(train_on(other, optimizer_of(other), range(5, 9))), torch.stack(expected))


def descend(term_of, parameters, steps=150):
    """The terms of SGD's steps, with gradients brought to one norm: the terms differ by orders of magnitude."""
    parameters, terms = list(parameters), []
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    for _ in range(steps):
        loss = term_of()
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_div_(gradients, nn.utils.get_total_norm(gradients))
        optimizer.step()
        terms.append(float(loss.detach()))
    return terms


@pytest.mark.parametrize("name", METHODS)
def test_each_method_alone_lowers_its_own_term(name):
    torch.manual_seed(3)
    images = random(3, 2, 8, 8, seed=5)[LABELS] + 0.3 * random(N, 2, 8, 8, seed=6)
    with torch.no_grad():
        teacher = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(5, 5, 3))(images)  # 2x2
    student = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    method = build(name, (8, 8, 8), tuple(teacher.shape[1:]))
    rows = batch_of(torch.arange(N))
    if hasattr(method, "prepare"):
        errors = descend(lambda: method.prepare(teacher), method.parameters())
        assert np.mean(errors[-5:]) < 0.5 * np.mean(errors[:5])
    terms = descend(lambda: term(method, student(images), teacher, rows), [*student.parameters(), *method.parameters()])
    assert np.mean(terms[-5:]) < np.mean(terms[:5]) - 0.4 * abs(np.mean(terms[:5]))


# ---- Without state ----


def test_at_and_fitnet_are_what_they_were():
    student, teacher = features()
    shrunk = F.adaptive_avg_pool2d(student, 4)
    assert torch.equal(term(build("at"), student, teacher), at_loss(shrunk, teacher))
    method = build("fitnet")
    torch.manual_seed(0)
    regressor = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5))
    assert torch.equal(term(method, student, teacher), hint_mse(regressor(shrunk), teacher))


def test_rkd_adds_distances_and_angles_with_the_weights_of_the_benchmark():
    student, teacher = features()
    vectors = student.mean((2, 3)), teacher.mean((2, 3))
    expected = 25 * rkd_distance_loss(*vectors) + 50 * rkd_angle_loss(*vectors)
    assert torch.allclose(term(build("rkd"), student, teacher), expected)


def test_pkt_and_nst_are_their_losses_of_means_and_of_maps():
    student, teacher = features()
    assert torch.equal(term(build("pkt"), student, teacher), pkt_loss(student.mean((2, 3)), teacher.mean((2, 3))))
    assert torch.equal(term(build("nst"), student, teacher), nst_loss(F.adaptive_avg_pool2d(student, 4), teacher))


@pytest.mark.parametrize("name", ["at", "sp", "cc", "rkd", "pkt", "nst", "crd"])
def test_methods_without_convolutions_are_computed_in_float32_under_autocast(name):
    student, teacher = (x.bfloat16() for x in features(teacher=(5, 6, 6)))
    expected = term(build(name), student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(term(build(name), student, teacher), expected)


@pytest.mark.parametrize("name", ["cc", "rkd", "pkt", "crd"])
def test_methods_on_vectors_see_the_spatial_mean_alone(name):
    student, teacher = features()
    means = [x.mean((2, 3), keepdim=True) for x in (student, teacher)]
    assert torch.allclose(term(build(name), student, teacher), term(build(name), *means), rtol=1e-4)


def test_sp_compares_the_maps_as_they_are():
    student = random(B, *STUDENT)
    assert float(term(build("sp"), student, student.flip(3))) == pytest.approx(0, abs=1e-9)
    assert float(term(build("sp"), student, student.mean((2, 3), keepdim=True))) > 1e-3


def test_vid_starts_at_the_mean_square_of_each_of_the_teachers_channels_in_the_first_batch():
    method = build("vid")
    student, teacher = features(teacher=(5, 6, 6))
    teacher = teacher * torch.tensor([0.0, 0.01, 1.0, 3.0, 50.0]).view(-1, 1, 1)
    method.eval()(student, teacher, BATCH)
    assert not method.started and not method.raw_variance.any()
    method.train()(student, teacher, BATCH)
    expected = teacher.square().mean(dim=(0, 2, 3)).clamp(min=1e-4)
    assert torch.allclose(F.softplus(method.raw_variance), expected, rtol=1e-4)
    method(student, 2 * teacher, BATCH)
    assert torch.allclose(F.softplus(method.raw_variance), expected, rtol=1e-4)  # in the first batch alone
    assert [type(layer) for layer in method.regressor] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_ab_asks_for_the_teachers_signs_alone():
    student, teacher = features(teacher=(5, 6, 6))
    expected = ab_loss(build("ab").connector(student), teacher)
    assert torch.equal(term(build("ab"), student, teacher), expected)
    assert torch.equal(term(build("ab"), student, teacher.relu()), expected)  # as its docstring says


# ---- CRD ----


def crd(labels=LABELS, **shapes):
    return build("crd", labels=labels, **shapes)


def test_crd_draws_negatives_from_other_classes_only_and_all_of_them_equally_often():
    method, index = crd(), torch.arange(N)
    counts = torch.zeros(N, N)
    for _ in range(1000):
        rows = method.draw_negatives(index)
        assert rows.shape == (N, N - 5)  # the largest class has five images
        counts += F.one_hot(rows, N).sum(1)
        method.step += 1
    other = LABELS[:, None] != LABELS
    assert (counts[~other] == 0).all()
    expected = 1000 * (N - 5) / other.sum(1, keepdim=True)
    assert ((counts - expected)[other].abs() < 5 * expected.expand(N, N)[other].sqrt()).all()


def test_crd_draws_anew_at_each_step_and_for_each_seed_and_no_more_than_it_needs():
    method = crd()
    first = method.draw_negatives(INDEX)
    assert torch.equal(method.draw_negatives(INDEX), first)
    assert not torch.equal(crd(student=(2, 1, 1)).draw_negatives(INDEX), first)  # other weights came before the seed
    term(method, *features())
    assert int(method.step) == 1 and not torch.equal(method.draw_negatives(INDEX), first)
    many = crd(labels=torch.arange(20_000) % 7)
    assert many.n_negatives == 16384 and many.draw_negatives(INDEX).shape == (B, 16384)


def test_crd_refuses_a_set_of_one_class():
    with pytest.raises(ValueError, match="all 4 images are of one class") as error:
        crd(labels=torch.ones(4, dtype=torch.int64))
    assert "\n" not in str(error.value)


def test_crd_scores_rows_alike_by_way_of_the_whole_bank_and_by_gathering_them(monkeypatch):
    bank, rows = random(40, 128, seed=1), torch.randint(40, (4, 64), generator=torch.Generator().manual_seed(2))
    embedding = random(4, 128).requires_grad_()
    gathered = torch.cat([scores_of_rows(embedding, bank, column[:, None], 0.07) for column in rows.T], dim=1)
    weights = random(4, 64, seed=3)
    (expected,) = torch.autograd.grad((gathered * weights).sum(), embedding)

    def unexpected(*_):
        raise AssertionError("rows were gathered")

    monkeypatch.setattr(methods, "crd_scores", unexpected)
    whole = scores_of_rows(embedding, bank, rows, 0.07)  # 40 * (4 + 128) numbers instead of 4 * 64 * 128
    bank.zero_()  # the bank goes on before the backward pass
    (found,) = torch.autograd.grad((whole * weights).sum(), embedding)
    torch.testing.assert_close(whole, gathered, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-2)
    with pytest.raises(AssertionError, match="gathered"):
        scores_of_rows(embedding, bank, rows[:, :1], 0.07)


def slow_unit(x):
    return x / np.linalg.norm(x)


def slow_direction(embedding, bank, index, negatives, log_z):
    """-ln h(positive) - sum ln(1 - h(negative)) of one direction, mean over the anchors, and ln Z."""
    rows = np.concatenate([index[:, None], negatives], axis=1)
    scores = np.array([[np.exp(e @ bank[j] / 0.07) for j in row] for e, row in zip(embedding, rows)])
    log_z = np.log(scores.mean() * N) if log_z is None else log_z
    p, noise = scores / np.exp(log_z), negatives.shape[1] / N
    h = p / (p + noise)
    return -np.mean(np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)), log_z


def test_crd_is_the_sum_of_both_directions_with_banks_that_move_half_way_and_a_kept_normalization():
    method = crd().double()
    banks = [method.student_bank.numpy().copy(), method.teacher_bank.numpy().copy()]
    log_z = [None, None]
    for step, index in enumerate([INDEX, INDEX[:4], INDEX.flip(0)]):
        student, teacher = (x.double() for x in features(seed=step, n=len(index)))
        embeddings = []
        for layer, feature in ((method.student_embedding, student), (method.teacher_embedding, teacher)):
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            embeddings.append([slow_unit(weight @ x.mean((1, 2)) + bias) for x in feature.detach().numpy()])
        negatives, rows = method.draw_negatives(index).numpy(), index.numpy()
        one, log_z[0] = slow_direction(embeddings[0], banks[1], rows, negatives, log_z[0])
        two, log_z[1] = slow_direction(embeddings[1], banks[0], rows, negatives, log_z[1])
        assert float(term(method, student, teacher, batch_of(index)).detach()) == pytest.approx(one + two, rel=1e-10)
        for bank, embedding in zip(banks, embeddings):
            for row, vector in zip(rows, embedding):
                bank[row] = slow_unit(0.5 * bank[row] + 0.5 * vector)
        np.testing.assert_allclose(method.student_bank, banks[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(method.teacher_bank, banks[1], rtol=0, atol=1e-12)


# ---- OFD ----


def test_the_margin_of_ofd_is_the_mean_of_all_negative_responses_so_far():
    method = build("ofd", (3, 4, 4), (5, 4, 4))
    silent = torch.tensor([1.0, 1, 1, 1, 0]).reshape(5, 1, 1)
    assert torch.equal(method.margin(), torch.zeros(5))
    seen = []
    for seed in range(4):
        student, teacher = features((3, 4, 4), (5, 4, 4), seed=seed, n=2 + seed)
        teacher = teacher * silent + (1 - silent)  # the last channel is never negative
        seen.append(teacher.numpy().astype(np.float64))
        loss = term(method, student, teacher, batch_of(INDEX[: 2 + seed]))
        values = [np.concatenate([x[:, c].ravel() for x in seen]) for c in range(5)]
        margin = torch.tensor([v[v < 0].mean() if (v < 0).any() else 0.0 for v in values], dtype=torch.float32)
        assert torch.allclose(method.margin(), margin, rtol=1e-6)
        assert torch.allclose(loss, ofd_loss(method.connector(student), teacher, margin), rtol=1e-5)
    assert margin[4] == 0 and margin[:4].max() < -0.5


def test_after_a_relu_the_margin_of_ofd_stays_zero():
    method = build("ofd")
    term(method, *(x.relu() for x in features()))
    assert torch.equal(method.margin(), torch.zeros(5))


# ---- ReviewKD ----

LEVELS = [(3, 8, 8), (4, 4, 4), (6, 2, 2)], [(4, 8, 8), (5, 4, 4), (7, 4, 2)]  # student, teacher


def review():
    torch.manual_seed(0)
    method = METHODS["reviewkd"](*LEVELS, LABELS)
    seeds = iter(range(6))
    student, teacher = ([random(B, *shape, seed=next(seeds)) for shape in shapes] for shapes in LEVELS)
    return method, [x.requires_grad_() for x in student], teacher


def test_each_level_of_reviewkd_depends_on_the_student_there_and_deeper_and_on_nothing_else():
    method, student, teacher = review()
    terms = method(student, teacher, BATCH)
    reached = [
        [
            g is not None and bool(g.abs().max() > 0)
            for g in torch.autograd.grad(t, student, None, True, allow_unused=True)
        ]
        for t in terms
    ]
    assert reached == [[True, True, True], [False, True, True], [False, False, True]]


def test_reviewkd_mixes_a_level_with_the_enlarged_deeper_one_by_weights_for_each_place():
    method, student, teacher = review()
    terms = method(student, teacher, BATCH)
    mixed = method.entries[2](student[2])
    expected = [hcl_loss(*match_size(method.exits[2](mixed), teacher[2]))]
    for level in (1, 0):
        own, deeper = method.entries[level](student[level]), mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)
        conv = method.mixers[level]
        logits = torch.einsum("bchw,oc->bohw", torch.cat([own, deeper], 1), conv.weight[:, :, 0, 0])
        weights = 1 / (1 + (-logits - conv.bias.reshape(2, 1, 1)).exp())
        mixed = own * weights[:, :1] + deeper * weights[:, 1:]
        expected.insert(0, hcl_loss(*match_size(method.exits[level](mixed), teacher[level])))
    assert torch.allclose(torch.stack(terms), torch.stack(expected), rtol=1e-5)


def test_the_width_of_reviewkd_is_that_of_the_deepest_teacher_layer_up_to_512():
    widths = [METHODS["reviewkd"]([(2, 4, 4)], [(c, 4, 4)], LABELS).entries[0][0].out_channels for c in (7, 600)]
    assert widths == [7, 512]


# ---- FT ----


def test_prepare_teaches_the_paraphraser_alone_and_forward_the_translator_alone():
    method = build("ft")
    student, teacher = features()
    for _ in range(2):
        found = gradients(method, method.eval().prepare(teacher), student)
        assert all((g is not None) == name.startswith("paraphraser") for name, g in found.items())
        assert all(g.abs().max() > 0 for g in found.values() if g is not None)
        method.train()
        loss = term(method, student, teacher)
        assert {name for name, p in method.named_parameters() if p.requires_grad} == {
            name for name, _ in method.named_parameters() if name.startswith("translator")
        }
        found = gradients(method, loss, student)
        assert all((g is None) == name.startswith("paraphraser") for name, g in found.items())


def test_a_frozen_paraphraser_stays_as_it_is_and_is_read_in_evaluation_mode():
    method = build("ft", *SHAPES["student smaller"])
    student, teacher = features(*SHAPES["student smaller"])
    method.eval()
    for _ in range(3):
        method.prepare(teacher)
    learned = copy.deepcopy(method.paraphraser)
    assert float(learned["encoder"][1].num_batches_tracked) == 3  # prepare runs in training mode
    method.train()
    loss = term(method, student, teacher)
    assert all(torch.equal(x, learned.state_dict()[key]) for key, x in method.paraphraser.state_dict().items())
    factor = learned.eval()["encoder"](teacher)
    assert factor.shape == (B, 1, 8, 8)  # half of three channels
    assert torch.allclose(loss, ft_loss(method.translator(student), F.adaptive_avg_pool2d(factor, 4)))


def test_prepare_measures_the_reconstruction_of_the_feature_in_its_own_size():
    method = build("ft")
    _, teacher = features()
    error = method.prepare(teacher)
    rebuilt = method.paraphraser["decoder"](method.paraphraser["encoder"](teacher))
    assert rebuilt.shape == teacher.shape and torch.allclose(error, (rebuilt - teacher).square().mean())

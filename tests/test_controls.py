"""Control teachers: what their hints are made of, and what they leave alone."""

import pytest
import torch
from torch import nn

from pursuhint_lib import controls
from pursuhint_lib.controls import UNTRAINED_SEED, ControlTeacher, control_teacher, untrained_network
from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.learners import seeded
from pursuhint_lib.models import candidate_layers, state_hash
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.study import fresh_network, study_images, training_batches

PARAMS = DistillStudents(study="toy", teacher="resnet20_w8", student="resnet8_w4", threads=1)


class Net(nn.Module):
    """Two maps, and logits; its modules are declared in another order than they run."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(5, 3)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.head(self.last(self.first(x)).mean((2, 3)))


def net(seed):
    with seeded(seed):
        return Net().eval()


def scene():
    trained, untrained = net(0), net(1)
    layers = ["last", "first"]
    teacher = ControlTeacher(FrozenTeacher(trained, layers), FrozenTeacher(untrained, layers))
    images = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return trained, untrained, teacher, images


@pytest.fixture(scope="module")
def images():
    return study_images(PARAMS)


@pytest.fixture(scope="module")
def random_network(images):
    return untrained_network(PARAMS, images)


def test_each_source_is_what_its_name_says_and_the_logits_are_the_trained_teachers():
    trained, untrained, teacher, images = scene()
    keys = ["untrained/first", "first", "shuffled/first", "shuffled/last"]
    seen = teacher.observe(images, keys)
    assert set(seen.features) == set(keys)
    with torch.no_grad():
        first = trained.first(images)
        assert torch.equal(seen.features["first"], first)
        assert torch.equal(seen.features["untrained/first"], untrained.first(images))
        for i in range(len(images)):  # image i is given what belongs to image i - 1
            other = trained.first(images[i - 1 : i] if i else images[-1:])
            torch.testing.assert_close(seen.features["shuffled/first"][i : i + 1], other)
        assert torch.equal(seen.features["shuffled/last"].roll(-1, dims=0), trained.last(first))
        assert torch.equal(seen.logits, trained(images))


def test_whatever_is_asked_the_trained_network_runs_once_and_the_untrained_one_only_when_asked():
    *_, teacher, images = scene()
    for keys, runs in (([], 0), (["first"], 0), (["first", "shuffled/first"], 0), (["untrained/last", "first"], 1)):
        teacher.model.runs = teacher.untrained.model.runs = 0
        seen = teacher.observe(images, keys)
        assert (teacher.model.runs, teacher.untrained.model.runs) == (1, runs), keys
        assert set(seen.features) == set(keys)
        assert torch.equal(seen.logits, teacher.teacher.observe(images, []).logits)


def test_it_has_the_face_of_a_frozen_teacher():
    trained, _, teacher, images = scene()
    assert teacher.model is teacher.teacher.model and state_hash(teacher.model) == state_hash(trained)
    everything = teacher.observe(images).features
    # Within a source in execution order, whatever the order that the layers were named in.
    expected = [prefix + layer for prefix in ("", "untrained/", "shuffled/") for layer in ("first", "last")]
    assert list(everything) == expected and set(teacher.layers) == set(expected)
    assert not list(teacher.parameters()) and not teacher.state_dict()
    modes = [module.training for module in teacher.train().modules()]
    assert not any(modes) and not teacher.untrained.model.training
    assert {p.dtype for part in (teacher.model, teacher.untrained.model) for p in part.parameters()} == {torch.float32}
    assert teacher.to(torch.float64) is teacher
    assert {p.dtype for part in (teacher.model, teacher.untrained.model) for p in part.parameters()} == {torch.float64}


def test_unknown_keys_and_teachers_of_different_layers_are_refused_by_name():
    trained, untrained, teacher, images = scene()
    with pytest.raises(ValueError, match="no layer 'untraned/first'") as error:
        teacher.observe(images, ["untraned/first"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="untrained teacher captures first and the trained one first, last"):
        ControlTeacher(FrozenTeacher(trained, ["first", "last"]), FrozenTeacher(untrained, ["first"]))


def test_observing_changes_neither_network():
    *_, teacher, images = scene()
    before = state_hash(teacher.model), state_hash(teacher.untrained.model)
    teacher.train()
    for _ in range(3):
        teacher.observe(images)
    assert (state_hash(teacher.model), state_hash(teacher.untrained.model)) == before


def test_the_untrained_network_has_random_weights_of_its_own_seed_and_only_batch_norm_was_measured(
    images, random_network
):
    drawn = fresh_network(PARAMS.teacher, images, UNTRAINED_SEED)
    weights, at_birth = dict(random_network.named_parameters()), dict(drawn.named_parameters())
    assert all(torch.equal(weights[name], at_birth[name]) for name in at_birth) and weights.keys() == at_birth.keys()
    assert not random_network.training
    other = fresh_network(PARAMS.teacher, images, 0)
    assert not torch.equal(weights["fc.weight"], other.fc.weight)


def test_no_seed_of_a_study_can_be_the_untrained_networks():
    DistillStudents(study="toy", seeds=[UNTRAINED_SEED - 1])
    with pytest.raises(ValueError, match="seeds"):
        DistillStudents(study="toy", seeds=[UNTRAINED_SEED])


def test_the_untrained_network_is_the_same_in_every_call_and_draws_nothing_from_the_global_generator(
    images, random_network
):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert state_hash(untrained_network(PARAMS, images)) == state_hash(random_network)
    assert torch.equal(before, torch.get_rng_state())
    more_seeds = PARAMS.model_copy(update={"seeds": [3, 4, 5]})
    assert state_hash(untrained_network(more_seeds, images)) == state_hash(random_network)


def test_another_untrained_network_has_other_features(images, random_network, monkeypatch):
    monkeypatch.setattr(controls, "UNTRAINED_SEED", UNTRAINED_SEED + 1)
    layers = candidate_layers(random_network)
    batch = next(iter(training_batches(PARAMS, images, 64, 0, torch.device("cpu"))))
    one, other = (
        FrozenTeacher(network, layers).observe(batch.images).features
        for network in (random_network, untrained_network(PARAMS, images))
    )
    for layer in layers:
        assert float((one[layer] - other[layer]).square().mean()) > 0.1 * float(one[layer].square().mean())


def spread(network, batch):
    """Root mean square of every batch norm's output in eval mode, its scale and shift being 1 and 0."""
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    features = FrozenTeacher(network, norms).observe(batch.images).features
    return [float(feature.square().mean().sqrt()) for feature in features.values()]


def test_its_batch_norm_normalizes_images_that_it_has_not_seen_which_it_would_not_as_initialized(
    images, random_network
):
    batch = list(training_batches(PARAMS, images, 64, 0, torch.device("cpu")).epoch(7))[3]
    assert spread(random_network, batch) == pytest.approx([1.0] * 21, abs=0.1)
    as_initialized = spread(fresh_network(PARAMS.teacher, images, UNTRAINED_SEED), batch)
    assert max(as_initialized) / min(as_initialized) > 3


def test_one_call_gives_the_teacher_of_a_study(images, random_network):
    trained = fresh_network(PARAMS.teacher, images, 1).eval()
    layers = candidate_layers(trained)
    teacher = control_teacher(trained, layers, PARAMS, images)
    assert state_hash(teacher.model) == state_hash(trained)
    assert state_hash(teacher.untrained.model) == state_hash(random_network)
    assert teacher.teacher.layers == teacher.untrained.layers == layers

"""What the notebooks of one study must agree on."""

import itertools

import torch

from pursuhint_lib.models import state_hash
from pursuhint_lib.params import TrainTeacher
from pursuhint_lib.study import (
    fixed_batches,
    fresh_network,
    probe_batches,
    study_images,
    training_batches,
    training_facts,
)

CPU = torch.device("cpu")
PARAMS = TrainTeacher(study="toy", noise=0.5, evaluation_repeats=2, validation_per_class=20)


def keys(image_set):
    return {image.numpy().tobytes() for image in image_set.images}


def test_train_validation_and_test_share_no_image_and_every_test_image_counts_twice():
    images = study_images(PARAMS)
    assert keys(images.train).isdisjoint(keys(images.validation))
    assert keys(images.train).isdisjoint(keys(images.test)) and keys(images.validation).isdisjoint(keys(images.test))
    assert len(images.validation) == 2 * 200 and torch.equal(images.test.images[0], images.test.images[1])
    assert images.facts()["sets"]["train"]["images"] == len(images.train)


def noise_of(batches, which, images):
    """What was added to the first batch of `which`, in units of the normalized image."""
    batch = next(iter(batches))
    mean, std = images.mean.float().view(-1, 1, 1), images.std.float().view(-1, 1, 1)
    return batch.images - (which.images[batch.index].float() / 255 - mean) / std


def test_noise_is_fixed_within_a_set_and_independent_between_sets_and_from_training():
    images = study_images(PARAMS)
    probe = probe_batches(PARAMS, images, 250, CPU)
    fields = {
        "validation": noise_of(fixed_batches(PARAMS, images, "validation", CPU), images.validation, images),
        "again": noise_of(fixed_batches(PARAMS, images, "validation", CPU), images.validation, images),
        "test": noise_of(fixed_batches(PARAMS, images, "test", CPU), images.test, images),
        "probe": noise_of(probe, probe.image_set, images),
    }
    train = training_batches(PARAMS.model_copy(update={"crop_padding": 0}), images, 250, 0, CPU)
    fields["train"] = noise_of(train, images.train, images)
    flat = {name: field[:200].flatten() for name, field in fields.items()}
    assert torch.equal(flat["validation"], flat["again"])
    for a, b in itertools.combinations(("validation", "test", "probe", "train"), 2):
        assert abs(float(torch.corrcoef(torch.stack([flat[a], flat[b]]))[0, 1])) < 0.05, (a, b)


def test_a_network_depends_on_its_seed_alone_and_the_facts_on_what_decides_it():
    images = study_images(PARAMS)
    torch.manual_seed(3)
    first = fresh_network("resnet8_w4", images, 1)
    assert state_hash(first) == state_hash(fresh_network("resnet8_w4", images, 1))
    assert state_hash(first) != state_hash(fresh_network("resnet8_w4", images, 2))
    facts = training_facts(PARAMS, images, "resnet8_w4", CPU, torch.float32)
    for change in ({"noise": 0.1}, {"crop_padding": 0}, {"flip": True}):
        assert training_facts(PARAMS.model_copy(update=change), images, "resnet8_w4", CPU, torch.float32) != facts
    assert training_facts(PARAMS, images, "resnet8_w4", CPU, torch.bfloat16) != facts

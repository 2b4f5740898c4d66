"""README's first minute, on networks of torchvision and on a module of one's own: it works, and leaves no trace."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pursuhint_lib.features import FrozenTeacher
from pursuhint_lib.hints import LayerClustering
from pursuhint_lib.models import build_model, candidate_layers, state_hash
from pursuhint_lib.profiling import profile_layers


def batches(size, *counts):
    torch.manual_seed(1)
    return [SimpleNamespace(images=torch.randn(count, 3, size, size)) for count in counts]


def first_minute(model, batches, metrics):
    """{metric: hint points}, as in README."""
    teacher = FrozenTeacher(model, candidate_layers(model))
    profile = profile_layers(teacher, batches)
    return {metric: LayerClustering(n_clusters=3).fit(profile.similarity(metric)).hint_points_ for metric in metrics}


def half_in_training(model):
    """Every third module in eval mode."""
    model.train()
    for module in list(model.modules())[::3]:
        module.training = False
    return model


def modes(model):
    return [module.training for module in model.modules()]


def answer(model, images):
    before = modes(model)
    with torch.no_grad():
        output = model.eval()(images)
    for module, training in zip(model.modules(), before):
        module.training = training
    return output


def n_hooks(model):
    """Of every kind, on every module and on all modules together."""
    everywhere = [value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_")]
    hooks = [vars(module)[name] for module in model.modules() for name in vars(module) if name.endswith("_hooks")]
    return sum(len(kind) for kind in [*everywhere, *hooks] if hasattr(kind, "__len__"))


def assert_no_trace(model, images, use):
    """Run `use` and compare all of the model, and torch's random numbers, with what was there before."""

    def everything():
        parameters = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        return state_hash(model), modes(model), n_hooks(model), parameters, list(vars(model))

    output, before, random_state = answer(model, images), everything(), torch.get_rng_state()
    assert True in before[1] and False in before[1], "the model is half in train mode"
    use()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert everything() == before
    assert torch.equal(answer(model, images), output)


# As few and small images as the networks allow: fewer than channels, so CCA can tell nothing, and says so.
@pytest.mark.filterwarnings("ignore:[12] of 3 clusters are empty")
@pytest.mark.parametrize(
    ("name", "size", "counts"),
    [
        ("resnet34", 32, (8, 5)),
        ("vgg13_bn", 32, (8, 5)),
        ("convnext_tiny", 32, (8, 5)),
        ("vit_b_16", 224, (2, 2)),
    ],
)
def test_the_first_minute_on_networks_of_torchvision(name, size, counts):
    torch.manual_seed(0)
    model, images = half_in_training(build_model(name, 3)), batches(size, *counts)

    def use():
        with pytest.warns(UserWarning, match=f"canonical correlation from {sum(counts)} images"):
            hints = first_minute(model, images, ["linear_cka", "r2_cca"])
        layers = candidate_layers(model)
        assert len(set(hints["linear_cka"])) == len(hints["r2_cca"]) == 3
        for chosen in hints.values():
            assert chosen == sorted(chosen, key=layers.index), "in order of depth"
            assert set(chosen) <= set(layers) <= {path for path, _ in model.named_modules()}

    assert_no_trace(model, images[0].images, use)


class OwnNetwork(nn.Module):
    """Nothing that the library knows: a functional stem, blocks of two kinds, a mask, layers declared in reverse."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.late = nn.ModuleList(OwnBlock(12) for _ in range(3))
        self.down = nn.Conv2d(6, 12, 2, stride=2)
        self.early = nn.ModuleDict({"b": OwnBlock(6), "a": OwnBlock(6)})
        self.stem = nn.Conv2d(3, 6, 3)

    def forward(self, images, mask=None):
        x = nn.functional.relu_(self.stem(images if mask is None else images * mask))
        x = self.down(self.early["b"](self.early["a"](x)))
        for block in self.late:
            x = block(x)
        return self.head(x.mean((2, 3)))


class OwnBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout(0.2),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x):
        return nn.functional.relu(x + self.layers(x), inplace=True)


@pytest.mark.parametrize(
    ("build", "size", "count"),
    [(OwnNetwork, 8, 40), (lambda: build_model("mobilenet_v3_small", 3), 32, 120)],
    ids=["own", "mobilenet_v3_small"],
)
def test_the_first_minute_with_more_images_than_channels_needs_no_warning(build, size, count):
    torch.manual_seed(0)
    model, images = half_in_training(build()), batches(size, count // 2, count // 2)

    def use():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hints = first_minute(model, images, ["r2_cca", "linear_cka"])
        for chosen in hints.values():
            assert len(set(chosen)) == 3 and set(chosen) <= set(candidate_layers(model))

    assert_no_trace(model, images[0].images, use)


def test_the_layers_of_a_module_of_ones_own_come_as_they_run():
    assert candidate_layers(OwnNetwork()) == ["early.a", "early.b", "late.0", "late.1", "late.2"]

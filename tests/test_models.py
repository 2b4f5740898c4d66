"""The networks against the published definitions, candidate layers by the documented rules, files that survive."""

import functools
import random
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pursuhint_lib.features import FeatureExtractor, FrozenTeacher, layer_table
from pursuhint_lib.models import MODELS, build_model, candidate_layers, load_model, save_model, state_hash
from pursuhint_lib.models.resnet_cifar import BasicBlock
from pursuhint_lib.models.wrn_cifar import PreActivationBlock

# Parameters, and multiply-accumulates in millions, of the RepDistiller definitions: 100 classes, 32x32 images.
PUBLISHED = {
    "resnet8": (83_892, 12.51),
    "resnet14": (181_108, 26.66),
    "resnet20": (278_324, 40.82),
    "resnet32": (472_756, 69.13),
    "resnet44": (667_188, 97.44),
    "resnet56": (861_620, 125.75),
    "resnet110": (1_736_564, 253.16),
    "resnet8x4": (1_233_540, 177.07),
    "resnet32x4": (7_433_860, 1083.04),
    "wrn_16_1": (180_916, 26.66),
    "wrn_16_2": (703_284, 101.12),
    "wrn_40_1": (569_780, 83.29),
    "wrn_40_2": (2_255_156, 327.61),
}


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    return build_model(name, 100).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_multiply_accumulates_equal_the_published_table(name):
    model = model_of(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, round(counter.get_total_flops() / 2e6, 2)) == PUBLISHED[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_network_takes_any_image_size_and_any_number_of_channels(name):
    with torch.device("meta"):  # shapes only
        model = build_model(name, 10, channels=1)
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
        assert model(torch.zeros(2, 1, 29, 40)).shape == (2, 10)


def test_a_residual_block_is_two_convolutions_plus_a_shortcut():
    torch.manual_seed(0)
    block = BasicBlock(2, 3, stride=2).double().eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)

    def conv_bn(x, conv, bn):  # fresh batch norm in eval mode: divide by sqrt(1 + eps)
        return nn.functional.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding) / (1 + bn.eps) ** 0.5

    inner = conv_bn(conv_bn(x, block.conv1, block.bn1).clamp(min=0), block.conv2, block.bn2)
    expected = (inner + conv_bn(x, *block.shortcut)).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


def test_a_wide_block_projects_its_activated_input_and_adds_a_bare_sum():
    torch.manual_seed(0)
    block = PreActivationBlock(2, 3, stride=2).double().eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    conv, shrink = nn.functional.conv2d, 1 / (1 + block.bn1.eps) ** 0.5  # a fresh batch norm in eval mode
    activated = (x * shrink).clamp(min=0)
    inner = (conv(activated, block.conv1.weight, stride=2, padding=1) * shrink).clamp(min=0)
    expected = conv(inner, block.conv2.weight, padding=1) + conv(activated, block.projection.weight, stride=2)
    torch.testing.assert_close(block(x), expected)

    same = PreActivationBlock(2, 2, stride=1).double()
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x), x)


def test_convolutions_start_with_the_spread_of_he_et_al():
    weight = model_of("resnet32x4").stage3[1].conv1.weight  # fan-out 256 * 9
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "count", "stage_ends"),
    [
        ("resnet110", 54, (18, 36, 54)),
        ("resnet56", 27, (9, 18, 27)),
        ("resnet32x4", 15, (5, 10, 15)),
        ("wrn_40_2", 18, (6, 12, 18)),
    ],
)
@pytest.mark.parametrize("before_activation", [False, True])
def test_candidates_are_the_residual_blocks(name, count, stage_ends, before_activation):
    model = model_of(name)
    layers = candidate_layers(model, before_activation=before_activation)
    with FeatureExtractor(model, layers) as extract, torch.no_grad():
        _, features = extract(torch.randn(1, 3, 32, 32))
    assert list(features) == layers, "execution order"
    assert len(layers) == count
    channels = [feature.shape[1] for feature in features.values()]
    changes = [depth for depth in range(1, count) if channels[depth] != channels[depth - 1]]
    assert (*changes, count) == stage_ends
    assert all((feature.min() < 0) == before_activation for feature in features.values())


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1"])
def test_an_activated_candidate_is_the_positive_part_of_the_one_before_activation(name):
    model = model_of(name)
    before, after = candidate_layers(model, before_activation=True), candidate_layers(model)
    with FeatureExtractor(model, [*before, *after]) as extract, torch.no_grad():
        _, features = extract(torch.randn(2, 3, 16, 16))
    for raw, activated in zip(before, after, strict=True):
        # Wide ResNets normalize in between; a fresh batch norm in eval mode divides by sqrt(1 + eps).
        torch.testing.assert_close(features[activated], features[raw].clamp(min=0), rtol=2e-5, atol=1e-6)


# Torchvision's networks by the tables of their papers: first and last candidate, and for the last block of every stage
# its number, channels and width, for images of 224 pixels (inception_v3: 299).
FAMILIES = {
    "resnet18": ("layer1.0", "layer4.1", [(2, 64, 56), (4, 128, 28), (6, 256, 14), (8, 512, 7)]),
    "resnet34": ("layer1.0", "layer4.2", [(3, 64, 56), (7, 128, 28), (13, 256, 14), (16, 512, 7)]),
    "wide_resnet50_2": ("layer1.0", "layer4.2", [(3, 256, 56), (7, 512, 28), (13, 1024, 14), (16, 2048, 7)]),
    "vgg13": (
        "features.1", "features.23", [(2, 64, 224), (4, 128, 112), (6, 256, 56), (8, 512, 28), (10, 512, 14)],
    ),
    "vgg13_bn": (
        "features.2", "features.33", [(2, 64, 224), (4, 128, 112), (6, 256, 56), (8, 512, 28), (10, 512, 14)],
    ),
    "alexnet": ("features.1", "features.11", [(1, 64, 55), (2, 192, 27), (3, 384, 13), (5, 256, 13)]),
    "squeezenet1_1": ("features.3", "features.12", [(2, 128, 55), (4, 256, 27), (6, 384, 13), (8, 512, 13)]),
    "densenet121": (
        "features.denseblock1.denselayer1",
        "features.denseblock4.denselayer16",
        [(6, 32, 56), (18, 32, 28), (42, 32, 14), (58, 32, 7)],
    ),
    "googlenet": (
        "inception3a",
        "inception5b",
        [(1, 256, 28), (2, 480, 28), (5, 512, 14), (6, 528, 14), (7, 832, 14), (8, 832, 7), (9, 1024, 7)],
    ),
    "inception_v3": ("Mixed_5b", "Mixed_7c", [(1, 256, 35), (3, 288, 35), (8, 768, 17), (9, 1280, 8), (11, 2048, 8)]),
    "mobilenet_v2": (
        "features.1",
        "features.17",
        [(1, 16, 112), (3, 24, 56), (6, 32, 28), (10, 64, 14), (13, 96, 14), (16, 160, 7), (17, 320, 7)],
    ),
    "mobilenet_v3_small": (
        "features.1", "features.11", [(1, 16, 56), (3, 24, 28), (6, 40, 14), (8, 48, 14), (11, 96, 7)],
    ),
    "mobilenet_v3_large": (
        "features.1",
        "features.15",
        [(1, 16, 112), (3, 24, 56), (6, 40, 28), (10, 80, 14), (12, 112, 14), (15, 160, 7)],
    ),
    "mnasnet1_0": (
        "layers.8.0",
        "layers.13.0",
        [(3, 24, 56), (6, 40, 28), (9, 80, 14), (11, 96, 14), (15, 192, 7), (16, 320, 7)],
    ),
    "efficientnet_b0": (
        "features.1.0",
        "features.7.0",
        [(1, 16, 112), (3, 24, 56), (5, 40, 28), (8, 80, 14), (11, 112, 14), (15, 192, 7), (16, 320, 7)],
    ),
    "efficientnet_v2_s": (
        "features.1.0",
        "features.6.14",
        [(2, 24, 112), (6, 48, 56), (10, 64, 28), (16, 128, 14), (25, 160, 14), (40, 256, 7)],
    ),
    "shufflenet_v2_x1_0": ("stage2.0", "stage4.3", [(4, 116, 28), (12, 232, 14), (16, 464, 7)]),
    "regnet_x_400mf": (
        "trunk_output.block1.block1-0",
        "trunk_output.block4.block4-11",
        [(1, 32, 56), (3, 64, 28), (10, 160, 14), (22, 400, 7)],
    ),
    "regnet_y_400mf": (
        "trunk_output.block1.block1-0",
        "trunk_output.block4.block4-5",
        [(1, 48, 56), (4, 104, 28), (10, 208, 14), (16, 440, 7)],
    ),
    "convnext_tiny": ("features.1.0", "features.7.2", [(3, 96, 56), (6, 192, 28), (15, 384, 14), (18, 768, 7)]),
    "vit_b_16": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", [(12, 768, 14 * 14 + 1)]),
    "vit_b_32": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11", [(12, 768, 7 * 7 + 1)]),
    "swin_t": ("features.1.0", "features.7.1", [(2, 96, 56), (4, 192, 28), (10, 384, 14), (12, 768, 7)]),
    "swin_v2_t": ("features.1.0", "features.7.1", [(2, 96, 56), (4, 192, 28), (10, 384, 14), (12, 768, 7)]),
    "maxvit_t": (
        "blocks.0.layers.0", "blocks.3.layers.1", [(2, 64, 56), (4, 128, 28), (9, 256, 14), (11, 512, 7)],
    ),
}  # fmt: skip
STAGED = {"vgg13": 5, "vgg13_bn": 5, "alexnet": 3, "densenet121": 4, "maxvit_t": 4}  # name -> stages on the outside


@pytest.mark.parametrize("name", FAMILIES)
def test_candidates_of_torchvision_networks_are_the_blocks_of_their_papers(name):
    first, last, stages = FAMILIES[name]
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # shapes only; a RegNet cannot be built so
        model = build_model(name, 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layers = candidate_layers(model)
    assert (layers[0], layers[-1], len(layers)) == (first, last, stages[-1][0])
    assert len(said) == (name in STAGED)
    assert all(f"has {STAGED[name]} stages, fewer than 8" in str(line.message) for line in said)
    size = 299 if name == "inception_v3" else 224
    table = layer_table(model.to("meta"), layers, (3, size, size))
    assert table["layer"].tolist() == layers, "execution order"
    ends = table[table["stage_end"]]
    assert list(zip(ends["depth"], ends["channels"], ends["width"])) == stages


def test_candidates_of_a_vgg_are_after_the_relu_or_before_it():
    with torch.device("meta"):
        model = build_model("vgg11_bn", 2)
    after = [model.get_submodule(layer) for layer in candidate_layers(model)]
    before = [model.get_submodule(layer) for layer in candidate_layers(model, before_activation=True)]
    assert {type(module) for module in after} == {nn.ReLU} and len(after) == 8
    assert {type(module) for module in before} == {nn.BatchNorm2d} and len(before) == 8


class Block(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Reversed(nn.Module):
    """Declared in the reverse of execution order; `unused` is never called."""

    def __init__(self):
        super().__init__()
        self.last, self.unused = Block(), Block()
        self.middle = nn.ModuleList([Block(), Block()])
        self.first = Block()

    def forward(self, x):
        x = self.middle[0](self.middle[1](self.first(x)))
        return self.last(x).mean((2, 3))


class Untraceable(Reversed):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return super().forward(x)


ORDER = ["first", "middle.1", "middle.0", "last"]


def test_candidates_come_in_execution_order_not_in_order_of_declaration():
    assert candidate_layers(Reversed()) == ORDER
    assert candidate_layers(nn.Sequential(Reversed())) == [f"0.{layer}" for layer in ORDER]


def test_stages_that_cannot_be_traced_inside_are_the_candidates_and_a_line_says_what_gives_more():
    class PickyStage(Stage):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    model = Looped(*[PickyStage(Block(), Block()) for _ in range(3)])
    with pytest.warns(UserWarning, match="cannot trace .*: pass image_shape.* more candidates than 3 stages"):
        assert candidate_layers(model) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(candidate_layers(model, image_shape=(2, 4, 4))) == 6


def test_a_forward_pass_that_cannot_be_traced_is_ordered_by_a_dry_run():
    model = Untraceable()
    with pytest.raises(ValueError, match="Untraceable.*pass image_shape"):
        candidate_layers(model)
    assert candidate_layers(model, image_shape=(2, 4, 4)) == ORDER
    with pytest.raises(ValueError, match="Untraceable cannot take an image of 3x4x4 .*3 channels") as error:
        candidate_layers(model, image_shape=(3, 4, 4))
    assert "\n" not in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


class Looped(nn.Module):
    """Runs some of its blocks by number, in the order of `path`; with a flag and a mask that are left alone."""

    def __init__(self, *blocks, path=None):
        super().__init__()
        self.head, self.blocks, self.stem = nn.Linear(2, 2), nn.ModuleList(blocks), nn.Conv2d(2, 2, 1)
        self.path = range(len(blocks)) if path is None else path

    def forward(self, x, mask=None, headless=False):
        x = self.stem(x)
        if mask is not None:
            x = x * mask
        for number in self.path:
            x = self.blocks[number](x)
        return x if headless else self.head(x.mean((2, 3)))


class OtherBlock(Block):
    pass


class Stage(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


class WrappingStage(Stage):
    def __init__(self, wrap):
        super().__init__(Block(), Block())
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.blocks(x))


class Wrapped(nn.Module):
    """Stages that give their map in some company or form, made by `wrap` and undone by `unwrap`."""

    def __init__(self, wrap, unwrap, stages=8):
        super().__init__()
        self.unwrap, self.stages = unwrap, nn.ModuleList(WrappingStage(wrap) for _ in range(stages))

    def forward(self, x):
        for stage in self.stages:
            x = self.unwrap(stage(x))
        return x.mean((2, 3))


class ConvBlock(nn.Module):
    """One weight layer, and an activation without a name."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Picky(nn.Module):
    """One weight layer; what it does depends on the data."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() < 1e9 else x


class WithAuxiliaryHeads(nn.Module):
    """Two heads, more outside than the blocks, that run in train mode only."""

    def __init__(self):
        super().__init__()
        self.head1, self.head2, self.body = OtherBlock(), OtherBlock(), Looped(Block(), Block())

    def forward(self, x):
        if self.training:
            x = self.head2(self.head1(x))
        return self.body(x)


class Functional(nn.Module):
    """LeNet's kind: most activations and poolings are functions. Declared in the reverse of execution order."""

    def __init__(self):
        super().__init__()
        self.fc2, self.late, self.fc1 = nn.Linear(4, 2), nn.ReLU(), nn.Linear(3, 4)
        self.norm2, self.conv2, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(2, 3, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = self.norm2(self.conv2(x)).relu().mean((2, 3))
        return self.fc2(self.late(2 * self.fc1(x)))


class FlatTransformer(nn.Module):
    """Attention and weights in lists of their own, without blocks. Attention returns a pair."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(2, 1, batch_first=True) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        for attention, mix in zip(self.attention, self.mix):
            x = mix(attention(x, x, x)[0])
        return self.mix[2](x.mean(1))


def twice_the_same_object():
    model = Looped(Block(), Block(), Block())
    model.another_name = model.blocks[0]
    return nn.Sequential(model)


def sequential(*layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def conv():
    return nn.Conv2d(2, 2, 1)


def one_relu_for_all(relu):
    return sequential(conv(), relu, conv(), nn.BatchNorm2d(2), relu, conv(), nn.ReLU())


def one_relu_for_all_stages(relu):
    pool = nn.MaxPool2d(1)
    return sequential(conv(), relu, conv(), relu, pool, conv(), nn.Tanh(), relu, pool, conv(), relu, nn.Tanh())


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def weight_normed():
    return nn.utils.parametrizations.weight_norm(conv())


OWN_MODULES = {  # name -> (model, candidates)
    "blocks in a ModuleList loop": (lambda: Looped(Block(), Block(), Block()), ["blocks.0", "blocks.1", "blocks.2"]),
    "not in order of declaration": (lambda: Looped(Block(), Block(), path=[1, 0]), ["blocks.1", "blocks.0"]),
    "one block never runs": (lambda: Looped(Block(), Block(), Block(), path=[0, 2]), ["blocks.0", "blocks.2"]),
    "one block runs twice": (lambda: Looped(Block(), Block(), Block(), path=[0, 1, 1, 2]), ["blocks.0", "blocks.2"]),
    "two classes alternate": (
        lambda: Looped(Block(), OtherBlock(), Block(), OtherBlock()), ["blocks.0", "blocks.1", "blocks.2", "blocks.3"],
    ),
    "a class of its own between": (
        lambda: Looped(OtherBlock(), Block(), Stage(Block(), Block()), Block()), ["blocks.1", "blocks.2", "blocks.3"],
    ),
    "nested: few outer stages": (
        lambda: Looped(Stage(Block()), Stage(Block(), Block())),
        ["blocks.0.blocks.0", "blocks.1.blocks.0", "blocks.1.blocks.1"],
    ),
    "nested: eight outer stages": (
        lambda: Looped(*[Stage(Block(), Block()) for _ in range(8)]), [f"blocks.{i}" for i in range(8)],
    ),
    "nested: few outer blocks, with parts of unlike classes": (
        lambda: Looped(*[Stage(Block(), OtherBlock()) for _ in range(3)]), ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "blocks that return their map's size, too": (
        lambda: Wrapped(lambda x: [x.shape[2:], x], lambda pair: pair[1]), [f"stages.{i}" for i in range(8)],
    ),
    "nested: one outer block": (
        lambda: Looped(Stage(Block(), Block())), ["blocks.0.blocks.0", "blocks.0.blocks.1"],
    ),
    "nested: outer blocks run only in training": (WithAuxiliaryHeads, ["body.blocks.0", "body.blocks.1"]),
    "one block under two names": (twice_the_same_object, ["0.blocks.0", "0.blocks.1", "0.blocks.2"]),
    "blocks of one weight layer": (lambda: sequential(ConvBlock(), ConvBlock(), ConvBlock()), ["0", "1", "2"]),
    "blocks that torch wrote": (
        lambda: nn.Sequential(
            nn.Flatten(2), *[nn.TransformerEncoderLayer(16, 1, 8, batch_first=True) for _ in range(2)]
        ),
        ["1", "2"],
    ),
    "a wrapper of torch": (
        lambda: nn.Sequential(nn.DataParallel(Looped(Block(), Block()))), ["0.module.blocks.0", "0.module.blocks.1"],
    ),
    "a part that cannot be traced, beside the blocks": (
        lambda: Looped(Block(), Picky(), Block()), ["blocks.0", "blocks.2"],
    ),
    "a chain": (
        lambda: sequential(conv(), nn.BatchNorm2d(2), nn.ReLU(), conv(), nn.Dropout(), nn.ReLU(), conv(), nn.GELU()),
        ["2", "5", "7"],
    ),
    "a chain of linear layers": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Identity(), nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)
        ),
        ["3", "5"],
    ),
    "a chain with two poolings": (
        lambda: sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(), conv(), nn.ReLU(), nn.MaxPool2d(2)),
        ["1", "3", "5"],
    ),
    "a chain with three stages": (
        lambda: sequential(
            conv(), nn.ReLU(), nn.MaxPool2d(1),
            conv(), conv(), nn.ReLU(), nn.MaxPool2d(1),
            conv(), nn.Dropout(), nn.ELU(),
        ),
        ["1", "3", "5", "9"],
    ),
    "a chain with one ReLU for all": (lambda: one_relu_for_all(nn.ReLU()), ["0", "3", "6"]),
    "stages with one ReLU for all": (lambda: one_relu_for_all_stages(nn.ReLU()), ["0", "2", "6", "9"]),
    "a functional forward": (Functional, ["conv1", "norm2", "fc1"]),
    "attention without blocks": (FlatTransformer, ["mix.0", "mix.1"]),
    "weights with a parametrization": (
        lambda: sequential(weight_normed(), nn.ReLU(), weight_normed(), nn.ReLU()), ["1", "3"],
    ),
    "a graph, which runs no blocks": (
        lambda: torch.fx.symbolic_trace(Looped(Block(), Block()), {"mask": None, "headless": False}),
        ["stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"],
    ),
    "compiled": (
        lambda: torch.compile(Looped(Block(), Block()), backend="eager"),
        ["_orig_mod.blocks.0", "_orig_mod.blocks.1"],
    ),
    "compiled in place": (lambda: compiled_in_place(Looped(Block(), Block())), ["blocks.0", "blocks.1"]),
    "compiled blocks": (
        lambda: Looped(*[torch.compile(Block(), backend="eager") for _ in range(2)]), ["blocks.0", "blocks.1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dry", [False, True], ids=["traced", "dry run"])
@pytest.mark.parametrize("name", OWN_MODULES)
def test_candidates_of_modules_of_ones_own(name, dry):
    torch.manual_seed(0)
    build, expected = OWN_MODULES[name]
    model = build().train()
    layers = candidate_layers(model, image_shape=(2, 4, 4) if dry else None)
    assert layers == expected
    observation = FrozenTeacher(model, layers).observe(torch.randn(3, 2, 4, 4))
    assert list(observation.features) == layers, "each runs once, in this order"
    assert layer_table(model, layers, (2, 4, 4))["layer"].tolist() == layers


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: {"map": x}, lambda wrapped: wrapped["map"]),
        (lambda x: (x.shape, "no map"), lambda wrapped: torch.ones(wrapped[0])),
        (lambda x: x.unflatten(0, (1, 1, -1)), lambda wrapped: wrapped.flatten(0, 2)),
        (lambda x: torch.cat([x, x]), lambda wrapped: wrapped[: len(wrapped) // 2]),
    ],
)
def test_a_dry_run_looks_inside_blocks_whose_output_is_no_feature(wrap, unwrap):
    model = Wrapped(wrap, unwrap, stages=2)
    layers = candidate_layers(model, image_shape=(2, 4, 4))
    assert layers == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0", "stages.1.blocks.1"]
    assert FrozenTeacher(model, layers).observe(torch.randn(3, 2, 4, 4)).features


def test_a_chain_has_candidates_before_its_activations_too():
    model, expected = OWN_MODULES["a chain"]
    assert candidate_layers(model(), before_activation=True) == ["1", "3", "6"]
    assert candidate_layers(Functional(), before_activation=True) == ["conv1", "norm2", "fc1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: Looped(Block(), path=[0, 0]), "Looped has no two blocks or .* by hand, from head, blocks, stem"),
        (lambda: nn.Linear(2, 2), r"Linear has no two .* by hand, from \(nothing\)"),
        (lambda: nn.Sequential(conv(), nn.Identity(), conv()), "Sequential has no two .* by hand, from 0, 1, 2"),
        (lambda: Looped(torch.jit.script(Block()), torch.jit.script(Block())), "Looped has no two .* by hand"),
        (lambda: torch.jit.script(Block()), r"RecursiveScriptModule .* pass a torch.nn.Module"),
        (lambda: {"layer": conv()}, "dict cannot be looked into: pass a torch.nn.Module"),
        (lambda: nn.Sequential(nn.LazyConv2d(2, 1), nn.ReLU()), "Sequential: 0.weight is lazy.* run the model once"),
        (lambda: nn.Sequential(nn.LazyBatchNorm2d(affine=False)), "Sequential: 0.running_mean is lazy"),
    ],
)
def test_what_cannot_be_listed_is_refused_in_one_line(model, expected):
    with pytest.raises((ValueError, TypeError), match=expected) as error:
        candidate_layers(model())
    assert "\n" not in str(error.value)


def test_tracing_and_dry_run_draw_no_random_numbers_of_the_callers_and_do_not_call_eval():
    class Noisy(Looped):
        def forward(self, x):
            return super().forward(x + torch.randn(2, 1, 1))

        def train(self, mode=True):
            raise AssertionError("some models answer eval() by rewriting their weights")

    model, before = Noisy(Block(), Block()), torch.get_rng_state()
    assert candidate_layers(model) == candidate_layers(model, image_shape=(2, 4, 4)) == ["blocks.0", "blocks.1"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_finding_candidates_leaves_the_model_as_it_was():
    model = build_model("resnet18", 2).train()
    model.layer2.eval()
    modes, before = [module.training for module in model.modules()], state_hash(model)
    random_state = torch.get_rng_state()
    assert candidate_layers(model) == candidate_layers(model, image_shape=(3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert state_hash(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_value_before_the_last_activation_of_a_block_has_no_name():
    with pytest.raises(ValueError, match="before the last activation has no name in Reversed"):
        candidate_layers(Reversed(), before_activation=True)


def test_auxiliary_heads_of_torchvision_are_no_candidates_in_either_mode():
    for name, last in (("googlenet", "inception5b"), ("inception_v3", "Mixed_7c")):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, init_weights=False)  # with heads, as torchvision builds it
        for training in (True, False):
            layers = candidate_layers(model.train(training))
            assert layers[-1] == last and not any("aux" in layer.lower() for layer in layers)


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match="resnet32x5.*resnet32x4") as error:
        build_model("resnet32x5", 10)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="vgg13bn.*vgg13_bn"):
        build_model("vgg13bn", 10)
    with pytest.raises(ValueError, match="resnet18.*3 channels, not 1"):
        build_model("resnet18", 10, channels=1)
    with pytest.raises(ValueError, match="at least one class"):
        build_model("resnet8", 0)


def trained(name="resnet8_w4", channels=1):
    """A model whose buffers differ from those of a fresh one."""
    torch.manual_seed(1)
    model = build_model(name, 3, channels=channels).train()
    model(torch.randn(4, channels, 8, 8))
    return model


def test_a_saved_model_comes_back_with_its_facts(tmp_path):
    model = trained()
    path = save_model(model, tmp_path / "deep" / "m.safetensors", seed=3, accuracy=0.1 + 0.2, note="é")
    random_state = torch.get_rng_state()
    again, facts = load_model(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert facts == {"seed": 3, "accuracy": 0.1 + 0.2, "note": "é"}
    assert again.spec == {"name": "resnet8_w4", "classes": 3, "channels": 1}
    assert state_hash(again) == state_hash(model)
    assert not again.training
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(images), model.eval()(images))


def test_a_torchvision_model_comes_back_too(tmp_path):
    model = trained("shufflenet_v2_x0_5", channels=3)
    again, _ = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert type(again) is torchvision.models.ShuffleNetV2
    assert state_hash(again) == state_hash(model)


def test_equal_models_give_equal_bytes_in_any_memory_format(tmp_path):
    one = save_model(trained(), tmp_path / "1.safetensors", seed=1, epochs=2)
    other = trained().to(memory_format=torch.channels_last)
    two = save_model(other, tmp_path / "2.safetensors", seed=1, epochs=2)
    assert one.read_bytes() == two.read_bytes()
    assert state_hash(other) == state_hash(trained())


def test_any_changed_byte_or_missing_end_is_noticed(tmp_path):
    path = save_model(trained(), tmp_path / "m.safetensors", seed=1)
    whole = path.read_bytes()
    draw = random.Random(0)
    header = range(int.from_bytes(whole[:8], "little") + 8)
    for position in [*draw.sample(header, 150), *draw.sample(range(len(whole)), 50)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="m.safetensors is not a whole model file") as error:
            load_model(path)
        assert "\n" not in str(error.value)
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="delete it and train"):
            load_model(path)
    path.write_bytes(whole)
    load_model(path)


def test_a_module_of_ones_own_is_loaded_into_a_given_one(tmp_path):
    torch.manual_seed(0)
    path = save_model(Reversed(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="pass it as model="):
        load_model(path)
    given = Reversed()
    loaded, _ = load_model(path, given)
    torch.manual_seed(0)
    assert loaded is given and state_hash(given) == state_hash(Reversed())
    with pytest.raises(ValueError, match=r"does not fit Block: a.weight is nothing there") as error:
        load_model(path, Block())
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_model(tmp_path / "absent.safetensors")


def test_the_state_hash_sees_names_types_shapes_values_and_buffers():
    class Holder(nn.Module):
        def __init__(self, name, tensor):
            super().__init__()
            self.register_buffer(name, tensor)

    hashes = [
        state_hash(Holder("a", torch.zeros(2, 3))),
        state_hash(Holder("b", torch.zeros(2, 3))),
        state_hash(Holder("a", torch.zeros(3, 2))),
        state_hash(Holder("a", torch.zeros(2, 3, dtype=torch.int32))),
        state_hash(Holder("a", torch.zeros(2, 3, dtype=torch.bfloat16))),
        state_hash(Holder("a", torch.tensor([[0, 0, 0], [0, 0, 1.0]]))),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == state_hash(Holder("a", torch.zeros(3, 2).T))


def test_facts_may_be_numpys_numbers(tmp_path):
    facts = {"accuracy": np.float32(0.5), "epochs": np.int64(3), "done": np.bool_(True)}
    found = load_model(save_model(trained(), tmp_path / "m.safetensors", **facts))[1]
    assert found == {"accuracy": 0.5, "epochs": 3, "done": True}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_a_wrapped_network_is_saved_without_its_wrapper(wrap, tmp_path):
    model = trained()
    again, _ = load_model(save_model(wrap(model), tmp_path / "m.safetensors"))
    assert state_hash(again) == state_hash(model)


@pytest.mark.parametrize(("model", "says"), [("resnet8", "str cannot be"), (nn.LazyLinear(2), "weight is lazy")])
def test_what_is_no_network_yet_is_not_saved(model, says, tmp_path):
    with pytest.raises((TypeError, ValueError), match=says):
        save_model(model, tmp_path / "m.safetensors")


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}


@pytest.mark.parametrize(
    ("model", "facts", "says"),
    [
        (WithExtraState(2, 2), {}, "WithExtraState cannot be saved: its _extra_state is a dict, and not a tensor"),
        (nn.Linear(2, 2), {"accuracies": np.zeros(2)}, "a fact is a ndarray: JSON holds numbers"),
    ],
)
def test_what_a_file_of_tensors_cannot_hold_is_one_line_and_nothing_is_written(model, facts, says, tmp_path):
    with pytest.raises(TypeError) as error:
        save_model(model, tmp_path / "m.safetensors", **facts)
    assert str(error.value).startswith(says) and "\n" not in str(error.value) and not list(tmp_path.iterdir())

"""The networks against the published definitions, candidate layers by the documented rules, files that survive."""

import functools
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pursuhint_lib.features import FeatureExtractor
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


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 8, "layer1.0", "layer4.1"),
        ("resnet34", 16, "layer1.0", "layer4.2"),
        ("vgg13_bn", 5, "features.5", "features.33"),
        ("alexnet", 3, "features.1", "features.11"),
        ("mobilenet_v3_small", 11, "features.1", "features.11"),
        ("efficientnet_b0", 16, "features.1.0", "features.7.0"),
        ("shufflenet_v2_x0_5", 16, "stage2.0", "stage4.3"),
        ("regnet_y_400mf", 16, "trunk_output.block1.block1-0", "trunk_output.block4.block4-5"),
        ("densenet121", 4, "features.denseblock1", "features.denseblock4"),
        ("convnext_tiny", 18, "features.1.0", "features.7.2"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_11"),
        ("swin_t", 12, "features.1.0", "features.7.1"),
    ],
)
def test_candidates_of_torchvision_networks_are_their_blocks_or_stages(name, count, first, last):
    layers = candidate_layers(build_model(name, 2))
    assert (len(layers), layers[0], layers[-1]) == (count, first, last)


def test_candidates_of_a_vgg_are_after_the_relu_or_before_it():
    model = build_model("vgg11_bn", 2)
    after = [model.get_submodule(layer) for layer in candidate_layers(model)]
    before = [model.get_submodule(layer) for layer in candidate_layers(model, before_activation=True)]
    assert {type(module) for module in after} == {nn.ReLU} and len(after) == 5
    assert {type(module) for module in before} == {nn.BatchNorm2d} and len(before) == 5


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


def test_a_forward_pass_that_cannot_be_traced_is_ordered_by_a_dry_run():
    model = Untraceable()
    with pytest.raises(ValueError, match="Untraceable.*pass image_shape"):
        candidate_layers(model)
    model.unused = nn.Identity()
    assert candidate_layers(model, image_shape=(2, 4, 4)) == ORDER


def test_finding_candidates_leaves_the_model_as_it_was():
    model = build_model("resnet18", 2).train()
    model.layer2.eval()
    modes, before = [module.training for module in model.modules()], state_hash(model)
    random_state = torch.get_rng_state()
    assert candidate_layers(model) == candidate_layers(model, image_shape=(3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert state_hash(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_model_without_repeated_blocks_asks_for_layers_by_hand():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    with pytest.raises(ValueError, match="Plain.*by hand.*body, head"):
        candidate_layers(Plain())
    with pytest.raises(ValueError, match="before the last activation"):
        candidate_layers(Reversed(), before_activation=True)


def test_a_chain_without_a_last_pooling_still_has_its_last_stage():
    chain = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.AvgPool2d(2),
        nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    assert candidate_layers(chain) == ["2", "8"]
    assert candidate_layers(chain, before_activation=True) == ["1", "7"]


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

"""The rest of the CIFAR zoo, VGG to ResNet-50: against the published table, torchvision's blocks and hand algebra."""

import functools

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import mobilenetv2, resnet, shufflenetv2, vgg

from pursuhint_lib.features import FeatureExtractor, layer_table
from pursuhint_lib.hints import pair_layers, select_hint_points, stage_points
from pursuhint_lib.models import MODELS, build_model, candidate_layers
from pursuhint_lib.models.mobilenet_cifar import InvertedResidual
from pursuhint_lib.models.resnet_cifar import BottleneckBlock
from pursuhint_lib.models.shufflenet_cifar import ShuffleUnitV1, ShuffleUnitV2, channel_shuffle
from pursuhint_lib.models.vgg_cifar import vgg_stage

VGG_MAPS = {"stage1": (64, 32), "stage2": (128, 16), "stage3": (256, 8), "stage4": (512, 4), "stage5": (512, 4)}
# The RepDistiller definitions, 100 classes, 32x32 images: parameters, multiply-accumulates in millions, feature list
# (channels, width) and the length of the pooled vector. Basic and wide ResNets are in test_models.
PUBLISHED = {
    "vgg8_cifar": (3_965_028, 96.19, VGG_MAPS, 512),
    "vgg11_cifar": (9_277_284, 209.44, VGG_MAPS, 512),
    "vgg13_cifar": (9_462_180, 284.94, VGG_MAPS, 512),
    "vgg16_cifar": (14_774_436, 398.18, VGG_MAPS, 512),
    "vgg19_cifar": (20_086_692, 511.43, VGG_MAPS, 512),
    "mobilenet_v2_cifar": (
        812_836, 6.52,
        {"relu1": (16, 16), "stage2": (12, 16), "stage3": (16, 8), "stage5": (48, 4), "stage7": (160, 2)}, 1280,
    ),
    "shufflenet_v1_cifar": (
        949_258, 38.69, {"relu": (24, 32), "stage1": (240, 16), "stage2": (480, 8), "stage3": (960, 4)}, 960,
    ),
    "shufflenet_v2_cifar": (
        1_355_528, 44.50, {"relu": (24, 32), "stage1": (116, 16), "stage2": (232, 8), "stage3": (464, 4)}, 1024,
    ),
    "resnet50_cifar": (
        23_705_252, 1298.01,
        {"relu": (64, 32), "stage1": (256, 32), "stage2": (512, 16), "stage3": (1024, 8), "stage4": (2048, 4)}, 2048,
    ),
}  # fmt: skip


@functools.cache
def blueprint(name):
    """Shapes without values."""
    with torch.device("meta"):
        return build_model(name, 100).eval()


def shaken(module):
    """In eval mode, its batch norms with statistics and weights unlike those they start with."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(part.bias, -0.5, 0.5, generator=generator)
            nn.init.uniform_(part.running_mean, -0.5, 0.5, generator=generator)
            nn.init.uniform_(part.running_var, 0.5, 1.5, generator=generator)
    return module.eval()


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    return shaken(build_model(name, 10))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_multiply_accumulates_and_feature_shapes_equal_the_published_table(name):
    model, (parameters, macs, maps, pooled) = blueprint(name), PUBLISHED[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, FeatureExtractor(model, [*maps, "pool"]) as extract:
        _, features = extract(torch.zeros(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 2e6, 2) == macs
    found = {layer: tuple(feature.shape[1:]) for layer, feature in features.items()}
    assert found == {**{layer: (c, width, width) for layer, (c, width) in maps.items()}, "pool": (pooled, 1, 1)}


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("resnet18", 11_689_512, 1814), ("resnet34", 21_797_672, 3664)]
)
def test_the_pair_of_the_imagenet_study_has_the_published_size(name, parameters, macs):
    """1000 classes, 224x224 images, torchvision's definition; multiply-accumulates in millions."""
    with torch.device("meta"):
        model = build_model(name, 1000).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert round(counter.get_total_flops() / 2e6) == macs


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 31), (64, 64)])
def test_no_map_vanishes(name, size):
    model = blueprint(name)
    table = layer_table(model, candidate_layers(model), (3, *size))
    halvings = 4 if name == "mobilenet_v2_cifar" else 3
    expected = size
    for _ in range(halvings):
        expected = tuple(-(-side // 2) for side in expected)
    assert (table["height"].iloc[-1], table["width"].iloc[-1]) == expected


def test_torchvisions_networks_keep_their_names():
    assert set(MODELS).isdisjoint(torchvision.models.list_models(module=torchvision.models))


# For the last candidate of every stage its number, channels and width, for 32x32 images: the paper's tables.
STAGE_ENDS = {
    **{name: [(1, 128, 16), (2, 256, 8), (4, 512, 4)] for name in PUBLISHED if name.startswith("vgg")},
    "mobilenet_v2_cifar": [
        (1, 8, 16), (3, 12, 16), (6, 16, 8), (10, 32, 4), (13, 48, 4), (16, 80, 2), (17, 160, 2),
    ],
    "shufflenet_v1_cifar": [(4, 240, 16), (12, 480, 8), (16, 960, 4)],
    "shufflenet_v2_cifar": [(4, 116, 16), (12, 232, 8), (16, 464, 4)],
    "resnet50_cifar": [(3, 256, 32), (7, 512, 16), (13, 1024, 8), (16, 2048, 4)],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("before_activation", [False, True])
def test_candidates_are_the_units_of_the_paper_in_execution_order(name, before_activation):
    model = blueprint(name)
    layers = candidate_layers(model, before_activation=before_activation)
    table = layer_table(model, layers, (3, 32, 32))
    assert table["layer"].tolist() == layers
    ends = table[table["stage_end"]]
    assert list(zip(ends["depth"], ends["channels"], ends["width"])) == STAGE_ENDS[name]


def test_the_candidates_of_a_vgg_are_four_stage_outputs():
    table = layer_table(blueprint("vgg13_cifar"), candidate_layers(blueprint("vgg13_cifar")), (3, 32, 32))
    assert table["channels"].tolist() == [128, 256, 512, 512]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg8_cifar", [(128, 16), (256, 8), (512, 4)]),
        ("vgg13_cifar", [(128, 16), (256, 8), (512, 4)]),
        ("mobilenet_v2_cifar", [(16, 8), (48, 4), (160, 2)]),  # the last three of the published feature list
        ("shufflenet_v1_cifar", [(240, 16), (480, 8), (960, 4)]),
        ("shufflenet_v2_cifar", [(116, 16), (232, 8), (464, 4)]),
        ("resnet50_cifar", [(512, 16), (1024, 8), (2048, 4)]),
    ],
)
def test_three_stage_points_are_the_ends_of_the_published_feature_list(name, expected):
    table = layer_table(blueprint(name), candidate_layers(blueprint(name)), (3, 32, 32))
    rows = table.iloc[stage_points(table, 3)]
    assert list(zip(rows["channels"], rows["width"])) == expected


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("vgg13_cifar", "vgg8_cifar"),
        ("resnet50_cifar", "vgg8_cifar"),
        ("resnet32x4", "shufflenet_v1_cifar"),
        ("resnet32x4", "shufflenet_v2_cifar"),
        ("vgg13_cifar", "mobilenet_v2_cifar"),
    ],
)
def test_the_pairs_of_the_benchmarks_are_paired_from_shallow_to_deep_at_like_resolutions(teacher, student):
    tables = {}
    for name in (teacher, student):
        model = blueprint(name)
        tables[name] = layer_table(model, candidate_layers(model), (3, 32, 32))
    hints = select_hint_points("stage_ends", None, tables[teacher], 3)
    pairs = pair_layers(hints, tables[teacher], tables[student])
    widths = {name: table.set_index("layer")["width"] for name, table in tables.items()}
    ratios = [widths[teacher][pair.teacher_layer] / widths[student][pair.student_layer] for pair in pairs]
    assert ratios in ([1, 1, 1], [2, 2, 2])


# ------------------------------------------------------------------------------------------------------ block algebra


def channels_of(order):
    return torch.tensor(order, dtype=torch.float).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("groups", "dealt"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 3, 1, 4, 2, 5]), (3, [0, 2, 4, 1, 3, 5])]
)
def test_a_channel_shuffle_is_a_permutation_of_the_channels_and_of_nothing_else(groups, dealt):
    assert channel_shuffle(channels_of(range(6)), groups).flatten().tolist() == dealt
    x = torch.randn(2, 6, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(channel_shuffle(x, groups), x[:, dealt])
    assert torch.equal(channel_shuffle(x.to(memory_format=torch.channels_last), groups), x[:, dealt])
    assert torch.equal(channel_shuffle(channel_shuffle(x, groups), 6 // groups), x), "dealt back"


def matrix(conv):
    """What a convolution does to the only pixel of a 1x1 map: (C_out, C_in), zero between groups."""
    return torch.block_diag(*conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2].chunk(conv.groups))


def normalized(x, bn):
    return (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias


def one_pixel(width, *, negative=True):
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if negative else x.abs()


def seeded(build, *arguments, **options):
    torch.manual_seed(0)
    return shaken(build(*arguments, **options)).double()


def on_one_pixel(block, x):
    return block(x[:, :, None, None])[:, :, 0, 0]


def test_an_inverted_residual_is_three_matrices_plus_its_input():
    block, x = seeded(InvertedResidual, 4, 4, 1, expansion=3), one_pixel(4)
    hidden = normalized(x @ matrix(block.conv1).T, block.bn1).clamp(min=0)
    hidden = normalized(hidden @ matrix(block.conv2).T, block.bn2).clamp(min=0)
    expected = x + normalized(hidden @ matrix(block.conv3).T, block.bn3)
    assert hidden.shape == (2, 12) and expected.min() < 0
    torch.testing.assert_close(on_one_pixel(block, x), expected)


@pytest.mark.parametrize(("out_channels", "stride"), [(4, 2), (6, 1)])
def test_an_inverted_residual_of_another_shape_has_no_shortcut(out_channels, stride):
    block = seeded(InvertedResidual, 4, out_channels, stride, expansion=3)
    nn.init.zeros_(block.conv3.weight)
    expected = normalized(torch.zeros(1, out_channels, dtype=torch.float64), block.bn3).expand(2, -1)
    torch.testing.assert_close(on_one_pixel(block, one_pixel(4)), expected)


def test_a_shuffle_unit_of_version_1_is_grouped_matrices_around_a_permutation_plus_its_input():
    block, x = seeded(ShuffleUnitV1, 24 * 2, 24 * 2, 1, groups=3), one_pixel(48, negative=False)
    hidden = normalized(x @ matrix(block.conv1).T, block.bn1).clamp(min=0)
    assert hidden.shape == (2, 12)
    hidden = hidden[:, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]  # three groups of four, dealt
    hidden = normalized(hidden @ matrix(block.conv2).T, block.bn2).clamp(min=0)
    expected = (x + normalized(hidden @ matrix(block.conv3).T, block.bn3)).clamp(min=0)
    torch.testing.assert_close(on_one_pixel(block, x), expected)


def test_a_first_shuffle_unit_of_version_1_appends_its_averaged_input_and_does_not_shuffle():
    block, x = seeded(ShuffleUnitV1, 24, 60, 2, groups=3), one_pixel(24, negative=False)  # 24: the stem's
    assert (block.conv1.groups, block.conv3.groups) == (1, 3)
    hidden = normalized(x @ matrix(block.conv1).T, block.bn1).clamp(min=0)
    hidden = normalized(hidden @ matrix(block.conv2).T, block.bn2).clamp(min=0)
    made = normalized(hidden @ matrix(block.conv3).T, block.bn3).clamp(min=0)
    expected = torch.cat([made, x / 9], dim=1)  # the other eight of 3x3 pixels are padding
    torch.testing.assert_close(on_one_pixel(block, x), expected)


def after_relu(width):
    x = torch.randn(2, width, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.clamp(min=0)


@pytest.mark.parametrize(
    ("ours", "torchvisions", "width"),
    [
        (lambda: BottleneckBlock(8, 8, 1), lambda: resnet.Bottleneck(8, 2), 8),
        (
            lambda: BottleneckBlock(8, 16, 2),
            lambda: resnet.Bottleneck(8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))),
            8,
        ),
        (lambda: ShuffleUnitV2(8, 8, 1), lambda: shufflenetv2.InvertedResidual(8, 8, 1), 8),
        (lambda: ShuffleUnitV2(8, 12, 2), lambda: shufflenetv2.InvertedResidual(8, 12, 2), 8),
        (lambda: InvertedResidual(8, 8, 1, expansion=6), lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6), 8),
        (lambda: InvertedResidual(8, 12, 2, expansion=6), lambda: mobilenetv2.InvertedResidual(8, 12, 2, 6), 8),
        (lambda: vgg_stage(3, 12, 2, pooled=True), lambda: vgg.make_layers(["M", 12, 12], batch_norm=True), 3),
    ],
    ids=["bottleneck", "bottleneck /2", "v2 unit", "v2 unit /2", "inverted", "inverted /2", "vgg"],
)
def test_blocks_compute_what_torchvisions_do_with_the_same_weights(ours, torchvisions, width):
    ours, torchvisions = seeded(ours), seeded(torchvisions)
    for part in torchvisions.modules():
        if isinstance(part, nn.ReLU6):
            part.max_val = float("inf")  # the one difference, on purpose
    torchvisions.load_state_dict(dict(zip(torchvisions.state_dict(), ours.state_dict().values(), strict=True)))
    x = after_relu(width)
    torch.testing.assert_close(ours(x), torchvisions(x))


def test_a_vgg_stage_pools_first_and_rounds_up():
    stage = seeded(vgg_stage, 1, 2, 1, pooled=True)
    x = torch.arange(9, dtype=torch.float64).reshape(1, 1, 3, 3)
    largest = torch.tensor([[4.0, 5], [7, 8]], dtype=torch.float64)[None, None]
    torch.testing.assert_close(stage(x), stage[1:](largest))


# --------------------------------------------------------------------------------------------- features and training


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "mobilenet_v2_cifar"])
def test_an_activated_candidate_is_the_positive_part_of_the_one_before_activation(name):
    model = model_of(name)
    before, after = candidate_layers(model, before_activation=True), candidate_layers(model)
    with FeatureExtractor(model, [*before, *after]) as extract, torch.no_grad():
        _, features = extract(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
    for raw, activated in zip(before, after, strict=True):
        assert features[raw].min() < 0
        assert torch.equal(features[activated], features[raw].clamp(min=0))


def test_a_linear_bottleneck_has_one_value_before_and_after_and_it_is_not_activated():
    model = model_of("mobilenet_v2_cifar")
    layers = candidate_layers(model)
    assert candidate_layers(model, before_activation=True) == layers
    with FeatureExtractor(model, layers) as extract, torch.no_grad():
        _, features = extract(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
    assert all(feature.min() < 0 for feature in features.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_works_in_place_so_that_anything_may_be_hooked(name):
    outputs = []

    def note(module, inputs, output):
        outputs.append((output, output._version))  # torch counts how often a tensor is written to

    with nn.modules.module.register_module_forward_hook(note):
        blueprint(name)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert outputs and all(output._version == version for output, version in outputs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_channels_last_images_give_channels_last_features_and_the_same_logits(name):
    model, images = model_of(name), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    plain = model(images).detach()
    model.to(memory_format=torch.channels_last)
    try:
        with FeatureExtractor(model, candidate_layers(model)) as extract, torch.no_grad():
            logits, features = extract(images.to(memory_format=torch.channels_last))
    finally:
        model.to(memory_format=torch.contiguous_format)
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features.values())
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vgg8_cifar", "mobilenet_v2_cifar", "shufflenet_v1_cifar", "shufflenet_v2_cifar"])
def test_every_weight_learns(name):
    torch.manual_seed(0)
    model = build_model(name, 3).train()
    nn.functional.cross_entropy(model(torch.randn(6, 3, 16, 16)), torch.tensor([0, 1, 2] * 2)).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        if parameter.ndim > 1:  # a VGG's biases are canceled by batch norm
            assert parameter.grad.abs().max() > 0, path


def test_convolutions_start_with_the_spread_of_he_et_al_by_the_weights_that_read_one_value():
    mobile, shuffle, plain = (model_of(f"{name}_cifar") for name in ("mobilenet_v2", "shufflenet_v1", "vgg8"))
    for conv, readers in (
        (plain.stage5[0], 512 * 9),
        (mobile.stage6[1].conv1, 480),
        (mobile.stage7[0].conv2, 9),  # depthwise: one filter of 3x3
        (shuffle.stage3[1].conv3, 960 // 3),  # one group of three
    ):
        assert conv.weight.std().item() == pytest.approx((2 / readers) ** 0.5, rel=0.05)

"""Features are what the layers returned, whatever comes after them; a teacher stays what it was."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlock, LayerNorm2d
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops import Permute

from pursuhint_lib.features import FeatureExtractor, FrozenTeacher, layer_table
from pursuhint_lib.models import build_model, candidate_layers, state_hash
from pursuhint_lib.profiling import profile_layers


class Reversed(nn.Module):
    """Declared in the reverse of execution order. After `norm` comes an in-place ReLU, if asked for."""

    def __init__(self, inplace=True):
        super().__init__()
        self.unused = nn.Identity()
        self.fc = nn.Linear(3, 2)
        self.relu = nn.ReLU(inplace=inplace)
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(1, 3, 3)

    def forward(self, images):
        x = self.relu(self.norm(self.conv(images)))
        return self.fc(x.mean((2, 3)))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return Reversed(**options), torch.randn(4, 1, 6, 6)


def tiny_in_eval():
    """A model in eval mode, images, and what `norm` makes of them before the in-place ReLU."""
    model, images = tiny()
    model.eval()
    return model, images, model.norm(model.conv(images)).detach()


each_grad_mode = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


def n_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_logits_equal_the_plain_forward_and_no_hook_is_left():
    model, images = tiny()
    model.eval()
    plain = model(images)
    with FeatureExtractor(model, ["fc", "conv"]) as extract:
        assert n_hooks(model) == 2
        logits, features = extract(images)
    assert torch.equal(logits, plain)
    assert torch.equal(features["fc"], plain)
    assert torch.equal(features["conv"], model.conv(images))
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError, match="closed"):
        extract(images)


def test_hooks_go_also_when_the_block_fails_and_are_deaf_between_calls():
    model, images = tiny()
    extract = FeatureExtractor(model, ["norm"])
    model(images), model(images)  # would be "more than once" if the hook listened
    extract(images)
    with pytest.raises(RuntimeError), extract:
        model(torch.randn(4, 2, 6, 6))
    assert n_hooks(model) == 0


def test_features_come_in_execution_order_whatever_the_order_asked_for():
    model, images = tiny()
    with FeatureExtractor(model, ["fc", "relu", "norm", "conv"]) as extract:
        assert list(extract(images)[1]) == ["conv", "norm", "relu", "fc"]
        assert list(extract(images, ["relu", "conv"])[1]) == ["conv", "relu"]


@each_grad_mode
def test_a_feature_is_before_the_in_place_relu_that_follows_in_every_call(mode):
    model, images, reference = tiny_in_eval()
    with mode(), FeatureExtractor(model, ["norm", "relu"]) as extract:
        for _ in range(3):
            _, features = extract(images)
            torch.testing.assert_close(features["norm"], reference)
            torch.testing.assert_close(features["relu"], reference.clamp(min=0))


def test_only_overwritten_layers_are_copied_after_the_first_call():
    model, images = tiny()
    returned = {}
    for name in ("conv", "norm"):
        getattr(model, name).register_forward_hook(lambda m, i, output, name=name: returned.update({name: output}))
    with FeatureExtractor(model, ["conv", "norm"]) as extract:
        for _ in range(2):
            _, features = extract(images)
            assert features["conv"] is returned["conv"]
            assert features["norm"] is not returned["norm"]
        assert extract._overwritten == {"conv": False, "norm": True}


def test_a_layer_overwritten_only_later_is_never_handed_out_wrong():
    model, images = tiny(inplace=False)
    with FeatureExtractor(model, ["norm"]) as extract:
        extract(images)
        model.relu.inplace = True
        with pytest.raises(RuntimeError, match="norm: overwritten"):
            extract(images)
        _, features = extract(images)  # from now on it is copied
        assert features["norm"].min() < 0


def test_gradients_through_a_copied_feature_equal_those_without_in_place_operations():
    gradients = []
    for inplace in (True, False):
        model, images = tiny(inplace=inplace)
        with FeatureExtractor(model.train(), ["norm"]) as extract:
            for _ in range(2):
                model.zero_grad()
                logits, features = extract(images)
                (features["norm"].pow(2).mean() * 3 + logits.pow(2).mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])


@each_grad_mode
def test_what_is_kept_of_a_feature_is_taken_before_anything_overwrites_it(mode):
    model, images, reference = tiny_in_eval()
    with mode(), FeatureExtractor(model, ["norm", "relu"]) as extract:
        mean = lambda map: map.mean((2, 3))  # noqa: E731
        for reduce in (mean, None, mean, lambda map: map[:, 1:], lambda map: map, None):
            logits, features = extract(images, reduce=reduce)
            expected = {"norm": reference, "relu": reference.clamp(min=0)}
            for layer, feature in expected.items():
                torch.testing.assert_close(features[layer], reduce(feature) if reduce else feature)
            torch.testing.assert_close(logits, model.fc(expected["relu"].mean((2, 3))))
        with pytest.raises(RuntimeError, match=r"norm: returns shape \(\) for 4 images"):
            extract(images, reduce=torch.mean)
        assert extract(images)[1]["norm"].ndim == 4, "a failed call leaves nothing behind"


def test_maps_are_let_go_where_only_a_part_is_kept():
    alive = []

    def first_pixel(map):
        alive.append(weakref.ref(map))
        return map[:, :, 0, 0].clone()

    def count(*_):
        if alive:
            counts.append(sum(map() is not None for map in alive))

    counts, model = [], nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(6)])
    for layer in model:
        layer.register_forward_pre_hook(count)
    teacher = FrozenTeacher(model, ["0", "1", "2", "3", "4"])
    features = teacher.observe(torch.randn(2, 2, 3, 3), reduce=first_pixel).features
    assert [feature.shape for feature in features.values()] == [(2, 2)] * 5
    assert max(counts) <= 1, "no more than the input of the next layer"


def test_gradients_flow_through_what_is_kept():
    model, images = tiny()
    with FeatureExtractor(model.train(), ["norm"]) as extract:
        extract(images, reduce=lambda map: map.mean((2, 3)))[1]["norm"].pow(2).sum().backward()
    reduced = model.norm.bias.grad.clone()
    model.zero_grad()
    model.norm(model.conv(images)).mean((2, 3)).pow(2).sum().backward()
    torch.testing.assert_close(reduced, model.norm.bias.grad)


def test_errors_name_the_layer():
    model, images = tiny()
    with pytest.raises(ValueError, match="'nrom'.*norm") as error:
        FeatureExtractor(model, ["nrom"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="'conv' is named twice"):
        FeatureExtractor(model, ["conv", "conv"])
    with pytest.raises(ValueError, match=r"write \['conv'\]"):
        FeatureExtractor(model, "conv")
    assert n_hooks(model) == 0
    with FeatureExtractor(model, ["conv", "unused"]) as extract:
        with pytest.raises(RuntimeError, match="unused: never called"):
            extract(images)
        with pytest.raises(ValueError, match="'norm'.*conv"):
            extract(images, ["norm"])
        assert list(extract(images, ["conv"])[1]) == ["conv"]


def test_a_layer_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(2, 2)

        def forward(self, x):
            return self.shared(self.shared(x))

    with FeatureExtractor(Twice(), ["shared"]) as extract:
        for _ in range(2):  # and a failed call leaves nothing behind
            with pytest.raises(RuntimeError, match="shared: called more than once"):
                extract(torch.zeros(1, 2))


def test_a_layer_without_one_tensor_is_refused_but_not_a_model():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.both = nn.Linear(2, 2), Both()

        def forward(self, x):
            return {"logits": self.both(self.body(x))["twice"]}

    class Both(nn.Module):
        def forward(self, x):
            return {"once": x, "twice": x + x}

    with (
        FeatureExtractor(nn.Sequential(Constant((4, 4))), ["0"]) as extract,
        pytest.raises(TypeError, match="0: returns tuple, but a feature is one tensor"),
    ):
        extract(torch.zeros(1, 3, 2))
    model, images = Dictionary(), torch.ones(3, 2)
    with FeatureExtractor(model, ["body", "both"]) as extract:
        with pytest.raises(TypeError, match="both: returns dict, but a feature is one tensor"):
            extract(images)
        output, features = extract(images, ["body"])
    assert torch.equal(output["logits"], 2 * features["body"])


class Constant(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.returned = returned

    def forward(self, x):
        return self.returned


@pytest.mark.parametrize("kind", [tuple, list])
def test_of_a_layer_that_returns_several_things_the_first_tensor_is_the_feature(kind):
    size, a, b = (2, 2), torch.randn(3, 5), torch.randn(3, 7)
    with FeatureExtractor(nn.Sequential(Constant(kind([size, a, b]))), ["0"]) as extract:
        output, features = extract(torch.zeros(3, 1))
    assert features["0"] is a and output[2] is b


def test_a_feature_without_a_row_per_image_is_refused():
    def transformer(batch_first):
        return nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4, batch_first=batch_first), nn.Linear(4, 2))

    images = torch.zeros(3, 5, 4)  # three images of five tokens
    with FeatureExtractor(transformer(batch_first=True), ["0"]) as extract:
        assert extract(images)[1]["0"].shape == (3, 5, 4)
    tokens_first = nn.Sequential(Permute([1, 0, 2]), transformer(batch_first=False), Permute([1, 0, 2]))
    with FeatureExtractor(tokens_first, ["1.0"]) as extract:
        with pytest.raises(RuntimeError, match=r"1.0: returns shape \(5, 3, 4\) for 3 images") as error:
            extract(images)
        assert "\n" not in str(error.value)
        with pytest.raises(RuntimeError, match=r"1.0: returns as many tokens as images .* another batch size") as error:
            extract(torch.zeros(5, 5, 4))
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="2.0: returns shape"):
        layer_table(nn.Sequential(nn.Flatten(2), *tokens_first), ["2.0"], (5, 2, 2))


@each_grad_mode
def test_layers_that_hand_on_their_input_or_a_view_of_it_keep_what_they_returned(mode):
    torch.manual_seed(0)
    layers = [nn.Identity(), nn.Conv2d(1, 3, 3), nn.Identity(), nn.Dropout(), nn.Flatten(2), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers).eval()
    model[4].channel_axis = model[5].channel_axis = 1
    images = torch.randn(4, 1, 6, 6)
    expected = model[1](images).detach()
    with mode(), FeatureExtractor(model, ["0", "1", "2", "3", "4", "5"]) as extract:
        for _ in range(3):
            _, features = extract(images)
            assert list(features) == ["0", "1", "2", "3", "4", "5"]
            assert torch.equal(features["0"], images)
            for layer in ("1", "2", "3"):
                assert torch.equal(features[layer], expected)
            assert torch.equal(features["4"], expected.flatten(2)[:, :, None])
            assert torch.equal(features["5"], expected.flatten(2)[:, :, None].clamp(min=0))


def test_one_module_under_two_names_answers_to_both():
    model = nn.ModuleDict({"first": nn.Linear(2, 2)})
    model["second"] = model["first"]
    model.forward = lambda x: model["second"](x)
    with FeatureExtractor(model, ["second", "first"]) as extract:
        output, features = extract(torch.ones(3, 2))
    assert torch.equal(features["first"], output) and torch.equal(features["second"], output)
    assert layer_table(nn.Sequential(model["first"], nn.ReLU()), ["0", "1"], (1, 3, 2))["depth"].tolist() == [1, 2]
    chain = nn.Sequential(model["first"], model["second"])
    with FeatureExtractor(chain, ["0"]) as extract, pytest.raises(RuntimeError, match="0: called more than once"):
        extract(torch.ones(3, 2))


def test_any_list_by_hand_works_at_any_depth_of_nesting():
    torch.manual_seed(0)
    model, images = build_model("resnet18", 2).eval(), torch.randn(2, 3, 32, 32)
    by_hand = ["fc", "layer1", "layer1.0.bn2", "conv1", "layer1.0", "layer2.0.downsample.1", "maxpool"]
    with torch.no_grad(), FeatureExtractor(model, by_hand) as extract:
        logits, features = extract(images)
        stem = model.maxpool(model.relu(model.bn1(model.conv1(images))))
        expected = {"conv1": model.conv1(images), "maxpool": stem}
        expected["layer1.0.bn2"] = model.layer1[0].bn2(model.layer1[0].conv2(model.layer1[0].bn1(
            model.layer1[0].conv1(stem)).relu()))  # fmt: skip
        expected["layer1.0"], expected["layer1"] = model.layer1[0](stem), model.layer1(stem)
        expected["layer2.0.downsample.1"] = model.layer2[0].downsample(model.layer1(stem))
        expected["fc"] = model(images)
    assert list(features) == list(expected), "a layer that holds another returns after it"
    for layer, feature in expected.items():
        torch.testing.assert_close(features[layer], feature, rtol=1e-4, atol=1e-5)
    with FeatureExtractor(nn.Sequential(nn.ModuleList([model.fc]), nn.Identity()), ["0"]) as extract:
        with pytest.raises(NotImplementedError):  # the model's own error
            extract(images)
        assert torch.equal(extract.model[1](images), images)


def test_a_model_half_in_train_mode_learns_what_it_would_learn_without_hooks():
    torch.manual_seed(0)
    models = [build_model("resnet8_w4", 3, channels=1).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images, start = torch.randn(4, 1, 8, 8), state_hash(models[0])
    for model in models:
        model.stage2.eval()
    with FeatureExtractor(models[0], ["stage1.0", "stage2.0"]) as extract:
        logits, _ = extract(images)
    assert torch.equal(logits, models[1](images))
    assert state_hash(models[0]) == state_hash(models[1]) != start
    assert models[0].stage1.training and not models[0].stage2.training


# ------------------------------------------------------------------------------------------- where the channels are


def swin(block, downsample):
    """8 channels on a map of (H / 4) x (W / 4), then 16 channels on half of that."""
    torch.manual_seed(0)
    sizes = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": [4, 4]}
    return SwinTransformer(**sizes, num_classes=2, block=block, downsample_layer=downsample).eval()


SWINS = {"v1": (SwinTransformerBlock, PatchMerging), "v2": (SwinTransformerBlockV2, PatchMergingV2)}


@pytest.mark.parametrize("version", SWINS)
# For 32 and 64 pixels there are as many rows, or columns, as channels somewhere.
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32), (64, 64), (96, 96)])
def test_maps_of_a_swin_come_channels_first_also_where_channels_equal_rows(version, size):
    model = swin(*SWINS[version])
    layers = ["features.1.0", "features.1.1", "features.1", "features.2", "features.3.0"]
    returned = {}
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: returned.update({layer: output})
        )
    height, width = size[0] // 4, size[1] // 4
    with torch.no_grad(), FeatureExtractor(model, layers) as extract:
        _, features = extract(torch.randn(2, 3, *size))
    for layer in layers:
        channels, shrink = (8, 1) if layer.startswith("features.1") else (16, 2)
        assert returned[layer].shape == (2, height // shrink, width // shrink, channels), "as torchvision works"
        assert torch.equal(features[layer], returned[layer].permute(0, 3, 1, 2))


class SqueezeExcite(nn.Module):
    """Linear layers, as wide as the channels, on maps with channels first."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x):
        return x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


@pytest.mark.parametrize(
    "layer",
    [
        CNBlock(8, layer_scale=1e-6, stochastic_depth_prob=0.0),
        LayerNorm2d(8),
        SqueezeExcite(8, squeezed=4),
        nn.Sequential(nn.Conv2d(8, 8, 1), SqueezeExcite(8, squeezed=16)),
        nn.Conv2d(8, 8, 1),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("width", [4, 8, 16])  # 8: as many columns as channels; 4 and 16: as other layers are wide
def test_maps_with_channels_first_stay_as_they_are(layer, width):
    torch.manual_seed(0)
    images = torch.randn(2, 8, 5, width)
    for maps in (images, images.transpose(2, 3).contiguous(), images.to(memory_format=torch.channels_last)):
        with FeatureExtractor(nn.Sequential(layer), ["0"]) as extract:
            output, features = extract(maps)
        assert torch.equal(features["0"], output) and features["0"].shape == output.shape


class Concatenated(nn.ModuleList):
    def forward(self, x):
        return torch.cat([part(x) for part in self], dim=1)


def convolutions(length):
    """Signals (B, 3, `length`) through convolutions, with channels as many as positions, or as outputs, somewhere."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 1),
        nn.ReLU(),
        Concatenated([nn.Conv1d(8, 8, 1), nn.Conv1d(8, 4, 1)]),
        nn.Conv1d(12, 16, 1),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, length),
    )


@pytest.mark.parametrize("length", [50, 16, 12, 8])
def test_signals_come_as_maps_of_one_row_with_the_channels_of_their_convolutions(length):
    torch.manual_seed(0)
    model, signals = convolutions(length), torch.randn(5, 3, length)
    layers = ["0", "1", "2", "3", "4"]
    _, features = FeatureExtractor(model, layers)(signals)
    for layer in layers:
        signals = model[int(layer)](signals)
        assert torch.equal(features[layer][:, :, 0], signals), layer
    table = layer_table(model, layers, (3, length))
    assert table[["channels", "height"]].values.tolist() == [[width, 1] for width in (8, 8, 12, 16, 16)]
    assert profile_layers(FrozenTeacher(model, layers), [torch.randn(9, 3, length)]).widths == [8, 8, 12, 16, 16]


class Mixer(nn.Module):
    """Two layers on tokens, one of which mixes tokens: both axes are as wide as a Linear layer."""

    def __init__(self, tokens, width):
        super().__init__()
        self.norm, self.across, self.along = nn.LayerNorm(width), nn.Linear(tokens, tokens), nn.Linear(width, width)
        self.act = nn.GELU()

    def forward(self, x):
        x = x + self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.act(self.along(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 10, batch_first=True),
        lambda: nn.Sequential(nn.Dropout(), nn.TransformerEncoderLayer(8, 2, 10, batch_first=True), nn.Dropout()),
        lambda: Mixer(6, 8),
        lambda: nn.Sequential(nn.RMSNorm(8), nn.SiLU()),
    ],
)
def test_tokens_stay_as_they_are_in_a_layer_and_in_its_parts_without_weights(build):
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Identity()).eval()
    tokens = torch.randn(3, 6, 8)
    plain = [name for name, part in model.named_modules() if isinstance(part, (nn.Dropout, nn.GELU, nn.SiLU))]
    output, features = FeatureExtractor(model, ["0", "1", *plain])(tokens)
    assert {feature.shape[:2] for feature in features.values()} == {(3, 6)}
    assert torch.equal(features["0"], output) and torch.equal(features["1"], output)


def test_a_part_without_weights_has_its_channels_where_the_layers_around_it_have_theirs():
    model = swin(*SWINS["v1"])
    with torch.no_grad(), FeatureExtractor(model, ["features.0.0", "features.0.1", "features.1.0.mlp.1"]) as extract:
        _, features = extract(torch.randn(2, 3, 64, 32))
    shapes = [tuple(feature.shape) for feature in features.values()]
    assert shapes == [(2, 8, 16, 8), (2, 8, 16, 8), (2, 32, 16, 8)], "also of a permutation and a GELU"


class Recurrent(nn.Module):
    """Signals (B, 3, L) through a convolution, and on as (B, L, 6) and (B, L, 10)."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop = nn.Conv1d(3, 6, 1), nn.Dropout()
        self.rnn = nn.GRU(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.drop(self.rnn(self.conv(x).transpose(1, 2))[0])


@pytest.mark.parametrize("length", [50, 6, 3])  # 6 and 3: as many positions as channels of the convolution
def test_what_a_recurrent_layer_returns_has_its_channels_last(length):
    model, signals = Recurrent().eval(), torch.randn(4, 3, length)
    _, features = FeatureExtractor(model, ["conv", "rnn"])(signals)
    assert features["conv"].shape == (4, 6, 1, length) and features["rnn"].shape == (4, length, 10)
    if length == 50:
        assert FeatureExtractor(model, ["drop"])(signals)[1]["drop"].shape == (4, 50, 10)
    else:
        with pytest.raises(ValueError, match="drop: .*which axis holds the channels is not known"):
            FeatureExtractor(model, ["drop"])(signals)


def test_a_linear_layer_over_the_positions_of_a_signal_is_not_taken_for_one_over_channels():
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Linear(20, 20))
    with pytest.raises(ValueError, match="1: .*which axis holds the channels is not known"):
        FeatureExtractor(model, ["1"])(torch.randn(4, 3, 20))


def test_where_nobody_tells_which_axis_holds_the_channels_the_user_is_asked():
    model, signals = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)), torch.randn(3, 6, 8)
    for said in (None, 2):
        if said:
            model.channel_axis = said
        with pytest.raises(ValueError, match=r"0: returns shape \(1, 6, 8\).*set channel_axis = 1 or -1") as error:
            layer_table(model, ["0"], (6, 8))
        assert "\n" not in str(error.value)
    for said, shape in ((1, (3, 6, 1, 8)), (-1, (3, 6, 8))):
        model.channel_axis = said
        assert FrozenTeacher(model, ["0"]).observe(signals).features["0"].shape == shape
    model[0].channel_axis = 1  # the layer's own word counts before the model's
    assert FeatureExtractor(model, ["0"])(signals)[1]["0"].shape == (3, 6, 1, 8)


# --------------------------------------------------------------------------------------------- compiled and scripted


class Compiler:
    """A backend for torch.compile that changes nothing, and counts what it is given to compile and what it runs."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, graph, examples):
        self.compiled += 1

        def run(*inputs):
            self.ran += 1
            return graph.forward(*inputs)

        return run


@pytest.mark.parametrize("how", ["returned", "in place", "a part"])
def test_a_compiled_model_gives_the_features_of_the_plain_one_and_stays_compiled(how):
    plain, images = tiny()
    plain.eval()
    with FeatureExtractor(plain, ["norm", "conv"]) as extract:
        logits, expected = extract(images)

    compiler, model, prefix = Compiler(), copy.deepcopy(plain), ""
    if how == "returned":
        model, prefix = torch.compile(model, backend=compiler, fullgraph=True), "_orig_mod."
    elif how == "in place":
        model.compile(backend=compiler, fullgraph=True)
    else:
        model.norm = torch.compile(model.norm, backend=compiler)
    model(images)  # before there are any hooks
    layers, before = [f"{prefix}norm", f"{prefix}conv"], compiler.compiled
    assert before >= 1
    teacher = FrozenTeacher(model, layers)
    with FeatureExtractor(model, layers) as extract:
        for _ in range(2):
            output, features = extract(images)
            assert list(features) == layers[::-1] == list(teacher.observe(images).features)
            for layer in ("norm", "conv"):
                torch.testing.assert_close(features[prefix + layer], expected[layer])
                torch.testing.assert_close(teacher.observe(images).features[prefix + layer], expected[layer])
            torch.testing.assert_close(output, logits)
    assert layer_table(model, layers, (1, 6, 6))["layer"].tolist() == layers[::-1]
    assert compiler.compiled == before, "nothing was compiled for the extraction"
    ran = compiler.ran
    model(images)
    assert compiler.ran > ran, "and it runs compiled again"


def look_at_table(model, layers):
    return layer_table(model, layers, (1, 6, 6))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_torch_jit_made_is_refused_where_no_hook_can_look():
    model, images = tiny()
    for scripted in (torch.jit.script(model), torch.jit.trace(model, images)):
        for look in (FeatureExtractor, FrozenTeacher, look_at_table):
            with pytest.raises(TypeError, match="cannot be looked into: pass a torch.nn.Module") as error:
                look(scripted, ["conv"])
            assert "\n" not in str(error.value)
    part = nn.Sequential(torch.jit.script(model), nn.Linear(2, 2))
    for layer in ("0", "0.conv"):
        with pytest.raises(ValueError, match=f"{layer}: lies in a torch.jit.ScriptModule"):
            FeatureExtractor(part, [layer])
    teacher = FrozenTeacher(part, ["1"])  # the rest is as good as any
    assert torch.equal(teacher.observe(images).logits, part.eval()(images))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_other_things_than_modules_and_lazy_modules_are_refused():
    with pytest.raises(TypeError, match="function cannot be looked into"):
        FeatureExtractor(lambda images: images, [])
    for look in (FeatureExtractor, FrozenTeacher, look_at_table):
        with pytest.raises(ValueError, match="Sequential: 0.weight is lazy and has no value yet"):
            look(nn.Sequential(nn.LazyLinear(3)), ["0"])


def test_copying_a_hooked_model_leaves_the_extractor_alone():
    model, images = tiny()
    with FeatureExtractor(model, ["conv"]) as extract:
        twin = copy.deepcopy(model)
        twin(images)
        assert torch.equal(extract(images)[1]["conv"], model.conv(images))


# ------------------------------------------------------------------------------------------------------------- teacher


def test_a_teacher_does_not_change_while_it_is_observed():
    torch.manual_seed(0)
    model = build_model("resnet8_w4", 3, channels=1).train()
    before = state_hash(model)
    teacher = FrozenTeacher(model, candidate_layers(model))
    holder = nn.ModuleList([teacher, nn.Linear(1, 1)])
    first = teacher.observe(torch.ones(2, 1, 8, 8)).logits
    for _ in range(20):
        holder.train()
        teacher.train()
        teacher.model.train()  # even so
        observation = teacher.observe(torch.randn(4, 1, 8, 8))
        assert not any(module.training for module in teacher.model.modules())
    assert state_hash(teacher.model) == before
    assert torch.equal(teacher.observe(torch.ones(2, 1, 8, 8)).logits, first)
    assert list(observation.features) == teacher.layers == candidate_layers(model)
    assert not teacher.training and holder[1].training


def test_a_teacher_shows_no_parameters_and_takes_no_gradient():
    torch.manual_seed(0)
    model = build_model("resnet8_w4", 3)
    teacher = FrozenTeacher(model, ["stage1.0"])
    holder = nn.ModuleList([teacher])
    assert list(teacher.parameters()) == list(holder.parameters()) == []
    assert teacher.state_dict() == holder.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    observation = teacher.observe(torch.randn(2, 3, 8, 8, requires_grad=True))
    assert not observation.logits.requires_grad and not observation.features["stage1.0"].requires_grad
    student = torch.zeros(2, 4, 8, 8, requires_grad=True)
    (student * observation.features["stage1.0"]).sum().backward()  # inference tensors could not be saved for this
    assert torch.equal(student.grad, observation.features["stage1.0"])


def test_training_the_callers_model_does_not_reach_the_teacher():
    torch.manual_seed(0)
    model = build_model("resnet8_w4", 3)
    teacher = FrozenTeacher(model, [])
    before = state_hash(teacher.model)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert state_hash(model) != before == state_hash(teacher.model)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused_in_one_line():
    model = nn.utils.weight_norm(nn.Linear(2, 2))  # keeps a weight that is a result, not a leaf
    with pytest.raises(ValueError, match="Linear cannot be copied, so it cannot be frozen .*weight_norm") as error:
        FrozenTeacher(model, [])
    assert "\n" not in str(error.value)


def test_a_teacher_observes_a_part_of_its_layers_and_follows_its_holder():
    teacher = FrozenTeacher(build_model("wrn_16_1", 3), ["stage2.0", "stage3.1"])
    nn.ModuleList([teacher]).to(torch.float64)
    observation = teacher.observe(torch.randn(2, 3, 8, 8, dtype=torch.float64), ["stage3.1"])
    assert list(observation.features) == ["stage3.1"]
    assert observation.logits.dtype == torch.float64
    assert teacher.observe(torch.zeros(1, 3, 8, 8, dtype=torch.float64), []).features == {}
    assert list(copy.deepcopy(teacher).observe(torch.zeros(1, 3, 8, 8).double()).features) == teacher.layers
    with pytest.raises(AttributeError):
        observation.logits = None


# --------------------------------------------------------------------------------------------------------------- table


def test_the_layer_table_counts_depth_and_stages():
    model = build_model("resnet14", 10)
    table = layer_table(model, candidate_layers(model)[::-1], (3, 32, 32))
    assert list(table.columns) == ["layer", "stage", "depth", "channels", "height", "width", "stage_end"]
    assert table["layer"].tolist() == candidate_layers(model)
    assert table["depth"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["stage"].tolist() == [1, 1, 2, 2, 3, 3]
    assert table["stage_end"].tolist() == [False, True] * 3
    assert table[["channels", "height", "width"]].values.tolist() == (
        [[16, 32, 32]] * 2 + [[32, 16, 16]] * 2 + [[64, 8, 8]] * 2
    )


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2"])
def test_stages_are_the_same_before_and_after_activation(name):
    model = build_model(name, 10)
    after = layer_table(model, candidate_layers(model), (3, 16, 16))
    before = layer_table(model, candidate_layers(model, before_activation=True), (3, 16, 16))
    assert after.drop(columns="layer").equals(before.drop(columns="layer"))


def test_the_dry_run_changes_no_buffer_and_restores_every_mode():
    model, _ = tiny()
    model.train()
    model.norm.eval()
    before, modes = state_hash(model), [module.training for module in model.modules()]
    layer_table(model, ["conv"], (1, 6, 6))
    with pytest.raises(RuntimeError, match="unused"):
        layer_table(model, ["unused"], (1, 6, 6))
    random_state = torch.get_rng_state()
    layer_table(nn.Sequential(model, nn.Dropout()), ["0.conv"], (1, 6, 6))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert state_hash(model) == before
    assert [module.training for module in model.modules()] == modes
    assert n_hooks(model) == 0


def test_the_blank_image_has_the_type_of_the_weights():
    model = nn.Sequential(nn.Embedding(2, 2), nn.Conv2d(1, 2, 1).double())
    model[0] = nn.ParameterList([nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)])
    model.forward = lambda images: model[1](images)
    assert layer_table(model, ["1"], (1, 3, 4))[["channels", "height", "width"]].values.tolist() == [[2, 3, 4]]


def test_tokens_and_vectors_count_as_maps_of_one_row_and_one_pixel():
    five_d = nn.Unflatten(1, (7, 1, 1, 1))
    model = nn.Sequential(nn.Flatten(2), nn.Linear(16, 5), nn.Flatten(), nn.Linear(15, 7), five_d)
    table = layer_table(model, ["1", "3"], (3, 4, 4))
    assert table[["channels", "height", "width"]].values.tolist() == [[5, 1, 3], [7, 1, 1]]
    assert table["stage"].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"4: returns shape \(1, 7, 1, 1, 1\)"):
        layer_table(model, ["4"], (3, 4, 4))
    assert len(layer_table(model, [], (3, 4, 4))) == 0


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("resnet18", 64, (64, 16, 16), (512, 2, 2)),
        ("mobilenet_v3_small", 64, (16, 16, 16), (96, 2, 2)),
        ("vit_b_16", 224, (768, 1, 197), (768, 1, 197)),
        ("swin_t", 64, (96, 16, 16), (768, 2, 2)),  # works on (B, H, W, C); features come channels first
        ("convnext_tiny", 64, (96, 16, 16), (768, 2, 2)),
    ],
)
def test_torchvision_networks_give_features_at_their_candidates(name, size, first, last):
    torch.manual_seed(0)
    model = build_model(name, 3).eval()
    layers = candidate_layers(model)
    table = layer_table(model, layers, (3, size, size))
    assert table["layer"].tolist() == layers
    shapes = [tuple(row) for row in table[["channels", "height", "width"]].values.tolist()]
    assert (shapes[0], shapes[-1]) == (first, last)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(FrozenTeacher(model, layers).observe(images).logits, model(images))

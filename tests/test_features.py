"""Features are what the layers returned, whatever comes after them; a teacher stays what it was."""

import copy

import pytest
import torch
from torch import nn

from pursuhint_lib.features import FeatureExtractor, FrozenTeacher, layer_table
from pursuhint_lib.models import build_model, candidate_layers, state_hash


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


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_feature_is_before_the_in_place_relu_that_follows_in_every_call(mode):
    model, images = tiny()
    model.eval()
    reference = model.norm(model.conv(images)).detach()
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


def test_a_layer_without_one_tensor_is_refused():
    with (
        FeatureExtractor(nn.Sequential(nn.LSTM(2, 2)), ["0"]) as extract,
        pytest.raises(TypeError, match="0: returns tuple"),
    ):
        extract(torch.zeros(1, 3, 2))


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
    assert state_hash(model) == before
    assert [module.training for module in model.modules()] == modes
    assert n_hooks(model) == 0


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

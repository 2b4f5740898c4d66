import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pursuhint_lib import arithmetic
from pursuhint_lib.arithmetic import WrongArithmetic, check_arithmetic, gradient_errors, laid_out, suited_format
from pursuhint_lib.data import Batch, Batches, ImageSet
from pursuhint_lib.learners import Supervised, seeded
from pursuhint_lib.models import MODELS, build_model
from pursuhint_lib.training import Schedule, fit, torch_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_every_network_has_the_gradients_of_float64_with_one_thread_and_with_two(name):
    with torch_threads(1):
        check_arithmetic(build_model(name, 10), (3, 32, 32), 4, CPU)


@pytest.mark.parametrize("name", ["resnet8_w4", "resnet8", "wrn_16_1", "vgg8_cifar", "shufflenet_v2_cifar"])
def test_the_contiguous_format_has_the_gradients_of_float64_too(name):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    errors = gradient_errors(build_model(name, 10), images)
    assert len(errors) > 5 and max(errors.values()) < 1e-4


@pytest.mark.parametrize(
    ("layer", "faulty"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(15, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),  # a whole block
        (nn.Conv2d(1, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(8, 8, 1, stride=2, groups=2), False),
    ],
)
def test_a_network_is_contiguous_on_a_cpu_where_channels_last_has_a_faulty_kernel(layer, faulty):
    model = nn.Sequential(nn.Sequential(layer), nn.ReLU())
    assert suited_format(model, CPU) == (torch.contiguous_format if faulty else torch.channels_last)
    assert suited_format(model, torch.device("cuda")) == torch.channels_last
    images = torch.randn(2, layer.in_channels, 4, 6).to(memory_format=torch.channels_last)
    assert laid_out(images, model).is_contiguous() == (faulty or layer.in_channels == 1)


def test_a_student_of_four_channels_learns_from_channels_last_images_what_float64_says():
    with seeded(0):
        network = build_model("resnet8_w4", 4, channels=1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    labels = torch.arange(64) % 4
    exact = Supervised(build_model("resnet8_w4", 4, channels=1)).double()
    exact.model.load_state_dict(network.state_dict())
    exact.losses(Batch(images.double(), labels, labels), None)["loss"].backward()
    with torch_threads(2):
        learner = Supervised(network).to(memory_format=suited_format(network, CPU))
        last = images.expand(-1, 1, -1, -1).contiguous(memory_format=torch.channels_last)
        learner.losses(Batch(last, labels, labels), None)["loss"].backward()
    for (name, true), parameter in zip(exact.named_parameters(), learner.parameters(), strict=True):
        assert float((parameter.grad - true.grad).norm() / true.grad.norm()) < 1e-4, name


TRAINING = """
import torch
from pursuhint_lib.data import Batches, channel_stats, load_images
from pursuhint_lib.learners import Supervised, seeded
from pursuhint_lib.models import build_model
from pursuhint_lib.training import Schedule, fit

torch.set_num_threads(1)
train = load_images("digits")["train"]
mean, std = channel_stats(train)
with seeded(0):
    network = build_model("resnet8_w4", 10, channels=1)
batches = Batches(train, 64, mean=mean, std=std, shuffle=True)
fit({"unaided": Supervised(network)}, batches, Schedule("fast", 2, 0.1))
print("trained")
"""


def test_the_smallest_student_trains_without_damage_to_the_heap():
    # As on a CPU without AVX-512, where the fault was. The C library looks after its heap, so no damage is luck.
    environment = os.environ | {"MALLOC_CHECK_": "3", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr


class Permuted(nn.Module):
    """Makes a channels-last map by itself, as networks with a LayerNorm of channels do."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.shortcut = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Conv2d(4, 8, 1, stride=2)

    def forward(self, images):
        maps = self.norm(self.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.shortcut(maps).mean((2, 3))


def test_a_network_that_makes_channels_last_maps_by_itself_is_right_too_and_left_as_it_was():
    network = Permuted()
    check_arithmetic(network, (3, 16, 16), 16, CPU)
    images = ImageSet(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), torch.arange(32) % 8, list("abcdefgh"))
    seen = []
    watch = network.shortcut.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].is_contiguous()))
    fit({"a": Supervised(network)}, Batches(images, 16, mean=[0.5] * 3, std=[0.3] * 3), Schedule("fast", 1, 0.01))
    watch.remove()
    assert len(seen) >= 2 and all(seen[-2:]) and not network.shortcut._forward_pre_hooks


def test_one_thread_does_not_hide_what_several_show(monkeypatch):
    # With one thread the faulty kernel gives right numbers, and damages the heap.
    used = []
    monkeypatch.setattr(arithmetic, "gradient_errors", lambda *_: used.append(torch.get_num_threads()) or {})
    with torch_threads(1):
        check_arithmetic(build_model("resnet8_w4", 10), (3, 8, 8), 8, CPU)
        assert used == [2, 1] and torch.get_num_threads() == 1


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wrong = 1.001 if x.dtype == torch.float32 else 1.0
        return gradient @ weight, wrong * gradient.T @ x


class Faulty(nn.Linear):
    def forward(self, x):
        return _Planted.apply(x, self.weight)


def test_a_faulty_layer_is_named_with_what_computes_and_what_to_set():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6, bias=False), nn.ReLU(), Faulty(6, 2, bias=False))
    for _ in range(2):  # and is found again when it is looked for again
        with pytest.raises(
            WrongArithmetic, match=r"^this machine computes 3 \(Faulty.*1\.0e-03 .*ONEDNN_MAX_CPU_ISA"
        ) as said:
            check_arithmetic(model, (3, 2, 2), 8, CPU)
    assert arithmetic.cpu_capability() in str(said.value) and "\n" not in str(said.value)


def test_the_check_leaves_the_network_and_the_random_numbers_as_they_were():
    model = build_model("resnet8_w4", 10).eval()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    gradient_errors(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert not model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not layer._forward_hooks for layer in model.modules())


def test_in_bfloat16_rounding_is_allowed_and_more_is_not():
    check_arithmetic(build_model("resnet8", 10), (3, 8, 8), 16, CPU, torch.bfloat16)


def test_a_limit_on_instructions_is_part_of_what_computes(monkeypatch):
    plain = torch.backends.cpu.get_cpu_capability()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert arithmetic.cpu_capability() == plain
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert arithmetic.cpu_capability() == f"{plain} (oneDNN: AVX2)"


def test_the_command_says_what_it_found(capsys):
    assert arithmetic.main(["resnet8_w4"]) == 0
    assert "1 networks" in capsys.readouterr().out

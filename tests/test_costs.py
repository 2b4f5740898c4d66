"""Costs against hand-counted sizes; of times only that they are there and in order."""

import pytest
import torch
from torch import nn

from pursuhint_lib.arms import Distillation, study_arms
from pursuhint_lib.costs import LONGEST_PASS, adapter_table, cost_table, measure_speed, speed_table
from pursuhint_lib.features import FrozenTeacher, layer_table
from pursuhint_lib.hints import HintPoints
from pursuhint_lib.methods import METHODS
from pursuhint_lib.models import build_model, candidate_layers
from pursuhint_lib.params import DistillStudents
from pursuhint_lib.study import fresh_network, study_images

CPU, F32 = torch.device("cpu"), torch.float32
PARAMS = DistillStudents(study="toy", teacher="resnet8_w8", student="resnet8_w4", balance="none", threads=1)
POINTS = {
    "first": HintPoints("first", ["stage1.0", "stage2.0", "stage3.0"]),
    "twin": HintPoints("twin", ["stage1.0", "stage2.0", "stage3.0"]),
    "random_step": HintPoints("random_step", ["stage1.0", "stage2.0", "stage3.0"], redrawn=2),
}


def test_sizes_of_published_networks():
    table = cost_table(
        {"teacher": ("resnet56", build_model("resnet56", 100)), "student": ("resnet20", build_model("resnet20", 100))},
        (3, 32, 32),
    )
    assert list(table.columns) == ["role", "network", "parameters", "macs"]
    assert table.values[1].tolist()[:3] == ["student", "resnet20", 278_324]
    assert round(table["macs"][1] / 1e6, 2) == 40.82 and table["macs"][0] > 3 * table["macs"][1]


@pytest.fixture(scope="module")
def distillation():
    images = study_images(PARAMS)
    teacher, student = (fresh_network(name, images, 5) for name in (PARAMS.teacher, PARAMS.student))
    tables = [layer_table(net, candidate_layers(net), images.shape) for net in (teacher, student)]
    return Distillation(PARAMS, images, FrozenTeacher(teacher, list(tables[0]["layer"])), *tables, CPU, F32)


def adapters_of(distillation, methods, points):
    tables = distillation.teacher_table, distillation.student_table
    arms = study_arms(points, methods, *tables)
    student = fresh_network(PARAMS.student, distillation.images, 0)
    table = adapter_table(arms, student, *tables, distillation.images.train.labels)
    assert not any(module._forward_hooks for module in student.modules())
    return arms, table.set_index("arm")


def test_adapters_by_hand(distillation):
    _, table = adapters_of(distillation, ["at", "fitnet", "crd@last"], POINTS)
    assert table.loc["kd"].tolist() == table.loc["at_first"].tolist() == [0, 0]
    # FitNet per pair: a 1x1 convolution from C to 2 C channels and a batch norm's scale and shift of each; in buffers
    # mean and variance, 4 bytes each, and a count of 8 bytes.
    widths = list(distillation.student_table.set_index("layer").loc[POINTS["first"].layers, "channels"])
    parameters, state = sum(2 * c * c + 2 * 2 * c for c in widths), sum(8 * 2 * c + 8 for c in widths)
    assert table.loc["fitnet_first"].tolist() == table.loc["fitnet_twin"].tolist() == [parameters, state]
    assert table.loc["fitnet_random_step", "adapter_parameters"] > parameters  # every pair that can be drawn
    # CRD: two linear maps to 128 numbers; two banks of 128 numbers per image, and three whole numbers per image, two
    # normalizations, a seed and a step.
    width, images = widths[-1], len(distillation.images.train)
    assert table.loc["crd@last", "adapter_parameters"] == (width + 1) * 128 + (2 * width + 1) * 128
    assert table.loc["crd@last", "state_bytes"] == images * (2 * 128 * 4 + 3 * 8) + 2 * 4 + 8 + 8


def test_adapters_are_those_that_arms_train_with_whatever_the_method(distillation):
    arms, table = adapters_of(distillation, list(METHODS), {"first": POINTS["first"]})
    assert len(table) == len(METHODS) + 1
    for arm in arms:
        # without a look at the images: that is where weights are balanced, which adds nothing
        learner = distillation.learner(arm, 0)
        counted = sum(p.numel() for p in learner.adapters.parameters())
        assert table.loc[arm.name, "adapter_parameters"] == counted, arm.name
        assert table.loc[arm.name, "state_bytes"] == sum(b.nbytes for b in learner.adapters.buffers()), arm.name
        learner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_there_and_in_order_and_the_network_is_left_alone(dtype, capfd):
    network = build_model("resnet8_w4", 10, channels=1).train()
    found = measure_speed(network, (1, 8, 8), 4, CPU, dtype, seconds=0.01)
    assert 0 < found["latency_low"] <= found["latency_ms"] <= found["latency_high"]
    assert found["images_per_second"] == pytest.approx(4 / (found["latency_ms"] / 1000))
    assert (found["batch"], found["threads"]) == (4, torch.get_num_threads())
    assert found["precision"] == str(dtype)[6:] and found["device"]
    assert network.training and next(network.parameters()).is_contiguous()
    assert not capfd.readouterr().err


def test_networks_are_measured_in_eval_mode_with_the_dtype_and_format_of_a_study():
    class Witness(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            assert not self.training and torch.is_inference_mode_enabled()
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert self.convolution.weight.is_contiguous(memory_format=torch.channels_last)
            answer = self.convolution(images)
            assert answer.dtype == torch.bfloat16
            return answer.mean((2, 3))

    assert measure_speed(Witness(), (3, 8, 8), 2, CPU, torch.bfloat16, seconds=0.01)["batch"] == 2


class Chain(nn.Module):
    """(B, 1, 1, 16) -> 1000 -> 10 numbers each."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 1000, bias=False), nn.Linear(1000, 10, bias=False)

    def forward(self, images):
        wide = self.wide(images.flatten(1))
        wide = wide.relu()
        return self.narrow(wide)


def test_peak_memory_by_hand():
    one = measure_speed(nn.Sequential(nn.Flatten(), nn.Linear(16, 1000)), (1, 1, 16), 8, CPU, F32, seconds=0.01)
    assert one["peak_memory_bytes"] == 8 * 1000 * 4  # the output; no weights, no images
    chain = measure_speed(Chain(), (1, 1, 16), 8, CPU, F32, seconds=0.01)
    assert chain["peak_memory_bytes"] == 2 * 8 * 1000 * 4  # before and after the ReLU; what is let go is not counted


def test_memory_grows_with_the_batch_and_is_equal_in_every_run():
    network = build_model("resnet8_w4", 10, channels=1)
    first, again, twice = (
        measure_speed(network, (1, 8, 8), batch, CPU, F32, seconds=0.01)["peak_memory_bytes"] for batch in (4, 4, 8)
    )
    assert first == again and twice == pytest.approx(2 * first, rel=0.01)


def test_both_networks_are_measured_on_one_image_and_on_the_same_batch():
    networks = {role: build_model("resnet8_w4", 10, channels=1) for role in ("teacher", "student")}
    table = speed_table(networks, (1, 8, 8), CPU, F32)
    assert list(table["role"]) == ["teacher", "teacher", "student", "student"]
    assert list(table["batch"]) == [1, table["batch"][1]] * 2
    expected = ["role", "batch", "latency_ms", "latency_low", "latency_high", "images_per_second", "peak_memory_bytes"]
    assert list(table.columns) == [*expected, "device", "threads", "precision"]


@pytest.mark.parametrize("slowest, batches", [(0.0001, [1, 64]), (LONGEST_PASS / 20, [1, 16]), (3.0, [1])])
def test_the_batch_is_smaller_where_the_slowest_network_is_slow(monkeypatch, slowest, batches):
    def measured(model, image_shape, batch, device, dtype):
        return {"batch": batch, "latency_ms": 1000 * slowest if model == "slow" else 0.01}

    monkeypatch.setattr("pursuhint_lib.costs.measure_speed", measured)
    table = speed_table({"teacher": "slow", "student": "fast"}, (1, 8, 8), CPU, F32)
    assert table.groupby("role", sort=False)["batch"].agg(list).tolist() == [batches, batches]

"""CIFAR ShuffleNets: cheap 1x1 convolutions on part of the channels, which a shuffle mixes, for small images.

Version 1: Zhang et al. 2018 (arXiv 1707.01083), table 1 with 3 groups. Version 2: Ma et al. 2018 (arXiv 1807.11164),
table 5 at width 1x. Both in the form of the distillation benchmarks: the stem is a 1x1 convolution without pooling, so
that 32x32 images give maps of 32, 16, 8 and 4; version 1 has a ReLU after its depthwise convolutions, which the paper
leaves out. Weights start as the ResNets' do (`he_init`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pursuhint_lib.models.resnet_cifar import he_init, residual_stage

STEM = 24  # channels of the first convolution
BLOCKS = (4, 8, 4)  # units in each stage


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels out like cards: the first of every group, then the second of every group, and so on.

    x: (B, groups * C, H, W). Returns the same shape, where channel i * groups + g is x's channel g * C + i. The result
    is stored channels last, as in training, however x is stored: so one copy is enough.
    """
    last = x.permute(0, 2, 3, 1)  # (B, H, W, groups * C)
    shuffled = last.unflatten(3, (groups, -1)).transpose(3, 4).flatten(3)
    return shuffled.permute(0, 3, 1, 2)


class ShuffleUnitV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    With stride 1 the input is added; with stride 2 the input, averaged over 3x3, is appended, and the convolutions make
    only the channels it lacks. The first 1x1 convolution after the stem is not grouped. `joined` is the unit's output
    before its last ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, groups: int) -> None:
        super().__init__()
        made = out_channels if stride == 1 else out_channels - in_channels
        self.groups = 1 if in_channels == STEM else groups
        self.conv1 = nn.Conv2d(in_channels, made // 4, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(made // 4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(made // 4, made // 4, 3, stride, padding=1, groups=made // 4, bias=False)
        self.bn2 = nn.BatchNorm2d(made // 4)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(made // 4, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = nn.Identity() if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.joined = nn.Identity()  # a place to hook the value before the last ReLU
        self.relu3 = nn.ReLU()
        self.adds = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(self.relu1(self.bn1(self.conv1(x))), self.groups)
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = self.shortcut(x)
        return self.relu3(self.joined(out + shortcut if self.adds else torch.cat([out, shortcut], dim=1)))


class ShuffleUnitV2(nn.Module):
    """Two branches side by side, then a shuffle: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    With stride 1 the first half of the channels passes as it is, and the second half goes through a 1x1, a 3x3
    depthwise and a 1x1 convolution. With stride 2 all channels go through these, and on the other side through a 3x3
    depthwise and a 1x1 convolution.

    The paper ends each branch with a ReLU before joining them. Here one ReLU follows the shuffle, which is the same:
    what passes with stride 1 comes out of a ReLU already. So `joined` is the unit's output before its last ReLU.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        entering = half if stride == 1 else in_channels
        self.splits = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, half, 1, bias=False),
                nn.BatchNorm2d(half),
            )
        self.conv1 = nn.Conv2d(entering, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, stride, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.joined = nn.Identity()  # a place to hook the value before the last ReLU
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        passing, entering = x.chunk(2, dim=1) if self.splits else (x, x)
        out = self.relu1(self.bn1(self.conv1(entering)))
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        joined = torch.cat([self.shortcut(passing), out], dim=1)
        return self.relu2(self.joined(channel_shuffle(joined, 2)))


class CifarShuffleNet(nn.Module):
    """Stem, three stages of shuffle units, an optional last 1x1 convolution, global pooling, linear classifier.

    unit: f(in_channels, out_channels, stride). widths: channels of the three stages. last: channels of the last
    convolution, 0 for none (version 1).
    Images (B, channels, H, W) -> logits (B, classes).
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        unit: Callable[[int, int, int], nn.Module],
        widths: tuple[int, int, int],
        last: int,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.stage1 = residual_stage(unit, STEM, first, BLOCKS[0], stride=2)
        self.stage2 = residual_stage(unit, first, second, BLOCKS[1], stride=2)
        self.stage3 = residual_stage(unit, second, third, BLOCKS[2], stride=2)
        self.last = nn.Sequential()
        if last:
            self.last = nn.Sequential(nn.Conv2d(third, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last or third, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.last(self.stage3(self.stage2(self.stage1(x))))
        return self.fc(self.pool(x).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The output of every unit, in execution order: after its last ReLU, or before it.

        Before it, channels that a unit passes on as they came are not negative either: they came out of a ReLU.
        """
        units = [f"stage{s}.{b}" for s, blocks in enumerate(BLOCKS, start=1) for b in range(blocks)]
        return [f"{unit}.joined" for unit in units] if before_activation else units


SHUFFLENETS: dict[str, Callable[[int, int], CifarShuffleNet]] = {
    "shufflenet_v1_cifar": partial(
        CifarShuffleNet, unit=partial(ShuffleUnitV1, groups=3), widths=(240, 480, 960), last=0
    ),
    "shufflenet_v2_cifar": partial(CifarShuffleNet, unit=ShuffleUnitV2, widths=(116, 232, 464), last=1024),
}

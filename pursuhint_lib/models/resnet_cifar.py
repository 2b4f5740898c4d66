"""CIFAR ResNets: post-activation residual networks for small images.

He et al. 2016 (arXiv 1512.03385), section 4.2, with the projection shortcut (1x1 convolution and batch norm, their
option B) wherever a block changes the shape. Depth 6n + 2 means three stages of n blocks; the channels double and the
maps halve from stage to stage. The pooling is adaptive, so any image size works: 32x32 gives maps of 32, 16 and 8.

resnet50_cifar is the paper's ResNet-50 for large images (table 1) behind the small stem, without the first pooling:
four stages of bottleneck blocks, with maps of 32, 16, 8 and 4. A block's stride is that of its 3x3 convolution.
"""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    The block's output is after its last ReLU; `sum` is the same value before it. No ReLU works in place, so both may be
    hooked without copying.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection_shortcut(in_channels, out_channels, stride)
        self.sum = nn.Identity()  # a place to hook the value before the last ReLU
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(self.sum(out + self.shortcut(x)))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolution beside a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    The first two make a quarter of the output's channels. As in BasicBlock, the output is after the last ReLU, and
    `sum` is the same value before it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        narrow = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(narrow, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection_shortcut(in_channels, out_channels, stride)
        self.sum = nn.Identity()  # a place to hook the value before the last ReLU
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(self.sum(out + self.shortcut(x)))


class CifarResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling, linear classifier.

    block: f(in_channels, out_channels, stride). blocks: their number in each stage. stem: channels of the first
    convolution. widths: channels of each stage's output.
    Images (B, channels, H, W) -> logits (B, classes).
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        block: Callable[[int, int, int], nn.Module],
        blocks: tuple[int, ...],
        stem: int,
        widths: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.blocks = blocks
        in_channels = stem
        for number, (width, depth) in enumerate(zip(widths, blocks), start=1):
            stage = residual_stage(block, in_channels, width, depth, stride=1 if number == 1 else 2)
            self.add_module(f"stage{number}", stage)
            in_channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        for number in range(1, len(self.blocks) + 1):
            x = getattr(self, f"stage{number}")(x)
        return self.fc(self.pool(x).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The output of every residual block, in execution order: after its last ReLU, or the sum before it."""
        blocks = [f"stage{s}.{b}" for s, depth in enumerate(self.blocks, start=1) for b in range(depth)]
        return [f"{block}.sum" for block in blocks] if before_activation else blocks


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """1x1 convolution and batch norm where the shape changes; elsewhere the input itself."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def residual_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, blocks: int, *, stride: int
) -> nn.Sequential:
    """`blocks` blocks in a row; the first one changes the channels and has the stride."""
    rest = [block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def he_init(model: nn.Module) -> None:
    """Draw all convolutions from He et al. 2015 (arXiv 1502.01852, eq. 14), by fan-out; the rest is torch's default.

    The fan-out is the number of weights that read one input value: in a grouped convolution those of its group only.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2.0) / math.sqrt(fan_out))


def _resnet(depth: int, *widths: int) -> Callable[[int, int], CifarResNet]:
    stem, *stages = widths
    return partial(CifarResNet, block=BasicBlock, blocks=((depth - 2) // 6,) * 3, stem=stem, widths=tuple(stages))


RESNETS: dict[str, Callable[[int, int], CifarResNet]] = {
    # He et al. 2016 (32x32 images)
    "resnet8": _resnet(8, 16, 16, 32, 64),
    "resnet14": _resnet(14, 16, 16, 32, 64),
    "resnet20": _resnet(20, 16, 16, 32, 64),
    "resnet32": _resnet(32, 16, 16, 32, 64),
    "resnet44": _resnet(44, 16, 16, 32, 64),
    "resnet56": _resnet(56, 16, 16, 32, 64),
    "resnet110": _resnet(110, 16, 16, 32, 64),
    # Four times as wide, with a stem of 32: the pair of the distillation benchmarks
    "resnet8x4": _resnet(8, 32, 64, 128, 256),
    "resnet32x4": _resnet(32, 32, 64, 128, 256),
    # Bottleneck blocks: the large teacher of the distillation benchmarks
    "resnet50_cifar": partial(
        CifarResNet, block=BottleneckBlock, blocks=(3, 4, 6, 3), stem=64, widths=(256, 512, 1024, 2048)
    ),
    # Narrow ones for tiny images (8x8 digits) and for tests
    "resnet8_w4": _resnet(8, 4, 4, 8, 16),
    "resnet14_w4": _resnet(14, 4, 4, 8, 16),
    "resnet20_w4": _resnet(20, 4, 4, 8, 16),
    "resnet32_w4": _resnet(32, 4, 4, 8, 16),
    "resnet56_w4": _resnet(56, 4, 4, 8, 16),
    "resnet8_w8": _resnet(8, 8, 8, 16, 32),
    "resnet14_w8": _resnet(14, 8, 8, 16, 32),
    "resnet20_w8": _resnet(20, 8, 8, 16, 32),
    "resnet32_w8": _resnet(32, 8, 8, 16, 32),
    "resnet56_w8": _resnet(56, 8, 8, 16, 32),
}

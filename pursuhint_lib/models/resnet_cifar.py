"""CIFAR ResNets: post-activation residual networks for small images.

He et al. 2016 (arXiv 1512.03385), section 4.2, with the projection shortcut (1x1 convolution and batch norm, their
option B) wherever a block changes the shape. Depth 6n + 2 means three stages of n blocks; the channels double and the
maps halve from stage to stage. The pooling is adaptive, so any image size works: 32x32 gives maps of 32, 16 and 8.
"""

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
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.sum = nn.Identity()  # a place to hook the value before the last ReLU
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(self.sum(out + self.shortcut(x)))


class CifarResNet(nn.Module):
    """Stem, three stages of `blocks` residual blocks, global average pooling, linear classifier.

    widths: channels of the stem and of the three stages.
    Images (B, channels, H, W) -> logits (B, classes).
    """

    def __init__(self, classes: int, channels: int, *, blocks: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.stage1 = residual_stage(BasicBlock, stem, first, blocks, stride=1)
        self.stage2 = residual_stage(BasicBlock, first, second, blocks, stride=2)
        self.stage3 = residual_stage(BasicBlock, second, third, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The output of every residual block, in execution order: after its last ReLU, or the sum before it."""
        blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(len(getattr(self, f"stage{s}")))]
        return [f"{block}.sum" for block in blocks] if before_activation else blocks


def residual_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, blocks: int, *, stride: int
) -> nn.Sequential:
    """`blocks` blocks in a row; the first one changes the channels and has the stride."""
    rest = [block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def he_init(model: nn.Module) -> None:
    """Draw all convolutions from He et al. 2015 (arXiv 1502.01852, eq. 14), by fan-out; the rest is torch's default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(depth: int, *widths: int) -> Callable[[int, int], CifarResNet]:
    return partial(CifarResNet, blocks=(depth - 2) // 6, widths=widths)


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

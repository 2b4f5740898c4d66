"""CIFAR MobileNetV2: inverted residuals with linear bottlenecks, at half the paper's width, for small images.

Sandler et al. 2018 (arXiv 1801.04381), table 2, with expansion 6 and width multiplier 0.5, in the form of the
distillation benchmarks. Other than in the paper: the second stage keeps its resolution, so that 32x32 images give maps
of 16, 16, 16, 8, 4, 4, 2 and 2; ReLU instead of ReLU6; the first block has its 1x1 convolution although its expansion
is 1. As in the paper, the last convolution has 1280 channels whatever the width. Weights start as the ResNets' do
(`he_init`).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pursuhint_lib.models.resnet_cifar import he_init, residual_stage

STEM, LAST = 16, 1280  # channels of the first and of the last convolution; the stem's are 32 * 0.5
STAGES = (  # expansion, channels (the paper's, times 0.5), blocks, stride of the first block
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    A 1x1 convolution to `expansion` times the channels, a 3x3 depthwise one, and a 1x1 one without an activation after
    it. The input is added where the shape stays the same; elsewhere there is no shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.keeps_shape = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + x if self.keeps_shape else out


class CifarMobileNetV2(nn.Module):
    """Stem of stride 2, seven stages of inverted residuals, a last 1x1 convolution, global pooling, linear classifier.

    Images (B, channels, H, W) -> logits (B, classes).
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, STEM, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu1 = nn.ReLU()
        width = STEM
        for number, (expansion, next_width, blocks, stride) in enumerate(STAGES, start=1):
            block = partial(InvertedResidual, expansion=expansion)
            self.add_module(f"stage{number}", residual_stage(block, width, next_width, blocks, stride=stride))
            width = next_width
        self.conv2 = nn.Conv2d(width, LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(LAST, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        x = self.stage7(self.stage6(self.stage5(self.stage4(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(self.pool(x).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The output of every inverted residual, in execution order, whatever `before_activation` is.

        A linear bottleneck ends without an activation, and the next block activates a wider, expanded map. So its
        output is both: the block's last value, and a value before any activation, which may be negative.
        """
        return [f"stage{s}.{b}" for s, (_, _, blocks, _) in enumerate(STAGES, start=1) for b in range(blocks)]


MOBILENETS: dict[str, Callable[[int, int], CifarMobileNetV2]] = {"mobilenet_v2_cifar": CifarMobileNetV2}

"""Wide ResNets: pre-activation residual networks for small images.

Zagoruyko & Komodakis 2016 (arXiv 1605.07146), table 1, without dropout. wrn_<depth>_<k> has depth 6n + 4: three stages
of n blocks with 16k, 32k and 64k channels after a stem of 16. The pooling is adaptive, so any image size works.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pursuhint_lib.models.resnet_cifar import he_init, residual_stage


class PreActivationBlock(nn.Module):
    """BN, ReLU, convolution, twice, beside a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    The block's output is a bare sum; its activation is the first BN + ReLU (`relu1`) of the block that follows. Where
    the shape changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(self.relu2(self.bn2(out)))
        shortcut = x if self.projection is None else self.projection(activated)
        return out + shortcut


class WideResNet(nn.Module):
    """Stem, three stages of `blocks` residual blocks, BN + ReLU, global average pooling, linear classifier.

    widths: channels of the stem and of the three stages.
    Images (B, channels, H, W) -> logits (B, classes).
    """

    def __init__(self, classes: int, channels: int, *, blocks: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.stage1 = residual_stage(PreActivationBlock, stem, first, blocks, stride=1)
        self.stage2 = residual_stage(PreActivationBlock, first, second, blocks, stride=2)
        self.stage3 = residual_stage(PreActivationBlock, second, third, blocks, stride=2)
        self.bn = nn.BatchNorm2d(third)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(third, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The output of every residual block, in execution order, activated or as it is.

        The activation of a block's output is the first BN + ReLU of the next block (of the network, after the last
        block). So activated candidate i has the name of block i + 1, and its shape is the shape of block i's output.
        """
        blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in range(len(getattr(self, f"stage{s}")))]
        return blocks if before_activation else [*(f"{block}.relu1" for block in blocks[1:]), "relu"]


def _wide_resnet(depth: int, k: int) -> Callable[[int, int], WideResNet]:
    return partial(WideResNet, blocks=(depth - 4) // 6, widths=(16, 16 * k, 32 * k, 64 * k))


WIDE_RESNETS: dict[str, Callable[[int, int], WideResNet]] = {
    "wrn_16_1": _wide_resnet(16, 1),
    "wrn_16_2": _wide_resnet(16, 2),
    "wrn_40_1": _wide_resnet(40, 1),
    "wrn_40_2": _wide_resnet(40, 2),
}

"""CIFAR VGGs: plain chains of 3x3 convolutions with batch norm, for small images.

Simonyan & Zisserman 2015 (arXiv 1409.1556), table 1, columns A, B, D and E, in the form of the distillation benchmarks:
batch norm after every convolution, a pooling before stages 2, 3 and 4 only, and one linear layer on the globally
averaged maps instead of three: 32x32 images give maps of 32, 16, 8, 4 and 4. A name counts the paper's three linear
layers, so vgg13_cifar has ten convolutions, two in each stage, and vgg8_cifar, which is not in the paper, has five.

The convolutions have biases, as in the paper and in the published numbers of parameters, though batch norm cancels
them. Weights start as the ResNets' do (`he_init`).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from pursuhint_lib.models.resnet_cifar import he_init

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five stages
POOLED = (False, True, True, True, False)  # whether a stage begins with a pooling


class CifarVGG(nn.Module):
    """Five stages of convolutions, global average pooling, linear classifier.

    convolutions: their number in each stage.
    Images (B, channels, H, W) -> logits (B, classes). The poolings round up, so that no map is too small for them.
    """

    def __init__(self, classes: int, channels: int, *, convolutions: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        for number, (width, depth, pooled) in enumerate(zip(WIDTHS, convolutions, POOLED), start=1):
            self.add_module(f"stage{number}", vgg_stage(channels, width, depth, pooled=pooled))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)
        he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(images)))
        x = self.stage5(self.stage4(x))
        return self.fc(self.pool(x).flatten(1))

    def candidate_layers(self, before_activation: bool) -> list[str]:
        """The outputs of stages 2 to 5: after their last ReLU, or its input, the batch norm before it.

        Stage 1 ends at full resolution, where the residual networks have their stem, which is no candidate either.
        Stages 4 and 5 have outputs of one shape, so `layer_table` counts them as one stage of two layers.
        """
        ends = {f"stage{number}": len(getattr(self, f"stage{number}")) for number in (2, 3, 4, 5)}
        return [f"{stage}.{length - 2}" for stage, length in ends.items()] if before_activation else list(ends)


def vgg_stage(in_channels: int, out_channels: int, convolutions: int, *, pooled: bool) -> nn.Sequential:
    """3x3 convolutions, each with batch norm and ReLU, at half the resolution if `pooled`: ceil(H / 2), ceil(W / 2)."""
    layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if pooled else []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()]
        in_channels = out_channels
    return nn.Sequential(*layers)


def _vgg(*convolutions: int) -> Callable[[int, int], CifarVGG]:
    return partial(CifarVGG, convolutions=convolutions)


VGGS: dict[str, Callable[[int, int], CifarVGG]] = {
    "vgg8_cifar": _vgg(1, 1, 1, 1, 1),
    "vgg11_cifar": _vgg(1, 1, 2, 2, 2),
    "vgg13_cifar": _vgg(2, 2, 2, 2, 2),
    "vgg16_cifar": _vgg(2, 2, 3, 3, 3),
    "vgg19_cifar": _vgg(2, 2, 4, 4, 4),
}

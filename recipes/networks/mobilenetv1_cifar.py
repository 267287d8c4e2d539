"""MobileNetV1 for CIFAR, with a stem of 32 channels ("MobileNetV1-32"), at any width.

MobileNetV1 (arXiv:1704.04861) whose first three strides are 1, so that its maps of a 32-pixel image are 32, 16 and 8
pixels. Source: the document on MobileNets with learned group convolution, CIFAR-100.
"""

from __future__ import annotations

from torch import Tensor, nn

from .cifar_layers import conv3x3, norm, set_initial_values

STEM_CHANNELS = 32
UNITS = (  # output channels and stride
    (64, 1), (128, 1), (128, 1), (256, 1), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetV1Cifar(nn.Module):
    """(N, 3, H, W) -> logits (N, num_classes); H and W multiples of 4.

    Args:
        num_classes: logits.
        width: every width of the network is round(width * channels), the stem's included.
    """

    def __init__(self, num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels = round(width * STEM_CHANNELS)
        layers: list[nn.Module] = [conv3x3(3, channels)]
        for wide, stride in UNITS:
            out = round(width * wide)
            layers.append(_unit(channels, out, stride))
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        set_initial_values(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def _unit(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A depthwise convolution and a 1x1 one, each with norm and ReLU6."""
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(
        *conv3x3(in_channels, in_channels, stride, groups=in_channels),
        *(pointwise, norm(out_channels), nn.ReLU6(inplace=True)),
    )

"""MobileNetV1 for ImageNet: the network that MobileNet_123 gives in full and calls `Net`.

Source: the document itself (marvis/pytorch-mobilenet); keys of the state dict are those of its code.
"""

from __future__ import annotations

from torch import Tensor, nn

STEM_CHANNELS = 32
UNITS = (  # output channels and stride
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip


class MobileNetV1(nn.Module):
    """(N, 3, 224, 224) -> logits (N, num_classes).

    Args:
        num_classes: logits.
        adaptive_pool: average the whole last map, whatever its size. The document's AvgPool2d(7) is equal at 224
            pixels and takes no other: a last map of 6x6, as the padding-free form has it, is too small for it.
    """

    def __init__(self, num_classes: int, adaptive_pool: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(3, STEM_CHANNELS, 2)]
        channels = STEM_CHANNELS
        for out, stride in UNITS:
            layers.append(_conv_dw(channels, out, stride))
            channels = out
        layers.append(nn.AdaptiveAvgPool2d(1) if adaptive_pool else nn.AvgPool2d(7))
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.fc(self.model(x).flatten(1))
        return logits


def _conv_bn(in_channels: int, out_channels: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _conv_dw(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(
        *_conv_bn(in_channels, in_channels, stride, groups=in_channels),
        *(pointwise, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)),
    )

"""MobileNetV3 as MobileNet_123 has it, which is not the one of torchvision or timm.

Its squeeze-and-excitation stands between norm and activation, without biases and with a quarter of the channels; the
first block expands by 1, too; widths are rounded up; both sizes have 1280 channels before the classifier. Keys of the
state dict are those of that implementation (kuan-wang/pytorch-mobilenet-v3), whose weights therefore fit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError

STEM_CHANNELS = 16  # at every width
HEAD_CHANNELS = 1280
DIVISOR = 8  # of widths

# kernel, expanded channels, output channels, squeeze-and-excitation, activation, stride; then those of the last conv
_ROWS = {
    "large": (
        (
            (3, 16, 16, False, "R", 1), (3, 64, 24, False, "R", 2), (3, 72, 24, False, "R", 1),
            (5, 72, 40, True, "R", 2), (5, 120, 40, True, "R", 1), (5, 120, 40, True, "R", 1),
            (3, 240, 80, False, "H", 2), (3, 200, 80, False, "H", 1), (3, 184, 80, False, "H", 1),
            (3, 184, 80, False, "H", 1), (3, 480, 112, True, "H", 1), (3, 672, 112, True, "H", 1),
            (5, 672, 160, True, "H", 2), (5, 960, 160, True, "H", 1), (5, 960, 160, True, "H", 1),
        ),
        960,
    ),
    "small": (
        (
            (3, 16, 16, True, "R", 2), (3, 72, 24, False, "R", 2), (3, 88, 24, False, "R", 1),
            (5, 96, 40, True, "H", 2), (5, 240, 40, True, "H", 1), (5, 240, 40, True, "H", 1),
            (5, 120, 48, True, "H", 1), (5, 144, 48, True, "H", 1), (5, 288, 96, True, "H", 2),
            (5, 576, 96, True, "H", 1), (5, 576, 96, True, "H", 1),
        ),
        576,
    ),
}  # fmt: skip


class HardSwish(nn.Module):
    """x relu6(x + 3) / 6."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * nn.functional.relu6(x + 3.0) / 6.0


class Gate(nn.Module):
    """Averages (N, C) -> scales (N, C) from 0 to 1: linear to a quarter, ReLU, linear, relu6(x + 3) / 6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = channels // 4
        self.add_module("0", nn.Linear(channels, squeezed, bias=False))  # numbers of that implementation's Sequential
        self.add_module("2", nn.Linear(squeezed, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Scales of averages."""
        squeeze, excite = self.children()
        return nn.functional.relu6(excite(nn.functional.relu(squeeze(x))) + 3.0) / 6.0


class SqueezeExcitation(nn.Module):
    """(N, C, H, W) with each channel scaled by what a gate makes of the channels' averages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels."""
        scale: Tensor = self.fc(x.mean((2, 3)))
        return x * scale[:, :, None, None]


class Bottleneck(nn.Module):
    """Expanding 1x1 convolution, depthwise one, squeeze-and-excitation, projecting 1x1 one; a shortcut where it fits.

    Args:
        in_channels: of the input.
        expanded: channels between the 1x1 convolutions.
        out_channels: of the output.
        kernel: side of the depthwise kernel.
        stride: of the depthwise convolution.
        excite: whether there is squeeze-and-excitation.
        hard_swish: whether the activation is that, or ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel: int,
        stride: int,
        excite: bool,
        hard_swish: bool,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        padding = (kernel - 1) // 2
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            _activation(hard_swish),
            nn.Conv2d(expanded, expanded, kernel, stride, padding, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            SqueezeExcitation(expanded) if excite else nn.Identity(),
            _activation(hard_swish),
            nn.Conv2d(expanded, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV3(nn.Module):
    """(N, 3, H, W) -> logits (N, num_classes).

    Args:
        num_classes: logits.
        size: "large" or "small".
        width: factor of all widths but the stem's; the head's grows, too, where it is over 1.
        dropout: before the classifier. The implementation's default is 0.8; the published training removed it.

    Raises:
        PadfreeError: there is no such size.
    """

    def __init__(
        self, num_classes: int, size: Literal["large", "small"] = "small", width: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if size not in _ROWS:
            raise PadfreeError(f"size is {size!r}; there are {', '.join(_ROWS)}")
        rows, last = _ROWS[size]
        channels = STEM_CHANNELS
        stem = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        layers: list[nn.Module] = [nn.Sequential(stem, nn.BatchNorm2d(channels), HardSwish())]
        for kernel, expanded, out, excite, activation, stride in rows:
            wide = _rounded_up(width * out)
            layers.append(
                Bottleneck(channels, _rounded_up(width * expanded), wide, kernel, stride, excite, activation == "H")
            )
            channels = wide
        last = _rounded_up(width * last)
        head = _rounded_up(width * HEAD_CHANNELS) if width > 1 else HEAD_CHANNELS
        layers += [
            nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), HardSwish()),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(last, head, 1),
            HardSwish(),
        ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))
        self._set_initial_values()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits

    @torch.no_grad()
    def _set_initial_values(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _activation(hard_swish: bool) -> nn.Module:
    return HardSwish() if hard_swish else nn.ReLU(inplace=True)


def _rounded_up(channels: float) -> int:
    return math.ceil(channels / DIVISOR) * DIVISOR

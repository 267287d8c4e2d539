"""MobileNetV2 for CIFAR, with dense, grouped or learned group convolutions as its 1x1 layers.

Unlike MobileNetV2 (arXiv:1801.04381) it halves an image twice only (maps of 32, 16 and 8 pixels), its units expand
also by 1, and units of stride 1 have a shortcut also where the channels change. Source: the document on MobileNets
with learned group convolution, CIFAR-100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.layers.learned_groups import LearnedGroupConv2d

from .cifar_layers import conv3x3, norm, set_initial_values

Kind = Literal["dense", "groups", "learned"]
ROWS = ((16, 1, 1), (24, 2, 1), (32, 3, 1), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class MobileNetV2Cifar(nn.Module):
    """(N, 3, H, W) -> logits (N, num_classes); H and W multiples of 4.

    Args:
        num_classes: logits.
        expansion: t; the first row expands by 1.
        stem_channels: 32, and 16 at the published t = 1.
        rows: (channels, units, stride of the first unit) by row; the last row's first unit has no shortcut.
        last_channels: of the 1x1 convolution before the pool.
        expand: kind of each unit's first 1x1 convolution.
        project: kind of each unit's last 1x1 convolution, "dense" or "learned".
        groups: of grouped and learned convolutions.
        condense_factor: of learned ones, each group of which keeps this part of its inputs.

    Raises:
        PadfreeError: there is no such kind, or channels cannot be divided so.
    """

    def __init__(
        self,
        num_classes: int,
        expansion: int = 6,
        stem_channels: int = 32,
        rows: Sequence[Sequence[int]] = ROWS,
        last_channels: int = 1280,
        expand: Kind = "dense",
        project: Kind = "dense",
        groups: int = 4,
        condense_factor: int = 4,
    ) -> None:
        super().__init__()

        def pointwise(kind: Kind, inputs: int, outputs: int) -> nn.Module:
            if kind == "learned":
                return LearnedGroupConv2d(inputs, outputs, groups=groups, condense_factor=condense_factor)
            if kind == "groups":
                return GroupConv1x1(inputs, outputs, groups)
            return nn.Conv2d(inputs, outputs, 1, bias=False)

        for name, kind, kinds in (
            ("expand", expand, ("dense", "groups", "learned")),
            ("project", project, ("dense", "learned")),
        ):
            if kind not in kinds:
                raise PadfreeError(f"{name} is {kind!r}; there are {', '.join(kinds)}")
        channels = stem_channels
        layers: list[nn.Module] = [conv3x3(3, channels)]
        for row, (out, units, first_stride) in enumerate(rows):
            for index in range(units):
                stride = first_stride if index == 0 else 1
                hidden = channels * (1 if row == 0 else expansion)
                bare = stride != 1 or (index == 0 and row == len(rows) - 1)
                layers.append(
                    InvertedResidual(
                        pointwise(expand, channels, hidden),
                        conv3x3(hidden, hidden, stride, groups=hidden),
                        pointwise(project, hidden, out),
                        None if bare else _shortcut(channels, out),
                        (hidden, out),
                    )
                )
                channels = out
        last = nn.Conv2d(channels, last_channels, 1, bias=False)
        layers += [nn.Sequential(last, norm(last_channels), nn.ReLU6(inplace=True))]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last_channels, num_classes)
        set_initial_values(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """1x1 convolution, norm, ReLU6; depthwise convolution, norm, ReLU6; 1x1 convolution, norm; and the shortcut.

    Args:
        expand: the first 1x1 convolution.
        depthwise: the second layer, with its norm and ReLU6.
        project: the last 1x1 convolution.
        shortcut: what is added to the result is this of the input; None adds nothing.
        channels: of the first and of the last convolution's output.
    """

    def __init__(
        self,
        expand: nn.Module,
        depthwise: nn.Module,
        project: nn.Module,
        shortcut: nn.Module | None,
        channels: tuple[int, int],
    ) -> None:
        super().__init__()
        self.expand = nn.Sequential(expand, norm(channels[0]), nn.ReLU6(inplace=True))
        self.depthwise = depthwise
        self.project = nn.Sequential(project, norm(channels[1]))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return out if self.shortcut is None else out + self.shortcut(x)


class GroupConv1x1(nn.Module):
    """A 1x1 group convolution and the shuffle behind it: output g C' / G + j is the convolution's j G + g.

    That is the inverse of ShuffleNet's shuffle. (N, C, H, W) -> (N, C', H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise PadfreeError(f"{in_channels} and {out_channels} channels cannot both be divided in {groups} groups")
        self.groups = groups
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and shuffle."""
        y: Tensor = self.conv(x)
        batch, channels, *sides = y.shape
        return y.reshape(batch, channels // self.groups, self.groups, *sides).transpose(1, 2).reshape(y.shape)


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    """The input itself, or where channels change a plain 1x1 convolution of it (no norm, no activation)."""
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, bias=False)

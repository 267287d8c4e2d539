"""ParC-MobileNetV2, the one base model of the paper that no package has.

MobileNetV2 whose later units replace the depthwise convolution by two position-aware circular
convolutions (ParC), one along the height and one along the width. Structure: the paper,
section "ParC-MobileNetV2".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError

POSITION_STD = 0.02


class Row(NamedTuple):
    """One row of the structure: `units` units of which the first `plain` are inverted residuals."""

    expansion: int
    channels: int
    units: int
    stride: int
    plain: int


ROWS = (
    Row(1, 16, 1, 1, 1),
    Row(6, 24, 2, 1, 2),
    Row(6, 32, 3, 2, 3),
    Row(6, 64, 4, 2, 2),
    Row(6, 96, 3, 1, 2),
    Row(6, 160, 3, 2, 2),
    Row(6, 320, 1, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


class ParC(nn.Module):
    """A circular depthwise convolution whose kernel spans the whole map along one axis.

    (N, C, H, W) -> (N, C, H, W), where H (axis "h") or W (axis "w") must be `side`.

    Args:
        channels: C.
        side: pixels of the map along the axis; the kernel is (side, 1) or (1, side).
        axis: "h" or "w".
        position: add a learnt embedding of shape (1, C, side, 1) or (1, C, 1, side) to the input.
    """

    position: nn.Parameter | None

    def __init__(self, channels: int, side: int, axis: Literal["h", "w"], position: bool) -> None:
        super().__init__()
        self.axis = axis
        self.dim = 2 if axis == "h" else 3
        self.conv = nn.Conv2d(channels, channels, self.span(side), groups=channels)
        if position:
            self.position = nn.Parameter(torch.randn(1, channels, *self.span(side)) * POSITION_STD)
        else:
            self.register_parameter("position", None)

    @property
    def side(self) -> int:
        """Pixels along the axis that this operator is made for."""
        return self.conv.kernel_size[self.dim - 2]

    def span(self, side: int) -> tuple[int, int]:
        """`side` along the axis, 1 across it."""
        return (side, 1) if self.axis == "h" else (1, side)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; the map is wrapped around by appending all of its lines but the last."""
        if self.position is not None:
            x = x + self.position
        lines = slice(self.side - 1)  # a slice, since converters to mobile runtimes know no `narrow`
        head = x[:, :, lines] if self.axis == "h" else x[:, :, :, lines]
        out: Tensor = self.conv(torch.cat([x, head], self.dim))  # 2 * side - 1 lines -> side lines
        return out

    def extra_repr(self) -> str:
        """What the printed module says of itself."""
        return f"side={self.side}, axis={self.axis!r}"


class ParCPair(nn.Module):
    """The first half of the channels along H, the second along W; (N, C, H, W) -> the same.

    Args:
        channels: C, even.
        side: pixels of the square map.
        position: whether both operators add a position embedding.

    Raises:
        PadfreeError: `channels` is odd.
    """

    def __init__(self, channels: int, side: int, position: bool) -> None:
        super().__init__()
        if channels % 2:
            raise PadfreeError(f"ParCPair halves its channels and got {channels}; give an even number")
        self.vertical = ParC(channels // 2, side, "h", position)
        self.horizontal = ParC(channels // 2, side, "w", position)

    def forward(self, x: Tensor) -> Tensor:
        """Run both operators and put the halves back together, height first."""
        top, bottom = x.chunk(2, dim=1)
        return torch.cat([self.vertical(top), self.horizontal(bottom)], 1)


class Unit(nn.Sequential):
    """Expand 1x1, mix spatially, project 1x1.

    (N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)).

    Args:
        channels_in: input channels.
        channels_out: output channels.
        expansion: expanded channels are `channels_in * expansion`; at 1 there is no expanding conv.
        mixer: the spatial operation on the expanded channels, with the unit's stride.
    """

    def __init__(self, channels_in: int, channels_out: int, expansion: int, mixer: nn.Module) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(channels_in, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)
            )
        self.mix = nn.Sequential(mixer, nn.BatchNorm2d(wide), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(nn.Conv2d(wide, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))


class ResidualUnit(Unit):
    """The same with a residual, where shape and stride allow: (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the unit and add its input."""
        out: Tensor = self.project(self.mix(self.expand(input)))
        return input + out


class ParCMobileNetV2(nn.Module):
    """MobileNetV2 with ParC operators; (N, 3, side, side) -> (N, num_classes).

    Args:
        num_classes: logits.
        input_side: 32 (CIFAR: stem and second row at stride 1) or 224 (both at stride 2); any other
            multiple of 32 is built as 224 is.
        dropout: before the classifier.

    Raises:
        PadfreeError: `input_side` is no multiple of 32, so the maps would not be whole.
    """

    def __init__(self, num_classes: int = 1000, input_side: int = 224, dropout: float = 0.2) -> None:
        super().__init__()
        if input_side < 32 or input_side % 32:
            raise PadfreeError(
                f"ParC-MobileNetV2 got input side {input_side}; its operators are sized to whole maps, "
                f"so give a multiple of 32"
            )
        early = 1 if input_side == 32 else 2
        side = input_side // early
        self.stem = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, early, 1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.ReLU6(inplace=True),
        )
        self.rows = nn.Sequential()
        channels = STEM_CHANNELS
        for index, row in enumerate(ROWS):
            stride = early if index == 1 else row.stride
            side //= stride
            self.rows.append(_row(row, channels, stride, side))
            channels = row.channels
        self.head = nn.Sequential(
            nn.Conv2d(channels, HEAD_CHANNELS, 1, bias=False),
            nn.BatchNorm2d(HEAD_CHANNELS),
            nn.ReLU6(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.head(self.rows(self.stem(x)))
        x = self.dropout(self.pool(x).flatten(1))
        logits: Tensor = self.classifier(x)
        return logits


def _row(row: Row, channels: int, stride: int, side: int) -> nn.Sequential:
    units = nn.Sequential()
    for index in range(row.units):
        stride = stride if index == 0 else 1
        wide = channels * row.expansion
        mixer: nn.Module
        if index < row.plain:
            mixer = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        else:
            mixer = ParCPair(wide, side, position=index == row.plain)
        kind = ResidualUnit if stride == 1 and channels == row.channels else Unit
        units.append(kind(channels, row.channels, row.expansion, mixer))
        channels = row.channels
    return units


def _initialise(module: nn.Module) -> None:
    """MobileNetV2's usual start: He over the outputs for convs, a narrow normal for the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)

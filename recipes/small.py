"""Small networks of five families, for images of 32 or 64 pixels: 24,000 to 45,000 parameters, seconds to train.

Each has a stem of stride 2 and two more strided places, as the larger networks of its family have them after the same
reduction: at 32 pixels the maps are 16, 8, 4, and 16, 7, 3 once padding-free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError

Activation = Callable[[], nn.Module]


def small_network(name: str, num_classes: int) -> nn.Module:
    """A network by the name of its family, with fresh values.

    Raises:
        PadfreeError: there is no such family here.
    """
    if name not in FAMILIES:
        raise PadfreeError(f"there is no small network {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name](num_classes)


def unit(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Activation | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm and activation; (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    parts["norm"] = nn.BatchNorm2d(outputs)
    if act is not None:
        parts["act"] = act()
    return nn.Sequential(parts)


class Classifier(nn.Module):
    """Stem, blocks, mean over the last map, and a linear layer.

    Args:
        stem: of the images.
        blocks: between stem and mean.
        channels: of the last map.
        num_classes: logits.
    """

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        maps: Tensor = self.blocks(self.stem(x))
        logits: Tensor = self.head(maps.mean((2, 3)))
        return logits


class Residual(nn.Module):
    """A residual block: relu(branch(x) + shortcut(x)).

    Args:
        branch: its last part has no activation.
        shortcut: a projection where shapes differ, else nothing.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        out: Tensor = self.act(self.branch(x) + self.shortcut(x))
        return out


def resnet(num_classes: int) -> Classifier:
    """Three basic blocks of 12, 24 and 48 channels (ResNet-20's shape, arXiv:1512.03385)."""

    def block(inputs: int, outputs: int, stride: int) -> Residual:
        branch = nn.Sequential(unit(inputs, outputs, stride=stride), unit(outputs, outputs, act=None))
        return Residual(branch, None if stride == 1 else unit(inputs, outputs, 1, stride, act=None))

    return Classifier(unit(3, 12, stride=2), [block(12, 12, 1), block(12, 24, 2), block(24, 48, 2)], 48, num_classes)


def bottleneck(num_classes: int) -> Classifier:
    """Bottleneck blocks whose 3x3 keeps its channels, so that the pool beside it needs no 1x1 (ResNet-50's shape)."""

    def block(inputs: int, width: int, stride: int) -> Residual:
        reduced = [unit(inputs, width, 1), unit(width, width, stride=stride), unit(width, 4 * width, 1, act=None)]
        return Residual(nn.Sequential(*reduced), unit(inputs, 4 * width, 1, stride, act=None))

    return Classifier(unit(3, 16, stride=2), [block(16, 8, 1), block(32, 16, 2), block(64, 24, 2)], 96, num_classes)


class SqueezeExcite(nn.Module):
    """Channels weighted by what the mean of the map says (arXiv:1709.01507); (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Weight every channel."""
        weights = self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True))))
        scaled: Tensor = x * self.gate(weights)
        return scaled


class Inverted(nn.Module):
    """An inverted residual of expansion 4 (MobileNetV2, arXiv:1801.04381; with `se` MobileNetV3, arXiv:1905.02244)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, act: Activation, kernel: int = 3, se: bool = False
    ) -> None:
        super().__init__()
        wide = 4 * inputs
        self.expand = unit(inputs, wide, 1, act=act)
        self.depthwise = unit(wide, wide, kernel, stride, groups=wide, act=act)
        self.se = SqueezeExcite(wide) if se else nn.Identity()
        self.project = unit(wide, outputs, 1, act=None)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        out: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


def mobilenetv2(num_classes: int) -> Classifier:
    """Five inverted residuals with ReLU6."""
    block = partial(Inverted, act=nn.ReLU6)
    blocks: list[nn.Module] = [block(12, 12, 1), block(12, 20, 2), block(20, 20, 1), block(20, 32, 2), block(32, 32, 1)]
    return Classifier(unit(3, 12, stride=2, act=nn.ReLU6), blocks, 32, num_classes)


def mobilenetv3(num_classes: int) -> Classifier:
    """Five inverted residuals with hard-swish, squeeze-and-excite in three and a 5x5 kernel in one."""
    block = partial(Inverted, act=nn.Hardswish)
    blocks: list[nn.Module] = [
        block(12, 12, 1),
        block(12, 20, 2, se=True),
        block(20, 20, 1),
        block(20, 32, 2, kernel=5, se=True),
        block(32, 32, 1, se=True),
    ]
    return Classifier(unit(3, 12, stride=2, act=nn.Hardswish), blocks, 32, num_classes)


class Ghost(nn.Module):
    """Half of the channels by a 1x1, the other half from them by a depthwise 3x3 (arXiv:1911.11907)."""

    def __init__(self, inputs: int, outputs: int, act: Activation | None = nn.ReLU) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = unit(inputs, half, 1, act=act)
        self.cheap = unit(half, half, groups=half, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        first = self.primary(x)
        return torch.cat((first, self.cheap(first)), 1)


class GhostBottleneck(nn.Module):
    """Ghost module, a depthwise norm without activation where strided, ghost module, and a shortcut."""

    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, kernel: int = 3) -> None:
        super().__init__()
        self.expand = Ghost(inputs, wide)
        down = unit(wide, wide, kernel, stride, groups=wide, act=None)
        self.depthwise = down if stride > 1 else nn.Identity()
        self.project = Ghost(wide, outputs, act=None)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            shrink = unit(inputs, inputs, kernel, stride, groups=inputs, act=None)
            self.shortcut = nn.Sequential(shrink, unit(inputs, outputs, 1, act=None))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H / stride, W / stride)."""
        out: Tensor = self.project(self.depthwise(self.expand(x))) + self.shortcut(x)
        return out


def ghostnet(num_classes: int) -> Classifier:
    """Five ghost bottlenecks, a 5x5 kernel in the first strided one."""
    blocks: list[nn.Module] = [
        GhostBottleneck(16, 48, 16, 1),
        GhostBottleneck(16, 64, 24, 2, kernel=5),
        GhostBottleneck(24, 96, 24, 1),
        GhostBottleneck(24, 120, 40, 2),
        GhostBottleneck(40, 160, 40, 1),
    ]
    return Classifier(unit(3, 16, stride=2), blocks, 40, num_classes)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "resnet": resnet,
    "mobilenetv2": mobilenetv2,
    "mobilenetv3": mobilenetv3,
    "ghostnet": ghostnet,
    "bottleneck": bottleneck,
}

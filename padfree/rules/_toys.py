"""Toy networks for the rules' examples: three-channel image in, four logits out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def unit(
    channels: int, out: int, kernel: int = 3, stride: int = 1, *, act: bool = True, **settings: Any
) -> nn.Sequential:
    """Conv -> norm (-> act), padded to keep the size at stride 1."""
    settings.setdefault("padding", kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, bias=False, **settings),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


def depthwise(
    channels: int, kernel: int = 3, stride: int = 2, *, multiplier: int = 1, **settings: Any
) -> nn.Sequential:
    """A depthwise unit."""
    return unit(channels, channels * multiplier, kernel, stride, groups=channels, **settings)


def net(*blocks: nn.Module, stem: nn.Module | None = None, out: int = 8) -> nn.Sequential:
    """Stem (3 -> 8) -> blocks -> pool -> logits."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 4))
    return nn.Sequential(unit(3, 8) if stem is None else stem, *blocks, head)


class Residual(nn.Module):
    """relu(main(x) + shortcut(x))."""

    def __init__(self, main: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add and activate."""
        total: Tensor = self.act(self.main(x) + self.shortcut(x))
        return total


class Joined(nn.Module):
    """cat(branches(x)), or their sum, then a norm and an activation."""

    def __init__(self, *branches: nn.Module, out: int, total: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.total = total
        self.norm = nn.BatchNorm2d(out)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Run the branches and join them."""
        parts = [branch(x) for branch in self.branches]
        joined = parts[0]
        if not self.total:
            joined = torch.cat(parts, 1)
        for part in parts[1:] if self.total else ():
            joined = joined + part
        out: Tensor = self.act(self.norm(joined))
        return out


class SplitJoin(nn.Module):
    """Convs over the halves of the channels, concatenated again (MixConv)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.small = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.large = nn.Conv2d(half, half, 5, 2, padding=2, groups=half, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Split, convolve, join."""
        a, b = torch.split(x, x.shape[1] // 2, 1)
        return torch.cat((self.small(a), self.large(b)), 1)


class Padded(nn.Module):
    """A conv whose zeros are put on one side by a function call (TensorFlow's SAME)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pad, convolve, normalise."""
        out: Tensor = self.norm(self.conv(pad(x, (0, 1, 0, 1))))
        return out


class KeyAttention(nn.Module):
    """Attention whose keys are subsampled by a strided depthwise conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels, 3, 2, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every pixel to the subsampled ones."""
        query = x.flatten(2).transpose(1, 2)
        keys = self.down(x).flatten(2)
        scores = torch.bmm(query, keys).softmax(-1)
        return x + torch.bmm(scores, keys.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Twice(nn.Module):
    """One strided unit used for two inputs."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Run the body on the map and on its mirror image."""
        total: Tensor = self.body(x) + self.body(x.flip(-1))
        return total


class Methodical(nn.Module):
    """A network whose stem is called in a method of its own, conv -> norm; then come `first` and a strided unit."""

    def __init__(self, channels: int, norm: nn.Module, *first: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = norm
        self.body = net(depthwise(channels), stem=nn.Sequential(*first), out=channels)

    def features(self, x: Tensor) -> Tensor:
        """The stem."""
        out: Tensor = self.norm(self.conv(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Stem, then the body."""
        out: Tensor = self.body(self.features(x))
        return out

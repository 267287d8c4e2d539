"""The sweep's oracle for methods beside forward: networks that agree, one that raises, and two that do not agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.siblings import sibling_fault
from padfree.errors import PadfreeError

SIZE = (3, 16, 16)


class Network(nn.Module):
    """With methods beside forward, as timm's networks have them."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.pooled = pooled

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return nn.functional.max_pool2d(out, 2) if self.pooled else out

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Shortened(Network):
    """Its features lack what its forward runs, as where a shortcut went into another method."""

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(nn.functional.max_pool2d(self.norm(self.conv(x)), 2))


class Failing(Network):
    """Its features do not run; `error` says how."""

    error: type[Exception] = RuntimeError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.norm(self.conv(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        raise self.error("these features are not there")


class Refusing(Failing):
    """It says what to do."""

    error = PadfreeError


def fault(kind: type[nn.Module], *arguments: Any) -> str:
    with torch.device("meta"):
        return sibling_fault(Network(), kind(*arguments), SIZE)


def test_what_agrees_or_raises_is_no_fault() -> None:
    assert not fault(Network)
    assert not fault(Network, True)  # both run the pool
    assert not fault(Refusing)


def test_what_neither_agrees_nor_raises_is_one() -> None:
    assert fault(Shortened) == "forward_features does not run what the forward runs"
    assert fault(Failing) == "forward_features: RuntimeError: these features are not there"

"""Recordings of networks that a test writes as one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from padfree.analysis.flow import Flow
from padfree.analysis.kinds import plain_kind
from padfree.analysis.sites import Sites
from padfree.indices import ValueId
from padfree.record.recorder import Op
from padfree.record.recording import record

Forward = Callable[[Any, Tensor], Any]


class Written(nn.Module):
    """A network whose forward is a function of itself and the image."""

    def __init__(self, forward: Forward, **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.written = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def sites_of(forward: Forward, size: tuple[int, ...] = (3, 8, 12), **children: nn.Module | nn.Parameter) -> Sites:
    """The convolutions of one recorded forward, in eval mode, on an image of (C, H, W)."""
    return Sites(Flow(record(Written(forward, **children).eval(), size)))


def flow_of(forward: Forward, size: tuple[int, ...] = (3, 8, 12), **children: nn.Module | nn.Parameter) -> Flow:
    """The dataflow of one recorded forward."""
    return sites_of(forward, size, **children).flow


def ops(flow: Flow, *kinds: str) -> list[Op]:
    """The operations of these kinds, in place or not, that depend on the image, in order."""
    return [op for op in flow.ops if op.inputs and plain_kind(op) in kinds]


def made(flow: Flow, kind: str, which: int = 0) -> ValueId:
    """What the operation of that kind writes: the first, or `which`."""
    return ops(flow, kind)[which].outputs[0]


def image(flow: Flow) -> ValueId:
    """The network's input."""
    return flow.recording.inputs[0]

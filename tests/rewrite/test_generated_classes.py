"""Classes made by conversion live as long as a module of theirs."""

from __future__ import annotations

import gc
import linecache
import weakref
from typing import Any

import torch
from strangers import Net, Unit, convert, images
from torch import nn


def own_class(index: int) -> nn.Module:
    """A block of a class of its own, as notebooks define them again and again."""

    class Own(Unit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.bn(self.conv(x))) * index

    return Net(Own())


def sources() -> int:
    return sum(1 for name in linecache.cache if name.startswith("<padfree "))


def test_converting_in_a_loop_keeps_no_classes() -> None:
    made: Any = convert(own_class(0))
    made.eval()(images())
    gc.collect()
    kept, before = weakref.ref(type(made.block)), sources()
    assert kept() is type(made.block)
    del made
    for index in range(3):
        convert(own_class(index))
    gc.collect()
    assert kept() is None and sources() <= before


def test_a_class_is_shared_while_it_lives() -> None:
    first: Any = convert(Net(Unit()))
    second: Any = convert(Net(Unit()))
    assert type(first.block) is type(second.block)

"""Values of every kind that a forward reads: another one, one that was missing, one that is gone, raises by name."""

from __future__ import annotations

import copy
import enum
import fractions
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from strangers import Net, Unit, convert, images
from torch import Tensor, nn
from torch.testing import assert_close

from padfree.errors import LockedStateError

Space = types.SimpleNamespace


class Mode(enum.Enum):
    PLAIN = 1


class Block(Unit):
    def __init__(self, cfg: Any = None) -> None:
        super().__init__()
        self.cfg = cfg

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Number(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * float(self.cfg.scale)


class Compared(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (3 if self.cfg.scale == b"x" else 1)


class Counted(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * 2 ** len(self.cfg.scale)


class Cut(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, self.cfg.scale]


class Among(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (3 if (0, 1) in self.cfg else 1)


class IsNone(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (3 if self.cfg.scale is None else 1)


class MayHave(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * getattr(self.cfg, "gain", 1.0)


class Has(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (3 if hasattr(self.cfg, "gain") else 1)


class MayHold(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg["scale"] * self.cfg.get("gain", 1.0)


class Holds(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg["scale"] * (3 if "gain" in self.cfg else 1)


class ByEnum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg[Mode.PLAIN]


class ByTuple(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg["a", "b"]


class ByNone(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg[None]


class Looped(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for name in self.cfg:
            y = y * self.cfg[name] if name == "a" else y * self.cfg[name] * 2
        return y


class LoopedLayers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleDict({"a": nn.Conv2d(8, 8, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for name in self.more:
            y = self.more[name](y) if name == "a" else self.more[name](y) * 2
        return y


class Listed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (3 if isinstance(self.cfg[0], nn.ReLU) else 1)


def scaled(value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(block.cfg, "scale", value)


def put(key: Any, value: Any = 3.0) -> Callable[[Any], None]:
    return lambda block: block.cfg.__setitem__(key, value)


CASES: dict[str, tuple[Callable[[], Block], Callable[[Any], Any]]] = {
    "number of numpy": (lambda: Number(Space(scale=np.float32(1))), scaled(np.float32(3))),
    "fraction": (lambda: Number(Space(scale=fractions.Fraction(1))), scaled(fractions.Fraction(3))),
    "bytes": (lambda: Compared(Space(scale=b"y")), scaled(b"x")),
    "range": (lambda: Counted(Space(scale=range(1))), scaled(range(3))),
    "slice": (lambda: Cut(Space(scale=slice(0, 4))), scaled(slice(4, 8))),
    "set of tuples": (lambda: Among({(0, 0)}), lambda block: block.cfg.add((0, 1))),
    "object, none": (lambda: IsNone(Space(scale=object())), scaled(None)),
    "tuple, none": (lambda: IsNone(Space(scale=(1, 2))), scaled(None)),
    "attribute, gone": (lambda: Number(Space(scale=1.0)), lambda block: delattr(block.cfg, "scale")),
    "attribute by name, new": (lambda: MayHave(Space()), lambda block: setattr(block.cfg, "gain", 3.0)),
    "attribute asked for, new": (lambda: Has(Space()), lambda block: setattr(block.cfg, "gain", 3.0)),
    "key with a default, new": (lambda: MayHold({"scale": 1.0}), put("gain")),
    "key asked for, new": (lambda: Holds({"scale": 1.0}), put("gain")),
    "key, gone": (lambda: Holds({"scale": 1.0, "gain": 1.0}), lambda block: block.cfg.clear()),
    "enum as key": (lambda: ByEnum({Mode.PLAIN: 1.0}), put(Mode.PLAIN)),
    "tuple as key": (lambda: ByTuple({("a", "b"): 1.0}), put(("a", "b"))),
    "none as key": (lambda: ByNone({None: 1.0}), put(None)),
    "loop over keys": (lambda: Looped({"a": 1.0}), put("b")),
    "loop over layers": (LoopedLayers, lambda block: block.more.__setitem__("b", nn.Identity())),
    "class of a listed module": (lambda: Listed([nn.Identity()]), lambda block: put(0, nn.ReLU())(block)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_new_value_is_not_ignored(case: str) -> None:
    make, change = CASES[case]
    made: Any = convert(Net(make())).eval()
    before = made(images())
    twin = copy.deepcopy(made) if case == "object, none" else pickle.loads(pickle.dumps(made))
    assert_close(twin(images()), before)
    change(twin.block)
    with pytest.raises(LockedStateError, match="baked into the converted forward"):
        twin(images())
    assert_close(made(images()), before)


@pytest.mark.parametrize("case", ["number of numpy", "enum as key", "key asked for, new"])
def test_compiled_whole(case: str) -> None:
    torch.compiler.reset()
    made: Any = convert(Net(CASES[case][0]())).eval()
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(images()), made(images()))


def test_what_is_not_read_may_come_and_go() -> None:
    made: Any = convert(Net(Holds({"scale": 1.0, "unused": (1, 2)}))).eval()
    before = made(images())
    made.block.cfg.update(unused=None, more=7)
    assert_close(made(images()), before)

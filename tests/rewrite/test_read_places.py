"""Places that a forward reads past its own attributes: classes, tables, children, other functions, a second name."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strangers import Net, Unit, convert, images
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
from padfree.errors import LockedStateError


class Config:
    class Inner:
        scale = 1.0


class Schedule:
    total = 1.0

    def __init__(self) -> None:
        self.value = 1.0

    def now(self) -> float:
        return self.value

    @classmethod
    def of_all(cls) -> float:
        return cls.total


SCHEDULE = Schedule()
THREE = torch.full((8, 1, 1), 3.0)


class Block(Unit):
    alpha = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.cfg = types.SimpleNamespace(scale=1.0)

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class ByVars(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * vars(self)["scale"]


class ByDict(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.__dict__.get("scale", 1.0)


class ByDictThrough(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.__dict__["cfg"].scale


class ByType(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * type(self).alpha


class ByClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.__class__.alpha


class BySuper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * super().alpha


class Inherited(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg.scale


class BySupersForward(Inherited):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class MayHave(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * getattr(self, "gain", 1.0)


class Answering(Block):
    def __getattr__(self, name: str) -> Any:
        if name == "answer":
            return self.cfg.scale
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.answer


class OverParameters(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for name in self._parameters:
            y = y * getattr(self, name)
        return y


class OverBuffers(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * self.gain if "gain" in self._buffers else y


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0

    @property
    def twice(self) -> float:
        return 2 * self.gain

    def times(self, x: Tensor) -> Tensor:
        return x * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return x


class Gained(Block):
    def __init__(self) -> None:
        super().__init__()
        self.last = Gain()


class OverChildren(Gained):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
            if isinstance(layer, Gain):
                x = x * layer.gain
        return x


class OverItself(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
            if isinstance(layer, Gain):
                x = x * layer.gain
        return x


class ChildsProperty(Gained):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.last.twice


class ChildsMethod(Gained):
    def forward(self, x: Tensor) -> Tensor:
        return self.last.times(self.body(x))


class NestedClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * Config.Inner.scale


class GlobalsMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * SCHEDULE.now()


class ClassMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * Schedule.of_all()


def helper(x: Tensor) -> Tensor:
    return x * helper.scale  # type: ignore[attr-defined]


helper.scale = 1.0  # type: ignore[attr-defined]


class FunctionsAttribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        return helper(self.body(x))


def sequential() -> nn.Module:
    return OverItself(*Unit().children(), Gain())


def on(path: str, value: Any = 3.0) -> Callable[[Any], Any]:
    """Sets an attribute, some steps from the block."""

    def change(block: Any) -> None:
        *steps, name = path.split(".")
        for step in steps:
            block = getattr(block, step)
        setattr(block, name, value)

    return change


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "vars": (ByVars, on("scale")),
    "__dict__": (ByDict, on("scale")),
    "through __dict__": (ByDictThrough, on("cfg.scale")),
    "type": (ByType, lambda block: setattr(Block, "alpha", 3.0)),
    "__class__": (ByClass, lambda block: setattr(Block, "alpha", 3.0)),
    "super": (BySuper, lambda block: setattr(Block, "alpha", 3.0)),
    "forward of a base": (BySupersForward, on("cfg.scale")),
    "missing, set on the class": (MayHave, lambda block: setattr(MayHave, "gain", 3.0)),
    "answered, set": (Answering, on("answer")),
    "answered by another value": (Answering, on("cfg.scale")),
    "over parameters": (OverParameters, lambda block: block.register_parameter("gain", nn.Parameter(THREE))),
    "over buffers": (OverBuffers, lambda block: block.register_buffer("gain", THREE)),
    "over children": (OverChildren, on("last.gain")),
    "over itself": (sequential, lambda block: setattr(block[3], "gain", 3.0)),
    "property of a child": (ChildsProperty, on("last.gain")),
    "method of a child": (ChildsMethod, on("last.gain")),
    "nested class": (NestedClass, lambda block: setattr(Config.Inner, "scale", 3.0)),
    "method of a global": (GlobalsMethod, lambda block: setattr(SCHEDULE, "value", 3.0)),
    "method of a class": (ClassMethod, lambda block: setattr(Schedule, "total", 3.0)),
    "attribute of a function": (FunctionsAttribute, lambda block: setattr(helper, "scale", 3.0)),
}


@pytest.fixture(autouse=True)
def put_back() -> Any:
    yield
    Block.alpha = Config.Inner.scale = SCHEDULE.value = Schedule.total = helper.scale = 1.0  # type: ignore[attr-defined]
    if "gain" in vars(MayHave):
        del MayHave.gain  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", CASES)
def test_a_new_value_is_not_ignored(case: str) -> None:
    make, change = CASES[case]
    made: Any = convert(Net(make())).eval()
    before = made(images())
    twin = copy.deepcopy(made)
    assert_close(twin(images()), before)
    with pytest.raises(LockedStateError, match="baked into the converted forward"):
        change(twin.block)
        twin(images())


@pytest.mark.parametrize("names", ["import strangers_state\n", "from strangers_state import SPACE\n"])
def test_what_a_forward_imports(names: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strangers_state.py").write_text(
        "import types\nSCALE = 1.0\nSPACE = types.SimpleNamespace(scale=1.0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers_state", raising=False)
    read = "SPACE.scale" if "from" in names else "strangers_state.SCALE"
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(f"def forward(self, x):\n    {names}    return self.body(x) * {read}\n", namespace)
    made: Any = convert(Net(type("Importing", (Block,), {"forward": namespace["forward"]})())).eval()
    made(images())
    imported: Any = sys.modules.pop("strangers_state")
    imported.SCALE = imported.SPACE.scale = 3.0
    with pytest.raises(LockedStateError, match="strangers_state"):
        made(images())


class Twice(Block):
    """One activation under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.before = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(self.before(x))))


class AlsoListed(Block):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(Unit().children())
        self.conv, self.bn, self.act = self.layers

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Tied(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, 1, 1))
        self.other = self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.other


def again() -> nn.Module:
    conv, norm, act = Unit().children()
    return nn.Sequential(act, conv, norm, act)


ALIASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "first name": (Twice, on("act", nn.SiLU())),
    "second name": (Twice, on("before", nn.SiLU())),
    "name beside a list": (AlsoListed, on("act", nn.SiLU())),
    "parameter": (Tied, on("other", nn.Parameter(THREE))),
    "sequential": (again, lambda block: block.__setitem__(3, nn.SiLU())),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_two_names_go_on_meaning_one_thing(alias: str) -> None:
    make, change = ALIASES[alias]
    made: Any = convert(Net(make())).eval()
    before = made(images())
    assert_close(copy.deepcopy(made).half().float()(images()), before, rtol=1e-2, atol=1e-2)
    change(made.block)
    with pytest.raises(LockedStateError, match="is the same"):
        made(images())


def test_two_names_under_compilers() -> None:
    torch.compiler.reset()
    made: Any = convert(Net(Twice())).eval()
    before = made(images())
    assert_close(padfree.fuse(made)(images()), before)
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(images()), before)
    assert_close(torch.export.export(made, (images(),)).module()(images()), before)


class TwoPlaces(Block):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.factor = 1.0
        self.register_module("after", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.second(self.body(x))) * self.factor * self.cfg.scale
        y = y if self.after is None else self.after(y)
        return y * self.gain if hasattr(self, "gain") else y


@pytest.mark.parametrize(
    "change", [on("factor"), on("after", nn.Tanh()), on("gain"), on("cfg.scale")], ids=["own", "none", "missing", "cfg"]
)
def test_a_second_conversion_keeps_what_the_first_baked(change: Callable[[Any], None]) -> None:
    made: Any = Net(TwoPlaces()).eval()
    for place in ("conv", "second"):
        made = padfree.convert(made, input_size=(3, 32, 32), rules=("depthwise",), include=[f"block.{place}"])
    made(images())
    with pytest.raises(LockedStateError, match="baked into the converted forward"):
        change(made.block)
        made(images())


class Whole(nn.Module):
    """A network whose own forward holds both places, and reads what is looked at whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.last = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.cfg = types.SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(self.stem(x)))) * self.cfg.scale


def test_a_network_whose_own_forward_was_rewritten_can_be_converted_again() -> None:
    made: Any = Whole().eval()
    for place in ("conv", "last"):
        made = padfree.convert(made, input_size=(3, 32, 32), rules=("depthwise",), include=[place])
    assert made.conv.padding == made.last.padding == (0, 0)
    made(images())
    made.cfg.scale = 3.0
    with pytest.raises(LockedStateError, match=r"self\.cfg\.scale"):
        made(images())

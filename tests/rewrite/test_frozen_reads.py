"""What a forward reads through other objects and a trace bakes: the new value counts, or an error names it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strangers import Net, Unit, convert, images
from torch import Tensor, nn
from torch.testing import assert_close

from padfree.errors import LockedStateError

SCALE = 1.0
TABLE = {"scale": 1.0, "other": 5}
SPACE = types.SimpleNamespace(scale=1.0, inner=types.SimpleNamespace(scale=1.0))


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    unused: int = 0
    inner: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    scale: float = 1.0


class Attributes:
    """Answers like OmegaConf's configs: by attribute and by key, from one dictionary."""

    def __init__(self, **content: Any) -> None:
        self.__dict__["_content"] = content

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__dict__["_content"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._content[name] = value

    def keys(self) -> Any:
        return self._content.keys()

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, key: str) -> Any:
        return self._content[key]


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Block(Unit):
    """`cfg` is what a forward below reads through."""

    alpha = 1.0
    sizes: ClassVar = [1.0, 2.0]

    def __init__(self, cfg: Any = None) -> None:
        super().__init__()
        self.cfg = cfg
        self.key = "scale"

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class ByAttribute(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg.scale


class ByInner(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg.inner.scale


class ByKey(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg["scale"]


class ByNamedKey(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg[self.key]


class ByIndex(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg[0]


class ByMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2 if self.cfg.mode is Mode.DOUBLE else 1)


class ByMembership(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * (2 if "double" in self.cfg else 1)


class BySum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * sum(self.cfg)


class ByWalk(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for _, value in self.cfg.items():
            y = y * value
        return y


class ByClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.alpha


class ByClassName(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * ByClassName.alpha


class ByClassList(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.sizes[0]


class ByProperty(Block):
    @property
    def scale(self) -> float:
        return float(self.cfg.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


class ByMethod(Block):
    def scale(self) -> float:
        return float(self.cfg.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale()


class ByGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * SCALE


class ByGlobalTable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * TABLE["scale"]


class ByGlobalSpace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * SPACE.inner.scale


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


class ByHelper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.body(x))


class ByCall(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg()


class ByObjectsMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg.now()


class ByReference(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.cfg().scale


class ByFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.cfg["act"](self.bn(self.conv(x)))


class ByObjectsFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.cfg.act(self.bn(self.conv(x)))


class ByArray(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * float(self.cfg[0])


class ByMade(Block):
    def forward(self, x: Tensor) -> Tensor:
        return MADE(self.body(x))


class Schedule:
    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self) -> float:
        return self.value

    def now(self) -> float:
        return self.value


def times(scale: float) -> Callable[[Tensor], Tensor]:
    def made(x: Tensor) -> Tensor:
        return x * scale

    return made


MADE: Any = times(1.0)


class ByChild(Block):
    def __init__(self, cfg: Any = None) -> None:
        super().__init__(cfg)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 3 if self.drop.p > 0 else y


def set_on(path: str, value: Any = 3.0) -> Callable[[Any], None]:
    """Sets an attribute, some steps from the block."""

    def change(block: Any) -> None:
        *steps, name = path.split(".")
        for step in steps:
            block = getattr(block, step)
        setattr(block, name, value)

    return change


def put(key: Any, value: Any = 3.0) -> Callable[[Any], None]:
    """Sets an item of `cfg`."""

    def change(block: Any) -> None:
        block.cfg[key] = value

    return change


def set_global(name: str) -> Callable[[Any], None]:
    return lambda block: globals().__setitem__(name, 3.0)


CASES: dict[str, tuple[Callable[[], Block], Callable[[Any], None]]] = {
    "namespace": (lambda: ByAttribute(types.SimpleNamespace(scale=1.0)), set_on("cfg.scale")),
    "argparse": (lambda: ByAttribute(argparse.Namespace(scale=1.0)), set_on("cfg.scale")),
    "dataclass": (lambda: ByAttribute(Config()), set_on("cfg.scale")),
    "slots": (lambda: ByAttribute(Slotted()), set_on("cfg.scale")),
    "dynamic": (lambda: ByAttribute(Attributes(scale=1.0)), set_on("cfg.scale")),
    "dynamic key": (lambda: ByKey(Attributes(scale=1.0)), set_on("cfg.scale")),
    "two steps": (lambda: ByInner(Config(inner=Config())), set_on("cfg.inner.scale")),
    "two steps, replaced": (lambda: ByInner(Config(inner=Config())), set_on("cfg.inner", Config(scale=3.0))),
    "dynamic two steps": (lambda: ByInner(Attributes(inner=Attributes(scale=1.0))), set_on("cfg.inner.scale")),
    "dict": (lambda: ByKey({"scale": 1.0}), put("scale")),
    "dict by name": (lambda: ByNamedKey({"scale": 1.0}), put("scale")),
    "list": (lambda: ByIndex([1.0, 2.0]), put(0)),
    "tuple in dict": (lambda: ByIndex({0: 1.0}), put(0)),
    "enum": (lambda: ByMode(types.SimpleNamespace(mode=Mode.PLAIN)), set_on("cfg.mode", Mode.DOUBLE)),
    "set": (lambda: ByMembership({"plain"}), lambda block: block.cfg.add("double")),
    "growing list": (lambda: ByMembership(["plain"]), lambda block: block.cfg.append("double")),
    "summed list": (lambda: BySum([0.5, 0.5]), lambda block: block.cfg.append(2.0)),
    "walk, changed": (lambda: ByWalk({"a": 1.0}), put("a")),
    "walk, longer": (lambda: ByWalk({"a": 1.0}), put("b")),
    "class": (ByClass, lambda block: setattr(ByClass, "alpha", 3.0)),
    "class by name": (ByClassName, lambda block: setattr(ByClassName, "alpha", 3.0)),
    "class of bases": (ByClass, lambda block: setattr(Block, "alpha", 3.0)),
    "list of a class": (ByClassList, lambda block: Block.sizes.__setitem__(0, 3.0)),
    "property": (lambda: ByProperty(Config()), set_on("cfg.scale")),
    "method": (lambda: ByMethod(Config()), set_on("cfg.scale")),
    "global": (ByGlobal, set_global("SCALE")),
    "helper": (ByHelper, set_global("SCALE")),
    "global table": (ByGlobalTable, lambda block: TABLE.__setitem__("scale", 3.0)),
    "global space": (ByGlobalSpace, lambda block: setattr(SPACE.inner, "scale", 3.0)),
    "child": (ByChild, set_on("drop.p", 0.5)),
    "callable": (lambda: ByCall(Schedule()), set_on("cfg.value")),
    "method of an object": (lambda: ByObjectsMethod(Schedule()), set_on("cfg.value")),
    "function in dict": (lambda: ByFunction({"act": F.relu}), put("act", F.silu)),
    "function in namespace": (lambda: ByObjectsFunction(types.SimpleNamespace(act=F.relu)), set_on("cfg.act", F.silu)),
    "array": (lambda: ByArray(np.array([1.0, 2.0])), put(0)),
    "function made by a function": (ByMade, lambda block: setattr(MADE.__closure__[0], "cell_contents", 3.0)),
}


@pytest.fixture(autouse=True)
def put_back() -> Any:
    torch.compiler.reset()
    yield
    globals()["SCALE"] = Block.alpha = Block.sizes[0] = TABLE["scale"] = SPACE.inner.scale = 1.0
    MADE.__closure__[0].cell_contents = 1.0
    for kind in (ByClass, ByClassName):
        if "alpha" in vars(kind):
            del kind.alpha


@pytest.mark.parametrize("case", CASES)
def test_a_new_value_is_not_ignored(case: str) -> None:
    make, change = CASES[case]
    made: Any = convert(Net(make())).eval()
    before = made(images())
    for twin in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert_close(twin(images()), before)
    twin = copy.deepcopy(made)
    change(twin.block)
    with pytest.raises(LockedStateError, match="baked into the converted forward"):
        twin(images())
    if "cfg" in case or case in ("namespace", "dict", "list"):  # the copy's state is its own
        assert_close(made(images()), before)


@pytest.mark.parametrize("case", ["namespace", "dataclass", "dict", "list", "class", "global", "helper", "two steps"])
def test_values_are_looked_at_under_compilers(case: str) -> None:
    make, change = CASES[case]
    made: Any = convert(Net(make())).eval()
    wanted = made(images())
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert_close(compiled(images()), wanted)
    assert_close(torch.export.export(made, (images(),)).module()(images()), wanted)
    assert_close(torch.jit.trace(made, images())(images()), wanted)
    change(made.block)
    with pytest.raises(Exception):  # noqa: B017 - the compiler wraps it in one of its own
        compiled(images())


def test_a_config_that_a_weak_reference_leads_to() -> None:
    config = Config()
    made: Any = convert(Net(ByReference(weakref.ref(config)))).eval()
    made(images())
    config.scale = 3.0
    with pytest.raises(LockedStateError, match="scale"):
        made(images())


def test_a_variable_that_a_function_of_an_attribute_closes_over() -> None:
    held = {"scale": 1.0}
    made: Any = convert(Net(ByCall(lambda: held["scale"]))).eval()
    made(images())
    held["scale"] = 3.0
    with pytest.raises(LockedStateError, match="scale"):
        made(images())


def test_a_method_that_a_forward_calls_cannot_be_given_to_the_instance() -> None:
    made: Any = convert(Net(ByAttribute(Config()))).eval()
    with pytest.raises(LockedStateError, match="body"):
        made.block.body = lambda x: x


def test_numbers_of_numpy() -> None:
    net = Net(ByIndex([np.float64(3.0)]))
    made, plain = (convert(each).eval() for each in (net, copy.deepcopy(net)))
    plain = convert(Net(ByIndex([1.0]))).eval()
    plain.load_state_dict(made.state_dict())
    assert_close(made(images()), 3 * plain(images()))


def test_other_values_may_change() -> None:
    made: Any = convert(Net(ByAttribute(Config()))).eval()
    before = made(images())
    made.block.cfg.unused = 7
    made.block.cfg.scale = 1.0
    assert_close(made(images()), before)


def test_script_keeps_what_it_compiles() -> None:
    made: Any = convert(Net(ByClass())).eval()
    assert_close(torch.jit.script(made)(images()), made(images()))


def test_a_closed_over_variable() -> None:
    scale = 1.0

    class Closed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * scale

    made = convert(Net(Closed())).eval()
    made(images())
    scale = 3.0
    with pytest.raises(LockedStateError, match="closure"):
        made(images())


class Layered(Unit):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.more = layers

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        for layer in self.more.values() if isinstance(self.more, nn.ModuleDict) else self.more:
            y = layer(y)
        return y


class Optional(Unit):
    """What may be there and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("after", None)
        self.register_parameter("gain", None)
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        y = y if self.after is None else self.after(y)
        y = y if self.gain is None else y * self.gain
        y = y if self.shift is None else y + self.shift
        return self.late(y) if hasattr(self, "late") else y


class Walking(Unit):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Multiplied(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([torch.ones(1, 8, 1, 1)])
        self.named = nn.ParameterDict({"a": torch.ones(1, 8, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        for gain in (*self.gains, *self.named.values()):
            y = y * gain
        return y


GAIN = nn.Parameter(torch.full((1, 8, 1, 1), 3.0))
ADDITIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "set": (Optional, lambda block: setattr(block, "after", nn.ReLU())),
    "add": (Optional, lambda block: block.add_module("after", nn.ReLU())),
    "register": (Optional, lambda block: block.register_module("late", nn.ReLU())),
    "parameter": (Optional, lambda block: block.register_parameter("gain", GAIN)),
    "buffer": (Optional, lambda block: block.register_buffer("shift", tensor=torch.ones(1))),
    "walk": (Walking, lambda block: setattr(block, "last", nn.ReLU())),
    "walk, less": (Walking, lambda block: delattr(block, "act")),
    "parameters": (Multiplied, lambda block: block.gains.append(GAIN)),
    "parameters by name": (Multiplied, lambda block: block.named.update({"b": GAIN})),
}


@pytest.mark.parametrize("addition", ADDITIONS)
def test_what_is_added_is_not_ignored(addition: str) -> None:
    make, add = ADDITIONS[addition]
    made: Any = convert(Net(make())).eval()
    made(images())
    with pytest.raises(LockedStateError, match="baked into the converted forward"):
        add(made.block)
        made(images())


def test_a_sequential_counts_its_children() -> None:
    made: Any = convert(nn.Sequential(*Net(Unit()).children(), *Unit().children())).eval()
    before = made(images())
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(images()), before)
    made.add_module("last", nn.ReLU())
    with pytest.raises(LockedStateError, match="number of its children"):
        made(images())


class Keyed(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return self.more["b"](self.more["a"](self.act(self.bn(self.conv(x)))))


def layers() -> list[nn.Module]:
    return [nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)]


def named() -> nn.ModuleDict:
    return nn.ModuleDict(dict(zip("ab", layers(), strict=True)))


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "append": (lambda: nn.ModuleList(layers()), lambda more: more.append(nn.ReLU())),
    "insert": (lambda: nn.ModuleList(layers()), lambda more: more.insert(0, nn.ReLU())),
    "extend": (lambda: nn.ModuleList(layers()), lambda more: more.extend(layers())),
    "pop": (lambda: nn.ModuleList(layers()), lambda more: more.pop(-1)),
    "del": (lambda: nn.ModuleList(layers()), lambda more: more.__delitem__(0)),
    "empty": (lambda: nn.ModuleList(), lambda more: more.append(nn.ReLU())),
    "sequential": (lambda: nn.Sequential(*layers()), lambda more: more.append(nn.ReLU())),
    "update": (
        lambda: named(),
        lambda more: more.update({"c": nn.ReLU()}),
    ),
    "order": (
        lambda: named(),
        lambda more: more.update({"a": more.pop("a")}),
    ),
    "clear": (lambda: named(), lambda more: more.clear()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_container_that_was_taken_apart_may_not_change(change: str) -> None:
    make, act = CHANGES[change]
    made: Any = convert(Net(Layered(make()))).eval()
    before = made(images())
    assert_close(torch.compile(made, fullgraph=True, backend="eager")(images()), before)
    assert_close(copy.deepcopy(made)(images()), before)
    act(made.block.more)
    with pytest.raises(LockedStateError, match="more"):
        made(images())


def test_layers_of_a_container_are_read_when_called() -> None:
    made: Any = convert(Net(Layered(nn.ModuleList(layers())))).eval()
    kept = made.block.more[0]
    made.block.more[1] = nn.Identity()
    x = made.stem(images())
    y = F.conv2d(x, made.block.conv.weight, made.block.conv.bias, 2, 0, 1, 8)
    assert_close(made(images()), kept(F.relu(made.block.bn(y)) + F.max_pool2d(x, 3, 2)))


def test_a_dictionary_that_is_read_by_key_may_grow() -> None:
    made: Any = convert(Net(Keyed(named()))).eval()
    before = made(images())
    made.block.more["c"] = nn.ReLU()
    assert_close(made(images()), before)


def test_a_plain_list_of_layers() -> None:
    class Listed(Unit):
        def __init__(self) -> None:
            super().__init__()
            self.order = [self.conv, self.bn, self.act]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = layer(x)
            return x

    made: Any = convert(Net(Listed())).eval()
    twin = copy.deepcopy(made)
    assert_close(twin(images()), made(images()))
    twin.block.order[2] = nn.GELU()
    with pytest.raises(LockedStateError, match="order"):
        twin(images())

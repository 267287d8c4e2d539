"""What no recorded operation shows: plain state, contexts, own backwards and containers are kept, or refused."""

from __future__ import annotations

import collections
import dataclasses
import enum
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from strangers import Net, Unit, convert, depthwise, images, refusal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import padfree
from padfree.rewrite.effects import Watch, alike, snapshot

SEEN: list[Tensor] = []
CACHE: dict[Any, Tensor] = {}
GENERATOR = np.random.default_rng(0)


class Block(Unit):
    """`kept` is what a forward below writes into."""

    kept: Any = None

    def body(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class CountsByName(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept = collections.Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.kept["calls"] += 1
        return self.body(x)


@dataclasses.dataclass(slots=True)
class Slotted:
    calls: int = 0


class CountsInSlots(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        self.kept.calls += 1
        return self.body(x)


class CountsInAnArray(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.kept[0] += 1
        return self.body(x)


class Tap:
    calls = 0

    def __call__(self) -> None:
        self.calls += 1


class Calls(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept = Tap()

    def forward(self, x: Tensor) -> Tensor:
        self.kept()
        return self.body(x)


class PastSetattr(Block):
    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "kept", x.dim())
        return self.body(x)


class CountsOnTheClass(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsOnTheClass.calls += 1
        return self.body(x)


class KeepsFeatures(Block):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x)
        return self.body(x)


class OwnDepth(Block):
    def __init__(self) -> None:
        super().__init__()
        self.kept = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 0 if self.training and self.kept.random() < 0.1 else y


class SharedDepth(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 0 if self.training and GENERATOR.random() < 0.1 else y


class FrozenNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.training = False
        return self.body(x)


class SetsAChild(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.act.factor = x.shape[1]
        return self.body(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class OwnBackward(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(Reversed.apply(x))  # type: ignore[no-untyped-call]


class Checkpoints(Block):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda t: self.body(t), x, use_reentrant=False)


class OnCpu(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.body(x)


class Named(dict):  # type: ignore[type-arg]
    pass


class ReturnsItsOwn(Block):
    def forward(self, x: Tensor) -> Any:
        return Named(out=self.body(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (CountsByName, "writes into its own attribute `kept`"),
        (CountsInSlots, "writes into its own attribute `kept`"),
        (CountsInAnArray, "writes into its own attribute `kept`"),
        (Calls, "writes into its own attribute `kept`"),
        (PastSetattr, "writes into its own attribute `kept`"),
        (OwnDepth, "writes into its own attribute `kept`"),
        (CountsOnTheClass, "writes into the class attribute `CountsOnTheClass.calls`"),
        (KeepsFeatures, "writes into the global `SEEN`"),
        (SharedDepth, "writes into the global `GENERATOR`"),
        (FrozenNorm, "writes into its child's attribute `bn.training`"),
        (SetsAChild, "writes into its child's attribute `act.factor`"),
        (OwnBackward, "calls an autograd function"),
        (Checkpoints, "decides what is kept for the backward pass"),
        (OnCpu, "decides what is kept for the backward pass"),
        (ReturnsItsOwn, "returns a Named, and a generated one would return a dict"),
    ],
)
def test_blocks_whose_effects_a_generated_forward_would_lose(kind: type[nn.Module], words: str) -> None:
    text = refusal(Net(kind()))
    assert words in text and "`block" in text


def test_what_a_look_changes_is_put_back() -> None:
    SEEN.clear()
    refusal(Net(KeepsFeatures()))
    refusal(Net(CountsOnTheClass()))
    assert SEEN == [] and CountsOnTheClass.calls == 0
    assert Reversed.apply(torch.ones(1)) == 1  # type: ignore[no-untyped-call]
    assert "apply" in vars(torch.autograd.Function) and torch.autograd.Function.apply.__name__ == "apply"


class Caches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        side = int(y.shape[-1])
        if side not in CACHE:
            CACHE[side] = torch.linspace(0, 1, side, device=x.device)
        return y * CACHE[side]


def test_a_cache_outside_the_model_keeps_no_weightless_tensors() -> None:
    CACHE.clear()
    model = Caches(Unit())
    padfree.plan(model, input_size=(3, 16, 16))
    assert CACHE == {}
    model(images())
    kept = dict(CACHE)
    made = convert(model)
    assert kept == CACHE
    assert made(images()).shape[-1] == 7


class Members(enum.Enum):
    FIRST = 1
    SECOND = 2


class Chosen(Block):
    def forward(self, x: Tensor, member: Members = Members.FIRST) -> Tensor:
        return self.body(x if member is Members.FIRST else 2 * x)


def test_an_enum_argument_is_refused() -> None:
    assert "enum member" in refusal(Net(Chosen()))


class InOrder(Block):
    def forward(self, x: Tensor) -> Any:
        return [collections.OrderedDict(b=self.body(x), a=collections.OrderedDict(x=x))]


def test_ordered_dictionaries_stay_ordered() -> None:
    (found,) = convert(Net(InOrder()))(images())
    assert type(found) is type(found["a"]) is collections.OrderedDict and list(found) == ["b", "a"]


class Reads(Block):
    table: ClassVar = {"scale": 2.0}

    def __init__(self) -> None:
        super().__init__()
        self.kept = Slotted(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.table["scale"] * self.kept.calls * len(CACHE or (1,)))


def test_reading_is_no_writing() -> None:
    CACHE.clear()
    made = convert(Net(Reads()).eval())
    assert type(made.block) is not Reads and isinstance(made.block, Reads)


def test_a_redefined_helper_is_the_one_that_a_new_conversion_calls() -> None:
    module = globals()
    text = "def helper(x):\n    return x * {} if x.mean() > -1e9 else x\n"
    block = "class Helped(Unit):\n    def forward(self, x):\n        return helper(self.act(self.bn(self.conv(x))))\n"
    try:
        exec(block, module)
        kind = module["Helped"]
        outputs = []
        for factor in (1, 0):
            exec(text.format(factor), module)
            outputs.append(convert(Net(kind()).eval())(images()))
    finally:
        for name in ("helper", "Helped"):
            module.pop(name, None)
    assert outputs[0].abs().max() > 0 and not outputs[1].any()


class Keyed(nn.Sequential):
    def __getitem__(self, index: Any) -> Any:
        return self._modules[index] if isinstance(index, str) else super().__getitem__(index)


def test_a_sequential_keeps_its_own_way_to_be_indexed() -> None:
    parts = collections.OrderedDict(conv=depthwise(), bn=nn.BatchNorm2d(8), act=nn.ReLU())
    made = convert(Net(Keyed(parts)))
    assert made.block["conv"] is made.block[0] and len(made.block) == 3


def test_snapshots_compare_what_they_hold() -> None:
    one = [1, {"a": (2.0, [3])}, np.arange(3), random.Random(1)]
    before = snapshot(one)
    assert alike(snapshot(one), before)
    one[3].random()
    assert not alike(snapshot(one), before)
    assert alike(0.5, 1 / 2) and not alike(1, True) and not alike((1,), (1, 2))


def test_a_watch_gives_children_their_attributes_back() -> None:
    block = Unit()
    watch = Watch(block, block.__dict__)
    assert watch.changed() == []
    block.bn.momentum = 0.3
    block.bn.added = 1
    assert sorted(watch.changed()) == ["its child's attribute `bn.added`", "its child's attribute `bn.momentum`"]
    assert block.bn.momentum == 0.1 and not hasattr(block.bn, "added")


class Shared(Net):
    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def test_a_module_that_copies_to_itself_is_refused_untouched() -> None:
    model = nn.Sequential(Shared(Unit()), nn.AdaptiveAvgPool2d(1)).train()
    assert "__deepcopy__" in refusal(model)
    assert all(module.training for module in model.modules())

"""A child is exchanged after the conversion, in blocks whose forwards ask what their children are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.errors import LockedStateError

KINDS = (nn.ReLU, nn.ReLU6)
FACTORS = {"ReLU": 2.0, "GELU": 3.0}


class Block(nn.Module):
    """What all of them are made of: the answer about `act` decides by what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, 2, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.kind = nn.ReLU


class Isinstance(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if isinstance(self.act, nn.ReLU) else x


class OneOf(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if isinstance(self.act, KINDS) else x


class Helped(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if _is_relu(self.act) else x


def _is_relu(module: nn.Module) -> bool:
    return isinstance(module, nn.ReLU)


class ByVariable(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if isinstance(self.act, self.kind) else x


class Matched(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        match self.act:
            case nn.ReLU():
                return x * 2
        return x


class ByType(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if type(self.act) is nn.ReLU else x


class ByName(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * FACTORS[self.act.__class__.__name__]


class Hasattr(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * 2 if hasattr(self.act, "inplace") else x


class Getattr(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        return x * getattr(self.act, "scale", 1.0)


BLOCKS = [Isinstance, OneOf, Helped, ByVariable, Matched, ByType, ByName, Hasattr]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _converted(kind: type[Block]) -> nn.Module:
    model = padfree.convert(kind().eval(), input_size=(3, 32, 32))
    assert {match.name for match in padfree.plan(kind().eval(), input_size=(3, 32, 32)).matches} >= {"conv"}
    return model


@pytest.mark.parametrize("kind", BLOCKS)
def test_another_answer_raises(kind: type[Block]) -> None:
    model = _converted(kind)
    model(IMAGES)
    model.act = nn.GELU()
    with pytest.raises(LockedStateError, match=r"self.act.*baked into the converted forward"):
        model(IMAGES)
    model.act = nn.ReLU()  # as the error advises
    model(IMAGES)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_answer_is_kept_by_copies_and_files(kind: type[Block]) -> None:
    model = _converted(kind)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), padfree.fuse(model)):
        torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        with pytest.raises(LockedStateError):
            again.act = nn.GELU()  # a part of a fused chain refuses here
            again(IMAGES)


@pytest.mark.parametrize("kind", [Isinstance, OneOf, Helped, Matched, Hasattr])
def test_the_same_answer_gives_what_the_original_gives(kind: type[Block]) -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = _converted(kind)
    before = model(IMAGES)
    model.act = Doubled()
    assert not torch.equal(model(IMAGES), before)
    original = kind().eval()
    original.act = Doubled()
    again = padfree.convert(original, input_size=(3, 32, 32))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(IMAGES), again(IMAGES))


def test_an_attribute_that_is_asked_for_by_name() -> None:
    model = _converted(Getattr)
    model(IMAGES)
    model.act.scale = 3.0
    with pytest.raises(LockedStateError, match=r"hasattr\(self.act, 'scale'\)"):
        model(IMAGES)
    original = Getattr().eval()
    original.act.scale = 3.0
    model = padfree.convert(original, input_size=(3, 32, 32))
    model(IMAGES)
    model.act.scale = 4.0
    with pytest.raises(LockedStateError, match=r"self.act.scale.*3\.0.*4\.0"):
        model(IMAGES)


def test_a_child_that_is_not_asked_about_may_be_another() -> None:
    class Silent(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.conv(self.stem(x))))

    model = padfree.convert(Silent().eval(), input_size=(3, 32, 32))
    before = model(IMAGES)
    model.act = nn.GELU()
    assert not torch.equal(model(IMAGES), before)


@pytest.mark.parametrize("kind", [Isinstance, Hasattr, ByType])
def test_compiled_whole(kind: type[Block]) -> None:
    model = _converted(kind)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(IMAGES), model(IMAGES))

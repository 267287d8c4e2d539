"""In what `fuse` returned, children whose weights or work lie elsewhere now cannot be set anew."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import padfree
from padfree.errors import LockedStateError
from tests.deploy.lived import drawn

SIZE = (3, 32, 32)


class Plain(nn.Module):
    """Its strided chain becomes one layer in a generated forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Spread(nn.Module):
    """Parts of the chain lie in containers beside each other, as torchvision keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Within(nn.Module):
    """A block around one of them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3, 1, 1), block, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


class Folded(nn.Module):
    """Norms fold into convolutions, in a forward that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False))
        self.norm = timm.layers.BatchNormAct2d(8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.branch(self.bn(self.stem(x)))))


def fused(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind() if kind is Folded else padfree.convert(Within(kind()), input_size=SIZE, rules=("depthwise",))
    return padfree.fuse(drawn(model), input_size=SIZE)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((Plain, f"block.{name}") for name in ("conv", "bn", "act", "bn.act", "conv.weight")),
        *((Spread, f"block.{name}") for name in ("first.2", "second.0", "second.1", "third.0", "third.1")),
        *((Spread, f"block.{name}") for name in ("first", "second", "third", "first.0", "first.1")),
        *((Folded, path) for path in ("stem", "bn", "branch.0", "branch", "norm")),
    ],
)
def test_what_was_merged_or_folded_stays(kind: type[nn.Module], path: str) -> None:
    model = fused(kind)
    holder, _, name = path.rpartition(".")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = dict(each.named_modules())
        value: Any = nn.Parameter(torch.ones(8)) if name == "weight" else nn.SiLU()
        with pytest.raises(LockedStateError, match="and fuse that"):
            setattr(each.get_submodule(holder), name, value)
        assert dict(each.named_modules()) == before


class Quantized(nn.Conv2d):
    """What a library makes of a convolution, with its weights."""

    @classmethod
    def of(cls, conv: nn.Module) -> nn.Module:
        made = cls(8, 8, 1)
        made.__dict__.update({**conv.__dict__, "_parameters": dict(conv._parameters)})
        del made.__dict__["padfree_kept"]
        return made


def test_what_holds_the_same_is_set() -> None:
    model, x = fused(Folded), torch.randn(2, *SIZE)
    expected = model(x)
    for name, child in model.named_children():
        setattr(model, name, nn.Sequential(copy.deepcopy(child)))
    assert_close(model(x), expected)
    again = fused(Folded)
    again.branch[0] = Quantized.of(again.branch[0])
    assert_close(again(x), expected)


def test_what_was_neither_is_set() -> None:
    model, x = fused(Folded), torch.randn(2, *SIZE)
    model.norm.act, model.head = nn.Identity(), nn.Identity()
    assert_close(model(x), model.branch(model.stem(x)))

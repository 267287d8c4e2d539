"""Attributes named as a conv's settings that are none, pads made by children, asserts, and TorchScript.

PYTEST_DONT_REWRITE: pytest would replace the asserts of the forwards below by code of its own.
"""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from strangers import Net, Unit, check, convert, images, refusal
from torch import Tensor, nn
from torch.testing import assert_close

import padfree


class Head(nn.Module):
    """Runs a conv of its own weight; `stride` is what detection heads keep under that name."""

    def __init__(self, **named: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8, 1, 1))
        self.fc = nn.Conv2d(8, 4, 1)
        for name, value in named.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y = (F.conv2d(x, self.weight) + self.fc(x)).mean((2, 3))
        return y if self.training else y * 2


class Computed(Head):
    @property
    def stride(self) -> Tensor:
        return torch.tensor([8.0, 16.0])

    @property
    def padding(self) -> int:
        raise AttributeError("none")


class Broken(Head):
    @property
    def stride(self) -> int:
        raise RuntimeError("not built yet")


HEADS = [
    lambda: Head(stride=torch.tensor([8.0, 16.0])),
    lambda: Head(stride=[torch.tensor(8.0), torch.tensor(16.0)], padding=torch.zeros(2)),
    lambda: Head(stride=[8, 16, 32], padding=[0, 0, 0]),
    lambda: Head(stride=None, padding=None, kernel_size=torch.ones(3)),
    lambda: Head(stride=nn.Parameter(torch.ones(3)), padding="same"),
    lambda: Head(stride=8.0, padding=()),
    Computed,
    Broken,
]


@pytest.mark.parametrize("head", HEADS, ids=range(len(HEADS)))
def test_what_is_no_setting_is_left_alone(head: Any) -> None:
    made: Any = convert(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(), head())).eval()
    x = made[0](images())
    unit = made[1]
    y = F.conv2d(x, unit.conv.weight, unit.conv.bias, 2, 0, 1, 8)
    assert_close(made[:2](images()), F.relu(unit.bn(y)) + F.max_pool2d(x, 3, 2))
    assert_close(made(images()), made[2](made[:2](images())))


class PadChild(nn.Conv2d):
    """SAME padding worked out once and kept as a child, as EfficientNet packages do."""

    def __init__(self, sides: tuple[int, int, int, int]) -> None:
        super().__init__(8, 8, 3, 2, groups=8, bias=False)
        self.static_padding = nn.ZeroPad2d(sides) if any(sides) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PadInner(PadChild):
    """The pad lies two levels down."""

    def __init__(self, sides: tuple[int, int, int, int]) -> None:
        super().__init__(sides)
        self.static_padding = nn.Sequential(nn.Sequential(nn.ZeroPad2d(sides)))


@pytest.mark.parametrize("kind", [PadChild, PadInner])
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (1, 1, 1, 1)])
def test_a_conv_that_pads_in_a_child(kind: Any, sides: tuple[int, int, int, int]) -> None:
    unit = Unit()
    unit.conv = kind(sides)
    keys = list(Net(unit).state_dict())
    made = check(unit)
    assert list(made.state_dict()) == keys


class Asserts(Unit):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        assert x.dim() == 4, "a batch of maps"
        torch._assert(x.shape[2] == x.shape[3], "square maps only")
        b, c, h, w = x.shape
        assert h % 2 == 0 and w % 2 == 0, f"sides of {h}x{w}"
        y = self.act(self.bn(self.conv(x)))
        assert y.size(0) == b and c != 9
        return y


def test_asserts_on_shapes_stay() -> None:
    made = check(Asserts())
    for shape, words in (((1, 3, 16, 20), "square"), ((1, 3, 15, 15), r"^(sides of .*)?$")):
        with pytest.raises(AssertionError, match=words):
            made(torch.randn(shape))


class Branches(Unit):
    """No assert: a size decides."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 8:
            x = x + 1
        return self.act(self.bn(self.conv(x)))


def test_what_decides_is_no_assert() -> None:
    assert "control flow" in refusal(Net(Branches()))


class Typed(Unit):
    def forward(self, x: Tensor, extra: Optional[Tensor] = None, scale: float = 1.0) -> Tensor:  # noqa: UP045
        y = self.act(self.bn(self.conv(x)))
        return y if extra is None else y + extra * scale


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Typed()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Giver(Caller):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x, F.avg_pool2d(x, 2).mean((2, 3), keepdim=True), 2.0)


class Listed(Unit):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.act(self.bn(self.conv(xs[0]))) + xs[1].mean()


class ListCaller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Listed()

    def forward(self, x: Tensor) -> Tensor:
        return self.block([self.stem(x), x])


@pytest.mark.parametrize("build", [Caller, Giver, ListCaller, lambda: Net(Asserts()), lambda: Net(Unit())])
def test_what_scripted_scripts(build: Any) -> None:
    torch.jit.script(build())
    made = convert(build()).eval()
    assert_close(torch.jit.script(made)(images()), made(images()))


def test_a_flag_is_still_checked_when_called() -> None:
    made: Any = convert(Caller()).eval()
    with pytest.raises(RuntimeError, match="extra=None"):
        made.block(made.stem(images()), torch.zeros(1))
    assert isinstance(made, nn.Module) and padfree.is_converted(made)

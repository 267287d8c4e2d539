"""Operators whose fake kernels compare no sizes: what they read is held in place, or one real run finds it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from strangers import SIDE, Net, Unit, convert, images, refusal, snapshot
from torch import Tensor, nn

import padfree


@torch.library.custom_op("padfree_tests::blend", mutates_args=())
def blend(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two maps, where both have the same size."""
    if a.shape != b.shape:
        raise ValueError(f"blend takes two maps of one size, not {tuple(a.shape)} and {tuple(b.shape)}")
    return a + b


@blend.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a)


@torch.library.custom_op("padfree_tests::even", mutates_args=())
def even(a: Tensor) -> Tensor:
    """The map, whose sides must be even."""
    if a.shape[-1] % 2:
        raise ValueError(f"even takes even sides, not {tuple(a.shape)}")
    return a.clone()


@even.register_fake
def _(a: Tensor) -> Tensor:
    return torch.empty_like(a)


@torch.library.custom_op("padfree_tests::guided", mutates_args=())
def guided(small: Tensor, large: Tensor) -> Tensor:
    """The large map plus the mean of the small one; nothing is compared, not even for real."""
    return large + small.mean()


@guided.register_fake
def _(small: Tensor, large: Tensor) -> Tensor:
    return torch.empty_like(large)


@torch.library.custom_op("padfree_tests::placed", mutates_args=())
def placed(a: Tensor, table: Tensor) -> Tensor:
    """The map plus the mean of a table of its places; nothing is compared."""
    return a + table.mean()


@placed.register_fake
def _(a: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(a)


class Even(Net):
    def forward(self, x: Tensor) -> Tensor:
        return even(super().forward(x))  # type: ignore[no-any-return]


class Blends(nn.Module):
    """Two branches of which only one is converted: a strided conv beside one that pads by reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3, padding=1), Unit()
        self.other = nn.Conv2d(8, 8, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return blend(self.unit(x), self.other(x)).mean((2, 3))  # type: ignore[no-any-return]


class BlendsOne(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return blend(y, y * 2).mean((2, 3))  # type: ignore[no-any-return]


class Guided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3, padding=1), Unit()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return guided(self.unit(x), x).mean((2, 3))  # type: ignore[no-any-return]


class Placed(nn.Module):
    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.body, self.table = Net(Unit()), nn.Parameter(torch.randn(1, 8, side, side))

    def forward(self, x: Tensor) -> Tensor:
        return placed(self.body(x), self.table).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: Even(Unit()),
            "on real tensors the model's own forward fails on (1, 3, 16, 16): ValueError: even takes",
        ),
        (Blends, "`other` enters the same map and has no padding-free form"),
        (
            Guided,
            "the model's own forward guided reads maps of 8x8 and 16x16, and nothing says how their sizes must fit",
        ),
        (Placed, "placed reads a table of its own of (1, 8, 8, 8) beside a map that would be (1, 8, 7, 7)"),
    ],
)
def test_custom_operators_whose_fakes_compare_nothing(build: Any, words: str) -> None:
    assert words in refusal(build())


def test_operators_that_take_the_new_maps() -> None:
    assert convert(BlendsOne(Unit()).eval())(images()).shape == (2, 8)
    assert convert(Placed(3).eval())(images()).shape == (2, 8)


def test_the_check_can_be_turned_off() -> None:
    made = convert(Even(Unit()).eval(), check=False)
    with pytest.raises(ValueError, match="even takes even sides"):
        made(images())


def test_only_the_domain_at_fault_is_given_up() -> None:
    class Two(nn.Module):
        """31 pixels to 16, padding-free 15, then 8 or 7: only the second makes the sides odd."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(Unit()), Unit()

        def forward(self, x: Tensor) -> Tensor:
            return even(self.second(self.first(x)))  # type: ignore[no-any-return]

    plan = padfree.plan(Two(), rules=["depthwise"], input_size=(3, 31, 31))
    assert [match.name for match in plan.matches] == ["first.block.conv"]
    assert [skip.name for skip in plan.skips] == ["second.conv"]
    assert "even takes even sides" in plan.skips[0].reason


@pytest.mark.parametrize("stride", [1, 2])
def test_deformable_convolutions_with_converted_offsets(stride: int) -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Conv2d(8, 18, 3, stride, 1)
            self.conv = ops.DeformConv2d(8, 8, 3, stride, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x, self.offset(x)))

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(), Deformable()).eval()
    made = convert(model, rules=("depthwise", "dense"), size=(3, 2 * SIDE, 2 * SIDE))
    assert [match.name for match in made.padfree_plan.matches] == ["1.conv"]
    assert made(images(side=2 * SIDE)).shape[-1] == (8 if stride == 2 else 15)


class Remembers(Net):
    """Its forward writes into a buffer, a parameter and a list, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__(Unit())
        self.register_buffer("seen", torch.zeros(()))
        self.steps = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.means: list[float] = []

    def forward(self, x: Tensor) -> Any:
        self.seen += 1
        self.steps.data.add_(1)
        y = super().forward(x + torch.randn(()) + random.random())
        self.means.append(0.0)
        return y


def test_the_real_run_leaves_no_trace() -> None:
    fired: list[int] = []
    model = Remembers()
    model.block.register_forward_hook(lambda *_: fired.append(1))
    before = snapshot(model)
    plan = padfree.plan(model, rules=["depthwise"], input_size=(3, SIDE, SIDE))
    assert plan.matches and not fired
    assert snapshot(model) == before and model.means == []
    assert float(model.seen) == float(model.steps) == 0


noted: list[Any] = []


def note(x: Tensor) -> Tensor:
    """A function of its own: containers that a class's functions name are left as they were."""
    if not x.is_meta:
        noted.append((tuple(x.shape), x.dtype, torch.is_grad_enabled()))
    return x


class Noting(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(note(x))


@pytest.mark.parametrize(("settings", "times"), [({}, 1), ({"check": False}, 0)])
def test_one_image_in_eval_mode_without_gradients(settings: dict[str, bool], times: int) -> None:
    noted.clear()
    made = convert(Noting(Unit()).double().train(), **settings)
    assert noted == [((1, 3, SIDE, SIDE), torch.float64, False)] * times
    assert made.training


def test_a_costly_network_gets_a_smaller_image_and_the_whole_one_if_that_fails() -> None:
    class Costly(Noting):
        def __init__(self, least: int) -> None:
            super().__init__(Unit())
            self.wide, self.least = nn.Conv2d(8, 1024, 7, padding=3), least

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            if x.shape[-1] < self.least:
                raise ValueError("too small")
            return self.wide(y)

    for least, expected in ((64, [96]), (128, [96, 192])):
        noted.clear()
        convert(Costly(least), size=(3, 192, 192))
        assert [shape[-1] for shape, _, _ in noted] == expected


def test_a_model_that_cannot_run_for_real_is_taken_at_its_word() -> None:
    class NotHere(Net):
        def forward(self, x: Tensor) -> Any:
            if not x.is_meta:
                raise RuntimeError("no kernel image is available")
            return super().forward(x)

    assert padfree.plan(NotHere(Unit()), rules=["depthwise"], input_size=(3, SIDE, SIDE)).matches


def test_a_model_on_the_meta_device_is_not_run() -> None:
    with torch.device("meta"):
        model = Even(Unit())
    assert padfree.plan(model, rules=["depthwise"], input_size=(3, SIDE, SIDE)).matches

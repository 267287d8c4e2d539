"""New crops, pads and stretching, and returned maps that lose the image's sides: refused, or accepted and shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from strangers import SIDE, Net, Unit, convert, images, refusal
from torch import Tensor, nn

import padfree
from padfree import Options
from padfree.errors import Refusal
from padfree.record.recording import record
from padfree.verify.resizing import check_resizing

ACCEPT = Options(allow_resize=True)


def cut_rest(a: Tensor, b: Tensor) -> Tensor:
    return a[:, :, : b.shape[2], : b.shape[3]]


def narrowed(a: Tensor, b: Tensor) -> Tensor:
    return a.narrow(2, 0, b.shape[2]).narrow(3, 0, b.shape[3])


def selected(a: Tensor, b: Tensor) -> Tensor:
    rows = torch.arange(b.shape[2], device=a.device)
    return a.index_select(2, rows).index_select(3, rows)


def indexed(a: Tensor, b: Tensor) -> Tensor:
    rows = torch.arange(b.shape[2], device=a.device)
    return a[:, :, rows[:, None], rows]


def centred(a: Tensor, b: Tensor) -> Tensor:
    top, left = ((x - y) // 2 for x, y in zip(a.shape[2:], b.shape[2:], strict=True))
    return a[..., top : top + b.shape[2], left : left + b.shape[3]]


def padded_by_less(a: Tensor, b: Tensor) -> Tensor:
    rows, columns = (x - y for x, y in zip(a.shape[2:], b.shape[2:], strict=True))
    return F.pad(a, (0, -columns, 0, -rows))


def strided(a: Tensor, b: Tensor) -> Tensor:
    return a.as_strided((*a.shape[:2], *b.shape[2:]), a.stride())


def split(a: Tensor, b: Tensor) -> Tensor:
    rows = a.split([b.shape[2], a.shape[2] - b.shape[2]], 2)[0] if a.shape != b.shape else a
    return rows[..., : b.shape[3]]


def interpolated(a: Tensor, b: Tensor) -> Tensor:
    return F.interpolate(a, size=b.shape[2:])


def pooled(a: Tensor, b: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(b, a.shape[2:]) if a.shape == b.shape else F.adaptive_max_pool2d(b, a.shape[2:])


class Decoder(nn.Module):
    """A map (16) and what an unpadded way down and up makes of it (16, then 14) are brought together."""

    def __init__(self, fit: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 3, padding=1), Unit()
        self.up, self.fit = nn.ConvTranspose2d(8, 8, 2, 2), fit

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        b = self.up(self.unit(a))
        fitted = self.fit(a, b)
        return fitted.mean((2, 3)) + b.mean((2, 3))


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (cut_rest, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 16))"),
        (narrowed, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 16))"),
        (selected, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 16))"),
        (indexed, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 14))"),
        (centred, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 16))"),
        (strided, "newly crop a map ((1, 8, 16, 16) to (1, 8, 14, 14))"),
        (split, "newly crop a map"),
        (padded_by_less, "newly run constant_pad_nd"),
        (interpolated, "newly run upsample_nearest2d"),
    ],
)
def test_maps_brought_together_newly(fit: Callable[[Tensor, Tensor], Tensor], words: str) -> None:
    text = refusal(Decoder(fit))
    assert words in text and "Options(allow_resize=True) accepts that" in text
    made = convert(Decoder(fit).eval(), options=ACCEPT)
    assert made(images()).shape == (2, 8)


def test_a_stretching_pool_is_another_layer() -> None:
    assert "would run _adaptive_avg_pool2d 0 times" in refusal(Decoder(pooled))


def border(y: Tensor) -> Tensor:
    return y[:, :, 1:-1, 1:-1]


def all_but_one(y: Tensor) -> Tensor:
    return y[:, :, :-1]


def every_second(y: Tensor) -> Tensor:
    return y[..., ::2, ::2]


def a_corner(y: Tensor) -> Tensor:
    return y[..., :4, :4]


def halves(y: Tensor) -> Tensor:
    return torch.cat(y.chunk(2, 3), 3)


@pytest.mark.parametrize("cut", [border, all_but_one, every_second, a_corner, halves])
def test_a_crop_that_was_there_before_is_none(cut: Callable[[Tensor], Tensor]) -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net(Unit())

        def forward(self, x: Tensor) -> Tensor:
            return cut(self.body(x)).mean((2, 3))

    assert convert(Cuts().eval())(images()).shape == (2, 8)


def test_a_crop_that_takes_more_than_before() -> None:
    class More(Decoder):
        """17 pixels cut to 16 before; to 14 now."""

        def forward(self, x: Tensor) -> Tensor:
            a = F.pad(self.stem(x), (0, 1, 0, 1))
            b = self.up(self.unit(a[..., 1:, 1:]))
            return (a[..., : b.shape[2], : b.shape[3]] + b).mean((2, 3))

    assert "newly crop a map ((1, 8, 17, 17) to (1, 8, 14, 17))" in refusal(More(cut_rest))


class CropsWithin(nn.Module):
    """The forward that is rewritten itself cuts a map to another's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.up = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(torch.relu(self.bn(self.conv(x))))
        return x[:, :, : y.shape[2], : y.shape[3]] + y


def test_a_crop_within_a_rewritten_forward() -> None:
    assert "`block` would newly crop a map" in refusal(Net(CropsWithin()), rules=("dense",))


class Returns(nn.Module):
    """A network whose outputs are what a function makes of the image, the stem's and the unit's map."""

    def __init__(self, give: Callable[..., Any]) -> None:
        super().__init__()
        self.stem, self.unit, self.give = nn.Conv2d(3, 8, 3, padding=1), Unit(), give

    def forward(self, x: Tensor) -> Any:
        a = self.stem(x)
        return self.give(x, a, self.unit(a))


def twice(y: Tensor, times: int = 2) -> Tensor:
    return F.interpolate(y, scale_factor=times)


@pytest.mark.parametrize(
    ("give", "times", "before", "after"),
    [
        (lambda x, a, b: twice(b), "the image's own", "16x16", "14x14"),
        (lambda x, a, b: {"out": twice(b), "aux": b}, "the image's own", "16x16", "14x14"),
        (lambda x, a, b: ((twice(b),), b), "the image's own", "16x16", "14x14"),
        (lambda x, a, b: twice(b, 4), "2 times the image's", "32x32", "28x28"),
        (lambda x, a, b: twice(b).flatten(2), "the image's own", "256", "196"),
    ],
)
def test_a_returned_map_that_has_the_images_sides_keeps_them(
    give: Callable[..., Any], times: str, before: str, after: str
) -> None:
    text = refusal(Returns(give))
    assert f"the model returns a map of {times} sides, {before}, and would return {after}" in text
    assert "Options(allow_resize=True) accepts that" in text
    made = convert(Returns(give), options=ACCEPT)
    assert made.padfree_plan.outputs[0].sizes(" becomes ") == f"{before} becomes {after}"


@pytest.mark.parametrize(
    ("give", "shown"),
    [
        (lambda x, a, b: F.interpolate(b, size=x.shape[2:]), ["output     16x16"]),
        (lambda x, a, b: b, ["output     8x8 becomes 7x7"]),
        (lambda x, a, b: (a, b), ["output     0: 16x16", "output     1: 8x8 becomes 7x7"]),
        (lambda x, a, b: {"pyramid": [a, b]}, ["output     pyramid.0: 16x16", "output     pyramid.1: 8x8 becomes 7x7"]),
        (lambda x, a, b: b.flatten(2), ["output     64 becomes 49"]),
        (lambda x, a, b: b.mean((2, 3)), []),
    ],
)
def test_plans_show_every_returned_map(give: Callable[..., Any], shown: list[str]) -> None:
    model = Returns(give).eval()
    plan = padfree.plan(model, rules=["depthwise"], input_size=(3, SIDE, SIDE))
    assert [match.name for match in plan.matches] == ["unit.conv"]
    assert [line.strip() for line in str(plan).splitlines() if line.strip().startswith("output")] == shown
    assert padfree.Plan.from_dict(plan.to_dict()) == plan
    compared = padfree.compare(model, plan.apply(model))
    assert compared.outputs == plan.outputs
    assert compared.to_dict()["outputs"] == plan.to_dict()["outputs"]


def test_shapes_in_a_plan_are_whole() -> None:
    plan = padfree.plan(Returns(lambda x, a, b: b), rules=["depthwise"], input_size=(3, SIDE, SIDE))
    assert plan.to_dict()["outputs"] == [{"name": "", "before": [1, 8, 8, 8], "after": [1, 8, 7, 7]}]


def test_a_plan_of_an_earlier_version_has_no_outputs() -> None:
    data = padfree.plan(Returns(lambda x, a, b: b), rules=["depthwise"], input_size=(3, SIDE, SIDE)).to_dict()
    del data["outputs"]
    assert padfree.Plan.from_dict(data).outputs == ()


@pytest.mark.parametrize(
    "outputs", [3, [3], [{"name": 3, "before": [1], "after": [1]}], [{"name": "a", "before": ["x"]}]]
)
def test_outputs_that_are_none(outputs: Any) -> None:
    data = padfree.plan(Net(Unit()), rules=["depthwise"], input_size=(3, SIDE, SIDE)).to_dict()
    with pytest.raises(padfree.errors.PlanError, match="not a plan"):
        padfree.Plan.from_dict({**data, "outputs": outputs})


def test_a_plan_that_converts_nothing_shows_them_too() -> None:
    plan = padfree.plan(Returns(lambda x, a, b: twice(b)), rules=["depthwise"], input_size=(3, SIDE, SIDE))
    assert not plan.matches and str(plan).endswith("output     16x16")


class Finder(nn.Module):
    """Finds so many things in an image, and stretches what it cuts out at each; the image too, if `whole`.

    `late`: a strided convolution reads what was found.
    """

    def __init__(self, things: int, whole: bool = False, late: bool = False) -> None:
        super().__init__()
        self.things, self.whole, self.late = things, whole, late
        self.conv = nn.Conv2d(3, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.nonzero(torch.arange(9, device=x.device) + 0 * x.sum() < self.things)
        cut = [F.interpolate((x * (place.sum() + 1))[:, :, 1:5, 1:5], size=(9, 9)) for place in found]
        total = sum((part.mean() for part in cut), x.mean())
        if self.late:
            total = total + sum(self.conv(part).mean() for part in cut[:1])
        return total + F.interpolate(x, size=(9, 9)).mean() if self.whole else total


def test_what_is_done_to_each_thing_that_is_found_is_not_compared() -> None:
    one, three, whole = (record(Finder(*how), (3, 8, 8)) for how in ((1,), (3,), (3, True)))
    assert not one.meta
    check_resizing(one, three)
    with pytest.raises(Refusal, match="would newly run upsample_nearest2d"):
        check_resizing(one, whole)
    early, more = (record(Finder(things, late=True), (3, 8, 8)) for things in (1, 3))
    with pytest.raises(Refusal, match="would newly run upsample_nearest2d"):  # a conversion may have changed its size
        check_resizing(early, more)

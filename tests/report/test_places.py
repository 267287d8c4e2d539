"""What places save and add, by hand, and that all of it adds up to the networks' own counts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import padfree
from padfree.layers.learned_groups import LearnedGroupConv2d, condense_stage
from padfree.record.recording import record
from padfree.report.comparison import Comparison
from padfree.report.costs import Cost, costs
from padfree.report.macs import count_macs, count_params

SIZE = (3, 32, 32)


def unit(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def plain() -> nn.Module:
    """A stem, a depthwise and a dense downsampling."""
    return nn.Sequential(
        unit(3, 8, 2), nn.Sequential(unit(8, 8, 2, 8), nn.Conv2d(8, 16, 1)), unit(16, 24, 2), nn.AdaptiveAvgPool2d(1)
    )


class Residual(nn.Module):
    """A block whose two branches downsample; the model's own forward pools, adds, flattens and classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.main = nn.Sequential(unit(8, 8, 2), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.last = unit(8, 12, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.main(x) + self.short(x))
        return self.head(self.last(x).mean((2, 3)))


class Learned(nn.Module):
    """A learned group convolution, half of whose weights are masked, behind a downsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = unit(3, 8, 2)
        self.learned = LearnedGroupConv2d(8, 8, 1, groups=2, condense_factor=2)
        self.more = unit(8, 8, 2)
        condense_stage(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.learned(self.down(x)))


def compared(model: nn.Module, size: tuple[int, ...] = SIZE, **settings: object) -> Comparison:
    return padfree.compare(model, padfree.convert(model, input_size=size, **settings), size)  # type: ignore[arg-type]


def test_places_by_hand() -> None:
    found = compared(plain())
    stem, depthwise, dense, rest = found.places
    assert [(place.name, place.rules) for place in found.places] == [
        ("0.0", ("stem",)),
        ("1.0.0", ("depthwise",)),
        ("2.0", ("dense",)),
        ("", ()),
    ]
    norm = 2  # of fvcore's multiply-adds for each element
    # the tail: a depthwise 3x3 with its norm, a 1x1 of both halves with its norm, on maps of 16x16
    tail = 256 * (8 * 9 + 8 * norm + 8 * 16 + 8 * norm)
    assert (stem.before.macs, stem.maps.macs, stem.layers.macs) == (256 * 8 * 27, 0, tail)
    assert stem.layers.params == 8 * 9 + 16 + 8 * 16 + 16
    pixel = 8 * 9 + 8 * norm + 16 * 8  # of the depthwise convolution, its norm, and the 1x1 behind it
    assert (depthwise.before.macs, depthwise.maps.macs, depthwise.layers) == (64 * pixel, (49 - 64) * pixel, Cost())
    pixel = 24 * 16 * 9 + 24 * norm + 24  # the last is the average pool's
    assert (dense.before.macs, dense.maps.macs) == (16 * pixel, (9 - 16) * pixel)
    assert (dense.layers.macs, dense.layers.params) == (9 * 24 * 16, 24 * 16)  # the 1x1 beside the pool
    assert (rest.before.macs, rest.maps.macs, rest.layers) == (256 * 8 * norm, 0, Cost())  # the stem's own norm


@pytest.mark.parametrize(
    "make",
    [
        lambda: compared(plain()),
        lambda: compared(Residual()),
        lambda: compared(Residual(), options=padfree.Options(projection="dense", merge="norm")),
        lambda: compared(Residual(), include=["last"]),
        lambda: compared(Learned()),
        lambda: compared(timm.create_model("test_resnet"), (3, 64, 64)),
        lambda: compared(timm.create_model("lcnet_035"), (3, 64, 64)),
        lambda: compared(timm.create_model("test_efficientnet_evos"), (3, 64, 64)),
    ],
    ids=["plain", "residual", "dense projection", "one place", "masked weights", "resnet", "lcnet", "evonorm"],
)
def test_places_add_up_to_both_networks(make: Callable[[], Comparison]) -> None:
    found = make()
    total = found.total()
    assert len(found.places) >= 2
    assert (total.before.params, total.after.params) == (found.params.original, found.params.converted)
    assert (total.before.macs, total.after.macs) == (found.macs.original, found.macs.converted)
    assert all(place.maps.params == 0 and place.layers.macs >= 0 for place in found.places)
    shrinking = [place for place in found.places if place.rules not in ((), ("stem",))]
    assert all(place.maps.macs < 0 for place in shrinking)


def test_networks_converted_in_steps_have_the_places_of_all() -> None:
    model = Residual()
    once = padfree.convert(model, input_size=SIZE, rules=("stem",))
    twice = padfree.convert(once, input_size=SIZE)
    found = padfree.compare(model, twice, SIZE)
    assert [place.rules for place in found.places] == [("stem",), ("dense", "projection"), ("dense",), ()]
    assert [place.name for place in found.places] == ["stem.0", "main.0.0 and 1 more", "last.0", ""]
    both = padfree.compare(model, padfree.convert(model, input_size=SIZE), SIZE)
    assert found.places == both.places
    replaced = padfree.replace(model, "bsconv-u", input_size=SIZE, include=["last"])
    (pair, rest) = padfree.compare(model, replaced, SIZE).places
    assert pair.name == "last.0" and pair.maps.macs == 0
    # 3x3 8 -> 12 at 8x8 pixels: instead of it a 1x1 that reads 16x16 and a depthwise 3x3
    assert pair.layers.macs == 256 * 8 * 12 + 64 * 12 * 9 - 64 * 8 * 12 * 9
    assert pair.layers.params == 8 * 12 + 12 * 9 - 8 * 12 * 9
    assert rest.layers == Cost() and rest.maps.macs == rest.maps.params == 0


def test_another_size_than_the_plans_has_the_same_places() -> None:
    model = plain()
    converted = padfree.convert(model, input_size=SIZE)
    large = padfree.compare(model, converted, (3, 64, 64))
    assert [place.name for place in large.places] == ["0.0", "1.0.0", "2.0", ""]
    assert large.total().after.macs == large.macs.converted
    assert large.places[1].maps.macs == (15 * 15 - 16 * 16) * (8 * 9 + 8 * 2 + 16 * 8)


def test_what_costs_more_than_it_saves_is_named() -> None:
    more = [text for label, text in compared(plain()).rows() if label == "costs more"]
    assert more == ["0.0 adds +0.06M, smaller maps save -0.03M: padfree.advise says what pays"]
    less = compared(plain(), rules=("depthwise", "dense"))
    assert "costs more" not in dict(less.rows()) and less.total().after.macs < less.total().before.macs


def test_without_a_plan_there_are_no_places() -> None:
    found = padfree.compare(plain(), plain(), SIZE)
    assert found.places == () and found.place_rows() == [] and "elsewhere" not in str(found)


def test_the_table_fits_and_the_data_are_plain() -> None:
    found = compared(Residual())
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    rows = found.place_rows()
    assert [row[0] for row in rows] == ["place", "stem.0", "main.0.0 and 1 more", "last.0", "elsewhere", "sum"]
    assert rows[-1][-1] == f"+{(found.params.converted or 0) - (found.params.original or 0):,}"
    data = json.loads(json.dumps(found.to_dict()))["places"]
    assert data[1]["rules"] == ["dense", "projection"]
    assert sum(place["after"]["macs"] for place in data) == found.macs.converted


def test_costs_by_hand() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    )
    counted = count_macs(model, (3, 8, 8))
    found = costs(model, record(model, (3, 8, 8)), counted.own)
    assert found["0.0"] == Cost(3 * 4 * 9 + 4, 16 * 4 * 27, 64)
    assert found["0.1"] == Cost(0, 0, 64)
    assert (found["1.1"].params, found["1.1"].macs) == (64 * 5 + 5, 64 * 5)
    assert sum(cost.params for cost in found.values()) == count_params(model)
    assert sum(cost.macs for cost in found.values()) == sum(counted.own.values()) == counted.macs

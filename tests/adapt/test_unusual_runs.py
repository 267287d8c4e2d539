"""Calibration of networks and batches that are not what most are: too few images, autocast, single images, buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.errors import PadfreeError
from padfree.rules._toys import depthwise, net, unit

SIZE = (3, 16, 16)


def trained(model: nn.Module) -> nn.Module:
    """Norms that have seen images."""
    for _ in range(20):
        model.train()(torch.randn(8, *SIZE))
    return model.eval()


def converted(original: nn.Module) -> nn.Module:
    return padfree.convert(original, input_size=SIZE, init="preserve")


def images(*counts: int) -> list[Tensor]:
    return [torch.randn(count, *SIZE) for count in counts]


@pytest.mark.parametrize(
    ("counts", "told"), [((8,), "8 images are too few"), ((1, 1, 1, 1), "batches hold one image each")]
)
@pytest.mark.parametrize("given", [True, False])
def test_too_few_images_to_measure_on(counts: tuple[int, ...], told: str, given: bool) -> None:
    original = trained(net(depthwise(8)))
    model = converted(original)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PadfreeError, match=told):
        padfree.calibrate(model, images(*counts), original=original if given else None)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_last_batch_of_one_image() -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 4))
    original = trained(nn.Sequential(unit(3, 8), depthwise(8), head))
    report = padfree.calibrate(converted(original), images(8, 8, 8, 8, 8, 1), original=original)
    done = next(step for step in report.steps if step.name == "recalibrate")
    assert done.places == 5  # of the stem, its tail (two), the strided unit and the head


def test_autocast_around_it_changes_nothing() -> None:
    original = trained(net(unit(8, 16, 1), depthwise(16), unit(16, 8, 1)))
    batches = images(8, 8, 8, 8, 8)
    plain, under = converted(original), converted(original)
    padfree.calibrate(plain, batches, original=original)
    with torch.autocast("cpu", torch.bfloat16):
        padfree.calibrate(under, batches, original=original)
    torch.testing.assert_close(dict(under.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


class Scaled(nn.Module):
    """An image over its largest value, as a tensor or as a number."""

    def __init__(self, number: bool) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().max()
        return x / (float(largest) if self.number else largest)


@pytest.mark.parametrize("number", [False, True])
def test_numbers_read_off_the_images_are_no_constants(number: bool) -> None:
    original = trained(nn.Sequential(Scaled(number), *net(depthwise(8), unit(8, 8, 1))))
    model = converted(original)
    batches = [batch * (index + 1) for index, batch in enumerate(images(8, 8, 8, 8, 8))]
    if not number:
        padfree.calibrate(model, batches, original=original)
        return
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PadfreeError, match="depends on numbers that its forward reads off the images"):
        padfree.calibrate(model, batches, original=original)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


class Counting(nn.Module):
    """Counts its calls in a buffer, in eval mode, too."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_the_originals_buffers_stay() -> None:
    original: Any = trained(nn.Sequential(Counting(), *net(depthwise(8), unit(8, 8, 1))))
    model = converted(original)
    before = float(original[0].calls)
    padfree.calibrate(model, images(8, 8, 8, 8, 8), original=original)
    assert float(original[0].calls) == before

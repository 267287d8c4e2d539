"""`padfree.replace` with batches: networks that write into what they read, and fits that fail midway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padfree
from padfree.errors import PadfreeError

SIZE = (3, 12, 12)


class Normalised(nn.Module):
    """Writes into the image that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5).div_(0.5)


class Named(nn.Module):
    """A convolution that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x)


def network(*first: nn.Module) -> nn.Sequential:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return nn.Sequential(*first, nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Named(), head).eval()


def images(*counts: int, channels: int = 3) -> list[Tensor]:
    return [torch.randn(count, channels, *SIZE[1:]) for count in counts]


def fitted(model: nn.Module, batches: list[Tensor], **settings: Any) -> nn.Module:
    return padfree.replace(model, "bsconv-u", batches=batches, input_size=SIZE, **settings)


def test_the_images_stay_and_the_values_are_those_of_a_network_that_writes_elsewhere() -> None:
    writing = network(Normalised())
    batches = images(8, 8)
    given = [batch.clone() for batch in batches]
    found = fitted(writing, batches, norms=True)
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))
    plain = nn.Sequential(*writing[1:])
    expected = fitted(plain, [(batch - 0.5) / 0.5 for batch in batches], norms=True)
    x = images(2)[0]
    torch.testing.assert_close(found(x.clone()), expected((x - 0.5) / 0.5), rtol=1e-3, atol=1e-4)


def _stopped(report: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "settings", "error"),
    [
        (lambda: [*images(8), *images(8, channels=4)], {}, PadfreeError),
        (lambda: images(8, 8), {"progress": _stopped}, KeyboardInterrupt),
        (lambda: images(1), {"norms": True}, PadfreeError),
    ],
    ids=["another size", "interrupted", "norms of one image"],
)
def test_where_it_fails_the_network_is_as_before(
    batches: Callable[[], list[Tensor]], settings: dict[str, Any], error: type[BaseException]
) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error):
        fitted(model, batches(), inplace=True, **settings)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not hasattr(model, "padfree_plan") and type(model[0]) is nn.Conv2d


def test_in_place_is_the_same_object_with_the_same_values() -> None:
    model = network()
    batches = images(8, 8)
    expected = fitted(model, batches, norms=True)
    found = fitted(model, batches, norms=True, inplace=True)
    assert found is model and found.padfree_plan == expected.padfree_plan
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()))


def test_a_last_batch_of_one_image() -> None:
    fitted(network(), images(8, 8, 1), norms=True)


def test_an_init_that_is_not_the_fits_is_refused() -> None:
    with pytest.raises(PadfreeError, match="init='xavier'"):
        fitted(network(), images(8), init="xavier")


def test_autocast_around_it_changes_nothing() -> None:
    model, batches = network(), images(8, 8)
    expected = fitted(model, batches)
    with torch.autocast("cpu", torch.bfloat16):
        found = fitted(model, batches)
    torch.testing.assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)

"""The 1x1 convolution of a hybrid stem as two: the same network, and where it is left whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import padfree
from padfree.deploy.split import SplitTail, split_stems
from padfree.layers.stem import StemTail

SIZE = (3, 16, 16)


class Stem(nn.Module):
    """A stem alone, converted: what its tail is made of is the case's."""

    def __init__(self, norm=nn.BatchNorm2d, act=nn.Hardswish, pool=False):
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), norm(8), act()
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.conv2 = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.conv2(self.pool(self.act1(self.bn1(self.conv1(x)))))


def lived_stem(**arguments):
    """It, converted, with norms that do something."""
    torch.manual_seed(0)
    model = padfree.convert(
        Stem(**{key: value for key, value in arguments.items() if key != "options"}),
        rules=("stem",),
        input_size=(3, 16, 16),
        options=arguments.get("options"),
    )
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


def group_norm(channels):
    return nn.GroupNorm(2, channels)


def tails(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, StemTail)]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"pool": True},
        {"norm": group_norm},
        {"norm": nn.Identity, "act": nn.ReLU},
        {"options": padfree.Options(stem_residual=True)},
        {"options": padfree.Options(stem_residual=True), "pool": True},
    ],
)
def test_the_split_network_is_the_same(arguments: dict[str, Any]) -> None:
    model = lived_stem(**arguments).double()
    split = split_stems(model, SIZE)
    assert [type(tail) for tail in tails(model)] == [StemTail]
    assert [type(tail) for tail in tails(split)] == [SplitTail]
    assert (tails(split)[0].left.in_channels, tails(split)[0].right.in_channels) == (8, 8)
    x = torch.randn(2, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(split(x), model(x), rtol=1e-9, atol=1e-9)


def hooked(tail: StemTail) -> None:
    tail.conv_pw.register_forward_hook(lambda module, inputs, output: 2 * output)


def parametrised(tail: StemTail) -> None:
    nn.utils.parametrizations.weight_norm(tail.conv_pw)


def before_the_norm(tail: StemTail) -> None:
    tail.preact = True


@pytest.mark.parametrize("change", [hooked, parametrised, before_the_norm])
def test_a_tail_that_is_more_than_its_parts_stays_whole(change: Any) -> None:
    model = lived_stem()
    change(tails(model)[0])
    assert split_stems(model, SIZE) is model


def test_a_network_without_a_tail_is_itself() -> None:
    model = Stem().eval()
    assert split_stems(model, SIZE) is model


def test_a_weight_that_two_tails_share_is_split_in_both() -> None:
    tail = tails(lived_stem())[0]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), tail, nn.Conv2d(8, 8, 1), tail).eval()
    x = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(split_stems(model, SIZE)(x), model(x), rtol=1e-4, atol=1e-4)

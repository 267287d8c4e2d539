"""What is converted together: the matches of a domain whole, or none of them, and the reason."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padfree.plan.groups import Group, find
from padfree.plan.patterns import Named
from padfree.rules._toys import Residual, depthwise, unit
from padfree.rules.base import rules
from padfree.types import NO_DOMAIN, Options, Skip
from tests.recordings import sites_of


def found(forward: Any, names: tuple[str, ...] | None = None, places: Named | None = None, **children: nn.Module):
    sites = sites_of(lambda net, x: forward(net, net.stem(x)), (3, 32, 32), stem=unit(3, 8), **children)
    return find(sites, rules(names), Options(), places or Named())


def names(groups: list[Group]) -> list[list[str]]:
    return [[match.name for match in group.matches] for group in groups]


def whys(skips: list[Skip]) -> dict[str, str]:
    return {skip.name: skip.reason for skip in skips}


def block(**settings: Any) -> Residual:
    """A main branch of a dense conv beside a strided 1x1 projection."""
    return Residual(unit(8, 8, stride=2, **settings), unit(8, 8, 1, 2, act=False))


class Functional(nn.Module):
    """The same block, its main conv called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.short = nn.Parameter(torch.ones(8, 8, 3, 3)), unit(8, 8, 1, 2, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, stride=2, padding=1).relu() + self.short(x)


class Blur(nn.Module):
    """A pool by a fixed filter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.full((8, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, stride=2, padding=1, groups=8)


def test_branches_that_meet_are_one_group() -> None:
    groups, skips = found(lambda net, x: net.one(net.two(net.block(x))),
                          one=depthwise(8), two=depthwise(8), block=block())  # fmt: skip
    assert names(groups) == [["stem.0"], ["block.main.0", "block.shortcut.0"], ["two.0"], ["one.0"]]
    assert [group.domain == NO_DOMAIN for group in groups] == [True, False, False, False]
    assert all({match.domain for match in group.matches} == {group.domain} for group in groups)
    assert skips == [] and groups[1].name == "block.main.0"


def test_what_only_enters_the_same_map_by_a_sum_is_one_group() -> None:
    groups, _ = found(lambda net, x: net.one(x) + net.two(x).relu(), one=depthwise(8), two=depthwise(8))
    assert names(groups)[1:] == [["one.0", "two.0"]]
    groups, _ = found(lambda net, x: (net.one(x), net.two(x)), one=depthwise(8), two=depthwise(8))
    assert names(groups)[1:] == [["one.0"], ["two.0"]]


def test_rules_that_are_not_selected_stop_a_domain_and_are_not_named() -> None:
    groups, skips = found(lambda net, x: net.block(x), ("dense",), block=block())
    assert groups == []
    assert whys(skips) == {
        "block.main.0": "`block.shortcut.0` enters the same map and needs rule 'projection', which is not selected"
    }
    groups, skips = found(lambda net, x: net.alone(x), ("dense",), alone=unit(8, 8, stride=2))
    assert (names(groups), skips) == ([["alone.0"]], [])


def test_one_place_that_is_not_wanted_stops_its_domain() -> None:
    groups, skips = found(lambda net, x: net.last(net.block(x)), None, Named(exclude="block.main"),
                          block=block(), last=depthwise(8))  # fmt: skip
    assert names(groups) == [["stem.0"], ["last.0"]]
    reason = "`block.main.0` enters the same map and is not among the included modules, or is excluded"
    assert whys(skips) == {"block.main.0": reason, "block.shortcut.0": reason}
    groups, skips = found(lambda net, x: net.last(net.block(x)), None, Named(include="block"),
                          block=block(), last=depthwise(8))  # fmt: skip
    assert names(groups) == [["block.main.0", "block.shortcut.0"]]
    assert set(whys(skips)) == {"stem.0", "last.0"}
    assert whys(skips)["stem.0"] == Named.unwanted  # a stem shrinks nothing: no map is entered


def test_an_entry_without_a_padding_free_form_stops_its_domain() -> None:
    groups, skips = found(lambda net, x: net.conv(x) + net.blur(x), conv=depthwise(8), blur=Blur())
    assert names(groups) == [["stem.0"]]
    assert whys(skips)["conv.0"].startswith("`blur` enters the same map and has no padding-free form: its fixed filter")
    assert "function call" in whys(skips)["blur"]
    groups, skips = found(lambda net, x: net.conv(x) + net.even(x), conv=depthwise(8),
                          even=unit(8, 8, 2, 2, padding=0))  # fmt: skip
    assert names(groups) == [["stem.0"]]
    assert "`even.0` enters the same map and has no padding-free form: " in whys(skips)["conv.0"]
    assert "2x2" in whys(skips)["conv.0"]


def test_an_entry_that_shrinks_alike_as_it_stands_does_not() -> None:
    both = {"conv": depthwise(8), "other": unit(8, 8, 3, 2, padding=0)}
    groups, skips = found(lambda net, x: F.pad(net.conv(x), (0, -1, 0, -1)) + net.other(x), **both)
    assert names(groups) == [["stem.0"], ["conv.0"]]  # a domain of its own, before the crop
    groups, skips = found(lambda net, x: net.other(x) + F.max_pool2d(x, 3, 2), **both)
    assert names(groups) == [["stem.0"]] and whys(skips) == {"other.0": "it is padding-free already"}


def test_a_projection_alone_is_not_converted() -> None:
    groups, skips = found(lambda net, x: net.block(x), ("dense", "projection"), block=Functional())
    assert groups == []
    assert whys(skips)["block.short.0"].startswith("`block`: it is a function call")
    assert list(whys(skips)) == ["block", "block.short.0"]


def test_a_skip_of_a_rule_that_is_not_selected_is_not_shown() -> None:
    children = {"even": unit(8, 8, 3, 4), "depth": depthwise(8, stride=4)}
    _, skips = found(lambda net, x: (net.even(x), net.depth(x)), ("dense", "depthwise"), **children)
    assert set(whys(skips)) == {"even.0", "depth.0"}
    _, skips = found(lambda net, x: (net.even(x), net.depth(x)), ("depthwise",), **children)
    assert set(whys(skips)) == {"depth.0"}

"""The sizes that maps will have, against what the networks with these convs and pools really write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree
from padfree.geometry import padfree_size
from padfree.plan.groups import Group
from padfree.plan.sizes import sizes_after, with_sizes
from padfree.rules._toys import depthwise, net
from padfree.types import NO_DOMAIN, Match, StridedDetail
from tests.recordings import image, made, ops, sites_of


def match(sites: Any, op: Any) -> Match:
    """A match of the conv or pool `op`, with the sizes of the original."""
    flow = sites.flow
    size, out = flow.size(sites.read_by(op)), flow.size(op.outputs[0])
    return Match("toy", "toy", "", flow.domain(op.outputs[0]), size, out, out, StridedDetail(op.index))


@pytest.mark.parametrize("size", [(12, 17), (16, 33), (19, 20), (31, 64)])
def test_each_map_of_a_chain_of_conversions(size: tuple[int, int]) -> None:
    convs = [nn.Conv2d(4, 4, 3, 2, 1) for _ in range(2)]
    sites = sites_of(lambda net, x: net.b(net.a(x)), (4, *size), a=convs[0], b=convs[1])
    one, other = ops(sites.flow, "convolution")
    groups = [Group(found.domain, (found,)) for found in (match(sites, one), match(sites, other))]
    first = tuple(map(padfree_size, size))
    second = tuple(map(padfree_size, first))
    sizes = sizes_after(sites, groups)
    assert [sizes[sites.flow.domain(op.outputs[0])] for op in (one, other)] == [first, second]
    assert sizes[sites.flow.domain(image(sites.flow))] == size
    assert [found.out_after for found in with_sizes(groups, sizes, sites)] == [first, second]
    assert sizes_after(sites, [])[sites.flow.domain(other.outputs[0])] == sites.flow.size(other.outputs[0])


FOLLOWING: list[Any] = [
    lambda y: F.max_pool2d(y, 3, 2, 1),
    lambda y: F.max_pool2d(y, 2),
    lambda y: torch.max_pool2d(y, 3),
    lambda y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True),
    lambda y: F.max_pool2d(y, (2, 3), (2, 1), (1, 0), (2, 1)),
    lambda y: F.avg_pool2d(y, 2),
    lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True),
    lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False),
    lambda y: F.max_pool2d(F.pad(y, (0, 1, 0, 1)), 3, 2),
    nn.Conv2d(4, 4, 3, 2, 1),
    nn.Conv2d(4, 4, 3, (2, 1), 1),
    nn.Conv2d(4, 4, 5, 3, (2, 0)),
    nn.Conv2d(4, 4, 3, 2, 2, dilation=2),
    nn.Conv2d(4, 4, 1, 2),
    nn.Conv2d(4, 4, 2, 2),
    nn.ConvTranspose2d(4, 4, 3, 2, 1),
    nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
    nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)),
]


@pytest.mark.parametrize("index", range(len(FOLLOWING)))
@pytest.mark.parametrize("size", [(16, 17), (33, 18), (35, 64)])
def test_what_is_not_converted_follows_by_its_own_formula(index: int, size: tuple[int, int]) -> None:
    function = FOLLOWING[index]
    children = {"after": function} if isinstance(function, nn.Module) else {}

    def forward(net: Any, x: Tensor) -> Tensor:
        return (net.after if children else function)(net.down(x))

    sites = sites_of(forward, (4, *size), down=nn.Conv2d(4, 4, 3, 2, 1), **children)
    found = match(sites, ops(sites.flow, "convolution")[0])
    sizes = sizes_after(sites, [Group(found.domain, (found,))])
    out = function(torch.zeros(1, 4, *map(padfree_size, size))).shape[2:]
    assert sizes[sites.flow.domain(sites.recording.outputs[0])] == tuple(out)


def test_gates_and_maps_that_are_no_convs_or_pools_keep_theirs() -> None:
    sites = sites_of(lambda net, x: (y := net.down(x)) * y.mean((2, 3), keepdim=True), down=nn.Conv2d(3, 3, 3, 2, 1))
    found = match(sites, ops(sites.flow, "convolution")[0])
    sizes = sizes_after(sites, [Group(found.domain, (found,))])
    assert sizes[sites.flow.domain(made(sites.flow, "mean"))] == (1, 1)
    assert sizes[found.domain] == sizes[sites.flow.domain(sites.recording.outputs[0])] == (3, 5)


def test_matches_that_shrink_nothing_stay_as_they_are() -> None:
    sites = sites_of(lambda net, x: net.down(x), down=nn.Conv2d(3, 3, 3, 2, 1))
    found = match(sites, ops(sites.flow, "convolution")[0])
    stem, bare = replace(found, domain=NO_DOMAIN), replace(found, detail={})
    sizes = {found.domain: (1, 1), sites.flow.domain(image(sites.flow)): (21, 9)}
    changed = with_sizes([Group(NO_DOMAIN, (stem,)), Group(found.domain, (bare, found))], sizes, sites)
    assert changed == (stem, bare, replace(found, out_after=(10, 4)))


def test_a_plan_says_what_comes_behind_a_conv_that_is_left_alone() -> None:
    model = net(*(depthwise(8) for _ in range(3)))
    plan = padfree.plan(model, input_size=(3, 33, 33), rules=("depthwise",), exclude="2.0")
    maps, x = [], torch.zeros(1, 3, 33, 33)
    for module in plan.apply(model).eval()[:4]:
        maps.append(tuple((x := module(x)).shape[2:]))
    assert maps == [(33, 33), (16, 16), (8, 8), (3, 3)]
    assert {found.name: found.out_after for found in plan.matches} == {"1.0": maps[1], "3.0": maps[3]}

"""What convolutions are, and what several of them act as: split parts, summed branches, pairs, shortcuts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padfree.analysis.convolution import Conv
from padfree.analysis.sites import Sites
from tests.recordings import image, made, ops, sites_of

C = 4


def conv(channels: int = C, kernel: int = 3, stride: int = 2, out: int = C, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, **{"padding": kernel // 2, **settings})


def only(sites: Sites) -> Conv:
    (found,) = sites.convs.values()
    return found


def by_path(sites: Sites) -> dict[str, Conv]:
    return {found.path: found for found in sites.convs.values()}


# -- one convolution --------------------------------------------------------------------------------------


def test_settings_of_a_conv() -> None:
    module = nn.Conv2d(6, 12, (3, 5), (2, 1), (1, 2), (1, 3), groups=6)
    found = only(sites_of(lambda net, x: net.conv(x), (6, 16, 16), conv=module))
    assert (found.path, found.is_module, found.in_channels, found.out_channels) == ("conv", True, 6, 12)
    assert (found.kernel, found.stride, found.dilation, found.groups) == ((3, 5), (2, 1), (1, 3), 6)
    assert (found.padding, found.pad, found.pad_mode, found.fixed) == ((1, 1, 2, 2), -1, "zeros", False)
    assert found.spans == (3, 13) and found.depthwise and not found.pointwise


@pytest.mark.parametrize(
    ("pad", "own", "padding", "mode"),
    [
        (lambda x: F.pad(x, (0, 1, 2, 3)), 0, (2, 3, 0, 1), "zeros"),
        (lambda x: F.pad(x, (0, 1, 2, 3)), 1, (3, 4, 1, 2), "zeros"),
        (lambda x: F.pad(x, (1, 1)), 0, (0, 0, 1, 1), "zeros"),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=2.0), 0, (1, 1, 1, 1), "the constant 2.0"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 0, (1, 1, 1, 1), "reflection_pad2d"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 0, (1, 1, 1, 1), "replication_pad2d"),
    ],
)
def test_a_pad_that_only_the_conv_reads_is_its_own(pad: Any, own: int, padding: Any, mode: str) -> None:
    module = conv(3, padding=own)
    sites = sites_of(lambda net, x: net.conv(pad(x)), conv=module)
    found = only(sites)
    assert (found.padding, found.pad_mode, found.source) == (padding, mode, image(sites.flow))
    assert sites.flow.ops[found.pad].outputs == ops(sites.flow, "convolution")[0].inputs
    sites = sites_of(lambda net, x: (net.conv(y := pad(x)), y), conv=module)
    assert only(sites).pad >= 0  # that it is returned too is no second reader
    sites = sites_of(lambda net, x: (net.conv(y := pad(x)), y.relu()), conv=module)
    assert (only(sites).pad, only(sites).padding) == (-1, (own,) * 4)


def test_circular_padding_is_no_padding_with_zeros() -> None:
    found = only(sites_of(lambda net, x: net.conv(x), conv=conv(3, padding_mode="circular")))
    assert found.pad_mode == "circular"
    assert "not zeros" in found.out_of_scope()


def test_functions_and_convs_of_other_dimensions() -> None:
    weight = nn.Parameter(torch.ones(C, 3, 3, 3))
    found = only(sites_of(lambda net, x: F.conv2d(x, net.weight, stride=2, padding=1), weight=weight))
    assert (found.path, found.is_module) == ("", False)
    assert "function call" in found.trouble()
    others = sites_of(
        lambda net, x: (net.line(x.flatten(2)), net.back(x)),
        line=nn.Conv1d(3, C, 3, 2, 1), back=nn.ConvTranspose2d(3, C, 3, 2, 1),
    )  # fmt: skip
    assert others.convs == {}


CONV = only(sites_of(lambda net, x: net.conv(x), conv=conv(3)))  # 3x3, stride 2, one zero a side


@pytest.mark.parametrize(
    ("settings", "padded", "scope", "trouble"),
    [
        ({}, True, "", ""),
        ({"padding": (0, 1, 0, 1)}, True, "", ""),
        ({"padding": (0, 0, 0, 0)}, False, "padding-free already", ""),
        ({"kernel": (5, 5), "padding": (1, 1, 1, 1)}, False, "padding-free already", ""),
        ({"kernel": (5, 5), "padding": (2, 2, 2, 2)}, True, "", ""),
        ({"dilation": (2, 2), "padding": (1, 1, 1, 1)}, False, "padding-free already", ""),
        ({"dilation": (2, 2), "padding": (1, 2, 1, 2)}, True, "", ""),
        ({"kernel": (4, 4)}, True, "spans 4x4; an odd kernel", ""),
        ({"stride": (2, 1)}, True, "its stride is 2x1", ""),
        ({"stride": (3, 3)}, True, "its stride is 3x3", ""),
        ({"pad_mode": "reflection_pad2d"}, True, "pads with reflection_pad2d", ""),
        ({"kernel": (3, 5), "padding": (1, 1, 2, 2)}, True, "", "3x5 or padding (1, 1, 2, 2) differs"),
        ({"padding": (1, 1, 0, 0)}, True, "", "padding (1, 1, 0, 0) differs"),
        ({"is_module": False}, True, "", "function call"),
    ],
)
def test_what_has_a_padding_free_form(settings: dict[str, Any], padded: bool, scope: str, trouble: str) -> None:
    found = replace(CONV, **settings)
    assert found.padded is padded
    for text, words in ((found.out_of_scope(), scope), (found.trouble(), trouble)):
        assert words in text and bool(text) is bool(words)


def test_a_filter_that_is_not_learnt() -> None:
    class Blur(nn.Module):
        def __init__(self, learnt: bool) -> None:
            super().__init__()
            weight = torch.full((3, 1, 3, 3), 1 / 9)
            if learnt:
                self.weight = nn.Parameter(weight)
            else:
                self.register_buffer("weight", weight)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * 1, stride=2, padding=1, groups=3)

    for learnt in (False, True):
        assert only(sites_of(lambda net, x: net.blur(x), blur=Blur(learnt))).fixed is not learnt
    scaled = sites_of(lambda net, x: F.conv2d(x, x.mean() * torch.ones(C, 3, 3, 3)))
    assert not only(scaled).fixed  # made from the image: nobody's fixed filter


# -- the first convolution --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "first"),
    [
        (lambda net, x: net.b(net.a(x)), ["a"]),
        (lambda net, x: net.a((x - 0.5) / 0.25), ["a"]),
        (lambda net, x: net.a(F.interpolate(x, scale_factor=2.0)), ["a"]),
        (lambda net, x: net.a(F.avg_pool2d(x, 2)), ["a"]),
        (lambda net, x: net.a(F.max_pool2d(x, 2)), []),
        (lambda net, x: (net.a(x), net.b(x.repeat(1, 2, 1, 1)[:, :C])), ["a", "b"]),
        (lambda net, x: net.b(net.adapter(x)), ["adapter", "b"]),  # a map of channels comes before the first layer
        (lambda net, x: net.b(net.adapter(x.relu())), ["adapter", "b"]),
        (lambda net, x: net.b(net.adapter(x).relu()), ["adapter"]),  # with an activation behind it is a layer itself
        (lambda net, x: net.b(net.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), []),
    ],
)
def test_the_first_convs_read_the_image(forward: Any, first: list[str]) -> None:
    modules = {"a": conv(3), "b": conv(), "adapter": conv(3, 1, 1), "linear": nn.Linear(3, C)}
    sites = sites_of(forward, (3, 16, 24), **modules)
    assert [found.path for found in sites.first] == first


def test_what_a_conv_or_pool_reads_before_its_pad() -> None:
    sites = sites_of(lambda net, x: (net.conv(F.pad(x, (0, 1, 0, 1))), F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)),
                     conv=conv(3, padding=0))  # fmt: skip
    for op in ops(sites.flow, "convolution", "max_pool2d_with_indices", "max_pool2d"):
        assert sites.read_by(op) == image(sites.flow)
    assert sites.conv_making(only(sites).out) == only(sites)
    assert sites.conv_making(image(sites.flow)) is None


# -- several that act as one ------------------------------------------------------------------------------


def parts(net: Any, x: Tensor) -> list[Tensor]:
    return [member(part) for member, part in zip((net.a, net.b), x.split(2, 1), strict=True)]


def halves() -> dict[str, nn.Module]:
    return {"a": conv(2, out=2, groups=2), "b": conv(2, 5, out=2, groups=2)}


def test_parts_of_a_split_that_are_put_together_again() -> None:
    sites = sites_of(lambda net, x: torch.cat(parts(net, x), 1).relu(), (C, 8, 12), **halves())
    one, other = (sites.site(found) for found in sites.convs.values())
    assert one == other
    assert [found.path for found in one.convs] == ["b", "a"] and one.largest.path == "b"  # the largest kernel first
    assert (one.source, one.chain.conv) == (image(sites.flow), made(sites.flow, "cat"))
    assert one.chain.act == made(sites.flow, "relu") and not one.dense and one.points == ()


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: torch.cat(parts(net, x)[::-1], 1),  # in another order
        lambda net, x: torch.cat((net.a(x[:, :2]), F.max_pool2d(x[:, 2:], 3, 2, 1)), 1),
        lambda net, x: torch.cat((*parts(net, x), F.max_pool2d(x, 3, 2, 1)), 1),
        lambda net, x: parts(net, x),
        lambda net, x: (torch.cat((p := parts(net, x)), 1), p[0].relu(), p[1].relu()),
    ],
)  # fmt: skip
def test_parts_that_are_convs_of_their_own(forward: Any) -> None:
    sites = sites_of(forward, (C, 8, 12), **halves())
    for found in sites.convs.values():
        site = sites.site(found)
        assert site.convs == (found,) and site.source == found.source and site.chain.conv == found.out


def branches() -> dict[str, nn.Module]:
    return {
        "large": conv(groups=C), "small": conv(kernel=1, groups=C), "third": conv(groups=C),
        "norm": nn.BatchNorm2d(C), "other": nn.BatchNorm2d(C),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "convs", "points"),
    [
        (lambda net, x: net.large(x) + net.small(x), ["large"], ["small"]),
        (lambda net, x: net.norm(net.large(x)) + net.other(net.small(x)), ["large"], ["small"]),
        (lambda net, x: net.other(net.small(x)) + net.norm(net.large(x)), ["large"], ["small"]),
        (lambda net, x: net.large(x) + net.small(x) + net.third(x), ["large", "third"], ["small"]),
        (lambda net, x: net.large(x) + (net.third(x) * 2 + net.small(x)), ["large", "third"], ["small"]),
    ],
)
def test_linear_branches_that_are_summed(forward: Any, convs: list[str], points: list[str]) -> None:
    sites = sites_of(lambda net, x: forward(net, x).relu(), (C, 8, 12), **branches())
    site = sites.site(by_path(sites)["large"])
    assert sorted(found.path for found in site.convs) == convs
    assert [found.path for found in site.points] == points
    assert site.chain.conv == ops(sites.flow, "add")[-1].outputs[0]
    assert site.chain.act == made(sites.flow, "relu")


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.large(x) + net.small(x).relu(),
        lambda net, x: net.large(x) + net.small(x.relu()),
        lambda net, x: net.large(x) + F.max_pool2d(x, 3, 2, 1),
        lambda net, x: (net.large(x) + (y := net.small(x)), y.relu()),
        lambda net, x: net.large(x) * net.small(x),
        lambda net, x: net.large(x),
    ],
)
def test_branches_that_are_not_summed_linearly(forward: Any) -> None:
    sites = sites_of(forward, (C, 8, 12), **branches())
    large = by_path(sites)["large"]
    site = sites.site(large)
    assert (site.convs, site.points, site.chain.conv) == ((large,), (), large.out)


@pytest.mark.parametrize(
    ("forward", "paired"),
    [
        (lambda net, x: net.depth(net.point(x)), ["point"]),
        (lambda net, x: net.depth(net.norm(net.point(x))), ["point"]),
        (lambda net, x: net.depth(net.norm(net.second(net.point(x)))), ["point", "second"]),
        (lambda net, x: net.depth(net.second(net.point(x).relu())), ["second"]),
        (lambda net, x: net.depth(net.point(x).relu()), []),
        (lambda net, x: (net.depth(y := net.point(x)), y.relu()), []),
        (lambda net, x: net.depth(net.wide(x)), []),
        (lambda net, x: net.depth(net.grouped(x)), []),
        (lambda net, x: net.depth(x), []),
        (lambda net, x: net.dense(net.point(x)), []),
    ],
)
def test_bsconv_pairs(forward: Any, paired: list[str]) -> None:
    modules = {
        "depth": conv(groups=C), "point": conv(kernel=1, stride=1), "second": conv(kernel=1, stride=1),
        "grouped": conv(kernel=1, stride=1, groups=2), "wide": conv(stride=1), "dense": conv(),
        "norm": nn.BatchNorm2d(C),
    }  # fmt: skip
    sites = sites_of(forward, (C, 8, 12), **modules)
    found = next(found for found in sites.convs.values() if found.stride == (2, 2))
    site = sites.site(found)
    assert [point.path for point in site.paired] == paired
    assert site.source == (by_path(sites)[paired[0]].source if paired else found.source)
    assert site.dense is (bool(paired) or found.path == "dense")


# -- shortcuts --------------------------------------------------------------------------------------------


def residual(main: Any, short: Any) -> Any:
    return lambda net, x: (main(net, x) + short(net, x)).relu()


@pytest.mark.parametrize(
    ("main", "short", "is_shortcut"),
    [
        (lambda net, x: net.b(net.a(x).relu()), lambda net, x: net.norm(net.depth(x)), True),
        (lambda net, x: F.max_pool2d(x, 3, 2, 1), lambda net, x: net.norm(net.depth(x)), True),
        (lambda net, x: net.b(net.a(x).relu()), lambda net, x: net.b(net.depth(x)), True),
        (lambda net, x: net.b(net.a(x).relu()), lambda net, x: net.b(net.bare(F.pad(x, (0, 1, 0, 1)))), True),
        (lambda net, x: net.b(net.a(x).relu()), lambda net, x: net.depth(x).relu(), False),
        (lambda net, x: net.b(net.a(x).relu()), lambda net, x: net.depth(x.relu()), False),
        (lambda net, x: net.b(net.a(x)), lambda net, x: net.norm(net.depth(x)), False),  # no branch bends
        (lambda net, x: 0, lambda net, x: net.norm(net.depth(x)), False),
    ],
)  # fmt: skip
def test_a_branch_that_only_adapts_shape(main: Any, short: Any, is_shortcut: bool) -> None:
    modules = {
        "stem": conv(stride=1), "a": conv(), "b": conv(stride=1), "depth": conv(groups=C),
        "bare": conv(groups=C, padding=0), "norm": nn.BatchNorm2d(C),
    }  # fmt: skip
    sites = sites_of(lambda net, x: residual(main, short)(net, net.stem(x)), (C, 8, 12), **modules)
    (adapting,) = (found for found in sites.convs.values() if found.depthwise)
    assert sites.site(adapting).shortcut is is_shortcut


def test_the_main_branch_is_no_shortcut() -> None:
    sites = sites_of(
        lambda net, x: residual(lambda net, x: net.a(x).relu(), lambda net, x: net.depth(x))(net, net.stem(x)),
        (C, 8, 12), stem=conv(stride=1), a=conv(), depth=conv(groups=C),
    )  # fmt: skip
    assert not sites.site(by_path(sites)["a"]).shortcut
    assert sites.site(by_path(sites)["depth"]).shortcut


def test_pools_and_projections_of_a_shortcut() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.a(x).relu() + net.point(F.avg_pool2d(x.relu(), 2))

    sites = sites_of(forward, (C, 8, 12), stem=conv(stride=1), a=conv(), point=conv(kernel=1, stride=1))
    (pool,) = ops(sites.flow, "avg_pool2d")
    assert sites.is_shortcut_op(pool)  # behind an activation that the branch begins with
    assert sites.is_shortcut_op(sites.flow.ops[by_path(sites)["point"].op])
    assert not sites.is_shortcut_op(sites.flow.ops[by_path(sites)["a"].op])

"""Which values are maps, and which of them share a size, on networks of a few operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recordings import flow_of, image, made, ops


def strided(channels: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, 2, 1)


def two(join: Any) -> Any:
    """A forward that puts two strided convs of the image together."""
    return lambda net, x: join(net.one(x), net.two(x))


@pytest.mark.parametrize(
    "join",
    [
        torch.add,
        torch.mul,
        lambda a, b: a - 2 * b,
        lambda a, b: torch.cat((a, b), 1),
        lambda a, b: torch.stack((a, b)).sum(0),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a.add_(b),
        lambda a, b: a.flatten(2) + b.flatten(2),
        lambda a, b: (a.permute(0, 2, 3, 1) + b.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ],
    ids=["add", "mul", "scaled", "cat", "stack", "where", "in place", "flat", "channels last"],
)  # fmt: skip
def test_what_must_be_equal_shares_a_domain(join: Any) -> None:
    flow = flow_of(two(join), one=strided(), two=strided())
    one, other = (op.outputs[0] for op in ops(flow, "convolution"))
    assert flow.is_map(one) and flow.is_map(other) and flow.size(one) == (4, 6)
    assert flow.domain(one) == flow.domain(other) == flow.domain(flow.recording.outputs[0])
    assert flow.domain(one) != flow.domain(image(flow))


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b: (a, b),
        lambda a, b: torch.cat((a, b), 2),
        lambda a, b: torch.cat((a, b), 3),
        lambda a, b: F.adaptive_avg_pool2d(a, 1) + F.adaptive_avg_pool2d(b, 1),
        lambda a, b: (a * b.mean((2, 3), keepdim=True), b),
    ],
    ids=["returned", "below each other", "beside each other", "pixels", "gated"],
)
def test_what_need_not_be_equal_does_not(join: Any) -> None:
    flow = flow_of(two(join), one=strided(), two=strided())
    one, other = (op.outputs[0] for op in ops(flow, "convolution"))
    assert flow.domain(one) != flow.domain(other)


@pytest.mark.parametrize(
    ("function", "is_map", "same"),
    [
        (torch.relu, True, True),
        (lambda x: x.roll(1, -1), True, True),
        (lambda x: x * torch.ones(1, 3, 1, 1), True, True),
        (lambda x: x.flatten(2), False, True),
        (lambda x: x.flatten(2).view(x.shape), True, True),
        (lambda x: x.unsqueeze(0), False, True),
        (lambda x: x.permute(0, 2, 3, 1), False, True),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)), False, True),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2), True, True),
        (lambda x: x.transpose(2, 3), False, True),
        (lambda x: x.mean((2, 3)), False, True),
        (lambda x: x.mean((2, 3), keepdim=True), True, False),
        (lambda x: F.pad(x, (1, 1, 1, 1)), True, False),
        (lambda x: x[:, :, :4], True, False),
        (lambda x: x[:, :, ::2, ::2], True, False),
        (lambda x: F.max_pool2d(x, 2), True, False),
        (lambda x: F.avg_pool2d(x, 2), True, False),
        (lambda x: F.interpolate(x, scale_factor=2.0), True, False),
        (lambda x: F.pixel_unshuffle(x, 2), True, False),
        (lambda x: x.view(1, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(6, 3, 4, 4), True, False),
    ],
)  # fmt: skip
def test_one_operation(function: Any, is_map: bool, same: bool) -> None:
    flow = flow_of(lambda net, x: function(net.conv(x)), conv=nn.Conv2d(3, 3, 3, padding=1))
    (conv,) = ops(flow, "convolution")
    (out,) = flow.recording.outputs
    assert flow.is_map(out) is is_map
    assert (flow.domain(out) == flow.domain(conv.outputs[0])) is same
    assert flow.domain(conv.outputs[0]) == flow.domain(image(flow))  # that it is padded keeps the size


class Gate(nn.Module):
    """x * sigmoid(conv(mean(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


def test_a_gate_of_one_pixel_is_in_no_maps_domain() -> None:
    flow = flow_of(lambda net, x: net.gate(x), gate=Gate())
    pixel, gate = made(flow, "mean"), made(flow, "sigmoid")
    assert flow.is_map(gate) and flow.size(gate) == (1, 1)
    assert flow.domain(made(flow, "mul")) == flow.domain(image(flow))
    assert flow.domain(image(flow)) not in (flow.domain(pixel), flow.domain(gate))


def test_one_gate_for_maps_of_two_sizes_does_not_join_them() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        gate = net.conv(x.mean((2, 3), keepdim=True))
        return x * gate, F.max_pool2d(x, 2) * gate

    flow = flow_of(forward, conv=nn.Conv2d(3, 3, 1))
    large, small = flow.recording.outputs
    assert (flow.size(large), flow.size(small)) == ((8, 12), (4, 6))
    assert flow.domain(large) == flow.domain(image(flow)) != flow.domain(small)


def test_a_networks_whole_body_may_be_channels_last() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.down(x).permute(0, 2, 3, 1)
        y = y + net.linear(net.norm(y))
        return net.last(y.permute(0, 3, 1, 2))

    flow = flow_of(
        forward, down=nn.Conv2d(3, 5, 2, 2), norm=nn.LayerNorm(5), linear=nn.Linear(5, 5), last=nn.Conv2d(5, 5, 1)
    )
    first, last = (op.outputs[0] for op in ops(flow, "convolution"))
    assert not any(flow.is_map(made(flow, kind)) for kind in ("native_layer_norm", "add"))
    assert {flow.domain(made(flow, kind)) for kind in ("native_layer_norm", "add")} == {flow.domain(first)}
    assert flow.domain(first) == flow.domain(last)


def test_what_a_conv_or_pool_reads_is_a_map_however_it_was_laid_out() -> None:
    flow = flow_of(lambda net, x: F.max_pool2d(x.transpose(2, 3), 2), size=(3, 8, 12))
    turned = made(flow, "transpose")
    assert flow.is_map(turned) and flow.size(turned) == (12, 8)
    assert flow.size(flow.recording.outputs[0]) == (6, 4)


def test_constants_have_no_domain() -> None:
    flow = flow_of(lambda net, x: x + net.table, table=nn.Parameter(torch.zeros(1, 3, 8, 12)))
    tables = [value.index for value in flow.values if value.name == "table"]
    assert len(tables) == 1 and not flow.is_map(tables[0])


def test_who_makes_and_reads_a_value() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        y = x.relu()
        z = y.sigmoid()
        return z, (y * z).tanh()

    flow = flow_of(forward)
    relu, sigmoid, mul, tanh = ops(flow, "relu", "sigmoid", "mul", "tanh")
    y, z = relu.outputs[0], sigmoid.outputs[0]
    assert flow.producer(image(flow)) is None
    assert [flow.producer(value) for value in (y, z)] == [relu, sigmoid]
    assert flow.consumers(y) == [sigmoid.index, mul.index] and flow.consumers(tanh.outputs[0]) == []
    assert flow.sole_consumer(image(flow)) == relu and flow.sole_consumer(mul.outputs[0]) == tanh
    assert flow.sole_consumer(y) is None  # two read it
    assert flow.sole_consumer(z) is None  # one reads it, but the network returns it as well

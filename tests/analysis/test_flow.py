"""What follows what: chains, activations and their formulas, forks and sums, blocks, entries of a domain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padfree.analysis.flow import Flow
from padfree.indices import ValueId
from tests.recordings import flow_of, image, made, ops

C = 4
GAMMA = nn.Parameter(torch.ones(1, C, 1, 1))


def conv(channels: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, C, 3, stride, 1)


def written(flow: Flow, value: ValueId | None) -> str:
    """The kind of operation that made a value."""
    op = None if value is None else flow.producer(value)
    return "" if op is None else op.kind


# -- one step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda net, y: net.norm(y), "native_batch_norm"),
        (lambda net, y: F.group_norm(y, 2), "native_group_norm"),
        (lambda net, y: y * net.gamma, "mul"),
        (lambda net, y: net.gamma + y, "add"),
        (lambda net, y: y / 2, "div"),
        (lambda net, y: -y, "neg"),
        (lambda net, y: y.mul_(2), "mul_"),
        (lambda net, y: y.permute(0, 2, 3, 1), "permute"),
        (lambda net, y: y.flatten(2), "view"),
        (lambda net, y: (net.norm(y), y), "native_batch_norm"),  # that it is returned too makes no other network
        (lambda net, y: y.relu(), ""),
        (lambda net, y: y * y.mean((2, 3), keepdim=True), ""),
        (lambda net, y: net.norm(y) + y, ""),
        (lambda net, y: y, ""),
    ],
)  # fmt: skip
def test_a_linear_step(function: Any, kind: str) -> None:
    flow = flow_of(lambda net, x: function(net, net.conv(x)), conv=conv(), norm=nn.BatchNorm2d(C), gamma=GAMMA)
    assert written(flow, flow.linear_step(made(flow, "convolution"))) == kind


def test_back_through_linear_steps_to_what_is_read_once() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        return (net.norm(net.conv(x)) * net.gamma).permute(0, 2, 3, 1)

    flow = flow_of(forward, conv=conv(), norm=nn.BatchNorm2d(C), gamma=GAMMA)
    assert flow.linear_source(flow.recording.outputs[0]) == made(flow, "convolution")
    flow = flow_of(lambda net, x: (y := net.conv(x)).relu() + net.norm(y), conv=conv(), norm=nn.BatchNorm2d(C))
    normed = made(flow, "native_batch_norm")
    assert flow.linear_source(normed) == normed  # the conv has a second reader
    assert flow.linear_source(made(flow, "relu")) == made(flow, "relu")


# -- chains -----------------------------------------------------------------------------------------------


def chain_of(forward: Any, **children: Any) -> tuple[Flow, Any]:
    flow = flow_of(forward, conv=conv(), **children)
    return flow, flow.chain(made(flow, "convolution"))


def test_conv_norm_activation() -> None:
    flow, chain = chain_of(lambda net, x: net.act(net.norm(net.conv(x))), norm=nn.BatchNorm2d(C), act=nn.ReLU())
    assert (chain.norm_path, chain.act_path) == ("norm", "act")
    assert (chain.norm, chain.act) == (made(flow, "native_batch_norm"), made(flow, "relu"))
    assert not (chain.norm_last or chain.act_last or chain.formula)
    assert [chain.end(merge) for merge in ("conv", "norm", "activation")] == [chain.conv, chain.norm, chain.act]


def test_chains_that_end_earlier() -> None:
    _, chain = chain_of(lambda net, x: net.conv(x))
    assert (chain.norm, chain.act) == (None, None)
    assert {chain.end(merge) for merge in ("conv", "norm", "activation")} == {chain.conv}
    flow, chain = chain_of(lambda net, x: net.norm(net.conv(x)), norm=nn.BatchNorm2d(C))
    assert (chain.norm, chain.act) == (made(flow, "native_batch_norm"), None)
    assert chain.end("activation") == chain.norm
    flow, chain = chain_of(lambda net, x: F.relu6(net.conv(x)))
    assert (chain.norm, chain.norm_path, chain.act_path) == (None, "", "")
    assert chain.act == made(flow, "hardtanh") and chain.end("norm") == chain.conv


def test_a_scale_of_channels_is_a_norm_and_a_number_is_none() -> None:
    flow, chain = chain_of(lambda net, x: (net.conv(x) * net.gamma).relu(), gamma=GAMMA)
    assert (chain.norm, chain.norm_path) == (made(flow, "mul"), "")
    flow, chain = chain_of(lambda net, x: (net.conv(x) * 2).relu())
    assert chain.norm is None and chain.act == made(flow, "relu")


def test_a_second_norm_is_not_the_convs() -> None:
    flow, chain = chain_of(
        lambda net, x: net.second(net.first(net.conv(x))).relu(), first=nn.BatchNorm2d(C), second=nn.BatchNorm2d(C)
    )
    assert chain.norm == made(flow, "native_batch_norm", 0) and chain.norm_path == "first"
    assert chain.act is None


def test_the_norm_that_a_block_begins_with_is_the_blocks() -> None:
    block = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv(C))
    _, chain = chain_of(lambda net, x: net.block(net.conv(x)), block=block)
    assert (chain.norm, chain.act) == (None, None)
    tail = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
    _, chain = chain_of(lambda net, x: net.tail(net.conv(x)), tail=tail)
    assert (chain.norm_path, chain.act_path) == ("tail.0", "tail.1")


def test_a_norm_over_the_last_axis() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.act(net.norm(net.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    flow, chain = chain_of(forward, norm=nn.LayerNorm(C), act=nn.GELU())
    assert chain.norm is None  # no map of the conv's layout is the norm's
    assert chain.act == flow.recording.outputs[0] and flow.is_map(chain.act)
    assert (chain.norm_path, chain.act_path, chain.norm_last, chain.act_last) == ("norm", "act", True, True)

    def laid_back(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()

    flow, chain = chain_of(laid_back, norm=nn.LayerNorm(C))
    assert written(flow, chain.norm) == "permute" and written(flow, chain.act) == "relu"
    assert (chain.norm_last, chain.act_last) == (True, False)


# -- activations ------------------------------------------------------------------------------------------


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize(
    ("function", "path", "formula"),
    [
        (lambda net, y: net.relu(y), "relu", False),
        (lambda net, y: net.prelu(y), "prelu", False),
        (lambda net, y: net.swish(y), "swish", False),
        (lambda net, y: y.relu(), "", False),
        (lambda net, y: y.relu_(), "", False),
        (lambda net, y: F.silu(y), "", False),
        (lambda net, y: y.clamp(0, 6), "", False),
        (lambda net, y: y * y.sigmoid(), "", True),
        (lambda net, y: y.sigmoid() * y, "", True),
        (lambda net, y: y * F.relu6(y + 3) / 6, "", True),
        (lambda net, y: y * F.softplus(y).tanh(), "", True),
        (lambda net, y: torch.where(y > 0, y, 0.1 * y), "", True),
        (lambda net, y: y.relu().square(), "", False),
    ],
)  # fmt: skip
def test_activations(function: Any, path: str, formula: bool) -> None:
    flow, chain = chain_of(
        lambda net, x: function(net, net.norm(net.conv(x))),
        norm=nn.BatchNorm2d(C), relu=nn.ReLU(), prelu=nn.PReLU(C), swish=Swish(),
    )  # fmt: skip
    assert (chain.act_path, chain.formula) == (path, formula)
    if formula or path:  # all of it; of two functions one after another the first
        assert chain.act == flow.recording.outputs[0]
    else:
        assert flow.producer(chain.act).inputs == (chain.norm,)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, y: y * net.other(y).sigmoid(),  # a gate: a conv makes it
        lambda net, y: y * y.mean((2, 3), keepdim=True).sigmoid(),
        lambda net, y: F.max_pool2d(y, 3, 1, 1),
        lambda net, y: y.flip(-1),
        lambda net, y: y * 2,
        lambda net, y: (y.sigmoid(), y.tanh()),
        lambda net, y: (s := y.sigmoid(), y * s),  # what is within a formula is returned as well
    ],
)
def test_what_is_no_activation(function: Any) -> None:
    _, chain = chain_of(
        lambda net, x: function(net, net.norm(net.conv(x))), norm=nn.BatchNorm2d(C), other=nn.Conv2d(C, C, 1)
    )
    assert chain.act is None and not chain.formula


def test_what_acts_in_training_only() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.pass_on(net.drop(net.conv(x)))

    flow = flow_of(forward, conv=conv(), drop=nn.Dropout2d(0.5), pass_on=nn.Identity())
    assert flow.acting(made(flow, "convolution")) == ["drop"]
    assert flow.acting(image(flow)) == []
    assert not any(module.training for module in flow.recording.modules.values())


def test_what_ends_in_an_attention_only() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        keys = net.conv(x).flatten(2)
        return torch.bmm(x.flatten(2).transpose(1, 2).repeat(1, 1, 2)[..., :C], keys)

    flow = flow_of(forward, conv=conv())
    assert flow.feeds_only_attention(made(flow, "convolution"))
    flow = flow_of(lambda net, x: (forward(net, x), net.conv(x)), conv=conv())
    assert not flow.feeds_only_attention(made(flow, "convolution", 1))
    flow = flow_of(lambda net, x: torch.bmm((y := net.conv(x)).flatten(2), x.flatten(2).transpose(1, 2)) + y.sum(),
                   conv=conv())  # fmt: skip
    assert not flow.feeds_only_attention(made(flow, "convolution"))


# -- walking back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda net, x: x, (True, False)),
        (lambda net, x: net.conv(x) * 2, (True, False)),
        (lambda net, x: F.avg_pool2d(x, 2), (True, False)),
        (lambda net, x: net.conv(x).relu(), (True, True)),
        (lambda net, x: net.conv(x.relu()), (True, True)),
        (lambda net, x: F.max_pool2d(x, 2), (True, True)),
        (lambda net, x: x + x.relu(), (True, True)),
        (lambda net, x: x.relu() + x, (True, True)),
    ],
)
def test_what_a_value_is_made_of(function: Any, expected: tuple[bool, bool]) -> None:
    flow = flow_of(lambda net, x: (function(net, y := net.first(x)), y), first=conv(), conv=conv(C))
    target = made(flow, "convolution")
    assert flow.reaches(flow.recording.outputs[0], target) == expected
    assert flow.reaches(image(flow), target) == (False, False)


def test_a_sibling_is_not_reached() -> None:
    flow = flow_of(lambda net, x: (net.one(x), net.two(x).relu()), one=conv(), two=conv())
    one, other = (op.outputs[0] for op in ops(flow, "convolution"))
    assert flow.reaches(made(flow, "relu"), one) == (False, False)
    assert flow.reaches(made(flow, "relu"), other) == (True, True)


# -- module calls -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """sigmoid(norm(conv(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).sigmoid()


def test_the_blocks_whose_forward_holds_values() -> None:
    flow = flow_of(lambda net, x: net.block(x).tanh(), block=Block())
    inside, normed, end, last = (made(flow, kind) for kind in ("convolution", "native_batch_norm", "sigmoid", "tanh"))
    (conv_op,) = ops(flow, "convolution")

    def blocks(*values: ValueId) -> list[str]:
        return [call.path for call in flow.blocks(conv_op.index, *values)]

    assert blocks() == ["block.conv", "block", ""]
    assert blocks(image(flow)) == ["block.conv", "block", ""]  # each is given it
    assert blocks(inside) == ["block.conv", "block"]  # made in the one, and what a child returns to the other
    assert blocks(inside, normed) == ["block"]
    assert blocks(end) == ["block", ""]
    assert blocks(normed, last) == []  # the one is out of the root's sight, the other out of the block's
    assert blocks(image(flow), last) == [""]


def test_what_enters_a_domain() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.last((net.main(y) + net.short(F.avg_pool2d(y, 2))) * F.max_pool2d(net.wide(y), 2)[:, :1])

    flow = flow_of(forward, first=conv(), main=conv(C, stride=2), short=nn.Conv2d(C, C, 1), wide=conv(C), last=conv(C))
    small = flow.domain(flow.recording.outputs[0])
    assert set(flow.entries) == {small}  # no conv of stride 1 enters anything
    entering = [op.kind for op in flow.entries[small]]
    assert entering[:2] == ["convolution", "avg_pool2d"] and entering[2].startswith("max_pool2d")
    assert all(flow.size(op.outputs[0]) == (4, 6) for op in flow.entries[small])

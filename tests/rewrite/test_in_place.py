"""Blocks that write in place into views of what they return, and blocks that look through their own parameters."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import padfree
from padfree.errors import Refusal
from padfree.rewrite.edit import BlockEdit, Places
from padfree.rewrite.in_place import follow_in_place, seen_elsewhere
from padfree.rewrite.tracer import Body, TracedBlock

SIZE = (3, 32, 32)


class Block(nn.Module):
    """A depthwise convolution, its norm, and what a test does behind them."""

    def __init__(self, behind: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, behind: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.block = Block(behind)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def _net(behind: Callable[[nn.Module, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return Net(behind).eval()


def detached(block: nn.Module, y: Tensor) -> Tensor:
    y.detach().clamp_(0)
    return y


def data(block: nn.Module, y: Tensor) -> Tensor:
    y.data.clamp_(0)
    return y


def same(block: nn.Module, y: Tensor) -> Tensor:
    y.view_as(y).relu_()
    return y


def sliced(block: nn.Module, y: Tensor) -> Tensor:
    y[...].relu_()
    return y


def flat(block: nn.Module, y: Tensor) -> Tensor:
    F.relu_(y.view(-1))
    return y


def half(block: nn.Module, y: Tensor) -> Tensor:
    y[:, :4].relu_()
    return y


def copied(block: nn.Module, y: Tensor) -> Tensor:
    y.view(y.shape).copy_(F.relu(y))
    return y


def given_out(block: nn.Module, y: Tensor) -> Tensor:
    torch.clamp(y, 0, out=y.detach())
    return y


@pytest.mark.parametrize("behind", [detached, data, same, sliced, flat, half, copied])
def test_a_shortcut_behind_another_view_is_refused(behind: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"`block` .* by another view of it"):
        padfree.convert(_net(behind), rules=("depthwise",), input_size=SIZE)


def plain(block: nn.Module, y: Tensor) -> Tensor:
    return F.relu(y)


def returned(block: nn.Module, y: Tensor) -> Tensor:
    return F.relu_(y)


def dropped(block: nn.Module, y: Tensor) -> Tensor:
    F.relu_(y)
    return y


def view_alone(block: nn.Module, y: Tensor) -> Tensor:
    return y.view_as(y).relu_()


def looked_at_before(block: nn.Module, y: Tensor) -> Tensor:
    y.detach().abs()
    F.relu_(y)
    return y


def doubled(block: nn.Module, y: Tensor) -> Tensor:
    F.relu_(y)
    y.add_(y.detach())
    return y / 2


@pytest.mark.parametrize("behind", [returned, dropped, view_alone, looked_at_before, doubled, given_out])
def test_what_is_read_is_what_is_written(behind: Callable[[nn.Module, Tensor], Tensor]) -> None:
    images = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = padfree.convert(_net(plain), rules=("depthwise",), input_size=SIZE)(images)
        found = padfree.convert(_net(behind), rules=("depthwise",), input_size=SIZE)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_added_has_to_come_out() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_method("relu", (x,))
    out = graph.output(x)
    edit = BlockEdit(TracedBlock("block", (), (Body(graph, {}, {}),), ()), ())
    added = edit.call(Places([out]), operator.add, Places([y]), Places([x]))
    with pytest.raises(Refusal, match=r"the forward of `block` returns nothing of what would be added to it"):
        edit.check_reached()
    with graph.inserting_before(out):
        appended = graph.call_method("append", (x, added.nodes[0]))  # as to a list that the forward was given
    edit.check_reached()
    graph.erase_node(appended)
    out.replace_input_with(x, added.nodes[0])
    edit.check_reached()


def _halves() -> tuple[torch.fx.Graph, dict[torch.fx.Node, tuple[tuple[object, ...], int]], torch.fx.Node]:
    """y, two halves of its columns, the first one written in place, the second read afterwards."""
    graph = torch.fx.Graph()
    y = graph.placeholder("y")
    left, right = (graph.call_method("narrow", (y, 1, start, 2)) for start in (0, 2))
    written = graph.call_method("relu_", (left,))
    graph.output((written, right))
    places = {left: (7, 0, (3, 2), (4, 1)), right: (7, 2, (3, 2), (4, 1))}
    results = {y: ((7, 0, (3, 4), (4, 1)), 0), left: (places[left], 1), right: (places[right], 2)}
    return graph, {**results, written: (places[left], 3)}, written


def test_parts_that_lie_among_each_other_are_told_apart() -> None:
    graph, results, written = _halves()
    follow_in_place(graph, results)
    assert not seen_elsewhere(graph, results, [(written, results[written][0])])
    overlapping = {
        node: (((7, 1, *key[2:]), value) if value == 2 else (key, value)) for node, (key, value) in results.items()
    }
    assert seen_elsewhere(graph, overlapping, [(written, results[written][0])])


def frozen(block: nn.Module, y: Tensor) -> Tensor:
    return y if any(parameter.requires_grad for parameter in block.parameters()) else y.detach()


def on_cpu(block: nn.Module, y: Tensor) -> Tensor:
    return y if next(block.parameters()).device.type == "cpu" else y * 3


def of_its_dtype(block: nn.Module, y: Tensor) -> Tensor:
    return F.relu(y).to(next(iter(block.state_dict().values())).dtype)


def of_a_buffer(block: nn.Module, y: Tensor) -> Tensor:
    return F.relu(y) if dict(block.named_buffers())["norm.running_mean"].device.type == "cpu" else y * 3


@pytest.mark.parametrize("behind", [frozen, on_cpu, of_its_dtype, of_a_buffer])
def test_what_the_copys_parameters_are_is_not_baked(behind: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(padfree.PadfreeError, match=r"`block` .* looks through its own parameters"):
        padfree.convert(_net(behind), rules=("depthwise",), input_size=SIZE)


def of_one(block: Block, y: Tensor) -> Tensor:
    return F.relu(y).to(block.conv.weight.dtype)


def test_one_parameter_by_name_is_read_at_every_call() -> None:
    model = padfree.convert(_net(of_one), rules=("depthwise",), input_size=SIZE).double()
    assert model(torch.randn(1, *SIZE, dtype=torch.double)).dtype == torch.double

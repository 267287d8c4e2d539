"""A second body for a generated forward, in which a strided chain, its pool and their sum are one call.

    y = self.bn(self.conv(x)); out = add_shortcut(y, shortcut_pool(x))
    ->  out = downsample(x, 3, 0, (self.conv, self.bn))

    out = self.bn(self.conv(self.reduce(x)))  ->  out = reduce(x, (self.reduce,), (self.conv, self.bn))

The functions of `padfree.onepass` compute the same, in one pass over the map where they can. Training, tracers,
compilers and TorchScript, which cannot hand modules to a function, run the first body.

A block that is nothing but such a chain also says what it is made of, for `padfree.onepass.sequence`: a Sequential
that holds it (`IN_SEQUENCE`) lets its neighbours take part.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Collection
from typing import Any

from torch import fx

from padfree.chains import CHAIN
from padfree.onepass import downsample, reduce
from padfree.pooling import add_shortcut, shortcut_pool
from padfree.understood import Functional

__all__ = ["IN_SEQUENCE", "QUICK", "chain_of", "named_chain", "quickened", "two_bodies"]

QUICK = "padfree_onepass_quick"  # what `padfree.onepass.quick` is called in a generated forward
IN_SEQUENCE = f"""\
def forward(self, input):
    if torch.jit.is_scripting() or not {QUICK}():
        for module in self:
            input = module(input)
    else:
        input = padfree_onepass_sequence(self, input)
    return input
"""
AHEAD = 2  # calls ahead of the convolution that may belong to it: the norm and the activation of an expansion
BEHIND = 6  # calls behind a sum that may belong to it: a norm and an activation, a 1x1 convolution with such of its own


def quickened(graph: fx.Graph, reductions: Collection[str] = ()) -> fx.Graph | None:
    """A copy of a block's graph with every such chain in one call; None where it has none.

    Args:
        graph: the block's forward.
        reductions: children that begin with a strided depthwise convolution, and to whose result nothing is added.
    """
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    copied.output(output)
    sums = [node for node in copied.nodes if node.op == "call_function" and node.target is add_shortcut]
    merged = [_merge(node) for node in sums]
    shrinking = [node for node in copied.nodes if node.op == "call_module" and node.target in reductions]
    merged += [_shrink(node) for node in shrinking]
    return copied if any(merged) else None


def _merge(total: fx.Node) -> bool:
    chain, pool = total.args
    if not (isinstance(pool, fx.Node) and pool.target is shortcut_pool and _private(pool) and not pool.kwargs):
        return False
    source, *window = pool.args
    before = list[fx.Node]()
    node = chain
    while isinstance(node, fx.Node) and node is not source and _is_link(node) and _private(node):
        before.insert(0, node)
        node = node.args[0]
    if node is not source or not before or before[0].op != "call_module" or not _at_once({pool, *before}, total):
        return False
    behind, ahead = _behind(total), _ahead(source, pool, before[0])
    if ahead:
        source = ahead[0].args[0]
    last = behind[-1] if behind else total
    graph = total.graph
    with graph.inserting_before(before[0]):
        modules = [_handed_over(links) for links in (before, behind, ahead)]
        if len(window) < 2:
            window += (3, 0)[len(window) :]
        merged = graph.call_function(downsample, (source, *window, *modules))
    last.replace_all_uses_with(merged)
    for old in (*reversed(behind), total, pool, *reversed(before), *reversed(ahead)):
        graph.erase_node(old)
    return True


def _shrink(node: fx.Node) -> bool:
    if not _is_link(node):
        return False
    behind, graph = _behind(node), node.graph
    with graph.inserting_before(node):
        merged = graph.call_function(reduce, (node.args[0], _handed_over([node]), _handed_over(behind)))
    (behind[-1] if behind else node).replace_all_uses_with(merged)
    for old in (*reversed(behind), node):
        graph.erase_node(old)
    return True


def _handed_over(links: list[fx.Node]) -> tuple[Any, ...]:
    """What is called, as arguments: children, and functions by their names."""
    return tuple(_function(link) or link.graph.get_attr(str(link.target)) for link in links)


def _at_once(calls: set[fx.Node], total: fx.Node) -> bool:
    """Whether these are what runs right before the sum: one call in their place moves no other."""
    node = total.prev
    while calls:
        if node not in calls and node.op != "get_attr":
            return False
        calls, node = calls - {node}, node.prev
    return True


def _is_link(node: fx.Node) -> bool:
    """A call of a child, or of an activation, on one value and nothing else."""
    settings = set(node.kwargs)
    if _function(node):
        settings.discard("inplace")  # which is no matter where nobody else reads the value
    return (node.op == "call_module" or bool(_function(node))) and len(node.args) == 1 and not settings


def _function(node: fx.Node) -> Any:
    return Functional.of(node.target) if node.op == "call_function" else None


def _private(node: fx.Node) -> bool:
    return len(node.users) == 1


def _behind(total: fx.Node) -> list[fx.Node]:
    """The calls that follow this one at once, each on the one before."""
    found, node = list[fx.Node](), total
    while len(found) < BEHIND and set(node.users) == {node.next} and _is_link(node.next):
        node = node.next
        found.append(node)
    return found


def _ahead(source: object, pool: fx.Node, conv: fx.Node) -> list[fx.Node]:
    """The calls that make, one right after another, a value which only these two read, right behind them."""
    found, node, readers = list[fx.Node](), source, {pool, conv}
    while len(found) < AHEAD and isinstance(node, fx.Node) and _is_link(node) and set(node.users) == readers:
        if node.kwargs.get("inplace"):  # others may read what it works on
            break
        if node.next not in readers or (not found and node.next.next not in readers):
            break
        found.insert(0, node)
        readers, node = {node}, node.args[0]
    return found


def chain_of(graph: fx.Graph) -> fx.Graph | None:
    """What a quickened graph's only call is given, as the result of a graph without inputs; None where it does more."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(calls) != 1 or len(inputs) != 1 or calls[0].target is not downsample:
        return None
    source, kernel, padding, before, behind, ahead = calls[0].args
    (result,) = graph.output_node().args
    if source is not inputs[0] or result is not calls[0] or ahead:
        return None
    made, table = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        if node.op == "get_attr":
            table[node] = made.node_copy(node)
    made.output(fx.map_arg((kernel, padding, before, behind), table.__getitem__))
    return made


def named_chain(source: str) -> str:
    """The `def forward` of such a graph, under its own name."""
    return source.replace("def forward(", f"def {CHAIN}(", 1)


def two_bodies(plain: str, quick: str) -> str:
    """One `def forward` of two: the second body for who plainly computes, the first for everybody else."""
    head, first = _split(plain)
    _, second = _split(quick)
    indented = [textwrap.indent(body, "    ") for body in (first, second)]
    return f"{head}    if torch.jit.is_scripting() or not {QUICK}():\n{indented[0]}    else:\n{indented[1]}"


def _split(source: str) -> tuple[str, str]:
    definition = ast.parse(source).body[-1]
    assert isinstance(definition, ast.FunctionDef)
    lines = source.splitlines(keepends=True)
    at = definition.body[0].lineno - 1
    return "".join(lines[:at]), "".join(lines[at:])

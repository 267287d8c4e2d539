"""In-place operations of a traced forward: which node holds what is written into, and whether another one does, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

Key = tuple[Any, ...]  # storage, offset, shape, strides
Results = Mapping[fx.Node, tuple[Key, int]]  # of nodes that make a tensor: where it lies, and its recorded value


def follow_in_place(graph: fx.Graph, results: Results) -> None:
    """Let what reads a tensor after an in-place operation on it read that operation's result, the same tensor.

    After `F.relu_(y)` whose result is dropped, `y` means the activation; an edit behind it must reach `y`.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    latest: dict[Key, fx.Node] = {}
    for node, (key, value) in results.items():
        written = _written(node, key, results) or latest.get(key)
        if written is not None and results[written][1] != value:
            for user in [user for user in written.users if place[user] > place[node]]:
                user.replace_input_with(written, node)
        latest[key] = node


def seen_elsewhere(graph: fx.Graph, results: Results, writes: Iterable[tuple[fx.Node, Key]]) -> bool:
    """Whether something written in place is read later by another view of it: `y.detach().clamp_(0)`, then `y`.

    An edit behind the operation would not reach what is read so.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node, key in writes:
        written = _written(node, key, results)
        for other, (held, _) in results.items():
            if other is written or place[other] >= place[node] or held[0] != key[0]:
                continue
            if any(place[user] > place[node] for user in other.users) and _overlap(held, key):
                return True
    return False


def _written(node: fx.Node, key: Key, results: Results) -> fx.Node | None:
    """The node whose tensor an operation writes into: its first input, where that lies there."""
    first = next((given for given in node.all_input_nodes[:1] if given in results), None)
    return first if first is not None and results[first][0] == key else None


def _overlap(one: Key, other: Key) -> bool:
    return one == other or bool(torch.isin(_places(one), _places(other)).any())


def _places(key: Key) -> torch.Tensor:
    _, offset, shape, strides = key
    found = torch.tensor([offset])
    for number, stride in zip(shape, strides, strict=True):
        found = (found[:, None] + torch.arange(number) * stride).flatten()
    return found

"""Edits of one block's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.layers.spec import Spec
from padfree.rewrite.tracer import TracedBlock
from padfree.types import NEW


class BlockEdit:
    """Edits of one block's graph."""

    def __init__(self, traced: TracedBlock, taken: Iterable[str]) -> None:
        self.traced = traced
        self.children: list[tuple[str, Spec]] = []
        self._now: dict[fx.Node, fx.Node] = {}
        self._taken = set(taken)

    def node(self, value: ValueId) -> fx.Node:
        """The node that made a recorded value, or what stands for it now, after the edits made so far."""
        return self._holders(value)[0]

    def read(self, value: ValueId, reader: fx.Node) -> fx.Node:
        """The node from which `reader` has a recorded value: a dropout in between passes on the same in eval mode."""
        found = [node for node in self._holders(value) if node in reader.all_input_nodes]
        return found[-1] if found else self.node(value)

    def _holders(self, value: ValueId) -> list[fx.Node]:
        found = list(self.traced.nodes.get(value, ()))
        if not found:
            raise Refusal(f"`{self.traced.path}` does not hold the value to be edited in its own forward")
        for index, node in enumerate(found):
            while node in self._now:
                node = found[index] = self._now[node]
        return found

    def anchor(self, op: OpId) -> fx.Node:
        """The node that runs a recorded operation."""
        return self.traced.anchors[op]

    def call(self, before: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a function, put before another node."""
        with self.traced.graph.inserting_before(before):
            return self.traced.graph.call_function(function, args)

    def call_new(self, before: fx.Node, spec: Spec, *args: Any) -> fx.Node:
        """A call of a new child, put before another node."""
        name = self.reserve(spec.child)
        self.children.append((name, spec))
        return self.call_child(before, name, *args)

    def call_child(self, before: fx.Node, name: str, *args: Any) -> fx.Node:
        """A call of a child by name, put before another node."""
        with self.traced.graph.inserting_before(before):
            return self.traced.graph.call_module(name, args)

    def reserve(self, name: str) -> str:
        """A free name for a new child."""
        base = f"{NEW}{name}"
        unique, count = base, 1
        while unique in self._taken:
            count += 1
            unique = f"{base}{count}"
        self._taken.add(unique)
        return unique

    def substitute(self, old: fx.Node, make: Callable[[fx.Node, fx.Node], fx.Node]) -> None:
        """Let everything that reads `old` read what `make(old, insertion point)` returns."""
        users = list(old.users)
        new = make(old, old.next)
        for user in users:
            user.replace_input_with(old, new)
        self._now[old] = new

    def drop(self, node: fx.Node) -> None:
        """Erase a node that nothing reads any more."""
        if not node.users:
            self.traced.graph.erase_node(node)

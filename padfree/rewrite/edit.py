"""Edits of one block's graph: made alike in every body, where the forward asks for the mode it runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.layers.spec import Spec
from padfree.rewrite.tracer import Body, TracedBlock
from padfree.types import NEW


class Places:
    """The same node in each body of a block; what it is is what it is in the recorded one."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.nodes = tuple(nodes)

    @property
    def op(self) -> str:
        """The kind of node."""
        return self.nodes[0].op

    @property
    def target(self) -> Any:
        """What it calls."""
        return self.nodes[0].target

    @property
    def args(self) -> tuple[Any, ...]:
        """Its positional arguments."""
        return self.nodes[0].args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Its keyword arguments."""
        return self.nodes[0].kwargs

    def replace_input_with(self, old: Places, new: Places) -> None:
        """Read `new` instead of `old`."""
        for node, before, after in zip(self.nodes, old.nodes, new.nodes, strict=True):
            node.replace_input_with(before, after)


class BlockEdit:
    """Edits of one block's bodies."""

    def __init__(self, traced: TracedBlock, taken: Iterable[str]) -> None:
        self.traced = traced
        self.children: list[tuple[str, Spec]] = []
        self._now: dict[fx.Node, fx.Node] = {}
        self._taken = set(taken)
        self._made: set[fx.Node] = set()
        self._ends: set[str] = set()

    def node(self, value: ValueId) -> Places:
        """The node that made a recorded value, or what stands for it now, after the edits made so far."""
        return Places(self._holders(body, value)[0] for body in self.traced.bodies)

    def read(self, value: ValueId, reader: Places) -> Places:
        """The node from which `reader` has a recorded value: a dropout in between passes on the same in eval mode."""
        first = reader.nodes[0]
        found = [node for node in self._holders(self.traced.bodies[0], value) if node in first.all_input_nodes]
        if not found:
            return self.node(value)
        at = first.all_input_nodes.index(found[-1])
        if any(len(node.all_input_nodes) != len(first.all_input_nodes) for node in reader.nodes):
            raise self._other_in_training()
        return Places(node.all_input_nodes[at] for node in reader.nodes)

    def _holders(self, body: Body, value: ValueId) -> list[fx.Node]:
        found = list(body.nodes.get(value, ()))
        if not found and body.graph is not self.traced.bodies[0].graph and self.traced.bodies[0].nodes.get(value):
            raise self._other_in_training()
        if not found:
            raise Refusal(f"`{self.traced.path}` does not hold the value to be edited in its own forward")
        for index, node in enumerate(found):
            while node in self._now:
                node = found[index] = self._now[node]
        return found

    def _other_in_training(self) -> Refusal:
        return Refusal(
            f"the forward of {self._where()} does something else in training at the place to be edited; "
            "move what differs into a child module"
        )

    def _where(self) -> str:
        return f"`{self.traced.path}`" if self.traced.path else "the model itself"

    def anchor(self, op: OpId) -> Places:
        """The node that runs a recorded operation."""
        found = [body.anchors.get(op) for body in self.traced.bodies]
        if found[0] is None:
            raise KeyError(op)
        if None in found:
            raise self._other_in_training()
        return Places(node for node in found if node is not None)

    def call(self, before: Places, function: Callable[..., Any], *args: Any) -> Places:
        """A call of a function, put before another node."""
        return self._insert(before, "call_function", function, args)

    def call_new(self, before: Places, spec: Spec, *args: Any) -> Places:
        """A call of a new child, put before another node."""
        name = self.reserve(spec.child)
        self.children.append((name, spec))
        return self.call_child(before, name, *args)

    def call_child(self, before: Places, name: str, *args: Any) -> Places:
        """A call of a child by name, put before another node."""
        return self._insert(before, "call_module", name, args)

    def _insert(self, before: Places, op: str, target: Any, args: tuple[Any, ...]) -> Places:
        made = []
        for index, (body, at) in enumerate(zip(self.traced.bodies, before.nodes, strict=True)):
            given = tuple(arg.nodes[index] if isinstance(arg, Places) else arg for arg in args)
            with body.graph.inserting_before(at):
                made.append(body.graph.create_node(op, target, given))
        self._made.update(made)
        return Places(made)

    def reserve(self, name: str) -> str:
        """A free name for a new child."""
        base = f"{NEW}{name}"
        unique, count = base, 1
        while unique in self._taken:
            count += 1
            unique = f"{base}{count}"
        self._taken.add(unique)
        return unique

    def substitute(self, old: Places, make: Callable[[Places, Places], Places]) -> None:
        """Let everything that reads `old` read what `make(old, insertion point)` returns."""
        self._end(old)
        users = [list(node.users) for node in old.nodes]
        new = make(old, Places(node.next for node in old.nodes))
        for readers, before, after in zip(users, old.nodes, new.nodes, strict=True):
            for reader in readers:
                reader.replace_input_with(before, after)
            self._now[before] = after

    def drop(self, place: Places) -> None:
        """Erase a node that nothing reads any more."""
        self._end(place)
        for body, node in zip(self.traced.bodies, place.nodes, strict=True):
            if not node.users:
                body.graph.erase_node(node)

    def _end(self, place: Places) -> None:
        if place.op == "call_module" and not place.target.startswith(NEW):
            self._ends.add(place.target)

    def check_reached(self) -> None:
        """Refuse edits of which nothing comes out.

        Raises:
            Refusal: what was added is read by nothing that the forward returns, or does beside (`maps.append(y)`).
        """
        for body in self.traced.bodies:
            reached: set[fx.Node] = set()
            for node in reversed(body.graph.nodes):
                if node in reached or (not node.users and node not in self._made):
                    reached.update(node.all_input_nodes)
            if any(node in self._made and node not in reached for node in body.graph.nodes):
                raise Refusal(f"the forward of {self._where()} returns nothing of what would be added to it")

    def ends(self) -> tuple[str, ...]:
        """Children that, called one after another, do not give what they give in the block.

        Either something is done to what they make, or they read what only the generated forward makes.
        """
        added = self._made - set(self._now.values())
        for node in self.traced.bodies[0].graph.nodes:
            if node.op == "call_module" and not node.target.startswith(NEW) and added & set(node.all_input_nodes):
                self._ends.add(node.target)
        return tuple(sorted(self._ends))

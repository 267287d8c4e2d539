"""Reading a recording: which values are maps, and which of them share a size.

A *map* is a value laid out (N, C, H, W). A *domain* is a set of maps that share one spatial size
because some operation needs them equal; every stride-2 operation entering a domain must shrink alike.
"""

from __future__ import annotations

from padfree.analysis.kinds import AVG_POOLS, MAX_POOLS, VIEWS, data_input, plain_kind
from padfree.indices import DomainId, OpId, ValueId
from padfree.record.recorder import Op
from padfree.record.recording import Recording


class Maps:
    """The values of one recording: who makes and reads them, which are maps, and their domains."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.values = recording.values
        self.ops = recording.ops
        self._parent: dict[ValueId, ValueId] = {}
        self._tag: dict[ValueId, tuple[int, int]] = {}
        self._maps: set[ValueId] = set()
        self._find_domains()

    # -- values ---------------------------------------------------------------------------------

    def consumers(self, value: ValueId) -> list[OpId]:
        """Indices of the operations that read `value`."""
        return self.recording.consumers.get(value, [])

    def sole_consumer(self, value: ValueId) -> Op | None:
        """The operation that reads `value`, if there is one only and the model does not return it."""
        found = self.consumers(value)
        if len(found) != 1 or value in self.recording.outputs:
            return None
        return self.ops[found[0]]

    def producer(self, value: ValueId) -> Op | None:
        """The operation that made `value`."""
        index = self.values[value].producer
        return None if index < 0 else self.ops[index]

    def size(self, value: ValueId) -> tuple[int, int]:
        """(H, W) of a map."""
        shape = self.values[value].shape
        return (shape[2], shape[3])

    def is_map(self, value: ValueId) -> bool:
        """Whether `value` is laid out (N, C, H, W)."""
        return value in self._maps

    def placed(self, value: ValueId) -> bool:
        """Whether `value` has a domain: it was live, and the model's own."""
        return value in self._parent

    # -- domains --------------------------------------------------------------------------------

    def domain(self, value: ValueId) -> DomainId:
        """The domain `value` belongs to."""
        return DomainId(self._root(value))

    def _root(self, value: ValueId) -> ValueId:
        """The smallest value of its domain."""
        while self._parent[value] != value:
            self._parent[value] = self._parent[self._parent[value]]
            value = self._parent[value]
        return value

    def _union(self, a: ValueId, b: ValueId) -> None:
        a, b = self._root(a), self._root(b)
        self._parent[max(a, b)] = min(a, b)

    def _find_domains(self) -> None:
        for value in self.recording.inputs:
            self._place(value, ())
        for op in self.ops:
            if op.kind == "convolution" or op.kind in MAX_POOLS | AVG_POOLS:
                self._claim(data_input(op))
            for out in op.outputs:
                if self.values[out].live:
                    self._place(out, op.inputs)

    def _claim(self, value: ValueId) -> None:
        """What a convolution or pool reads is a map, however it was laid out before."""
        shape = self.values[value].shape
        if value in self._parent and value not in self._maps and len(shape) == 4:
            self._maps.add(value)
            self._tag[value] = (shape[2], shape[3])

    def _place(self, value: ValueId, inputs: tuple[ValueId, ...]) -> None:
        """Give a new value its domain: that of the inputs of its size, or one of its own."""
        self._parent[value] = value
        shape = self.values[value].shape
        side = (shape[2], shape[3]) if len(shape) == 4 else None
        carried = [source for source in inputs if source in self._tag]
        alike = [source for source in carried if self._tag[source] == side]
        wide = [source for source in carried if self._tag[source] != (1, 1)]  # but a squeeze-excitation's of one pixel
        if side is not None and (alike or self._makes_map(value, carried)):
            self._maps.add(value)
            self._tag[value] = side
            if side != (1, 1):
                for source in alike:
                    self._union(value, source)
        elif len({self._tag[source] for source in wide}) == 1:
            self._tag[value] = self._tag[wide[0]]
            for source in wide:
                self._union(value, source)

    def _makes_map(self, value: ValueId, carried: list[ValueId]) -> bool:
        """Whether a 4-d value of a new size is a map, rather than one laid out (N, H, W, C)."""
        op = self.producer(value)
        shape = self.values[value].shape
        if any(self._tag[source] == (shape[1], shape[2]) for source in carried):
            return False
        if op is not None and plain_kind(op) in ("permute", "transpose"):
            return False
        unfolded = op is not None and plain_kind(op) in VIEWS
        return unfolded or all(source in self._maps for source in carried)

"""Which operations and calls of a recording are norms, and which are activations."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from padfree.analysis.kinds import (
    AFFINE,
    AVG_POOLS,
    LIKE,
    MAX_POOLS,
    NONLINEAR,
    NORMS,
    PRODUCTS,
    STATISTICS,
    VIEWS,
    plain_kind,
)
from padfree.analysis.maps import Maps
from padfree.indices import ValueId
from padfree.record.recorder import Op
from padfree.record.recording import Call
from padfree.record.trees import Ref

_DIVIDES = frozenset({"div", "rsqrt", "reciprocal", "pow"})
_GATES = frozenset({"sigmoid", "hardsigmoid", "tanh", "_softmax"})
_NO_NORM = NORMS | PRODUCTS | MAX_POOLS | AVG_POOLS | {"convolution"}


@dataclass(frozen=True)
class WrittenNorm:
    """A norm that is a formula: its module's path, the map it reads and the map it makes."""

    path: str
    read: ValueId
    made: ValueId


class Norms(Maps):
    """Norms and activations over one recording."""

    @functools.cached_property
    def written_norms(self) -> dict[ValueId, WrittenNorm]:
        """By the map that each alone reads, the norms whose forwards are formulas: FRN, EvoNorm, one's own.

        Such a module has a weight for every channel and takes a statistic of its map; it has no layers below it, but
        for an activation that its forward ends with.
        """
        calls = (call for call in self.recording.calls if call.path and len(call.inputs) == 1 == len(call.outputs))
        found = (written for call in calls if (written := self._written_norm(call)) is not None)
        return {written.read: written for written in found}

    def _written_norm(self, call: Call) -> WrittenNorm | None:
        (read,), (made,) = call.inputs, call.outputs
        ops = [self.ops[index] for index in call.ops]
        kinds = {plain_kind(op) for op in ops}
        if kinds.isdisjoint(STATISTICS) or kinds & _NO_NORM or not self.is_map(read):
            return None
        if kinds.isdisjoint(_DIVIDES) or any(plain_kind(op) in _GATES and self._is_smaller(op, read) for op in ops):
            return None  # a gate: how much of each channel goes on
        below = {op.call for op in ops} - {call.index}
        if below:
            act = self.recording.calls[below.pop()]
            if below or act.outputs != call.outputs or len(act.inputs) != 1 or not self.pointwise(act):
                return None
            (made,), ops = act.inputs, [op for op in ops if op.call == call.index]
        weights = {
            ref.value for op in ops for ref in op.args[0] if isinstance(ref, Ref) and self.values[ref.value].name
        }
        channels = self.values[read].shape[1]
        fits = (
            read != made
            and self.values[made].shape == self.values[read].shape
            and all(reader in call.ops for reader in self.consumers(read))
            and any(math.prod(self.values[weight].shape) == channels for weight in weights)
        )
        return WrittenNorm(call.path, read, made) if fits else None

    def _is_smaller(self, op: Op, read: ValueId) -> bool:
        shape = self.values[read].shape
        return bool(op.outputs) and math.prod(self.values[op.outputs[0]].shape) < math.prod(shape)

    def scales_channels(self, op: Op) -> bool:
        """Whether an affine operation has a tensor of constants, not a number, for its other operand."""
        constants = [ref for ref in op.args[0] if isinstance(ref, Ref) and ref.value not in op.inputs]
        return plain_kind(op) in AFFINE and any(self.values[ref.value].shape for ref in constants)

    def norm_module(self, op: Op) -> str:
        """Path of the module that is a norm and no more, or ""."""
        call = self.recording.calls[op.call]
        heavy = {"convolution", "mm", "addmm", "bmm"}
        return "" if any(self.ops[index].kind in heavy for index in call.ops) else call.path

    def pointwise(self, call: Call) -> bool:
        """Whether a call is an activation: what it makes of its map is pointwise, bent, and of nothing else."""
        ops = [self.ops[index] for index in call.ops if self.ops[index].inputs]
        known = set(call.inputs)
        for op in ops:
            if plain_kind(op) not in NONLINEAR | AFFINE | VIEWS | LIKE or not known.issuperset(op.inputs):
                return False
            known.update(op.outputs)
        same = len(call.outputs) == 1 and self.values[call.outputs[0]].shape == self.values[call.inputs[0]].shape
        return same and any(plain_kind(op) in NONLINEAR for op in ops)

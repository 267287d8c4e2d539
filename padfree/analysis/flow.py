"""Reading a recording: what follows what, forward to the end of a convolution's chain, and back to a fork."""

from __future__ import annotations

import copy
import functools

import torch

from padfree.analysis.chain import Chain
from padfree.analysis.kinds import (
    AFFINE,
    ATTENTION,
    AVG_POOLS,
    LIKE,
    MAX_POOLS,
    NONLINEAR,
    NORMS,
    VIEWS,
    data_input,
    plain_kind,
)
from padfree.analysis.norms import Norms
from padfree.indices import DomainId, OpId, ValueId
from padfree.record.copies import in_mode
from padfree.record.recorder import Op, Recorder
from padfree.record.recording import Call


class Flow(Norms):
    """Dataflow questions over one recording."""

    # -- walking forward ------------------------------------------------------------------------

    def linear_step(self, value: ValueId) -> ValueId | None:
        """The value after the one norm, constant scale or shift, or view that reads `value`."""
        if value in self.written_norms:
            return self.written_norms[value].made
        readers = self.consumers(value)  # that the model returns it too makes no other network
        if len(readers) != 1 or not self.ops[readers[0]].outputs:
            return None
        op = self.ops[readers[0]]
        kind = plain_kind(op)
        if op.kind in NORMS or kind in VIEWS or (kind in AFFINE and len(op.inputs) == 1):
            return op.outputs[0]
        return None

    def chain(self, value: ValueId) -> Chain:
        """The norm and activation that follow the convolution output `value`."""
        norm, norm_path, current, normed = None, "", value, False
        while (after := self.linear_step(current)) is not None:
            op = self.ops[self.values[after].producer]
            written = self.written_norms.get(current)
            is_norm = op.kind in NORMS or written is not None
            if (is_norm and normed) or self.in_other_block(op, value):
                break
            if is_norm or self.scales_channels(op):
                norm_path = norm_path or (self.norm_module(op) if written is None else written.path)
                normed = True
            current = after
            if normed and self.values[current].shape == self.values[value].shape:
                norm = current
        same = self.values[current].shape == self.values[value].shape
        act, act_path = self.activation(
            current if same or (normed and norm is None) else value if norm is None else norm
        )
        act_last = act is not None and not same and norm is None
        if act_last:  # the map is laid out anew for its norm, and laid back after its activation
            act = self._laid_back(act, value)
        norm_path = norm_path if norm is not None or act_last else ""
        read = self.recording.calls_of[norm_path][0].inputs if norm_path else ()
        norm_last = bool(read) and not self.is_map(read[0])
        producer = None if act is None else self.producer(act)
        formula = (
            producer is not None and not act_path and not act_last and producer.inputs not in ((current,), (norm,))
        )
        return Chain(value, norm, act, norm_path, act_path, norm_last, act_last, formula)

    def _laid_back(self, value: ValueId | None, like: ValueId) -> ValueId | None:
        """The value that views make of this one, of the shape that another has; None where they do not."""
        while value is not None and self.values[value].shape != self.values[like].shape:
            op = self.sole_consumer(value)
            value = op.outputs[0] if op is not None and plain_kind(op) in VIEWS else None
        return value

    def acting(self, value: ValueId) -> list[str]:
        """Paths of the modules that pass `value` on, and only act in training."""
        return [call.path for call in self._passing.get(value, ()) if self._acts_in_training(call)]

    @functools.cached_property
    def _passing(self) -> dict[ValueId, list[Call]]:
        table: dict[ValueId, list[Call]] = {}
        for call in self.recording.calls:
            if not call.ops and len(call.inputs) == 1 and call.inputs == call.outputs:
                table.setdefault(call.inputs[0], []).append(call)
        return table

    def _acts_in_training(self, call: Call) -> bool:
        module = copy.deepcopy(self.recording.modules[call.path])  # without weights; its mode is nobody else's
        args, kwargs = call.arguments
        try:
            with in_mode(module.modules(), True), torch.random.fork_rng(devices=[]), Recorder() as recorder:
                type(module).forward(module, *args, **kwargs)
        except Exception:  # whatever it does in training, it is more than to pass a value on
            return True
        return bool(recorder.ops)

    def activation(self, value: ValueId) -> tuple[ValueId | None, str]:
        """The value after the activation that reads `value`, and its module's path ("" for a function).

        An activation is a module call, a single operation or a formula that is pointwise, nonlinear and reads
        nothing but `value`.
        """
        readers = self.consumers(value)
        if not readers:
            return None, ""
        first = self.ops[readers[0]]
        if self.in_other_block(first, value):
            return None, ""
        for call in reversed([c for c in self.recording.ancestors(first.call) if c.inputs == (value,)]):
            if all(index in call.ops for index in readers) and self.pointwise(call):
                return call.outputs[0], call.path
        if len(readers) == 1 and plain_kind(first) in NONLINEAR and first.inputs == (value,):
            return first.outputs[0], ""
        return self._formula(value, first), ""

    def _formula(self, value: ValueId, first: Op) -> ValueId | None:
        """What several operations make of `value` that nothing else reads: y * sigmoid(y), y * relu6(y + 3) / 6."""
        known, bends = {value}, False
        for op in self.ops[first.index :]:
            if known.isdisjoint(op.inputs):
                continue
            kind = plain_kind(op)
            fits = kind in NONLINEAR | AFFINE | VIEWS | LIKE and known.issuperset(op.inputs)
            if not fits or self.in_other_block(op, value):
                return None
            known.update(op.outputs)
            bends = bends or kind in NONLINEAR
            end = op.outputs[0]
            inner = known - {end}
            closed = all(reader <= op.index for part in inner for reader in self.consumers(part))
            if closed and bends and inner.isdisjoint(self.recording.outputs):
                return self._scaled(end) if self.values[end].shape == self.values[value].shape else None
        return None

    def _scaled(self, value: ValueId) -> ValueId:
        """The value after the numbers that `value` is multiplied with, or added to."""
        while (op := self.sole_consumer(value)) is not None and plain_kind(op) in AFFINE and len(op.inputs) == 1:
            if self.scales_channels(op):
                break
            value = op.outputs[0]
        return value

    def in_other_block(self, op: Op, value: ValueId) -> bool:
        """Whether `op` lies in a module that `value` only enters and that has convolutions of its own.

        The norm and activation that a pre-activation block begins with are the block's, not those of the
        conv before it.
        """
        made = self.values[value].producer
        outside = [call for call in self.recording.ancestors(op.call) if made not in call.ops]
        return bool(outside) and any(self.ops[i].kind == "convolution" for i in outside[-1].ops)

    def feeds_only_attention(self, value: ValueId) -> bool:
        """Whether all that is made of `value` alone ends as one operand of attention products."""
        derived, met = {value}, False
        for op in self.ops[self.values[value].producer + 1 :]:
            if derived.isdisjoint(op.inputs):
                continue
            if derived.issuperset(op.inputs):
                derived.update(op.outputs)
            elif op.kind in ATTENTION:
                met = True
            else:
                return False
        return met and derived.isdisjoint(self.recording.outputs)

    # -- walking back ---------------------------------------------------------------------------

    def linear_source(self, value: ValueId) -> ValueId:
        """Back from `value` through norms, constant scales and views that nothing else reads."""
        while (op := self.producer(value)) is not None:
            kind = plain_kind(op)
            written = next((norm.read for norm in self.written_norms.values() if norm.made == value), None)
            if written is not None:
                value = written
                continue
            if not (op.kind in NORMS or kind in VIEWS or (kind in AFFINE and len(op.inputs) == 1)):
                break
            if value != op.outputs[0] or len(self.consumers(op.inputs[0])) != 1:
                break
            value = op.inputs[0]
        return value

    def reaches(self, value: ValueId, target: ValueId) -> tuple[bool, bool]:
        """(whether `value` is made of `target`, whether by way of an activation or max-pool)."""
        nonlinear: dict[ValueId, bool] = {value: False}
        found, bent = value == target, False
        stack = [value]
        while stack:
            current = stack.pop()
            op = self.producer(current)
            if op is None or current == target:
                continue
            bends = nonlinear[current] or plain_kind(op) in NONLINEAR or op.kind in MAX_POOLS
            for source in op.inputs:
                if source < target or (source in nonlinear and nonlinear[source] >= bends):
                    continue
                nonlinear[source] = bends
                if source == target:
                    found, bent = True, bent or bends
                stack.append(source)
        return found, bent

    # -- module calls ---------------------------------------------------------------------------

    def visible(self, value: ValueId, call: Call) -> bool:
        """Whether `value` is an input of `call`, or made by an operation or a child call of its own forward."""
        if value in call.inputs:
            return True
        op = self.producer(value)
        if op is None or op.index not in call.ops:
            return False
        return op.call == call.index or any(
            inner.parent == call.index and value in inner.outputs for inner in self.recording.ancestors(op.call)
        )

    def blocks(self, inside: OpId, *values: ValueId) -> list[Call]:
        """Calls around operation `inside` whose own forward holds all `values`, innermost first."""
        around = self.recording.ancestors(self.ops[inside].call)
        return [call for call in around if all(self.visible(value, call) for value in values)]

    @functools.cached_property
    def entries(self) -> dict[DomainId, list[Op]]:
        """By domain, the convolutions and pools that enter it from a map of another size."""
        table: dict[DomainId, list[Op]] = {}
        for op in self.ops:
            if op.kind != "convolution" and op.kind not in MAX_POOLS | AVG_POOLS:
                continue
            source, out = data_input(op), op.outputs[0]
            if self.is_map(source) and self.is_map(out) and self.size(source) != self.size(out):
                table.setdefault(self.domain(out), []).append(op)
        return table

    @functools.cached_property
    def pinned(self) -> dict[int, Op]:
        """By domain, an operator of another library that reads a map of it beside a larger one.

        Nothing says how the sizes of the two must fit, so neither may change alone.
        """
        table: dict[int, Op] = {}
        for op in self.ops:
            maps = [value for value in op.inputs if self.is_map(value)] if op.foreign else []
            largest = max((self.size(value) for value in maps), default=(0, 0))
            for value in maps:
                if self.size(value) not in (largest, (1, 1)):
                    table.setdefault(self.domain(value), op)
        return table

"""Rules edit a recording through the `Surgeon`; what comes out is a list of operations on module paths."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from padfree.analysis.convolution import Conv
from padfree.analysis.kinds import AVG_POOLS, data_input
from padfree.analysis.sites import Sites
from padfree.errors import Refusal
from padfree.indices import OpId, ValueId
from padfree.kernels import shortcut_pool
from padfree.layers.spec import PoolProjectionSpec, Spec, StemTailSpec
from padfree.record.recording import Call
from padfree.rewrite.edit import BlockEdit, Places
from padfree.rewrite.forward import Locked, graph_source, original_class
from padfree.rewrite.operations import (
    AddChild,
    MoveChild,
    Operation,
    Reforward,
    ReplaceEnd,
    Resize,
    Seal,
    SetAttributes,
    Substitute,
)
from padfree.rewrite.reads import without_reads
from padfree.rewrite.same_padding import plain_forward
from padfree.rewrite.sealed import FUSERS
from padfree.rewrite.tracer import TracedBlock, trace_block
from padfree.rewrite.views import SEALED
from padfree.rules.base import Shortcut
from padfree.types import Options

TraceCache = dict[str, TracedBlock | Refusal]
"""Traced blocks by path, or why they cannot be traced, shared by trials of one recording."""


class Surgeon:
    """Collects the edits of a plan's matches into operations (`padfree.rules.base.Editor`)."""

    def __init__(self, sites: Sites, options: Options, traced: TraceCache | None = None) -> None:
        self._traced = {} if traced is None else traced
        self.sites = sites
        self.options = options
        self._recording = sites.recording
        self._blocks: dict[str, BlockEdit] = {}
        self._operations: list[Operation] = []

    def _block(self, path: str) -> BlockEdit:
        edit = self._blocks.get(path)
        if edit is None:
            call = self._recording.calls_of[path][0]
            module = self._recording.modules[path]
            edit = self._blocks[path] = BlockEdit(self._trace(call).copied(), module._modules)
        return edit

    def _trace(self, call: Call) -> TracedBlock:
        found = self._traced.get(call.path)
        if found is None:
            try:
                found = trace_block(self._recording, call)
            except Refusal as refusal:
                found = refusal
            self._traced[call.path] = found
        if isinstance(found, Refusal):
            raise found
        return found

    # -- what rules may do (documented in `padfree.rules.base.Editor`) ---------------------------

    def conv(self, conv: Conv, padding: int, stride: int | None = None) -> None:  # noqa: D102
        module = self._recording.modules[conv.path]
        values: dict[str, Any] = {"padding": (padding, padding)}
        if stride is not None:
            values["stride"] = (stride, stride)
        if conv.pad >= 0:
            self._unpad(conv.path, conv.op, conv.pad, conv.source, values)
        reversed_name = "_reversed_padding_repeated_twice"
        if hasattr(module, reversed_name):
            values[reversed_name] = [padding] * 4
        self._operations.append(SetAttributes(conv.path, tuple(values.items())))

    def _unpad(self, path: str, op: OpId, pad: OpId, source: ValueId, values: dict[str, Any]) -> None:
        recording = self._recording
        within = (call.index for call in recording.ancestors(recording.ops[pad].call))
        if recording.ops[op].call in within:  # in its own forward, or a child that pads
            source_text, names, switches = plain_forward(recording, recording.calls[recording.ops[op].call], values)
            values.update(switches)
            if source_text:
                self._operations.append(Reforward(path, source_text, names, ()))
            return
        out = recording.ops[pad].outputs[0]
        around = self.sites.flow.blocks(op, source, out)
        call = next((c for c in around if c.path != path), None)
        if call is None:
            raise Refusal(f"`{path}`: the padding before it is made where no forward holds both")
        edit = self._block(call.path)
        padded = edit.node(out)
        edit.anchor(op).replace_input_with(padded, edit.read(source, padded))
        edit.drop(padded)

    def pool(self, op: OpId) -> None:  # noqa: D102
        recording = self._recording
        recorded = recording.ops[op]
        path = recording.calls[recorded.call].path
        module = recording.modules[path]
        before = self.sites.flow.producer(recorded.inputs[0])
        if getattr(module, "divisor_override", None):
            raise Refusal(
                f"`{path}` divides its sums by {module.divisor_override}, which a 3x3 window's would need too"
            )
        if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            values: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 0, "ceil_mode": False}
            inside = before is not None and before.kind == "constant_pad_nd" and before.call == recorded.call
            if inside or type(module) not in (nn.AvgPool2d, nn.MaxPool2d):
                source_text, names, switches = plain_forward(recording, recording.calls[recorded.call], values)
                values.update(switches)
                if source_text:
                    self._operations.append(Reforward(path, source_text, names, ()))
            self._operations.append(SetAttributes(path, tuple(values.items())))
            return
        edit = self._block(path)
        node = edit.anchor(op)
        function = F.avg_pool2d if recorded.kind in AVG_POOLS else F.max_pool2d
        called = getattr(node.target, "__name__", str(node.target))
        if called != function.__name__ or node.kwargs.get("divisor_override") or len(node.args) > 6:
            raise Refusal(f"`{path}` pools by {called}, with settings or sums of its own that a 3x3 window would lose")
        source = edit.read(data_input(recorded), node)
        edit.substitute(node, lambda old, at: edit.call(at, function, source, 3, 2, 0))
        edit.drop(node)

    def shortcut(self, block: str, shortcut: Shortcut) -> None:  # noqa: D102
        edit = self._block(block)
        at, read = self._reading(edit, shortcut.source, shortcut.anchor)
        window = (shortcut.kernel, shortcut.padding)
        if shortcut.project:
            reference = self._weight_near(shortcut.anchor)
            channels = (self._channels(shortcut.source), self._channels(shortcut.merge))
            pooled = edit.call_new(at, PoolProjectionSpec(reference, *channels, *window), read)
        else:
            pooled = edit.call(at, shortcut_pool, read, *(() if window == (3, 0) else window))
            if shortcut.repeat > 1:
                pooled = edit.call(at, torch.repeat_interleave, pooled, shortcut.repeat, 1)
        edit.substitute(edit.node(shortcut.merge), lambda old, at: edit.call(at, operator.add, old, pooled))

    def unfuse(self, block: str, value: ValueId, path: str) -> None:  # noqa: D102
        edit = self._block(block)
        name = edit.reserve("act")
        edit.substitute(edit.node(value), lambda old, at: edit.call_child(at, name, old))
        self._operations.append(MoveChild(block, path, name))

    def crop(self, block: str, source: ValueId, op: OpId, margin: int) -> None:  # noqa: D102
        edit = self._block(block)
        at, read = self._reading(edit, source, op)
        every = slice(None)
        inner = slice(margin, -margin)
        at.replace_input_with(read, edit.call(at, operator.getitem, read, (every, every, inner, inner)))

    def insert_before(self, block: str, source: ValueId, op: OpId, spec: Spec) -> None:  # noqa: D102
        edit = self._block(block)
        at, read = self._reading(edit, source, op)
        at.replace_input_with(read, edit.call_new(at, spec, read))

    def insert_after(self, block: str, value: ValueId, spec: Spec) -> None:  # noqa: D102
        edit = self._block(block)
        edit.substitute(edit.node(value), lambda old, at: edit.call_new(at, spec, old))

    def replace(self, block: str, source: ValueId, op: OpId, spec: Spec) -> None:  # noqa: D102
        edit = self._block(block)
        node = edit.anchor(op)
        read = edit.read(source, node)
        edit.substitute(node, lambda old, at: edit.call_new(at, spec, read))
        edit.drop(node)

    def add_parallel(self, block: str, source: ValueId, anchor: OpId, merge: ValueId, spec: Spec) -> None:  # noqa: D102
        edit = self._block(block)
        at, read = self._reading(edit, source, anchor)
        new = edit.call_new(at, spec, read)
        edit.substitute(edit.node(merge), lambda old, at: edit.call(at, operator.add, old, new))

    def pool_input(self, block: str, source: ValueId, op: OpId) -> None:  # noqa: D102
        edit = self._block(block)
        at, read = self._reading(edit, source, op)
        at.replace_input_with(read, edit.call(at, shortcut_pool, read))

    def replace_end(self, path: str, spec: StemTailSpec) -> None:  # noqa: D102
        self._operations.append(ReplaceEnd(path, spec))

    def substitute(self, path: str, spec: Spec) -> None:  # noqa: D102
        self._operations.append(Substitute(path, spec))

    def resize(self, path: str, shape: tuple[int, ...]) -> None:  # noqa: D102
        self._operations.append(Resize(path, tuple(shape)))

    def assign(self, path: str, **attributes: Any) -> None:  # noqa: D102
        self._operations.append(SetAttributes(path, tuple(attributes.items())))

    # -------------------------------------------------------------------------------------------

    def _reading(self, edit: BlockEdit, source: ValueId, op: OpId) -> tuple[Places, Places]:
        """The node that runs an operation, and the one that it has `source` from.

        Raises:
            Refusal: something that acts in training lies between them, out of the block's sight.
        """
        at = edit.anchor(op)
        inside = f"{edit.traced.path}.{at.target}." if at.op == "call_module" else ""
        for path in self.sites.flow.acting(source) if inside else ():
            if path.startswith(inside):
                raise Refusal(f"`{path}` changes in training what the conv reads, where no forward holds both")
        return at, edit.read(source, at)

    def _channels(self, value: ValueId) -> int:
        return self._recording.values[value].shape[1]

    def _weight_near(self, op: OpId) -> str:
        call = self._recording.ops[op].call
        return self._recording.calls[call].path

    def operations(self) -> tuple[Operation, ...]:
        """Everything collected: attributes and children first, then forwards, then seals of ancestors."""
        found = list(self._operations)
        inner: list[str] = []  # ends of chains that lie in containers which the block's forward takes apart
        for path, edit in self._blocks.items():
            edit.check_reached()
            locked = self._lasting(edit)
            source, names = graph_source([body.graph for body in edit.traced.bodies], edit.traced.flags)
            found += [AddChild(path, name, spec) for name, spec in edit.children]
            ends = edit.ends()
            own = tuple(name for name in ends if "." not in name)
            found.append(Reforward(path, source, names, (*locked, (SEALED, own)) if own else locked))
            inner += [f"{path}.{name}".removeprefix(".") for name in ends if "." in name]
        found += self._seals({op.path for op in found if isinstance(op, Reforward)})
        for holder in dict.fromkeys(name.rpartition(".")[0] for name in inner):
            ends = tuple(name[len(holder) + 1 :] for name in inner if name.rpartition(".")[0] == holder)
            found.append(Seal(holder, ends))
        return tuple(found)

    def _lasting(self, edit: BlockEdit) -> Locked:
        """What was baked into a block, but what the conversion itself changes."""
        below = f"{edit.traced.path}." if edit.traced.path else ""
        changed = [
            f"{operation.path}.{name}"
            for operation in self._operations
            if isinstance(operation, SetAttributes)
            for name, _ in operation.values
        ]
        changed += [operation.origin for operation in self._operations if isinstance(operation, MoveChild)]
        changed += [operation.path for operation in self._operations if isinstance(operation, ReplaceEnd)]
        inside = [path.removeprefix(below) for path in changed if path.startswith(below)]
        return tuple(without_reads(dict(edit.traced.locked), inside).items())

    def _seals(self, rewritten: set[str]) -> list[Operation]:
        """Ancestors of rewritten blocks whose fusing methods would drop a shortcut unseen."""
        seals: list[Operation] = []
        above = {path.rsplit(".", depth)[0] for path in rewritten for depth in range(1, path.count(".") + 1)}
        for path in sorted((above | {""}) - rewritten if rewritten else ()):
            kind = original_class(self._recording.modules[path])
            if any(callable(getattr(kind, name, None)) for name in FUSERS):
                seals.append(Seal(path))
        return seals

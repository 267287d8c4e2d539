"""Strided convolutions as the rules see them: one convolution, or several that act as one.

A *site* is what a rewrite treats as a unit: a conv with what pads it, a BSConv pair, convolutions over
the parts of a split that are concatenated again, or linear branches of one input that are summed
(re-parameterisable blocks).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from padfree.analysis.convolution import Conv, Site
from padfree.analysis.flow import Flow
from padfree.analysis.kinds import (
    AFFINE,
    ATTENTION,
    MAX_POOLS,
    NONLINEAR,
    NORMS,
    PRODUCTS,
    VIEWS,
    data_input,
    pair,
    plain_kind,
)
from padfree.indices import ValueId
from padfree.record.recorder import NO_OP, Op
from padfree.record.trees import Ref

_PARTS = frozenset({"slice", "split", "split_with_sizes", "unbind", "select"})


_PADS = frozenset({"constant_pad_nd", "reflection_pad2d", "replication_pad2d", "_pad_circular"})


def _is_setting(value: Any) -> bool:
    """Whether an attribute says a stride or a padding; heads keep tensors under such names."""
    sides = value if isinstance(value, (tuple, list)) else (value,)
    return isinstance(value, str) or (bool(sides) and all(isinstance(side, int) for side in sides))


class Sites:
    """The convolutions of a recording and what they act as."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.recording = flow.recording
        found = (op for op in flow.ops if op.kind == "convolution" and self._is_2d(op))
        self.convs = {op.index: self._conv(op) for op in found}

    def _is_2d(self, op: Op) -> bool:
        positional = op.args[0]
        return not positional[6] and len(self.flow.values[positional[1].value].shape) == 4

    def _conv(self, op: Op) -> Conv:
        flow = self.flow
        positional = op.args[0]
        weight = flow.values[positional[1].value].shape
        source = data_input(op)
        pad, sides, mode = NO_OP, (0, 0, 0, 0), "zeros"
        before = flow.producer(source)
        if before is not None and before.kind in _PADS and len(flow.consumers(source)) == 1:
            pad, sides, mode = before.index, *_pad(before)
            source = data_input(before)
        own = pair(positional[4])
        padding = (sides[0] + own[0], sides[1] + own[0], sides[2] + own[1], sides[3] + own[1])
        path, is_module = self._owner(op)
        if is_module and pad < 0:  # circular padding is made of copies, no pad operation
            mode = getattr(self.recording.modules[path], "padding_mode", mode)
        channels = flow.values[source].shape[1]
        return Conv(
            op=op.index, path=path, is_module=is_module, source=source, out=op.outputs[0],
            in_channels=channels, out_channels=weight[0], kernel=(weight[2], weight[3]),
            stride=pair(positional[3]), dilation=pair(positional[5]), groups=positional[8],
            padding=padding, pad=pad, pad_mode=mode, fixed=not self._learnt(positional[1].value),
        )  # fmt: skip

    def _learnt(self, weight: ValueId, unnamed: bool = True) -> bool:
        """Whether a weight is a parameter (`unnamed`: or a tensor of no module), or made from one or from the input."""
        stack, seen = [weight], {weight}
        while stack:
            value = self.flow.values[stack.pop()]
            parameter = value.name and value.name in self._parameters
            if value.live or parameter or (unnamed and value.producer < 0 and not value.name):
                return True
            if value.producer >= 0:
                found = [ref for ref in _refs(self.flow.ops[value.producer].args) if ref not in seen]
                seen.update(found)
                stack.extend(found)
        return False

    @functools.cached_property
    def _parameters(self) -> set[str]:
        return {name for name, _ in self.recording.model.named_parameters()}

    def _owner(self, op: Op) -> tuple[str, bool]:
        recording = self.recording
        if op.call < 0:
            return "", False
        call = recording.calls[op.call]
        module = recording.modules.get(call.path)
        inner = [self.flow.ops[i] for i in call.ops if self.flow.ops[i].kind == "convolution"]
        fits = module is not None and all(_is_setting(vars(module).get(name)) for name in ("stride", "padding"))
        return call.path, bool(fits and len(inner) == 1 and not isinstance(module, nn.Sequential))

    @functools.cached_property
    def first(self) -> tuple[Conv, ...]:
        """The convolutions that read the network's input: resized, normalised, padded, by a fixed filter, ...

        Whatever is done to an image before the first layer that learns is not the network's; nor is a 1x1
        convolution that maps its channels to those the network takes.
        """
        return tuple(conv for conv in self.convs.values() if self._is_image(conv.source))

    def _is_image(self, value: ValueId) -> bool:
        """Whether nothing that `value` is made of but the network's input went through a layer that learns."""
        found, seen, stack = False, {(value, False)}, [(value, False)]
        while stack:
            current, bent = stack.pop()
            op = self.flow.producer(current)
            if op is None:
                found = found or current in self.recording.inputs
                continue
            if op.kind in MAX_POOLS or self._learns(op, bent):
                return False
            bent = bent or plain_kind(op) in NONLINEAR
            new = {(source, bent) for source in op.inputs} - seen
            seen |= new
            stack += new
        return found

    def _learns(self, op: Op, bent: bool) -> bool:
        """Whether an operation multiplies with parameters, and (`bent`) is more than a map between channels."""
        conv = self.convs.get(op.index)
        if conv is not None:
            adapter = conv.pointwise and conv.stride == (1, 1) and conv.groups == 1 and not bent
            return not (conv.fixed or adapter)
        others = [ref for ref in _refs(op.args) if ref not in op.inputs]
        heavy = op.kind in PRODUCTS | ATTENTION or op.kind == "convolution"
        return heavy and (len(op.inputs) > 1 or any(self._learnt(ref, unnamed=False) for ref in others))

    def read_by(self, op: Op) -> ValueId:
        """The map that a convolution or pool reads, before a pad that only it reads."""
        if op.index in self.convs:
            return self.convs[op.index].source
        source = data_input(op)
        pad = self.flow.producer(source)
        return data_input(pad) if pad is not None and pad.kind == "constant_pad_nd" else source

    def conv_making(self, value: ValueId) -> Conv | None:
        """The convolution that made `value`."""
        producer = self.flow.producer(value)
        return None if producer is None else self.convs.get(producer.index)

    def site(self, conv: Conv) -> Site:
        """What `conv` acts as."""
        flow = self.flow
        members, source, value = self._split_parts(conv)
        if len(members) == 1:
            members, value = self._summed(conv)
        width = flow.values[value].shape[1]
        convs = sorted(
            (m for m in members if m.kernel != (1, 1)), key=lambda m: (-m.spans[0], m.out_channels != width, m.op)
        )
        points = tuple(m for m in members if m.kernel == (1, 1))
        paired: tuple[Conv, ...] = ()
        if len(members) == 1 and conv.depthwise:
            paired = self._paired(conv)
            source = paired[0].source if paired else source
        dense = bool(paired) or not (convs or members)[0].depthwise
        shortcut = self._is_shortcut(source, value)
        chain = flow.chain(value)
        if not chain.norm_path and len(members) > 1:  # the branches have norms of their own
            chain = replace(chain, norm_path=flow.chain(convs[0].out).norm_path)
        return Site(tuple(convs), points, source, chain, dense, paired, shortcut)

    def _split_parts(self, conv: Conv) -> tuple[list[Conv], ValueId, ValueId]:
        """Convs over the parts of one split, concatenated again in order (MixConv)."""
        flow, alone = self.flow, ([conv], conv.source, conv.out)
        cat = flow.sole_consumer(conv.out)
        split = flow.producer(conv.source)
        if cat is None or cat.kind != "cat" or split is None:
            return alone
        parts = [ref.value for ref in cat.args[0][0] if isinstance(ref, Ref)]
        members = [member for part in parts if (member := self.conv_making(part)) is not None]
        sources = tuple(member.source for member in members)
        whole = len(members) == len(parts) == len(split.outputs) and sources == split.outputs
        if not whole or any(member.stride != conv.stride for member in members):
            return alone
        return members, split.inputs[0], cat.outputs[0]

    def _summed(self, conv: Conv) -> tuple[list[Conv], ValueId]:
        """Linear branches of one input, each conv -> norm, summed: members and the sum's value."""
        flow = self.flow
        members, best = [conv], conv.out
        value = conv.out
        while True:
            after = flow.linear_step(value)
            if after is None and value == conv.out:
                after = self._adapted(conv)
            if after is not None:
                value = after
                continue
            op = flow.sole_consumer(value)
            if op is None or plain_kind(op) != "add" or len(op.inputs) != 2:
                return members, best
            other = next(v for v in op.inputs if v != value) if op.inputs[0] != op.inputs[1] else value
            branch = self._branch(other, conv.source)
            if branch is None:
                return members, best
            members += branch
            value = best = op.outputs[0]

    def _adapted(self, conv: Conv) -> ValueId | None:
        """What a 1x1 conv makes of a dense conv that nothing else reads: the two are an adapter of low rank."""
        op = self.flow.sole_consumer(conv.out)
        point = None if op is None else self.convs.get(op.index)
        low = point is not None and point.pointwise and point.stride == (1, 1) and point.groups == 1
        return point.out if point is not None and low and conv.groups == 1 else None

    def _branch(self, value: ValueId, source: ValueId) -> list[Conv] | None:
        """The convs of a sum of linear one-conv branches that lead from `source` to `value`, else None."""
        flow = self.flow
        op = flow.producer(value)
        if op is None or len(flow.consumers(value)) != 1:
            return None
        if op.index in self.convs:
            conv = self.convs[op.index]
            inner = self.conv_making(conv.source)
            if inner is not None and inner.kernel != (1, 1) and self._adapted(inner) == value:
                conv = inner
            return [conv] if conv.source == source and conv.stride == (2, 2) else None
        if self._is_linear(op):
            return self._branch(op.inputs[0], source)
        if plain_kind(op) == "add" and len(op.inputs) == 2:
            branches = [self._branch(part, source) for part in op.inputs]
            return None if None in branches else [conv for branch in branches for conv in branch or []]
        return None

    def _paired(self, conv: Conv) -> tuple[Conv, ...]:
        """The 1x1 convs that alone feed a depthwise conv, with no activation between (BSConv-U/S)."""
        pair: list[Conv] = []
        source = conv.source
        while True:
            value = self.flow.linear_source(source)
            point = self.conv_making(value)
            alone = point is not None and len(self.flow.consumers(value)) == 1
            if point is None or not alone or not point.pointwise or point.stride != (1, 1) or point.groups != 1:
                return tuple(pair)
            pair.insert(0, point)
            source = point.source

    def _is_shortcut(self, source: ValueId, value: ValueId, *, preact: bool = False) -> bool:
        """Whether only linear operations lead from a fork through here to a sum with a nonlinear branch."""
        flow = self.flow
        source = self._fork(source, preact)
        if len(flow.consumers(source)) < 2:
            return False
        stack, sums = [value], 0
        while stack:
            value = stack.pop()
            readers = flow.consumers(value)
            if not readers or value in self.recording.outputs:
                return False
            for op in (flow.ops[index] for index in readers):
                kind = plain_kind(op)
                joins = (kind == "add" and len(op.inputs) == 2) or kind == "cat"
                if joins:
                    others = [flow.reaches(part, source) for part in op.inputs if part != value]
                    if not any(found and bent for found, bent in others):
                        return False
                    sums += kind == "add"
                elif self._is_linear(op) or kind in _PARTS or op.kind in {"convolution", "avg_pool2d"}:
                    stack.extend(out for out in op.outputs if flow.consumers(out))
                else:
                    return False
        return sums > 0

    def _is_linear(self, op: Op) -> bool:
        kind = plain_kind(op)
        return op.kind in NORMS or kind in VIEWS or (kind in AFFINE and len(op.inputs) == 1)

    def _fork(self, value: ValueId, preact: bool) -> ValueId:
        """Back from `value` through linear operations and convs to a value that several operations read.

        With `preact` also through the activation of a norm -> act that the branch begins with.
        """
        flow = self.flow
        while len(flow.consumers(value)) < 2:
            op = flow.producer(value)
            if op is None or not op.inputs:
                break
            bends = preact and plain_kind(op) in NONLINEAR and len(op.inputs) == 1
            if not (self._is_linear(op) or bends or op.kind in {"convolution", "avg_pool2d", "constant_pad_nd"}):
                break
            value = data_input(op) if isinstance(op.args[0][0], Ref) else op.inputs[0]
        return value

    def is_shortcut_op(self, op: Op) -> bool:
        """Whether a pool or 1x1 conv, after a norm -> act of its own at most, only adapts a shortcut's shape."""
        return self._is_shortcut(data_input(op), op.outputs[0], preact=True)


def _pad(op: Op) -> tuple[tuple[int, int, int, int], str]:
    amounts = (*op.args[0][1], 0, 0, 0, 0)[:4]
    left, right, top, bottom = amounts
    mode = "zeros"
    if op.kind != "constant_pad_nd":
        mode = op.kind
    elif len(op.args[0]) > 2 and op.args[0][2] not in (0, None):
        mode = f"the constant {op.args[0][2]}"
    return (top, bottom, left, right), mode


def _refs(tree: Any) -> Iterator[ValueId]:
    """Values among recorded arguments."""
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _refs(item)

"""Linear branches of one map that are summed: what one convolution can compute instead. Pure.

Re-parameterisable networks (RepVGG, MobileOne, RepViT, FastViT) train several convolutions, each with a norm, beside an
identity, and deploy their sum. In the padding-free form the small ones read a cropped map, so that their window is the
middle of the largest one's. What is found is told by operations: convolutions, batch norms in eval mode, sums, crops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from padfree.analysis.kinds import data_input, plain_kind
from padfree.deploy.operations import Operations
from padfree.indices import OpId, ValueId
from padfree.record.recorder import NO_OP, Op


@dataclass(frozen=True)
class Branch:
    """One linear way from the source to the sum: a convolution, or none (the identity), and the norms behind it."""

    source: ValueId
    conv: OpId
    window: tuple[int, int, int, int]
    """Of the convolution on the source, (top, left, bottom, right) from its first output: padding is negative."""
    stride: int
    groups: int
    norms: tuple[OpId, ...] = ()


@dataclass(frozen=True)
class Branches:
    """Branches of one source that are summed, by values and operations of a recording."""

    source: ValueId
    out: ValueId
    ops: tuple[OpId, ...]
    parts: tuple[Branch, ...]
    lead: Branch

    @property
    def core(self) -> tuple[OpId, ...]:
        """All of it is needed."""
        return self.ops


class Sums(Operations):
    """Finds the sums of branches in one recording."""

    def forms(self) -> Iterator[list[Branches]]:
        """Each sum that one convolution can compute, the largest first."""
        for op in reversed(self.recording.ops):
            if not self.is_sum(op) and not _adds_nothing(op):
                continue
            found = self._parts(op.outputs[0])
            if found is None or len(found[0]) < 2:
                continue
            parts, ops = found
            lead = self._lead(parts)
            if lead is not None:
                yield [Branches(lead.source, op.outputs[0], tuple(sorted(ops)), tuple(parts), lead)]

    def _parts(self, value: ValueId) -> tuple[list[Branch], set[OpId]] | None:
        """The branches that are summed to a value, and their operations."""
        op = self.producer(value)
        if op is not None and value == op.outputs[0]:
            if op.kind == "convolution":
                return self._convolution(op)
            if self.norm_tensors(op) is not None:
                source = data_input(op)
                if self.sole(source) is None:  # the identity's own norm, of the source
                    return [self._identity(source, (op.index,))], {op.index}
                inner = self._parts(source)
                if inner is None:
                    return None
                parts = [replace(part, norms=(*part.norms, op.index)) for part in inner[0]]
                return (parts, inner[1] | {op.index}) if len(parts) == 1 else None  # a norm of a sum is folded later
            if self.is_sum(op):
                return self._summed(op)
            if _adds_nothing(op):
                inner = self._parts(op.inputs[0]) if self.sole(op.inputs[0]) else None
                return None if inner is None else (inner[0], inner[1] | {op.index})
        return [self._identity(value)], set()

    def _summed(self, op: Op) -> tuple[list[Branch], set[OpId]] | None:
        parts: list[Branch] = []
        ops = {op.index}
        for value in op.inputs:
            inner = self._parts(value)
            if inner is None:
                return None
            if self.sole(value) is None:  # read elsewhere too: nothing but the identity
                inner = [self._identity(value)], set()
            parts += inner[0]
            ops |= inner[1]
        return parts, ops

    def _identity(self, value: ValueId, norms: tuple[OpId, ...] = ()) -> Branch:
        return Branch(value, NO_OP, (0, 0, 1, 1), 1, 0, norms)

    def _convolution(self, op: Op) -> tuple[list[Branch], set[OpId]] | None:
        _, weight, _, stride, padding, dilation, transposed, _, groups = op.args[0]
        shape = self.recording.values[weight.value].shape
        if transposed or len(shape) != 4 or len(set(stride)) != 1 or set(dilation) != {1}:
            return None
        source, (top, left), ops = self._uncropped(data_input(op))
        top, left = top - padding[0], left - padding[-1]
        if ops and any(padding):
            return None  # zeros around a crop are not what lies there
        window = (top, left, top + shape[2], left + shape[3])
        return [Branch(source, op.index, window, stride[0], groups)], {op.index, *ops}

    def _uncropped(self, value: ValueId) -> tuple[ValueId, tuple[int, int], set[OpId]]:
        """The map that a value is the middle of, where it begins there, and the operations that crop it."""
        begins, ops = [0, 0], set[OpId]()
        while (op := self.producer(value)) is not None and op.kind == "slice" and self.sole(value):
            (_, axis, start, end), shape = (*op.args[0], 0, None, None)[:4], self.recording.values[value].shape
            before = self.recording.values[data_input(op)].shape
            if axis not in (2, 3) or not start or before[axis] - shape[axis] != 2 * start or end is None:
                break
            begins[axis - 2] += start
            ops.add(op.index)
            value = data_input(op)
        return value, (begins[0], begins[1]), ops

    def _lead(self, parts: list[Branch]) -> Branch | None:
        """The convolution whose window holds all others', if they are of one source, stride and grouping."""
        convs = [part for part in parts if part.conv >= 0]
        if not convs or len({part.source for part in parts}) != 1 or len({part.stride for part in parts}) != 1:
            return None
        if len({part.groups for part in convs}) != 1:
            return None
        lead = max(convs, key=lambda part: part.window[2] - part.window[0])
        top, left, bottom, right = lead.window
        padding = self.recording.ops[lead.conv].args[0][4]
        fits = all(
            part.window[0] >= top and part.window[1] >= left and part.window[2] <= bottom and part.window[3] <= right
            for part in parts
        )
        return lead if fits and (top, left) == (-padding[0], -padding[-1]) else None


def _adds_nothing(op: Op) -> bool:
    """Whether it adds the number 0, where `sum` begins."""
    return plain_kind(op) == "add" and len(op.inputs) == 1 and op.args[0][1:] == (0,) and not op.args[1]


def merged(parts: tuple[Branch, ...], lead: Branch, tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, in double precision, of the convolution that computes the sum.

    Args:
        parts: the branches.
        lead: the one whose window is the convolution's.
        tensors: gives a convolution's (weight, bias or None), and a norm's (scale, shift), by operation.
    """
    like = tensors(lead.conv)[0]
    weight, bias = torch.zeros_like(like, dtype=torch.float64), like.new_zeros(len(like), dtype=torch.float64)
    for part in parts:
        own, shift = (None, None) if part.conv < 0 else tensors(part.conv)
        if own is None:  # each channel reads itself
            own = like.new_zeros((*like.shape[:2], 1, 1), dtype=torch.float64)
            channels = torch.arange(len(like), device=like.device)
            own[channels, channels % like.shape[1]] = 1.0
        own = own.double()
        shift = torch.zeros_like(bias) if shift is None else shift.double()
        for norm in part.norms:
            scale, offset = tensors(norm)
            own, shift = own * scale[:, None, None, None], shift * scale + offset
        top, left = part.window[0] - lead.window[0], part.window[1] - lead.window[1]
        weight[:, :, top : top + own.shape[2], left : left + own.shape[3]] += own
        bias += shift
    return weight, bias

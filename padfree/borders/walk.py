"""Fields carried through a recording, operation by operation.

A value is a `Seen`: a field, and which of its positions each element of the tensor belongs to. Operations that only
lay tensors out anew (views, slices, windows of transformers, circular padding written into a buffer) are done to that
table of positions by torch itself, so no layout is a special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from padfree.analysis.kinds import AFFINE, ATTENTION, LIKE, NONLINEAR, NORMS, plain_kind
from padfree.borders import field as fields
from padfree.borders.field import Field
from padfree.borders.seen import Buffer, Seen, Unknown, narrowed, starts
from padfree.borders.taps import LEFT_OUT, Window, sliced, window_of
from padfree.indices import ValueId
from padfree.record.recorder import Op, Value
from padfree.record.recording import Recording, path_of
from padfree.record.trees import Ref

GATES = "values of single pixels spread over a map (squeeze-excitation, global context) are left out of it"
MIXED = "attention is taken to read the whole map evenly"
STATISTICS = "norms over a whole map in eval mode (group, instance norm) are left out"
KERNELS = "kernels computed from the image are left out"

_LAYOUT = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "squeeze", "unsqueeze",
     "expand", "slice", "select", "split", "split_with_sizes", "unbind", "chunk", "cat", "stack", "roll", "flip",
     "clone", "contiguous", "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "narrow", "alias",
     "detach", "unfold", "_to_copy", "lift_fresh", "movedim"}
)  # fmt: skip
_POINTWISE = AFFINE | NONLINEAR | {
    "native_dropout", "_safe_softmax", "_log_softmax", "addcmul", "lerp", "hypot", "bernoulli",
    "logical_and", "logical_or", "logical_not", "eq", "ne", "round", "floor", "ceil", "nan_to_num", "masked_fill",
}  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "max", "var", "std", "linalg_vector_norm", "logsumexp", "prod"})
_FRESH = frozenset({"new_empty", "new_zeros", "new_full", "new_ones", "empty_strided", "new_empty_strided"})
_BUFFERS = _FRESH | {"zeros_like", "empty_like"}  # what forwards write maps into
_WRITES = frozenset({"copy", "fill", "zero"})
_OVER_MAP = frozenset({"native_group_norm"})


class Walk:
    """The fields of every value of a recording of an image network.

    Attributes:
        image: the field of the image.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.values: Sequence[Value] = recording.values
        self.seen: dict[ValueId, Seen | Unknown] = {}
        sides = {self.values[value].shape[-2:] for value in recording.inputs}
        height, width = next(iter(sides))
        self.image = fields.image(height, width)
        for value in recording.inputs:
            shape = self.values[value].shape  # (N, C, H, W), or (C, H, W) in a list of images
            index = torch.arange(height * width).view(1, height, width).expand(shape) if len(shape) == 3 else None
            self.seen[value] = Seen(self.image, index)
        for op in recording.ops:
            if op.inputs:
                self._step(op)

    # -- what comes out -------------------------------------------------------------------------

    def map_of(self, value: ValueId) -> Field | Unknown:
        """The field of a value as a map (H, W)."""
        seen = self.seen.get(value) or Unknown("nothing is known of it")
        shape = self.values[value].shape
        if isinstance(seen, Unknown):
            return seen
        if len(shape) != 4:
            return Unknown(f"a value of shape {shape} is no map")
        return self._as_map(seen, shape)

    def positions_of(self, value: ValueId) -> Field | Unknown:
        """The field of exactly the positions that a value holds, in whatever layout."""
        seen = self.seen.get(value) or Unknown("nothing is known of it")
        if isinstance(seen, Unknown) or seen.index is None:
            return seen if isinstance(seen, Unknown) else seen.field
        return fields.chosen(seen.field, narrowed(seen.index).reshape(-1, 1))

    # -- one operation --------------------------------------------------------------------------

    def _step(self, op: Op) -> None:
        kind = plain_kind(op)
        lost = [seen for seen in map(self.seen.get, op.inputs) if isinstance(seen, Unknown)]
        try:
            out = self._of(op, kind, lost)
        except Exception as error:  # an unusual form of a known operation: named, like an unknown one
            out = self._unknown(op, f" ({type(error).__name__})")
        made = out if isinstance(out, list) else [out] * len(op.outputs)
        self.seen.update(zip(op.outputs, made, strict=False))
        if kind in _WRITES and isinstance(out, Unknown):
            self._lose(op.args[0][0], out)

    def _lose(self, written: Any, reason: Unknown) -> None:
        """A write that is not followed changes what the written tensor is a view of, too."""
        while isinstance(written, Ref):
            producer = self.values[written.value].producer
            op = self.recording.ops[producer] if producer >= 0 else None
            if op is None or plain_kind(op) not in _LAYOUT - {"clone"}:
                return
            written = op.args[0][0]
            if isinstance(written, Ref):
                self.seen[written.value] = reason

    def _unknown(self, op: Op, more: str = "") -> Unknown:
        where = path_of(self.recording, op) or "the model's own forward"
        return Unknown(f"{op.kind} in {where}{more}")

    def _of(self, op: Op, kind: str, lost: list[Unknown]) -> Seen | Unknown | list[Seen]:
        if kind in _BUFFERS:
            return self._buffer(op)
        if kind in LIKE:
            return self._filled(op.outputs[0], op)
        if kind == "copy":
            return self._copy(op)
        first = self._operand(op.args[0][0]) if op.args[0] else None
        if (kind in NORMS and isinstance(first, Seen)) or (kind in _POINTWISE and op.inputs and not lost):
            return self._pointwise(op, kind)
        if lost:
            return lost[0]
        if not isinstance(first, Seen) and kind not in ("cat", "stack", "mm", "addmm"):
            return self._unknown(op)
        if kind in _LAYOUT:
            return self._laid_out(op, kind)
        if kind == "as_strided" and self.values[op.inputs[0]].shape[2:] == self.values[op.outputs[0]].shape[2:] == (
            1,
            1,
        ):
            return first if isinstance(first, Seen) else self._unknown(op)  # strides of single pixels put right
        if kind in ATTENTION and len(op.inputs) > 1:
            whole = fields.everything([self._operand(Ref(v)).field for v in op.inputs], MIXED)  # type: ignore[union-attr]
            return Seen(whole, torch.zeros((), dtype=torch.long).expand(self.values[op.outputs[0]].shape))
        if kind in ("mm", "addmm"):
            return self._linear(op, kind)
        if kind in _REDUCTIONS:
            return self._reduced(op)
        window = window_of(op, self.values)
        assert window is None or isinstance(first, Seen)
        if window is None or not isinstance(first, Seen):
            return self._unknown(op)
        source = fields.through(self._as_map(first, self.values[op.inputs[0]].shape), window)
        if len(op.inputs) > 1:
            source = fields.noted(source, KERNELS, self._known(op.inputs[1:]))
        return Seen(source)

    def _operand(self, argument: Any) -> Seen | Unknown | None:
        return self.seen.get(argument.value) if isinstance(argument, Ref) else None

    def _known(self, values: Iterable[ValueId]) -> list[Field]:
        return [seen.field for seen in map(self.seen.get, values) if isinstance(seen, Seen)]

    def _index(self, seen: Seen, shape: tuple[int, ...]) -> Tensor:
        """(shape) positions of the value's field."""
        if seen.index is not None:
            return seen.index
        return torch.arange(shape[2] * shape[3]).view(1, 1, *shape[2:]).expand(shape)

    def _as_map(self, seen: Seen, shape: tuple[int, ...]) -> Field:
        if seen.index is None:
            return seen.field
        index = narrowed(seen.index).permute(2, 3, 0, 1)
        index = index.expand(*shape[2:], *index.shape[2:])
        return fields.chosen(seen.field, index.reshape(shape[2] * shape[3], -1), (shape[2], shape[3]))

    # -- pointwise ------------------------------------------------------------------------------

    def _pointwise(self, op: Op, kind: str) -> Seen | Unknown:
        """One value for each position: the operands of that size evenly; those spread over a map are left out."""
        shape = self.values[op.outputs[0]].shape
        operands = op.inputs[:1] if kind in NORMS else op.inputs
        full = [value for value in operands if self.values[value].shape == shape]
        known = [each for each in map(self.seen.get, full) if isinstance(each, Seen)]
        known = [each for each in known if not each.field.blank] or known  # what an activation compares with
        if not known:
            return self._unknown(op)
        merged = self._merged(known, shape)
        spread = [value for value in operands if value not in full]
        if spread:
            merged = Seen(fields.noted(merged.field, GATES, self._known(spread)), merged.index)
        if kind in _OVER_MAP:
            merged = Seen(fields.noted(merged.field, STATISTICS), merged.index)
        return merged

    def _merged(self, known: list[Seen], shape: tuple[int, ...]) -> Seen:
        if len(known) == 1:
            return known[0]
        if all(each.index is None for each in known):
            return Seen(fields.mean([each.field for each in known]))
        indices = [narrowed(self._index(each, shape)) for each in known]
        sides = [max(sizes) for sizes in zip(*(index.shape for index in indices), strict=True)]
        begins = starts([each.field for each in known])
        pairs = [(index + start).expand(sides).reshape(-1) for index, start in zip(indices, begins, strict=True)]
        rows, where = torch.unique(torch.stack(pairs, 1), dim=0, return_inverse=True)
        joined = fields.side_by_side([each.field for each in known])
        return Seen(fields.chosen(joined, rows), where.view(sides).expand(shape))

    # -- layouts --------------------------------------------------------------------------------

    def _laid_out(self, op: Op, kind: str) -> Seen | Unknown | list[Seen]:
        if kind in ("cat", "stack"):
            return self._joined(op, kind)
        source = self._operand(op.args[0][0])
        assert isinstance(source, Seen)
        shape, out = (self.values[index].shape for index in (op.inputs[0], op.outputs[0]))
        if source.index is None and kind == "slice" and len(out) == 4:
            return self._cut(op, source, shape, out)
        index = self._index(source, shape)
        kind = "reshape" if kind in ("view", "_unsafe_view", "_reshape_alias") else kind
        if kind in ("clone", "contiguous", "_to_copy", "lift_fresh"):
            return Seen(source.field, source.index)
        result = getattr(torch.ops.aten, kind)(index, *op.args[0][1:], **dict(op.args[1]))
        parts = [result] if isinstance(result, Tensor) else list(result)
        return [self._plain(Seen(source.held, part)) for part in parts]

    def _plain(self, seen: Seen) -> Seen:
        """The map itself, where the table of positions says no more than that."""
        index, grid = seen.index, seen.field.grid
        if index is None or index.dim() != 4 or tuple(index.shape[2:]) != grid or isinstance(seen.held, Buffer):
            return seen
        small = narrowed(index)
        same = small.shape[:2] == (1, 1) and torch.equal(small.reshape(-1), torch.arange(grid[0] * grid[1]))
        return Seen(seen.held) if same else seen

    def _cut(self, op: Op, source: Seen, shape: tuple[int, ...], out: tuple[int, ...]) -> Seen:
        """A slice of a map: of channels nothing changes, of rows or columns it is a window of one tap."""
        _, axis, start, _, step, *_ = [*op.args[0], *[None] * 4][:6]
        axis = (axis or 0) % 4
        if axis < 2:
            return source
        axes = [sliced(size, 0, 1, size) for size in shape[2:]]
        start = 0 if start is None else start + shape[axis] if start < 0 else start
        axes[axis - 2] = sliced(shape[axis], start, step or 1, out[axis])
        return Seen(fields.through(source.field, Window("slice", (axes[0], axes[1]), LEFT_OUT)))

    def _joined(self, op: Op, kind: str) -> Seen:
        parts, axis = op.args[0][0], (op.args[0][1] if len(op.args[0]) > 1 else 0)
        known = [self._part(ref) for ref in parts]
        shape = self.values[op.outputs[0]].shape
        axis %= len(shape)
        if kind == "cat" and axis == 1 and len(shape) == 4 and all(seen.index is None for seen in known):
            weights = [float(self.values[ref.value].shape[1]) for ref in parts]
            return Seen(fields.mean([seen.field for seen in known], weights))
        begins = starts([seen.field for seen in known])
        indices = [self._index(seen, self.values[ref.value].shape) for seen, ref in zip(known, parts, strict=True)]
        join = torch.cat if kind == "cat" else torch.stack
        index = join([index + start for index, start in zip(indices, begins, strict=True)], axis)
        return Seen(fields.side_by_side([seen.field for seen in known]), index)

    def _part(self, ref: Ref) -> Seen:
        """A part of a concatenation: parameters see nothing; zeros made on the way are padding."""
        seen = self.seen.get(ref.value)
        if isinstance(seen, Seen):
            return seen
        producer = self.values[ref.value].producer
        return self._filled(ref.value, self.recording.ops[producer] if producer >= 0 else None)

    def _filled(self, value: ValueId, maker: Op | None) -> Seen:
        """A tensor that sees nothing of the image."""
        filled = fields.constant(1.0 if maker is None else _fill(maker))
        return Seen(filled, torch.zeros((), dtype=torch.long).expand(self.values[value].shape))

    def _buffer(self, op: Op) -> Seen:
        shape = self.values[op.outputs[0]].shape
        return Seen(Buffer(fields.constant(_fill(op))), torch.zeros(shape, dtype=torch.long))

    def _copy(self, op: Op) -> Seen | Unknown:
        """Written into a buffer: the tables share memory, as the tensors do."""
        target, source = (self._operand(argument) for argument in op.args[0][:2])
        if not (isinstance(target, Seen) and isinstance(target.held, Buffer) and target.index is not None):
            return self._unknown(op)
        if not isinstance(source, Seen):
            return source if isinstance(source, Unknown) else self._unknown(op)
        index = self._index(source, self.values[op.args[0][1].value].shape)
        if source.held is not target.held:
            start = len(target.held.field.inside)
            target.held.field = fields.side_by_side([target.held.field, source.field])
            index = index + start
        target.index.copy_(index)
        return target

    # -- products and reductions ----------------------------------------------------------------

    def _linear(self, op: Op, kind: str) -> Seen | Unknown:
        """Rows times a matrix of weights: each row mixes its own columns."""
        rows = op.args[0][1 if kind == "addmm" else 0]
        source = self._operand(rows)
        shape = self.values[op.outputs[0]].shape
        if not isinstance(source, Seen):
            return self._unknown(op, ": what is multiplied from the right depends on the image")
        if [value for value in op.inputs if value != rows.value]:
            whole = fields.everything(self._known(op.inputs), MIXED)
            return Seen(whole, torch.zeros((), dtype=torch.long).expand(shape))
        mixed = self._mixed(source, narrowed(self._index(source, self.values[rows.value].shape)), 1)
        assert mixed.index is not None
        return Seen(mixed.held, mixed.index[:, None].expand(shape))

    def _reduced(self, op: Op) -> Seen:
        source = self._operand(op.args[0][0])
        assert isinstance(source, Seen)
        shape, out = (self.values[index].shape for index in (op.inputs[0], op.outputs[0]))
        given = op.args[0][2] if op.kind == "linalg_vector_norm" and len(op.args[0]) > 2 else [*op.args[0], None][1]
        axes = range(len(shape)) if given in (None, ()) or isinstance(given, float) else _axes(given, len(shape))
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        index = narrowed(self._index(source, shape)).permute(*kept, *axes)
        mixed = self._mixed(source, index, len(kept))
        assert mixed.index is not None
        return self._plain(Seen(mixed.held, mixed.index.expand([shape[axis] for axis in kept]).reshape(out)))

    def _mixed(self, source: Seen, index: Tensor, kept: int) -> Seen:
        """What mixes the last axes of a table into one position each; its first `kept` axes stay."""
        rows = index.reshape(index.shape[:kept].numel(), -1)
        if rows.shape[1] == 1:
            return Seen(source.field, rows.view(index.shape[:kept]))
        return Seen(fields.chosen(source.field, rows), torch.arange(len(rows)).view(index.shape[:kept]))


def _fill(maker: Op) -> float:
    """0 for a tensor that is made of zeros (padding, where it meets a map), 1 for one of other values."""
    kind = plain_kind(maker)
    zeros = "zeros" in kind or "empty" in kind or ("full" in kind and maker.args[0][-1] == 0)
    return 0.0 if zeros else 1.0


def _axes(given: Any, dimensions: int) -> list[int]:
    axes = [given] if isinstance(given, int) else list(given)
    return sorted(axis % dimensions for axis in axes)

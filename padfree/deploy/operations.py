"""Questions to the operations of a recording that deployment asks. Pure."""

from __future__ import annotations

from padfree.analysis.kinds import plain_kind
from padfree.indices import OpId, ValueId
from padfree.record.recorder import Op
from padfree.record.recording import Recording
from padfree.record.trees import Ref

BATCH_NORMS = {"native_batch_norm": 5, "_native_batch_norm_legit_no_training": None}
"""Kinds of batch norms, and where among their arguments it stands whether they train."""


class Operations:
    """The operations of one recording: who makes and reads a value, and what some of them are."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def readers(self, value: ValueId) -> list[OpId]:
        """Indices of the operations that read a value."""
        return self.recording.consumers.get(value, [])

    def producer(self, value: ValueId) -> Op | None:
        """The operation that made a value."""
        index = self.recording.values[value].producer
        return None if index < 0 else self.recording.ops[index]

    def sole(self, value: ValueId) -> Op | None:
        """The operation that alone reads a value, which the model does not return either."""
        found = self.readers(value)
        return self.recording.ops[found[0]] if len(found) == 1 and value not in self.recording.outputs else None

    def is_sum(self, op: Op) -> bool:
        """Whether it adds two maps of one shape, unscaled."""
        shapes = {self.recording.values[value].shape for value in op.inputs}
        return (
            plain_kind(op) == "add" and len(op.inputs) == 2 == len(op.args[0]) and not op.args[1] and len(shapes) == 1
        )

    def norm_tensors(self, op: Op) -> tuple[list[ValueId | None], float] | None:
        """Values of weight, bias, mean and variance of a batch norm in eval mode, and its epsilon."""
        if op.kind not in BATCH_NORMS:
            return None
        _, *tensors = op.args[0][:5]
        flag = BATCH_NORMS[op.kind]
        if any(each is not None and not isinstance(each, Ref) for each in tensors) or None in tensors[2:]:
            return None
        if flag is not None and op.args[0][flag]:
            return None
        return [None if ref is None else ref.value for ref in tensors], float(op.args[0][-1])

"""Which tensors of a model a recorded forward reads, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from padfree.indices import ValueId
from padfree.record.recording import Recording
from padfree.record.trees import Ref, storage

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether a module carries hooks of its user's."""
    return any(getattr(module, name) for name in _HOOKS)


class Parameters:
    """The parameters and buffers of a model by name, and who has a share in them.

    Args:
        model: its real tensors.
        recording: of one forward of it.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._recording = recording
        everywhere = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors: dict[str, torch.Tensor] = dict(everywhere)
        self._places = Counter(map(storage, self.tensors.values()))
        self._reads = Counter(value for op in recording.ops for value in set(_refs(op.args)))
        self._values: dict[str, list[int]] = {}
        for value in recording.values:
            if value.name:
                self._values.setdefault(value.name, []).append(value.index)

    def idle(self) -> frozenset[int]:
        """Operations that read nothing of the network and make nothing that is read (a batch norm's reserve)."""
        return frozenset(
            op.index for op in self._recording.ops if not op.inputs and not any(self._reads[out] for out in op.outputs)
        )

    def alone(self, value: ValueId) -> bool:
        """Whether a recorded value is a tensor of the model that one operation reads, and one module has."""
        name = self._recording.values[value].name
        return bool(name) and self.read_once(name)

    def read_once(self, name: str) -> bool:
        """Whether one operation reads a tensor of the model, and no second module has it."""
        if self._places[storage(self.tensors[name])] != 1:
            return False
        return sum(self._reads[value] for value in self._values.get(name, ())) == 1


def _refs(tree: Any) -> Iterator[int]:
    if isinstance(tree, Ref):
        yield tree.value
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _refs(item)

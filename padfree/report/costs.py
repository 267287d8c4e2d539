"""What each module of a network costs: parameters, multiply-adds, and the numbers that its operations write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from padfree.layers.learned_groups import learned_group_convs
from padfree.record.recording import Recording, path_of


@dataclass(frozen=True)
class Cost:
    """What a part of a network costs for one image, or a difference of two costs.

    Attributes:
        params: number of parameters.
        macs: multiply-adds as fvcore counts them.
        elements: numbers that its operations write, a measure of memory.
    """

    params: int = 0
    macs: int = 0
    elements: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs, self.elements + other.elements)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs, self.elements - other.elements)


NOTHING = Cost()


def costs(model: nn.Module, recording: Recording, macs: Mapping[str, int]) -> dict[str, Cost]:
    """What is each module's own, by path: what its children cost is not in it. All of it adds up to the network's.

    Args:
        model: the network; shared modules count at their first path.
        recording: of its forward on one image.
        macs: multiply-adds that are each module's own (`MacCount.own`).
    """
    found: dict[str, Cost] = {}

    def add(path: str, cost: Cost) -> None:
        found[path] = found.get(path, NOTHING) + cost

    for name, parameter in model.named_parameters():
        add(name.rpartition(".")[0], Cost(params=parameter.numel()))
    learned = {id(layer): layer.masked for layer in learned_group_convs(model)}
    for path, module in model.named_modules():
        if id(module) in learned:
            add(path, Cost(params=-learned[id(module)]))  # as `count_params`, without what is masked
    for path, number in macs.items():
        add(path, Cost(macs=number))
    for op in recording.ops:
        if op.inputs and op.outputs:
            add(path_of(recording, op), Cost(elements=math.prod(recording.values[op.outputs[0]].shape)))
    return found

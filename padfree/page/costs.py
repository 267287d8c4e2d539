"""Parameters, multiply-adds and map elements by place of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from padfree.analysis.kinds import PRODUCTS, plain_kind
from padfree.record.recording import Recording, path_of

_DEPTH = 3


@dataclass
class Cost:
    """What one place costs for one image.

    Attributes:
        params: number of parameters.
        macs: multiply-adds of convolutions and matrix products: one for each fused multiply-add.
        elements: numbers that its operations write, a measure of memory.
    """

    params: int = 0
    macs: int = 0
    elements: int = 0


def costs(model: nn.Module, recording: Recording) -> dict[str, Cost]:
    """By place: the module whose forward calls a layer, at most three names deep ("" for the model's own)."""
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    found: dict[str, Cost] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(_place(name.rpartition(".")[0], leaves), Cost()).params += parameter.numel()
    for op in recording.ops:
        if not (op.inputs and op.outputs):
            continue
        cost = found.setdefault(_place(path_of(recording, op), leaves), Cost())
        out = math.prod(recording.values[op.outputs[0]].shape)
        cost.elements += out
        kind = plain_kind(op)
        if kind == "convolution":
            weight = recording.values[op.args[0][1].value].shape
            read = recording.values[op.inputs[0]].shape
            cost.macs += (math.prod(read) if op.args[0][6] else out) * math.prod(weight[1:])
        elif kind in PRODUCTS and kind != "dot":
            left = op.args[0][1 if kind in ("addmm", "baddbmm") else 0]
            cost.macs += out * recording.values[left.value].shape[-1]
    return found


def _place(path: str, leaves: set[str]) -> str:
    parts = path.split(".")
    return ".".join((parts[:-1] if path in leaves else parts)[:_DEPTH])

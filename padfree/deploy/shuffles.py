"""Channel shuffles of a recording: views and copies that only give channels another order. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padfree.indices import ValueId
from padfree.record.recording import Recording

_DO: dict[str, Callable[..., Tensor]] = {
    "view": lambda x, shape: x.reshape(shape),
    "_unsafe_view": lambda x, shape: x.reshape(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": torch.transpose,
    "permute": torch.permute,
    "clone": lambda x: x,
    "contiguous": lambda x: x,
    "channel_shuffle": lambda x, groups: torch.native_channel_shuffle(x.contiguous(), groups),
    "native_channel_shuffle": lambda x, groups: torch.native_channel_shuffle(x.contiguous(), groups),
}


def shuffled(recording: Recording, value: ValueId) -> tuple[list[ValueId], list[int]]:
    """Where a map's channels go in operations that nothing else reads the results of.

    Returns:
        the values on the way, from the map itself to that with its channels in another order, or to the map alone;
        and for each channel of the last one which channel of the map it is.
    """
    shape = recording.values[value].shape
    order = list(range(shape[1])) if len(shape) == 4 else []
    ways, channels = [value], torch.arange(len(order)).reshape(1, -1, 1, 1).expand(shape) if order else torch.empty(0)
    found = ways[:], order
    while order:
        readers = recording.consumers.get(ways[-1], [])
        if len(readers) != 1 or ways[-1] in recording.outputs:
            break
        op = recording.ops[readers[0]]
        if op.kind not in _DO or len(op.outputs) != 1:
            break
        settings: tuple[Any, ...] = op.args[0][1:]
        channels = _DO[op.kind](channels, *settings)
        ways.append(op.outputs[0])
        if channels.shape == shape and bool((channels == channels[:1, :, :1, :1]).all()):
            found = ways[:], [int(channel) for channel in channels[0, :, 0, 0]]
    return found

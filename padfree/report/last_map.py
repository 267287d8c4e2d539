"""The image at which a converted network has the original's last map."""

from __future__ import annotations

import torch

from padfree.record.inputs import example_inputs
from padfree.record.recording import Recording

Size = tuple[int, ...]


def size_with_last_map(converted: Recording, path: str, last: Size) -> Size | None:
    """(C, H, W), both sides as much larger as it takes, at which the module at `path` writes a map of size `last`.

    Padding-free downsampling maps n to n/2 - 1, so the last map loses a pixel or more, and most of what a conversion
    costs a trained network lies there. Found by bisection on the recording's own weightless copy; even sides where they
    do as well. None: there is no such size up to twice the recorded one, or the network does not take other sizes.
    """
    if not converted.meta:
        return None
    channels, (height, width) = converted.input_size[:-2], converted.input_size[-2:]
    found: dict[int, Size] = {}

    def written(more: int) -> Size:
        if more not in found:
            found[more] = _written(converted, path, (*channels, height + more, width + more))
        return found[more]

    low, high = -1, max(height, width)  # `low` is too small, `high` large enough
    if not _covers(written(high), last):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _covers(written(middle), last) else (middle, high)
    if written(high) != last:
        return None
    if (height + high) % 2 and written(high + 1) == last:
        high += 1
    return (*channels, height + high, width + high)


def _covers(size: Size, last: Size) -> bool:
    return bool(size) and all(side >= wanted for side, wanted in zip(size, last, strict=True))


def _written(recording: Recording, path: str, size: Size) -> Size:
    """(H, W) of what a module returns first at an input size; () where the network does not take it."""
    shapes: list[Size] = []

    def note(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() == 4:
            shapes.append(tuple(output.shape[-2:]))

    kind = len(recording.example), type(recording.example[0])
    handle = recording.modules[path].register_forward_hook(note)
    try:
        for example in example_inputs(recording.model, size, meta=True):
            if (len(example), type(example[0])) == kind:
                with torch.no_grad():
                    recording.model(*example)
                break
    except Exception:  # any failure means that this size is not taken
        return ()
    finally:
        handle.remove()
    return shapes[0] if shapes else ()

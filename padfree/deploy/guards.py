"""What an exported program asserts about its input's sides, beyond what the network needs.

`torch.export` writes down what it took for granted while it traced. Where a tensor is laid out anew (a channel
shuffle), that includes that no map is a single pixel: of one pixel more layouts are true. The program computes the same
for it all the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.record.inputs import random_images
from padfree.record.recording import record
from padfree.record.trees import tensors
from padfree.report.smallest import minimum_input

__all__ = ["allow_single_pixels"]

_SINGLE = "!= 1"  # what such a guard ends with
_TOLERANCE = 1e-4  # of the largest output


def allow_single_pixels(program: torch.export.ExportedProgram, model: nn.Module, size: tuple[int, ...]) -> None:
    """Take guards against single pixels out of a program, where it computes what the model does without them.

    Args:
        program: exported with free sides; changed in place.
        model: what it was exported from, in eval mode.
        size: (C, H, W) that it was traced at.
    """
    held: Any = program
    guards = getattr(held, "_guards_code", None)  # versions of torch that keep none assert nothing
    if not isinstance(guards, list) or not any(str(guard).endswith(_SINGLE) for guard in guards):
        return
    side = _smallest(model, size)
    if side is None:
        return
    held._guards_code = [guard for guard in guards if not str(guard).endswith(_SINGLE)]
    if not all(_agrees(program, model, (*size[:-2], *sides)) for sides in ((side, side), (side, size[-1]), size[-2:])):
        held._guards_code = guards


def _smallest(model: nn.Module, size: tuple[int, ...]) -> int | None:
    try:
        recording = record(model, size)
    except PadfreeError:
        return None
    return minimum_input(recording, recording)


def _agrees(program: torch.export.ExportedProgram, model: nn.Module, size: tuple[int, ...]) -> bool:
    image = random_images(model, size)
    try:
        with torch.no_grad():
            results = [tensors(model(image)), tensors(program.module()(image))]
    except Exception:  # the model's own code, or a guard that is left
        return False
    return len(results[0]) == len(results[1]) and all(
        mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= _TOLERANCE * mine.abs().max())
        for mine, theirs in zip(*results, strict=True)
        if mine.is_floating_point() and mine.numel()
    )

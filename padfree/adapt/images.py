"""Batches of images as a calibration divides them: a fifth of them is held back."""

from __future__ import annotations

import itertools

from torch import Tensor

HELD = 5  # one of so many is held back
_MEASURED = 128  # images on which outputs are compared


def divided(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to learn from and a fifth to measure on; of fewer than five, a fifth of each batch's images."""
    if len(batches) >= HELD:
        held = batches[HELD - 1 :: HELD]
        return [batch for index, batch in enumerate(batches) if index % HELD != HELD - 1], held
    parts = [(batch[: len(batch) - _share(batch)], batch[len(batch) - _share(batch) :]) for batch in batches]
    return [part for part, _ in parts if len(part)], [part for _, part in parts if len(part)]


def measured(held: list[Tensor]) -> list[Tensor]:
    """The first of the held-back batches, as many as it takes to measure a network's outputs by."""
    counts = itertools.accumulate(len(batch) for batch in held)
    return held[: next((index + 1 for index, count in enumerate(counts) if count >= _MEASURED), len(held))]


def _share(batch: Tensor) -> int:
    return max(1, len(batch) // HELD) if len(batch) > 1 else 0

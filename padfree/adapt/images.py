"""Batches of images as a calibration takes them: checked, and a fifth of them held back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.inputs import like_of

HELD = 5  # one of so many is held back
_MEASURED = 128  # images on which outputs are compared


def checked(batches: Iterable[Any], model: nn.Module) -> list[Tensor]:
    """The batches, on the model's device and of its type.

    Raises:
        PadfreeError: they are no batches of images, or hold what is no number.
    """
    if isinstance(batches, (Tensor, str, bytes, dict)) or not isinstance(batches, Iterable):
        what = f"a tensor of shape {tuple(batches.shape)}" if isinstance(batches, Tensor) else type(batches).__name__
        raise PadfreeError(f"batches is {what}; pass a list of tensors (N, C, H, W), or a loader that yields them")
    like = like_of(model)
    found = [_checked(batch, index).to(like.device, like.dtype) for index, batch in enumerate(batches)]
    if not found:
        raise PadfreeError("batches is empty; pass some hundred unlabelled images, such as 20 batches of 64")
    channels = {batch.shape[1] for batch in found}
    if len(channels) > 1:
        raise PadfreeError(f"the batches have images of {' and '.join(map(str, sorted(channels)))} channels")
    if sum(len(batch) for batch in found) < 2:
        raise PadfreeError("batches holds one image; pass some hundred, such as 20 batches of 64")
    return found


def _checked(batch: Any, index: int) -> Tensor:
    if isinstance(batch, (list, tuple)):
        inner = ", ".join(_described(item) for item in batch[:3])
        raise PadfreeError(
            f"batch {index} is a {type(batch).__name__} of {len(batch)} ({inner}), not a tensor of images: calibration "
            "takes no labels; pass (images for images, labels in loader)"
        )
    if isinstance(batch, dict):
        raise PadfreeError(f"batch {index} is a dict with {', '.join(map(repr, batch))}; pass its images alone")
    if not isinstance(batch, Tensor):
        raise PadfreeError(f"batch {index} is a {type(batch).__name__}; pass tensors (N, C, H, W)")
    if batch.dim() != 4 or 0 in batch.shape:
        raise PadfreeError(f"batch {index} has the shape {tuple(batch.shape)}; pass images as (N, C, H, W)")
    if batch.is_meta:
        raise PadfreeError(f"batch {index} is on the meta device and has no values")
    if not batch.is_floating_point():
        raise PadfreeError(
            f"batch {index} holds {str(batch.dtype).removeprefix('torch.')}; pass images as the network takes them, "
            "scaled and normalised (float32)"
        )
    if not bool(batch.isfinite().all()):
        raise PadfreeError(f"batch {index} holds NaN or infinite values")
    return batch.detach().clone() if batch.is_inference() else batch.detach()


def _described(item: Any) -> str:
    return f"a tensor of shape {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__


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

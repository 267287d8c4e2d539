"""Batches of images that a caller passes in: what is accepted, checked once, for whoever looks at images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.inputs import like_of


def image_batches(batches: Any, model: nn.Module, *, labels: bool, together: int = 1, advice: str = "") -> list[Tensor]:
    """The batches of images, on the model's device and of its type.

    Args:
        batches: tensors (N, C, H, W) of finite floating-point numbers, as a list, a loader, or one tensor.
        model: what they are for.
        labels: whether a batch may be a tuple or list that begins with its images; what follows them is left out.
        together: how many images the largest batch must hold at least.
        advice: how many images are enough, for those who pass too few.

    Raises:
        PadfreeError: they are something else, or too few; it says which batch, what was found and what is needed.
    """
    if isinstance(batches, (str, bytes, dict)) or not isinstance(batches, Iterable):
        raise PadfreeError(
            f"batches is {type(batches).__name__}; pass a list of tensors (N, C, H, W), or a loader that yields them"
        )
    like = like_of(model)
    listed = [batches] if isinstance(batches, Tensor) else batches
    found = [_checked(batch, index, labels).to(like.device, like.dtype) for index, batch in enumerate(listed)]
    enough = f" ({advice})" if advice else ""
    if not found:
        raise PadfreeError(f"batches is empty; pass batches of images (N, C, H, W){enough}")
    channels = sorted({batch.shape[1] for batch in found})
    if len(channels) > 1:
        raise PadfreeError(f"the batches have images of {' and '.join(map(str, channels))} channels")
    if max(map(len, found)) < together:
        held = "one image" if len(found) == 1 else "one image each"
        raise PadfreeError(f"batches hold {held}, and the statistics of norms take {together} in one batch{enough}")
    return found


def _checked(batch: Any, index: int, labels: bool) -> Tensor:
    if isinstance(batch, (list, tuple)):
        if not labels:
            inner = ", ".join(_described(item) for item in batch[:3])
            what = f"batch {index} is a {type(batch).__name__} of {len(batch)} ({inner}), not a tensor of images"
            if len(batch) == 1:
                raise PadfreeError(f"{what}; pass (images for (images,) in loader)")
            if len(batch) == 2:
                raise PadfreeError(f"{what}: no labels are taken; pass (images for images, labels in loader)")
            raise PadfreeError(
                f"{what}: images alone are taken; pass (batch[0] for batch in loader), if they come first"
            )
        if not batch:
            raise PadfreeError(f"batch {index} is an empty {type(batch).__name__}; its images come first in it")
        batch = batch[0]
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

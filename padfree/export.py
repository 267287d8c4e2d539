"""Networks as files that run without padfree: ONNX, in float32 or int8, and `torch.export` programs.

padfree.export.to_onnx(padfree.convert(model).eval(), "model.onnx")
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from padfree.adapt.images import divided
from padfree.deploy.int8 import Int8, write_int8
from padfree.deploy.limits import check_limit
from padfree.deploy.onnx import OPSET, to_onnx
from padfree.deploy.program import to_exported_program
from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.record.batches import image_batches

__all__ = ["Int8", "to_exported_program", "to_int8_onnx", "to_onnx"]


def to_int8_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    dynamic_sides: bool = True,
    opset: int = OPSET,
    time_limit: float | None = None,
) -> Int8:
    """Write an ONNX file in int8 (static, QDQ, weights per channel), calibrated on images.

    A fifth of the images is held back, to compare the file's outputs with the network's. The file has the input and the
    outputs of `to_onnx`, in float32.

    Args:
        model: a trained network in eval mode that takes image batches (N, C, H, W), converted or not.
        path: the file to write; its folder must exist.
        batches: some hundred images as the network takes them, unlabelled, all of one size: tensors (N, C, H, W) in a
            list, or from a loader.
        dynamic_sides: leave height and width free; with False only the batch is.
        opset: version of the ONNX operators, at least 18.
        time_limit: seconds that it may take; None for no limit.

    Returns:
        how far the file's outputs are from the network's.

    Raises:
        PadfreeError: the batches are none; or see `to_onnx`; or ONNX Runtime does not quantize the network, or what it
            then computes is not finite.
        FileError: the file cannot be written.
    """
    check_limit(time_limit)
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"export takes a torch.nn.Module, not {type(model).__name__}")
    images = image_batches(batches, model, labels=False, advice="some hundred, such as 20 batches of 64")
    sizes = sorted({tuple(batch.shape[1:]) for batch in images})
    if len(sizes) > 1:
        raise PadfreeError(f"the batches have images of {' and '.join(map(size_text, sizes))}; pass one size")
    calibration, held = divided(images)
    if not held:
        count = sum(map(len, images))
        raise PadfreeError(
            f"batches of one image each, {count} in all, of which none can be held back: pass some hundred, such as 20 "
            "batches of 64"
        )
    return write_int8(model, path, calibration, held, dynamic_sides=dynamic_sides, opset=opset, time_limit=time_limit)

"""Whether an ONNX file computes what its model does, asked of ONNX Runtime before the file appears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.record.inputs import random_images
from padfree.record.trees import first_line, tensors

__all__ = ["check_onnx"]

_FAINT = 1e-2  # a smaller largest output is taken for this, since what makes it up may be larger
_TOLERANCE = 1e-3  # of the largest output; the two runtimes round differently, a wrong file is off by about 1


def check_onnx(path: Path, model: nn.Module, size: tuple[int, ...], larger: tuple[int, ...] | None, hint: str) -> None:
    """Run a file on a random image and compare.

    Args:
        path: the file.
        model: what it was written from, in eval mode.
        size: (C, H, W) of the image.
        larger: (C, H, W) of a second one, which the model itself need not take; None for no second one.
        hint: what to do where the file fails on the second one alone.

    Raises:
        PadfreeError: onnx or ONNX Runtime refuses the file, or its outputs are not the model's, or not finite.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise PadfreeError(
            f"ONNX Runtime does not run the exported {type(model).__name__}: {first_line(error)}"
        ) from error
    _compare(session, model, random_images(model, size), "; report it")
    if larger is not None and _runs(model, random_images(model, larger)):
        _compare(session, model, random_images(model, larger), f". {hint}")


def _runs(model: nn.Module, image: torch.Tensor) -> bool:
    try:
        with torch.no_grad():
            model(image)
    except Exception:  # the model's own code
        return False
    return True


def _compare(session: Any, model: nn.Module, image: torch.Tensor, advice: str) -> None:
    name, shape = type(model).__name__, size_text(tuple(image.shape[1:]))
    with torch.no_grad():
        expected = [output.cpu() for output in tensors(model(image))]
    try:
        found = session.run(None, {session.get_inputs()[0].name: image.cpu().numpy()})
    except Exception as error:
        raise PadfreeError(
            f"ONNX Runtime does not run the exported {name} at {shape}: {first_line(error)}{advice}"
        ) from error
    for mine, theirs in zip(expected, map(torch.as_tensor, found), strict=True):
        if not mine.isfinite().all():
            raise PadfreeError(f"the outputs of {name} itself at {shape} are not finite, so the file cannot be checked")
        limit = _TOLERANCE * max(_FAINT, float(mine.abs().max()))
        difference = float("inf")
        if mine.shape == theirs.shape:
            difference = float((mine.double() - theirs.double()).abs().max())
        if not difference <= limit:
            raise PadfreeError(f"the exported {name} is off by {difference:.3g} in ONNX Runtime at {shape}{advice}")

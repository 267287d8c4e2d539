"""Networks as files that run without padfree: ONNX and `torch.export` programs.

    padfree.export.to_onnx(padfree.convert(model).eval(), "model.onnx")

Batch size and image sides stay free, down to the smallest image the network takes. Every max-pool is the
plain operator in the file. A file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padfree.deploy.blame import cause
from padfree.deploy.limits import Stage, check_limit, limited
from padfree.deploy.onnx_check import check_onnx
from padfree.deploy.program import ADVICE, HINT, TRACING, exported, in_graph, larger, quietly
from padfree.deploy.split import split_stems
from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing
from padfree.record.trees import first_line

__all__ = ["to_onnx"]

OPSET = 18  # the first with everything the converted networks need, and the exporter's own
_AXES = {0: "batch", 2: "height", 3: "width"}


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: tuple[int, ...] | None = None,
    *,
    dynamic_sides: bool = True,
    opset: int = OPSET,
    time_limit: float | None = None,
) -> Path:
    """Write an ONNX file: one input `input` (batch, C, height, width), outputs `output`, `output_1`, ...

    The file is checked before it appears: its structure by onnx, and by running it in ONNX Runtime on a
    random image, whose result must be the model's; with free sides on a larger image too. The 1x1 convolution of a
    hybrid stem is written as two that are summed (`padfree.deploy.split`), which runtimes run faster.

    Args:
        model: a network in eval mode that takes image batches (N, C, H, W), converted or not.
        path: the file to write; its folder must exist.
        input_size: (C, H, W) to trace with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).
        dynamic_sides: leave height and width free; with False only the batch is.
        opset: version of the ONNX operators, at least 18.
        time_limit: seconds that it may take; None for no limit.

    Returns:
        `path`.

    Raises:
        PadfreeError: onnx, onnxscript or onnxruntime is missing; the model is in training mode; an operation
            cannot be exported (naming the module it belongs to); the exporter does not reach the opset; the
            model's outputs are not finite; the file does not compute what the model does; or the time is up.
        FileError: the file cannot be written.
    """
    check_limit(time_limit)
    target = check_target(path)
    stage = Stage(TRACING)

    def write() -> None:
        graph = onnx_graph(model, input_size, dynamic_sides=dynamic_sides, opset=opset, lower=split_stems, stage=stage)
        with replacing(target) as temporary:
            graph.save(temporary)

    limited(time_limit, f"the export of {type(model).__name__}", stage, ADVICE, write)
    return target


@dataclass(frozen=True)
class OnnxGraph:
    """A network as ONNX, in memory.

    Attributes:
        model: what it was made from.
        size: (C, H, W) that it was traced at.
        dynamic_sides: whether height and width are free.
        program: torch's.
        stage: what says what is being done.
    """

    model: nn.Module
    size: tuple[int, ...]
    dynamic_sides: bool
    program: Any
    stage: Stage

    def save(self, path: Path) -> None:
        """Write it, and check that the file computes what the network does.

        Raises:
            PadfreeError: it does not, or does not fit into one file.
        """
        self.stage.text = "writing the file and running it in ONNX Runtime"
        try:
            self.program.save(str(path), external_data=False)
        except ValueError as error:  # a protobuf message ends at 2 GiB
            raise PadfreeError(
                f"{type(self.model).__name__} does not fit into one ONNX file: {first_line(error)}"
            ) from error
        check_onnx(path, self.model, self.size, larger(self.size) if self.dynamic_sides else None, HINT)


def onnx_graph(
    model: nn.Module,
    input_size: tuple[int, ...] | None,
    *,
    dynamic_sides: bool,
    opset: int,
    lower: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None,
    stage: Stage,
) -> OnnxGraph:
    """Export a network to ONNX; see `to_onnx`, and `padfree.deploy.program.exported` for `lower`.

    Raises:
        PadfreeError: see `to_onnx`.
    """
    if not isinstance(opset, int) or opset < OPSET:
        raise PadfreeError(f"opset is {opset!r}; the exporter takes {OPSET} or more")
    _need("onnx", "onnxscript", "onnxruntime")
    program, size = exported(model, input_size, dynamic_sides, lower)
    stage.text = "translating the graph to ONNX"
    try:
        with quietly():
            onnx_program: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False, input_names=["input"]
            )
            _name_axes(onnx_program, dynamic_sides)
    except Exception as error:
        raise PadfreeError(
            f"{type(model).__name__} cannot be written as ONNX: {in_graph(program, model, error)}{cause(error)}"
        ) from error
    written = onnx_program.model.opset_imports.get("")
    if written != opset:  # the exporter leaves its own where it cannot convert
        raise PadfreeError(f"the exporter writes {type(model).__name__} with opset {written}, not with {opset}")
    return OnnxGraph(model, size, dynamic_sides, onnx_program, stage)


def _need(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        advice = 'pip install ".[onnx]" in the source folder of padfree'
        raise PadfreeError(f"writing ONNX needs {', '.join(missing)}: {advice}")


def _name_axes(onnx_program: Any, dynamic_sides: bool) -> None:
    """Call the free axes of the input batch, height and width."""
    shape = onnx_program.model.graph.inputs[0].shape
    names: dict[str, str] = {}
    for axis, name in _AXES.items():
        symbol = getattr(shape[axis], "value", None) if axis < len(shape) else None
        if isinstance(symbol, str) and (axis == 0 or dynamic_sides):
            names.setdefault(symbol, name)
    if hasattr(onnx_program, "rename_axes"):  # an older torch keeps its own names
        onnx_program.rename_axes(names)

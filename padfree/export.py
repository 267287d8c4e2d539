"""Networks as files that run without padfree: ONNX and `torch.export` programs.

    padfree.export.to_onnx(padfree.convert(model).eval(), "model.onnx")

Batch size and image sides stay free, down to the smallest image the network takes. Every max-pool is the
plain operator in the file. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padfree.blame import cause, place_in_graph, place_in_model
from padfree.errors import PadfreeError
from padfree.guards import allow_single_pixels
from padfree.onnx_check import check_onnx
from padfree.record import check_input_size, default_input_size
from padfree.recorder import first_line
from padfree.samples import random_images, size_text
from padfree.writing import check_target, replacing

__all__ = ["to_exported_program", "to_onnx"]

OPSET = 18  # the first with everything the converted networks need, and the exporter's own
_HINT = "Hint: a network tied to one image size takes dynamic_sides=False (--fixed-sides)"
_TRACED_BATCH = 2
_LARGER = (32, 64)  # pixels that the check of free sides adds to height and width
_AXES = {0: "batch", 2: "height", 3: "width"}


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: tuple[int, ...] | None = None,
    *,
    dynamic_sides: bool = True,
    opset: int = OPSET,
) -> Path:
    """Write an ONNX file: one input `input` (batch, C, height, width), outputs `output`, `output_1`, ...

    The file is checked before it appears: its structure by onnx, and by running it in ONNX Runtime on a
    random image, whose result must be the model's; with free sides on a larger image too.

    Args:
        model: a network in eval mode that takes image batches (N, C, H, W), converted or not.
        path: the file to write; its folder must exist.
        input_size: (C, H, W) to trace with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).
        dynamic_sides: leave height and width free; with False only the batch is.
        opset: version of the ONNX operators, at least 18.

    Returns:
        `path`.

    Raises:
        PadfreeError: onnx, onnxscript or onnxruntime is missing; the model is in training mode; an operation
            cannot be exported (naming the module it belongs to); the exporter does not reach the opset; the
            model's outputs are not finite; or the file does not compute what the model does.
        FileError: the file cannot be written.
    """
    if not isinstance(opset, int) or opset < OPSET:
        raise PadfreeError(f"opset is {opset!r}; the exporter takes {OPSET} or more")
    _need("onnx", "onnxscript", "onnxruntime")
    target = check_target(path)
    program, size = _program(model, input_size, dynamic_sides)
    try:
        with _quietly():
            onnx_program: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, verbose=False, input_names=["input"]
            )
            _name_axes(onnx_program, dynamic_sides)
    except Exception as error:
        raise PadfreeError(
            f"{type(model).__name__} cannot be written as ONNX: {_in_graph(program, model, error)}{cause(error)}"
        ) from error
    written = onnx_program.model.opset_imports.get("")
    if written != opset:  # the exporter leaves its own where it cannot convert
        raise PadfreeError(f"the exporter writes {type(model).__name__} with opset {written}, not with {opset}")
    with replacing(target) as temporary:
        try:
            onnx_program.save(str(temporary), external_data=False)
        except ValueError as error:  # a protobuf message ends at 2 GiB
            raise PadfreeError(
                f"{type(model).__name__} does not fit into one ONNX file: {first_line(error)}"
            ) from error
        check_onnx(temporary, model, size, _larger(size) if dynamic_sides else None, _HINT)
    return target


def to_exported_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: tuple[int, ...] | None = None,
    *,
    dynamic_sides: bool = True,
) -> Path:
    """Write a program of `torch.export` (conventionally `.pt2`); `torch.export.load(path).module()` runs it.

    Args:
        model: a network in eval mode that takes image batches (N, C, H, W), converted or not.
        path: the file to write; its folder must exist.
        input_size: (C, H, W) to trace with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).
        dynamic_sides: leave height and width free; with False only the batch is.

    Returns:
        `path`.

    Raises:
        PadfreeError: the model is in training mode, or part of it cannot be exported (naming the module).
        FileError: the file cannot be written.
    """
    target = check_target(path)
    program, size = _program(model, input_size, dynamic_sides)
    if dynamic_sides:
        with _quietly():
            allow_single_pixels(program, model, size)
    content = io.BytesIO()  # written to a file by torch itself, a full disk would end the process
    try:
        with _quietly():
            torch.export.save(program, content)
    except Exception as error:  # torch has no file form for every expression of a free side
        raise PadfreeError(
            f"{type(model).__name__} cannot be saved as a program: {_in_graph(program, model, error)}{cause(error)}"
            + (f". {_HINT}" if dynamic_sides else "")
        ) from error
    with replacing(target) as temporary:
        temporary.write_bytes(content.getbuffer())
    return target


def _need(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PadfreeError(f"writing ONNX needs {', '.join(missing)}: pip install padfree[onnx]")


def _program(
    model: nn.Module, input_size: tuple[int, ...] | None, dynamic_sides: bool
) -> tuple[torch.export.ExportedProgram, tuple[int, ...]]:
    """The model as a program with free batch (and sides), and the size it was traced at."""
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"export takes a torch.nn.Module, not {type(model).__name__}")
    training = next((name or type(model).__name__ for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise PadfreeError(f"`{training}` is in training mode; export writes inference: call model.eval() first")
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    example = random_images(model, size, _TRACED_BATCH)
    if dynamic_sides:
        _check_untied(model, size, example)
    free = [0] + (list(range(2, len(size) + 1)) if dynamic_sides else [])
    shapes = {axis: torch.export.Dim.DYNAMIC for axis in free}
    try:
        with _quietly(), _small_maps(), torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise PadfreeError(_export_failure(model, error, size, dynamic_sides)) from error
    return program, size


def _check_untied(model: nn.Module, size: tuple[int, ...], example: torch.Tensor) -> None:
    """Ask the network itself for another size, which is quick: the tracer may take hours to find out.

    Raises:
        PadfreeError: it takes the size it is exported at, and not a larger one.
    """
    larger = _larger(size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            model(example.new_zeros((_TRACED_BATCH, *larger)))
            return
        except Exception as error:  # the model's own code, which may raise anything
            place, why = place_in_model(model, error), first_line(error)
        try:
            model(example)
        except Exception:  # it takes neither: the export says why
            return
    raise PadfreeError(
        f"{type(model).__name__} takes {size_text(size)} and not {size_text(larger)}: {place}{why}. {_HINT}"
    )


def _larger(size: tuple[int, ...]) -> tuple[int, ...]:
    return (*size[:-2], size[-2] + _LARGER[0], size[-1] + _LARGER[1])


def _in_graph(program: torch.export.ExportedProgram, model: nn.Module, error: Exception) -> str:
    with _quietly():
        return place_in_graph(program, model, error)


def _export_failure(model: nn.Module, error: Exception, size: tuple[int, ...], dynamic_sides: bool) -> str:
    shape = size_text(size)
    place = place_in_model(model, error)
    text = f"{type(model).__name__} cannot be exported at {shape}: {place}{cause(error)}"
    return f"{text}. {_HINT}" if dynamic_sides else text


def _small_maps() -> AbstractContextManager[Any]:
    """Let the tracer treat sides of 1 like any other: else it writes down that no map may be that small."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # an older torch: the smallest sizes may be refused
        return contextlib.nullcontext()
    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' warnings, progress lines and half-made graphs to themselves; what matters is raised."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


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

"""Networks as files that run without padfree: ONNX and `torch.export` programs.

    padfree.export.to_onnx(padfree.convert(model).eval(), "model.onnx")

Batch size and image sides stay free, down to the smallest image the network takes. Every max-pool is the
plain operator in the file. A file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
import types
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.guards import allow_single_pixels
from padfree.record import check_input_size, default_input_size
from padfree.recorder import first_line
from padfree.writing import check_target, replacing

__all__ = ["to_exported_program", "to_onnx"]

OPSET = 18  # the first with everything the converted networks need, and the exporter's own
_HINT = "Hint: a network tied to one image size takes dynamic_sides=False (--fixed-sides)"
_TRACED_BATCH = 2
_LARGER = (32, 64)  # pixels that the check of free sides adds to height and width
_AXES = {0: "batch", 2: "height", 3: "width"}
_LONGEST = 300  # characters of a reason
_FAINT = 1e-2  # a smaller largest output is taken for this, since what makes it up may be larger
_TOLERANCE = 1e-3  # of the largest output; the two runtimes round differently, a wrong file is off by about 1


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
        place = _module_of_node(program, model, error)
        raise PadfreeError(f"{type(model).__name__} cannot be written as ONNX: {place}{_cause(error)}") from error
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
        _check_onnx(temporary, model, size, dynamic_sides)
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
        place = _module_of_node(program, model, error)
        raise PadfreeError(
            f"{type(model).__name__} cannot be saved as a program: {place}{_cause(error)}"
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
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    example = torch.rand((_TRACED_BATCH, *size), device=tensor.device).to(tensor.dtype)
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
            place, why = _place(_deepest(model, error)), first_line(error)
        try:
            model(example)
        except Exception:  # it takes neither: the export says why
            return
    raise PadfreeError(f"{type(model).__name__} takes {_by(size)} and not {_by(larger)}: {place}{why}. {_HINT}")


def _larger(size: tuple[int, ...]) -> tuple[int, ...]:
    return (*size[:-2], size[-2] + _LARGER[0], size[-1] + _LARGER[1])


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _export_failure(model: nn.Module, error: Exception, size: tuple[int, ...], dynamic_sides: bool) -> str:
    shape = _by(size)
    place = _place(_deepest(model, error))
    text = f"{type(model).__name__} cannot be exported at {shape}: {place}{_cause(error)}"
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


def _check_onnx(path: Path, model: nn.Module, size: tuple[int, ...], dynamic_sides: bool) -> None:
    """Run the file on one random image and compare; with free sides on a larger one too, if the model takes it.

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
    _compare_onnx(session, model, size, "")
    if dynamic_sides:
        _compare_onnx(session, model, _larger(size), f". {_HINT}")


def _compare_onnx(session: Any, model: nn.Module, size: tuple[int, ...], hint: str) -> None:
    """Compare on one random image of `size`; with a `hint` the model itself need not take that size."""
    tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.rand((1, *size), generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    shape = _by(size)
    try:
        with torch.no_grad():
            expected = [t.cpu() for t in _leaves(model(image.to(tensor.device)))]
    except Exception:
        if hint:
            return
        raise
    try:
        found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    except Exception as error:
        raise PadfreeError(
            f"ONNX Runtime does not run the exported {type(model).__name__} at {shape}: {first_line(error)}{hint}"
        ) from error
    for mine, theirs in zip(expected, map(torch.as_tensor, found), strict=True):
        if not mine.isfinite().all():
            raise PadfreeError(
                f"the outputs of {type(model).__name__} itself at {shape} are not finite, so the file cannot be checked"
            )
        limit = _TOLERANCE * max(_FAINT, float(mine.abs().max()))
        difference = float("inf")
        if mine.shape == theirs.shape:
            difference = float((mine.double() - theirs.double()).abs().max())
        if not difference <= limit:
            raise PadfreeError(
                f"the exported {type(model).__name__} is off by {difference:.3g} in ONNX Runtime at {shape}"
                f"{hint or '; report it'}"
            )


def _leaves(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _deepest(model: nn.Module, error: BaseException) -> str | None:
    """Path of the innermost module of `model` whose code the error passed through."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: str | None = None
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            found = paths[id(owner)]
        trace = trace.tb_next
    return found


def _module_of_node(program: torch.export.ExportedProgram, model: nn.Module, error: BaseException) -> str:
    """Where the graph node that an error names comes from: "`path`: ", or "" if it names none."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    named = re.search(r"node %?(\w+)", "\n".join(texts))
    if named is None:
        return ""
    paths = {path for path, _ in model.named_modules()}
    with _quietly():
        nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    for node in nodes:
        if node.name == named[1]:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            inside = [str(entry[0]).removeprefix("L['self'].") for entry in stack]
            return _place(next((path for path in reversed(inside) if path and path in paths), None))
    return ""


def _place(path: str | None) -> str:
    return f"`{path}`: " if path else ""


def _cause(error: BaseException) -> str:
    """The first line of what started it, without the tracer's advice; symbolic sizes can make it very long."""
    while (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return textwrap.shorten(f"{type(error).__name__}: {first_line(error)}", _LONGEST, placeholder=" ...")

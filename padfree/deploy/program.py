"""Programs of `torch.export`, with the batch and the sides of the image left free."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from padfree.deploy.blame import cause, place_in_graph, place_in_model
from padfree.deploy.guards import allow_single_pixels
from padfree.deploy.limits import Stage, check_limit, limited
from padfree.errors import PadfreeError
from padfree.files.writing import check_target, replacing
from padfree.geometry import size_text
from padfree.kernels import DECOMPOSITIONS
from padfree.record.inputs import check_input_size, default_input_size, random_images
from padfree.record.trees import first_line

HINT = "Hint: a network tied to one image size takes dynamic_sides=False (--fixed-sides)"
ADVICE = (
    "free sides are what takes long: dynamic_sides=False (--fixed-sides) exports for one size, or give it a longer "
    "time_limit (--time-limit)"
)
TRACING = "tracing the network with torch.export"

_TRACED_BATCH = 2


_LARGER = (32, 64)  # pixels that the check of free sides adds to height and width


def to_exported_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: tuple[int, ...] | None = None,
    *,
    dynamic_sides: bool = True,
    time_limit: float | None = None,
) -> Path:
    """Write a program of `torch.export` (conventionally `.pt2`); `torch.export.load(path).module()` runs it.

    Args:
        model: a network in eval mode that takes image batches (N, C, H, W), converted or not.
        path: the file to write; its folder must exist.
        input_size: (C, H, W) to trace with; default: the size it was converted at,
            else that of its `pretrained_cfg`, else (3, 224, 224).
        dynamic_sides: leave height and width free; with False only the batch is.
        time_limit: seconds that it may take; None for no limit.

    Returns:
        `path`.

    Raises:
        PadfreeError: the model is in training mode, part of it cannot be exported (naming the module), or the time is
            up.
        FileError: the file cannot be written.
    """
    check_limit(time_limit)
    target = check_target(path)
    stage = Stage(TRACING)

    def write() -> None:
        content = _content(model, input_size, dynamic_sides, stage)
        with replacing(target) as temporary:
            temporary.write_bytes(content.getbuffer())

    limited(time_limit, f"the export of {type(model).__name__}", stage, ADVICE, write)
    return target


def _content(model: nn.Module, input_size: tuple[int, ...] | None, dynamic_sides: bool, stage: Stage) -> io.BytesIO:
    """What the file holds."""
    program, size = exported(model, input_size, dynamic_sides)
    stage.text = "checking and packing the program"
    if dynamic_sides:
        with quietly():
            allow_single_pixels(program, model, size)
    content = io.BytesIO()  # written to a file by torch itself, a full disk would end the process
    try:
        with quietly():
            torch.export.save(program, content)
    except Exception as error:  # torch has no file form for every expression of a free side
        raise PadfreeError(
            f"{type(model).__name__} cannot be saved as a program: {in_graph(program, model, error)}{cause(error)}"
            + (f". {HINT}" if dynamic_sides else "")
        ) from error
    return content


def exported(
    model: nn.Module,
    input_size: tuple[int, ...] | None,
    dynamic_sides: bool,
    lower: Callable[[nn.Module, tuple[int, ...]], nn.Module] | None = None,
) -> tuple[torch.export.ExportedProgram, tuple[int, ...]]:
    """The model as a program with free batch (and sides), and the size it was traced at.

    Args:
        model: a network in eval mode.
        input_size: (C, H, W); None for its default.
        dynamic_sides: leave height and width free.
        lower: gives another network that computes the same at (C, H, W), to be traced in its place.
    """
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
        with quietly(), _small_maps(), torch.no_grad():
            traced = model if lower is None else lower(model, size)
            program = torch.export.export(traced, (example,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        raise PadfreeError(_export_failure(model, error, size, dynamic_sides)) from error
    if any(node.target in DECOMPOSITIONS for node in program.graph.nodes):  # files are read where padfree is not
        with quietly(), _small_maps():
            program = program.run_decompositions(DECOMPOSITIONS)
    return program, size


def _check_untied(model: nn.Module, size: tuple[int, ...], example: torch.Tensor) -> None:
    """Ask the network itself for another size, which is quick: the tracer may take hours to find out.

    Raises:
        PadfreeError: it takes the size it is exported at, and not a larger one.
    """
    other = larger(size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            model(example.new_zeros((_TRACED_BATCH, *other)))
            return
        except Exception as error:  # the model's own code, which may raise anything
            place, why = place_in_model(model, error), first_line(error)
        try:
            model(example)
        except Exception:  # it takes neither: the export says why
            return
    raise PadfreeError(
        f"{type(model).__name__} takes {size_text(size)} and not {size_text(other)}: {place}{why}. {HINT}"
    )


def larger(size: tuple[int, ...]) -> tuple[int, ...]:
    """A larger image, of other proportions."""
    return (*size[:-2], size[-2] + _LARGER[0], size[-1] + _LARGER[1])


def in_graph(program: torch.export.ExportedProgram, model: nn.Module, error: Exception) -> str:
    """Where in the model an error of its program comes from."""
    with quietly():
        return place_in_graph(program, model, error)


def _export_failure(model: nn.Module, error: Exception, size: tuple[int, ...], dynamic_sides: bool) -> str:
    shape = size_text(size)
    place = place_in_model(model, error)
    text = f"{type(model).__name__} cannot be exported at {shape}: {place}{cause(error)}"
    return f"{text}. {HINT}" if dynamic_sides else text


def _small_maps() -> AbstractContextManager[Any]:
    """Let the tracer treat sides of 1 like any other: else it writes down that no map may be that small."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):  # an older torch: the smallest sizes may be refused
        return contextlib.nullcontext()
    patched: AbstractContextManager[Any] = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return patched


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep the exporters' warnings, progress lines and half-made graphs to themselves; what matters is raised."""
    with (
        warnings.catch_warnings(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield

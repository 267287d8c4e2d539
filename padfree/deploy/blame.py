"""What an exporter's error means: the module it belongs to, and its cause in one line."""

from __future__ import annotations

import re
import textwrap
import types

import torch
from torch import nn

from padfree.record.trees import first_line

__all__ = ["cause", "place_in_graph", "place_in_model"]

_LONGEST = 300  # characters of a reason


def place_in_model(model: nn.Module, error: BaseException) -> str:
    """The words "`path`: ", the innermost module of `model` whose code the error passed through, or ""."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: str | None = None
    trace: types.TracebackType | None = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            found = paths[id(owner)]
        trace = trace.tb_next
    return _named(found)


def place_in_graph(program: torch.export.ExportedProgram, model: nn.Module, error: BaseException) -> str:
    """The words "`path`: ", the module of the graph node that an error names, or "" if it names none."""
    texts = []
    behind: BaseException | None = error
    while behind is not None:
        texts.append(str(behind))
        behind = behind.__cause__ or behind.__context__
    named = re.search(r"node %?(\w+)", "\n".join(texts))
    if named is None:
        return ""
    paths = {path for path, _ in model.named_modules()}
    nodes = [*program.graph.nodes, *program.run_decompositions().graph.nodes]
    for node in nodes:
        if node.name == named[1]:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            inside = [str(entry[0]).removeprefix("L['self'].") for entry in stack]
            return _named(next((path for path in reversed(inside) if path and path in paths), None))
    return ""


def _named(path: str | None) -> str:
    return f"`{path}`: " if path else ""


def cause(error: BaseException) -> str:
    """The first line of what started it, without the tracer's advice; symbolic sizes can make it very long."""
    while (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return textwrap.shorten(f"{type(error).__name__}: {first_line(error)}", _LONGEST, placeholder=" ...")

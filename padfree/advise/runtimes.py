"""Where networks are timed: what makes a network ready to be called there."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from padfree.advise.timing import Call
from padfree.deploy.fuse import fuse
from padfree.errors import PadfreeError
from padfree.record.inputs import random_images


@dataclass(frozen=True)
class Runtime:
    """One way to run a network.

    Attributes:
        name: what `advise` calls it.
        prepare: given a network in eval mode on the CPU, (C, H, W) and the batch, gives what builds a call of it, as
            often as asked: builds of one network differ by where they lie in memory.
    """

    name: str
    prepare: Callable[[nn.Module, tuple[int, ...], int], Callable[[], Call]]


def runtime(name: str | Runtime) -> Runtime:
    """The runtime of that name.

    Raises:
        PadfreeError: there is none, or it is not installed.
    """
    if isinstance(name, Runtime):
        return name
    if not isinstance(name, str) or name not in RUNTIMES:
        raise PadfreeError(f"no runtime {name!r} to measure in; there are {', '.join(RUNTIMES)}")
    missing = [package for package in _NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise PadfreeError(
            f'measuring in {name} needs {", ".join(missing)}: pip install ".[onnx]" in padfree\'s source folder'
        )
    return RUNTIMES[name]


def _eager(model: nn.Module, size: tuple[int, ...], batch: int) -> Callable[[], Call]:
    images = random_images(model, size, batch)

    def build() -> Call:
        duplicate = copy.deepcopy(model)

        def call() -> object:
            with torch.inference_mode():
                return duplicate(images)

        return call

    return build


def _fused(model: nn.Module, size: tuple[int, ...], batch: int) -> Callable[[], Call]:
    return _eager(fuse(model, input_size=size), size, batch)


def _onnxruntime(model: nn.Module, size: tuple[int, ...], batch: int) -> Callable[[], Call]:
    import onnxruntime

    from padfree.deploy.onnx import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        content = to_onnx(model, Path(folder) / "model.onnx", size, dynamic_sides=False).read_bytes()
    images = {"input": random_images(model, size, batch).numpy()}

    def build() -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return functools.partial(session.run, None, images)

    return build


RUNTIMES = {each.name: each for each in (Runtime("fused", _fused), Runtime("eager", _eager))}
RUNTIMES["onnxruntime"] = Runtime("onnxruntime", _onnxruntime)
_NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime")}

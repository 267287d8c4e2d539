"""What a forward does that operations on meta tensors show no trace of."""

from __future__ import annotations

import pickle
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from padfree.record.quick import TorchDispatchMode

_ENTERED = {  # functions of torch, by their code, that a generated forward would not call
    torch.autocast.__enter__.__code__: "switches autocast on or off",
    torch.autograd.graph.saved_tensors_hooks.__enter__.__code__: "decides what is kept for the backward pass",
    torch.profiler.record_function.__enter__.__code__: "marks a stretch for the profiler",
}
_OWN_BACKWARD = "calls an autograd function, whose backward is its own"
if hasattr(torch.autograd.Function.apply, "__func__"):  # Python in older versions of torch, C in newer ones
    _ENTERED[torch.autograd.Function.apply.__func__.__code__] = _OWN_BACKWARD
_OWN_TENSORS = {  # whose devices, dtypes and gradients are those of the copy that is traced
    getattr(nn.Module, name).__code__
    for name in ("parameters", "named_parameters", "buffers", "named_buffers", "state_dict")
}
_ASKED: dict[Any, str] = {  # what the answer to is baked
    torch.is_grad_enabled: "asks whether gradients are on",
    torch.is_inference_mode_enabled: "asks whether inference mode is on",
    torch.is_autocast_enabled: "asks whether autocast is on",
    torch.get_autocast_dtype: "asks for autocast's dtype",
}
_ASKED_IN_PYTHON = {  # the same, by their code
    function.__code__: reason
    for function, reason in (
        (getattr(torch.jit, "is_tracing", None), "asks whether it is traced"),
        (torch.compiler.is_compiling, "asks whether it is compiled"),
        (torch.compiler.is_dynamo_compiling, "asks whether it is compiled"),
        (getattr(torch.compiler, "is_exporting", None), "asks whether it is exported"),  # not in all versions
        (torch.onnx.is_in_onnx_export, "asks whether it is exported"),
        (torch.are_deterministic_algorithms_enabled, "asks whether algorithms are deterministic"),
    )
    if isinstance(function, types.FunctionType)
}
_LIBRARIES = ("torch.", "padfree.", "torchvision.utils", "torchvision.ops.")  # whose answers change no values


@contextmanager
def noting_unseen() -> Iterator[list[str]]:
    """Collects which of these this thread calls meanwhile; nothing of torch is replaced for it.

    Python tells of each call (`sys.setprofile`, which is a thread's own); a profiler that runs is paused.
    """
    noted: list[str] = []

    def called(frame: types.FrameType, event: str, function: Any) -> None:
        if event == "call" and frame.f_code in _ENTERED:
            noted.append(_ENTERED[frame.f_code])
        elif event == "call" and frame.f_code in _OWN_TENSORS and not _is_library(frame.f_back):
            noted.append("looks through its own parameters, whose dtype, device and the like would be baked")
        elif event == "call" and frame.f_code in _ASKED_IN_PYTHON and not _is_library(frame.f_back):
            noted.append(_ASKED_IN_PYTHON[frame.f_code])
        elif event == "c_call" and isinstance(function, types.BuiltinFunctionType):
            owner = function.__self__
            if function.__name__ == "apply" and isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                noted.append(_OWN_BACKWARD)
            if function in _ASKED and not _is_library(frame):
                noted.append(_ASKED[function])

    usual: Any = sys.getprofile()
    pause, resume = (getattr(usual, name, None) for name in ("disable", "enable"))  # of cProfile
    if pause and resume:
        pause()
    sys.setprofile(called)
    try:
        yield noted
    finally:
        sys.setprofile(None if pause and resume else usual)
        if pause and resume:
            resume()


def _is_library(frame: types.FrameType | None) -> bool:
    return frame is None or str(frame.f_globals.get("__name__")).startswith(_LIBRARIES)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees random numbers that are drawn while tracing, which would become constants."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


TRIES = 4  # other threads may draw from the same generators meanwhile


def random_states() -> tuple[Any, ...]:
    """Of the generators that are not torch's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), b"" if numpy is None else pickle.dumps(numpy.random.get_state())

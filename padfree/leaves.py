"""Layers that pad inside their own forward (SAME padding), made to stop.

Such a class computes its padding from the input's size, so no attribute says it. Two ways are tried on
the copy: switch off a flag whose absence of effect but the pad can be seen in the recorded operations,
or use the forward of the torch.nn class it derives from.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from padfree.errors import Refusal
from padfree.record import Call, Op, Recorder, Recording, _collect
from padfree.reforward import Names, rewritten_class

_FORWARDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "def forward(self, input):\n    return self._conv_forward(input, self.weight, self.bias)\n",
    nn.AvgPool2d: (
        "def forward(self, input):\n    return avg_pool2d(input, self.kernel_size, self.stride, self.padding, "
        "self.ceil_mode, self.count_include_pad)\n"
    ),
    nn.MaxPool2d: (
        "def forward(self, input):\n    return max_pool2d(input, self.kernel_size, self.stride, self.padding, "
        "self.dilation, self.ceil_mode)\n"
    ),
}
_NAMES: dict[type[nn.Module], Names] = {
    nn.Conv2d: (),
    nn.AvgPool2d: (("avg_pool2d", "torch.nn.functional", "avg_pool2d"),),
    nn.MaxPool2d: (("max_pool2d", "torch.nn.functional", "max_pool2d"),),
}


def plain_forward(recording: Recording, call: Call, values: dict[str, Any]) -> tuple[str, Names, dict[str, Any]]:
    """How the module that `call` calls does the same without its own padding, once `values` are set.

    Returns:
        the source of a forward to give it with its globals, or "" and the flags to set.

    Raises:
        Refusal: neither way leaves everything but the pad as it was.
    """
    module = recording.modules[call.path]
    wanted = [op.kind for op in recording.ops[call.ops.start : call.ops.stop] if not _is_pad(op)]
    for name, value in list(module.__dict__.items()):
        if value is True and name != "training" and _kinds(module, call, {**values, name: False}) == wanted:
            return "", (), {name: False}
    for base, source in _FORWARDS.items():
        if isinstance(module, base) and _kinds(module, call, values, base) == wanted:
            return source, _NAMES[base], {}
    raise Refusal(
        f"`{call.path}` ({type(module).__name__}) pads inside its own forward, which could not be switched off"
    )


def _is_pad(op: Op) -> bool:
    return op.kind == "constant_pad_nd" and bool(op.inputs)


def _kinds(
    module: nn.Module, call: Call, values: dict[str, Any], base: type[nn.Module] | None = None
) -> list[str] | None:
    """Kinds of the operations the module issues with `values` set (and the forward of `base`)."""
    before, kind = dict(module.__dict__), type(module)
    try:
        module.__dict__.update({name: value for name, value in values.items() if name in before})
        if base is not None:
            module.__class__ = rewritten_class(kind, _FORWARDS[base], _NAMES[base], ())
        recorder = Recorder()
        tensors: list[Any] = []
        _collect(call.arguments, tensors)
        for tensor in tensors:
            recorder.enter(tensor)
        with recorder:
            type(module).forward(module, *call.arguments[0], **call.arguments[1])
    except Exception:  # this way does not work; the caller tries the next or refuses
        return None
    finally:
        module.__dict__.clear()
        module.__dict__.update(before)
        module.__class__ = kind
    return [op.kind for op in recorder.ops]

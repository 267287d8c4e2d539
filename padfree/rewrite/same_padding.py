"""Layers that pad inside their own forward (SAME padding), made to stop.

Such a class computes its padding from the input's size, so no attribute says it. Two ways are tried on
the copy: switch off a flag whose absence of effect but the pad can be seen in the recorded operations,
or use the forward of the torch.nn class it derives from.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from padfree.errors import Refusal
from padfree.geometry import out_size
from padfree.record.recorder import Op, Recorder
from padfree.record.recording import Call, Recording
from padfree.record.trees import collect
from padfree.rewrite.forward import Names, rewritten_class, set_class

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
    ops = recording.ops[call.ops.start : call.ops.stop]
    shrunk = next(op for op in ops if op.kind == "convolution" or "pool2d" in op.kind)
    before = next((op for op in ops if _is_pad(op) and op.outputs[0] in shrunk.inputs), shrunk)
    wanted = (
        [op.kind for op in ops if not _is_pad(op)],
        _sizes(module, recording.values[before.inputs[0]].shape, values),
    )
    flags = [name for name, value in module.__dict__.items() if value is True and name != "training"]
    for switches in ({}, *({name: False} for name in flags)):
        if _effect(module, call, {**values, **switches}) == wanted:
            return "", (), switches
    for base, source in _FORWARDS.items():
        if isinstance(module, base) and _effect(module, call, values, base) == wanted:
            return source, _NAMES[base], {}
    raise Refusal(
        f"`{call.path}` ({type(module).__name__}) pads inside its own forward, which could not be switched off"
    )


def shaped_like(value: Any, old: Any) -> Any:
    """(p, p) as the kind of thing that stood there: an int stays an int, four sides stay four."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        if isinstance(old, int) and not isinstance(old, bool):
            return value[0]
        if isinstance(old, (list, tuple)) and all(isinstance(side, int) for side in old):
            return type(old)([value[0]] * len(old))
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(old, (tuple, list)):
        return type(old)([value] * len(old))
    return value


def _sizes(module: nn.Module, shape: tuple[int, ...], values: dict[str, Any]) -> list[int]:
    """(H, W) that a strided layer makes of (N, C, H, W) with `values` set and no padding of its own."""

    def sides(name: str, default: int) -> tuple[int, int]:
        value = values.get(name, getattr(module, name, default))
        return (value, value) if isinstance(value, int) else (value[0], value[-1])

    settings = (sides("kernel_size", 1), sides("stride", 1), sides("padding", 0), sides("dilation", 1))
    return [out_size(side, k, s, p, d) for side, k, s, p, d in zip(shape[2:], *settings, strict=True)]


def _is_pad(op: Op) -> bool:
    return bool(op.inputs) and op.kind in ("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "clone")


def _effect(
    module: nn.Module, call: Call, values: dict[str, Any], base: type[nn.Module] | None = None
) -> tuple[list[str], list[int]] | None:
    """What the module does with `values` set (and the forward of `base`): operations but pads, output size."""
    state, kind = dict(module.__dict__), type(module)
    try:
        new = {name: shaped_like(value, state[name]) for name, value in values.items() if name in state}
        module.__dict__.update(new)
        if base is not None:
            set_class(module, rewritten_class(kind, _FORWARDS[base], _NAMES[base], ()))
        recorder = Recorder()
        tensors: list[Any] = []
        collect(call.arguments, tensors)
        for tensor in tensors:
            recorder.enter(tensor)
        with recorder:
            out = type(module).forward(module, *call.arguments[0], **call.arguments[1])
    except Exception:  # this way does not work; the caller tries the next or refuses
        return None
    finally:
        module.__dict__.clear()
        module.__dict__.update(state)
        set_class(module, kind)
    return [op.kind for op in recorder.ops if not _is_pad(op)], list(out.shape[2:])

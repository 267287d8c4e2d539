"""Whether a converted copy runs on real tensors.

Meta kernels of other libraries' operators compare no sizes (torchvision's `deform_conv2d`, most custom operators), so
a network may verify on meta tensors and fail at its first image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from padfree.analysis.kinds import PRODUCTS
from padfree.record.copies import bare_copy, kept_generators
from padfree.record.recording import ForwardFailedError, Recording, record
from padfree.record.trees import Ref, first_line
from padfree.rewrite.operations import Operation, perform
from padfree.verify.verify import blame

_MACS = 2_000_000_000  # about a tenth of a second on one core, less than planning takes
_SMALLEST = 64  # pixels a side
_MULTIPLE = 32  # decoders want their images divisible


def real_run(
    model: nn.Module, recording: Recording, put_back: Callable[[], None] = lambda: None
) -> Callable[[tuple[Operation, ...]], str] | None:
    """What runs a converted copy of `model` once, on arguments like the recorded ones, and says why it fails.

    The copy is in eval mode, without hooks, on the model's own device; no gradients are made and the random state is
    kept. Costly networks get a smaller image first; if that fails, the recorded size decides. A failure counts only if
    a plain copy runs: half precision on a CPU, or too little memory, says nothing.

    Args:
        model: the model itself, which stays as it is.
        recording: its recording.
        put_back: empties caches outside the model of meta tensors, and of real ones afterwards.

    Returns:
        a function from the operations of a conversion to the reason ("": it runs); None where nothing can be run
        (a model on the meta device) or all was recorded on real tensors anyway.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not recording.meta or any(tensor.is_meta for tensor in tensors):
        return None
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    # weights that the recorded forward never wrote into need no copy, which may take longer than the forward
    kept = [tensor for name, tensor in model.named_parameters() if name not in recording.written]

    def forward(operations: tuple[Operation, ...], parts: int = 1, like: Recording | None = None) -> Exception | None:
        put_back()
        try:
            with _real_device(), kept_generators(seed=0), torch.no_grad():
                copy, example = perform(bare_copy(model, kept), operations), _real(recording.example, device, parts)
                if like is None:
                    copy(*example)
                else:
                    record(copy, like=replace(like, example=example, meta=False))
        except Exception as error:  # whatever an operator raises
            return error
        finally:
            put_back()
        return None

    def run(operations: tuple[Operation, ...]) -> str:
        parts = _parts(recording)
        if parts > 1 and forward(operations, parts) is None:
            return ""
        error = forward(operations)
        if error is None or forward(()) is not None:  # it runs, or the model itself does not
            return ""
        told = forward(operations, like=recording)
        if isinstance(told, ForwardFailedError):
            return f"on real tensors {blame(recording, told)}"
        return f"it fails on real tensors: {type(error).__name__}: {first_line(error)}"

    return run


def _real_device() -> Any:
    """Around a forward on real tensors: whoever plans under `torch.device("meta")` means the model that he builds."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _parts(recording: Recording) -> int:
    """What to divide an image's sides by, a power of 2, so that a forward costs less than `_MACS`."""
    macs, parts = _macs(recording), 1
    smallest = min(min(recording.values[value].shape[-2:]) for value in recording.inputs)
    while macs > _MACS and smallest // (2 * parts) >= _SMALLEST:
        macs, parts = macs // 4, parts * 2
    return parts


def _macs(recording: Recording) -> int:
    """Multiply-adds of the convolutions and matrix products that were recorded."""
    total = 0
    for op in recording.ops:
        shapes = [recording.values[arg.value].shape for arg in op.args[0] if isinstance(arg, Ref)]
        if op.kind == "convolution":
            total += math.prod(recording.values[op.outputs[0]].shape) * math.prod(shapes[1][1:])
        elif op.kind in PRODUCTS:
            total += math.prod(recording.values[op.outputs[0]].shape) * shapes[-2][-1]
    return total


def _real(tree: Any, device: torch.device, parts: int) -> Any:
    """Recorded arguments with random values from 0 to 1 for their meta tensors, their sides divided by `parts`."""
    if isinstance(tree, torch.Tensor):
        generator = torch.Generator().manual_seed(0)
        sides = [-(-side // (_MULTIPLE * parts)) * _MULTIPLE if parts > 1 else side for side in tree.shape[-2:]]
        return torch.rand((*tree.shape[:-2], *sides), generator=generator).to(device, tree.dtype)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_real(item, device, parts) for item in tree)
    return tree

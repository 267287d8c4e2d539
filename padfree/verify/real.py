"""Whether a converted copy runs on real tensors.

Meta kernels of other libraries' operators compare no sizes (torchvision's `deform_conv2d`, most custom operators), so
a network may verify on meta tensors and fail at its first image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from padfree.record.copies import bare_copy, kept_generators
from padfree.record.recording import ForwardFailedError, Recording, record
from padfree.rewrite.operations import Operation, perform
from padfree.verify.verify import blame


def real_run(model: nn.Module, recording: Recording) -> Callable[[tuple[Operation, ...]], str] | None:
    """What runs a converted copy of `model` once, on arguments like the recorded ones, and says why it fails.

    The copy is in eval mode, without hooks, on the model's own device; no gradients are made and the random state is
    kept. A failure counts only if a plain copy runs: half precision on a CPU, or too little memory, says nothing.

    Returns:
        a function from the operations of a conversion to the reason ("": it runs); None where nothing can be run
        (a model on the meta device) or all was recorded on real tensors anyway.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not recording.meta or any(tensor.is_meta for tensor in tensors):
        return None
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def run(operations: tuple[Operation, ...]) -> str:
        example = _real(recording.example, device)
        try:
            _forward(perform(bare_copy(model), operations), example)
        except Exception as error:  # whatever an operator raises
            return _reason(model, recording, operations, example, error)
        return ""

    return run


def _forward(model: nn.Module, example: tuple[Any, ...]) -> None:
    with kept_generators(seed=0), torch.no_grad():
        model(*example)


def _reason(
    model: nn.Module, recording: Recording, operations: Iterable[Operation], example: tuple[Any, ...], error: Exception
) -> str:
    """Why a converted copy fails, with the module that does; "" if the model itself fails too."""
    try:
        _forward(bare_copy(model), example)
    except Exception:  # whatever it is, it is not the conversion's doing
        return ""
    like = Recording(recording.model, recording.input_size, example, False, (), (), (), (), ())
    try:
        record(perform(bare_copy(model), operations), like=like)
    except ForwardFailedError as failure:
        return f"on real tensors {blame(recording, failure)}"
    return f"it fails on real tensors: {type(error).__name__}: {error}"


def _real(tree: Any, device: torch.device) -> Any:
    """Recorded arguments with random values from 0 to 1 for their meta tensors."""
    if isinstance(tree, torch.Tensor):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(tree.shape, generator=generator).to(device, tree.dtype)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_real(item, device) for item in tree)
    return tree

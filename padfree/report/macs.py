"""fvcore's multiply-adds, and what they do not count."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from padfree.layers.learned_groups import condensed, learned_group_convs
from padfree.record.copies import bare_copy
from padfree.record.inputs import example_inputs
from padfree.record.trees import first_line

_WEIGHT, _POINT_WEIGHT = 2, 12  # of padfree::chain's inputs, by its schema


@dataclass(frozen=True)
class MacCount:
    """fvcore's count for one image.

    Attributes:
        macs: the total; None if there is none.
        uncounted: operations that it left out, with their number.
        note: why there is no total.
        own: of `macs`, what is each module's own, by path, without its children; it adds up to `macs`.
    """

    macs: int | None
    uncounted: Counter[str]
    note: str = ""
    own: Mapping[str, int] = field(default_factory=dict)


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> MacCount:
    """Multiply-adds of one image of `input_size` (C, H, W), by fvcore, on a copy on the CPU.

    fvcore follows a jit trace, which takes real tensors: this is a true forward pass. Functional
    operations count like modules. A network that cannot be traced gets `macs=None` and a note.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its use of torch.jit.script when it is imported
        from fvcore.nn import FlopCountAnalysis

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet():
            duplicate = _on_cpu(_as_kept(bare_copy(model)))
            example = next(example_inputs(duplicate, input_size, meta=False))
            analysis = FlopCountAnalysis(duplicate, example).tracer_warnings("none")
            analysis.set_op_handle("padfree::chain", _chain_macs)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            total = int(analysis.total())
            own = _own(analysis.by_module())
            skipped = sorted(analysis.unsupported_ops().items())
    except Exception as error:  # fvcore and the tracer raise anything; the comparison goes on without
        why = f"{type(error).__name__}: {first_line(error)}"
        return MacCount(None, Counter(), f"fvcore cannot count it: {why}")
    return MacCount(total, Counter({name.rpartition("::")[2]: number for name, number in skipped}), own=own)


def _own(counted: Mapping[str, int]) -> dict[str, int]:
    """Of counts in which each module's has those of its children, what is its own."""
    own = {path: int(number) for path, number in counted.items()}
    for path, number in counted.items():
        if path:
            own[path.rpartition(".")[0]] -= int(number)
    return {path: number for path, number in own.items() if number}


def _chain_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Of a fused chain: its depthwise convolution's and, where it has one, its 1x1's, as fvcore counts convolutions."""
    from fvcore.nn.jit_handles import get_shape

    batch, _, *sides = get_shape(outputs[0])
    weights = (get_shape(inputs[at]) for at in (_WEIGHT, _POINT_WEIGHT))
    return int(batch * math.prod(sides) * sum(math.prod(shape) for shape in weights if shape))


def _as_kept(model: nn.Module) -> nn.Module:
    """With standard group convolutions for learned ones, whose masked weights would count otherwise."""
    return condensed(model) if any(layer.masked for layer in learned_group_convs(model)) else model


def count_params(model: nn.Module) -> int:
    """Parameters of a network, without the weights that learned group convolutions have masked."""
    masked = (layer.masked for layer in learned_group_convs(model))
    return sum(p.numel() for p in model.parameters()) - sum(masked)


def _on_cpu(model: nn.Module) -> nn.Module:
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = model.to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    return model.float().cpu()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence fvcore, which logs through the logging module whatever its switches say."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

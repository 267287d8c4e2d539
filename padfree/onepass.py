"""A depthwise convolution, its norm and activation, the max-pool beside it and their sum in one pass over the map.

Four or five operations of torch's read and write the map anew. Where the C extension is there and somebody plainly
computes (float32 on a CPU, eval mode, no gradient, no hook on the modules concerned, nobody tracing), one function of
it takes their place (`_depthwise.c`); its results differ from theirs by rounding. Everybody else gets the modules,
called one after another, and `padfree.pooling`. The pass takes as much of a chain as it understands (`padfree.chains`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from padfree import native
from padfree.chains import Chain, Modules, read
from padfree.native import Merge
from padfree.pooling import add_shortcut, ordinary, shortcut_pool, watched

__all__ = ["downsample", "quick", "reduce", "stem_branches"]


def quick() -> bool:
    """Whether somebody plainly computes here, in inference: no gradients, nobody who traces, compiles or looks on."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    else:  # which the compiler of TorchScript skips
        return _plainly_computing()


def downsample(x: torch.Tensor, kernel: int, padding: int, before: Modules, behind: Modules = ()) -> torch.Tensor:
    """`behind(before(x) + pool(x))`: (N, C, H, W) -> (N, C, h, w), a strided conv's chain and its max-pool shortcut.

    For who has asked `quick` before, as generated forwards do.

    Args:
        x: what the strided convolution reads.
        kernel: the pool's, pixels; its stride is 2.
        padding: the pool's, pixels.
        before: the convolution and what follows it, up to the sum.
        behind: what follows the sum (ShuffleNetV2's norm).
    """
    chain = _chain(x, before, behind, 2, kernel, padding)
    if chain is not None:
        out = _result(x, chain.conv)
        merge = Merge.BEFORE_NORM if chain.late else Merge.AFTER_ACTIVATION
        pooled = torch.empty_like(out) if chain.rest else None
        merge = Merge.BESIDE if chain.rest else merge
        if native.depthwise(x, *chain[:3], (kernel, padding), merge, out, pooled):
            if pooled is not None:
                out = add_shortcut(_called(chain.rest, out), pooled)
            return _called(chain.behind, out)
    pooled = shortcut_pool(x, kernel, padding)
    return _called(behind, add_shortcut(_called(before, x), pooled))


def reduce(x: torch.Tensor, modules: Modules) -> torch.Tensor:
    """`modules(x)`: a strided depthwise convolution and what follows it, without a pool."""
    chain = _chain(x, modules, (), 2, 0, 0) if quick() else None
    if chain is not None:
        out = _result(x, chain.conv)
        if native.depthwise(x, *chain[:3], (0, 0), Merge.BESIDE, out, None):
            return _called(chain.rest, out)
    return _called(modules, x)


def stem_branches(x: torch.Tensor, modules: Modules, pool: tuple[int, int, int]) -> torch.Tensor | None:
    """`cat(modules(x), pool(x))` of a stem tail: (N, C, H, W) -> (N, 2C, h, w); None where it must be called in parts.

    For who has asked `quick` before.

    Args:
        x: the stem's own output.
        modules: the depthwise convolution, its norm and its activation.
        pool: the kernel, stride and padding of the max-pool beside it, pixels.
    """
    kernel, stride, padding = pool
    chain = _chain(x, modules, (), stride, kernel, padding)
    if chain is None or chain.rest:
        return None
    out = _result(x, chain.conv, 2)
    left, right = out.tensor_split(2, 1)
    return out if native.depthwise(x, *chain[:3], (kernel, padding), Merge.BESIDE, left, right) else None


def _plainly_computing() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or native.extension is None
        or torch.is_autocast_enabled("cpu")
        or watched()
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _chain(x: torch.Tensor, before: Modules, behind: Modules, stride: int, kernel: int, padding: int) -> Chain | None:
    """The chain that the extension can run on this map, with this pool beside it (kernel 0: none)."""
    if type(x) is not torch.Tensor or not (native.takes(x, kernel or 3, stride) and ordinary(x, kernel or 3, padding)):
        return None
    chain = read(before, behind)
    if chain is None:
        return None
    conv = chain.conv
    size, pad, (_, channels, height, width) = conv.kernel_size[0], int(conv.padding[0]), x.shape
    fits = channels == conv.in_channels and height >= size <= width and conv.stride[0] == stride
    # both windows have one centre, so that both results have one size
    return chain if fits and (kernel == 0 or size - 2 * pad == kernel - 2 * padding) else None


def _result(x: torch.Tensor, conv: nn.Conv2d, times: int = 1) -> torch.Tensor:
    stride, reach = conv.stride[0], 2 * int(conv.padding[0]) - conv.kernel_size[0]
    count, channels, height, width = x.shape
    shape = (count, times * channels, (height + reach) // stride + 1, (width + reach) // stride + 1)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)


def _called(modules: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x

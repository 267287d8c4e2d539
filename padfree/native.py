"""The C extension on tensors: float32 max-pools of 3x3 and 5x5 windows, depthwise convolutions with one beside them.

It is built where the installation finds a C compiler; `extension` is None elsewhere, and `padfree.pooling` does
without it. A map is (N, C, H, W), dense, contiguous or channels_last but not both.
"""

import contextlib
from enum import IntEnum
from operator import itemgetter

import torch
from torch.autograd.profiler import record_function

try:
    from padfree import _maxpool as extension
except ImportError:
    extension = None  # type: ignore[assignment]

__all__ = ["Merge", "depthwise", "extension", "max_pool", "max_pool_backward", "max_pool_taps", "takes"]


class Merge(IntEnum):
    """Where the maxima of the pool are added to the convolution's chain (as in `_depthwise.c`)."""

    BESIDE = 0  # nowhere: they are a map of their own, or there is no pool
    AFTER_ACTIVATION = 1
    BEFORE_NORM = 2


THREADED_NUMEL = 1 << 16  # elements of a map from which torch's number of threads is taken


def takes(x: torch.Tensor, kernel: int, stride: int) -> bool:
    """Whether this map can be pooled here: its type, its windows, and that its memory holds its numbers."""
    plain_memory = not (x.is_neg() or x._is_zerotensor())  # else they are another sign's, or there is none
    return extension is not None and x.dtype is torch.float32 and kernel in (3, 5) and stride in (1, 2) and plain_memory


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """The maxima: (N, C, H, W) -> (N, C, h, w) in the same layout."""
    pooled = _result(x, kernel, stride, padding, x.dtype)
    with _named("padfree::max_pool"):
        extension.max_pool(x.data_ptr(), pooled.data_ptr(), *_sizes(x), kernel, stride, padding, _threads(x))
    return pooled


def max_pool_taps(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima, and the place of each in its window, row * kernel + column: both (N, C, h, w), the second uint8."""
    pooled, taps = (_result(x, kernel, stride, padding, dtype) for dtype in (x.dtype, torch.uint8))
    addresses = x.data_ptr(), pooled.data_ptr(), taps.data_ptr()
    extension.max_pool_taps(*addresses, *_sizes(x), kernel, stride, padding, _threads(x))
    return pooled, taps


def max_pool_backward(
    grad: torch.Tensor, taps: torch.Tensor, out: torch.Tensor, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """Send (N, C, h, w) back to where the taps say: into `out`, (N, C, H, W) of the same layout, which is returned."""
    addresses = grad.data_ptr(), taps.data_ptr(), out.data_ptr()
    extension.max_pool_backward(*addresses, *_sizes(out), kernel, stride, padding, _threads(out))
    return out


def _named(name: str) -> contextlib.AbstractContextManager[object]:
    """For torch's profiler, where it is on: these are none of its operators."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else _UNNAMED


_UNNAMED = contextlib.nullcontext()


def _result(x: torch.Tensor, kernel: int, stride: int, padding: int, dtype: torch.dtype) -> torch.Tensor:
    count, channels, height, width = x.shape
    sides = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((count, channels, *sides), dtype=dtype, memory_format=layout, device="cpu")


def _sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Planes, height, width and how many values lie beside each other in a plane."""
    count, channels, height, width = x.shape
    return (count * channels, height, width, 1) if x.is_contiguous() else (count, height, width, channels)


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= THREADED_NUMEL else 1


def depthwise(
    x: torch.Tensor,
    conv: torch.nn.Conv2d,
    norm: torch.nn.BatchNorm2d | None,
    limits: tuple[float, float],
    pool: tuple[int, int],
    merge: Merge,
    out: torch.Tensor,
    pooled: torch.Tensor | None,
) -> bool:
    """A depthwise convolution, the norm and activation behind it and the max-pool beside it, in one pass.

    False, and nothing done, where a weight is not finite and the map is padded.

    Args:
        x: (N, C, H, W), as `takes` asks for.
        conv: 3x3 or 5x5 pixels, stride 1 or 2, less padding than half a window; its weights lie one after another.
        norm: in eval mode, by running statistics.
        limits: what the activation clamps to; the first above the second means hardswish.
        pool: its kernel and padding, pixels, so that its result has the size of the convolution's; kernel 0: none.
        merge: where the maxima are added; `BESIDE`, they go into `pooled`.
        out: (N, C, h, w) of the layout of `x`, or the first C channels of a map of more.
        pooled: such a map, or the last C channels of that of `out`.
    """
    count, channels, height, width = x.shape
    last = not x.is_contiguous()
    wide = out.stride(3) if last else out.stride(0) // out.stride(1)
    tensors = [x, *_CONV(conv._parameters)]
    tensors += _NONE if norm is None else (*_STATISTICS(norm._buffers), *_CONV(norm._parameters))
    arguments = (
        tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors]),
        (out.data_ptr(), 0 if pooled is None else pooled.data_ptr()),
        (count, channels, height, width, wide),
        (conv.kernel_size[0], conv.stride[0], int(conv.padding[0]), *pool),
        last,
        merge,
        (*limits, 0.0 if norm is None else norm.eps),
        _threads(x),
    )
    with _named("padfree::depthwise"):
        return extension.depthwise(*arguments)


_CONV, _STATISTICS = itemgetter("weight", "bias"), itemgetter("running_mean", "running_var")
_NONE = (None,) * 4

"""The C extension on tensors: float32 max-pools of 3x3 and 5x5 windows, depthwise convolutions with one beside them.

It is built where the installation finds a C compiler; `extension` is None elsewhere, and `padfree.pooling` does
without it. A map is (N, C, H, W), dense, contiguous or channels_last but not both.
"""

import contextlib
from enum import IntEnum
from typing import Any

import torch
from torch.autograd.profiler import record_function

try:
    from padfree import _maxpool as extension
except ImportError:
    extension = None  # type: ignore[assignment]

__all__ = [
    "CHANGED",
    "TABLE",
    "Extra",
    "Merge",
    "extension",
    "has_changed",
    "max_pool",
    "max_pool_backward",
    "max_pool_taps",
    "one_pass",
    "takes",
]


class Extra(IntEnum):
    """What is added to the result of a 1x1 convolution (as in `_depthwise.h`)."""

    NOTHING = 0
    INPUT = 1  # the map that is passed over
    MAXIMA = 2


class Merge(IntEnum):
    """Where the maxima of the pool are added to the convolution's chain (as in `_depthwise.h`)."""

    NOTHING = -1  # is done, but to see whether the modules have changed
    BESIDE = 0  # nowhere: they are a map of their own, or there is no pool
    AFTER_ACTIVATION = 1
    BEFORE_NORM = 2


THREADED_NUMEL = 1 << 16  # elements of a map from which torch's number of threads is taken


def takes(x: torch.Tensor, kernel: int, stride: int) -> bool:
    """Whether this map can be pooled here: its type, its windows, and that its memory holds its numbers."""
    # else its numbers are another sign's, or lie elsewhere
    plain_memory = not (x.is_neg() or x._is_zerotensor() or torch._is_functional_tensor(x))
    return extension is not None and x.dtype is torch.float32 and kernel in (3, 5) and stride in (1, 2) and plain_memory


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """The maxima: (N, C, H, W) -> (N, C, h, w) in the same layout."""
    pooled = _result(x, kernel, stride, padding, x.dtype)
    with record_function("padfree::max_pool") if _profiled() else _UNNAMED:
        extension.max_pool(x.data_ptr(), pooled.data_ptr(), *_sizes(x), kernel, stride, padding, _threads(x.numel()))
    return pooled


def max_pool_taps(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maxima, and the place of each in its window, row * kernel + column: both (N, C, h, w), the second uint8."""
    pooled, taps = (_result(x, kernel, stride, padding, dtype) for dtype in (x.dtype, torch.uint8))
    addresses = x.data_ptr(), pooled.data_ptr(), taps.data_ptr()
    extension.max_pool_taps(*addresses, *_sizes(x), kernel, stride, padding, _threads(x.numel()))
    return pooled, taps


def max_pool_backward(
    grad: torch.Tensor, taps: torch.Tensor, out: torch.Tensor, kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """Send (N, C, h, w) back to where the taps say: into `out`, (N, C, H, W) of the same layout, which is returned."""
    addresses = grad.data_ptr(), taps.data_ptr(), out.data_ptr()
    extension.max_pool_backward(*addresses, *_sizes(out), kernel, stride, padding, _threads(out.numel()))
    return out


_profiled = torch._C._autograd._profiler_enabled  # it is told their names: these are no operators of torch's
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


def _threads(numel: int) -> int:
    return torch.get_num_threads() if numel >= THREADED_NUMEL else 1


def one_pass(
    watch: tuple[object, ...],
    x: torch.Tensor,
    modules: tuple[object, ...],
    pool: tuple[int, int, int],
    merge: Merge,
    joined: bool,
    leads: bool = False,
    mixed: bool = False,
    extra: Extra = Extra.NOTHING,
) -> Any:
    """A depthwise convolution, the norm and activation behind it and the max-pool beside it: one pass (`_onepass.c`).

    A map of (N, C, h, w), or two. None, and nothing done, where `x` is not a dense float32 map on the CPU, of one
    unmistakable layout, that these windows fit into, or a weight is none that the extension reads; `CHANGED` where the
    modules are not what was read any more.

    Args:
        watch: what was read of the modules (`padfree.chains`).
        x: (N, C, H, W).
        modules: those that it was read of, as `padfree.chains.listed` gives them.
        pool: its stride, which is the convolution's too, its kernel and padding, pixels; kernel 0: there is none.
        merge: where the maxima are added; `BESIDE`, they are a result of their own.
        joined: both results are the halves of one map of 2C channels.
        leads: the norm and the activation ahead come first.
        mixed: the 1x1 convolution that was read, its norm and activation follow; (N, C', h, w) is what they make.
        extra: what is added to that.
    """
    if type(x) is not torch.Tensor:
        return None
    arguments = (TABLE, _PLAIN, watch, x, modules, *pool, merge, joined, leads, mixed, extra, _threads(x.numel()))
    if not _profiled():
        return extension.onepass(*arguments)
    with record_function("padfree::depthwise"):
        return extension.onepass(*arguments)


def has_changed(watch: tuple[object, ...], x: torch.Tensor, modules: tuple[object, ...]) -> bool:
    """Whether the modules are not what was read any more; nothing is done."""
    arguments = (TABLE, _PLAIN, watch, x, modules, 2, 0, 0, Merge.NOTHING, False, False, False, Extra.NOTHING, 1)
    return extension.onepass(*arguments) is CHANGED


CHANGED = False
_PLAIN = (torch.nn.Parameter, torch.Tensor)
# How C looks into tensors (DLPack 1.3). A torch that does not have it yet has no pass: the modules are called.
TABLE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)

"""The C extension, which is built where the installation finds a compiler, and what it needs to know of tensors.

It takes addresses and sizes of float32 maps (N, C, H, W) that are dense, contiguous or channels_last but not both, and
knows nothing of torch. `native` is None where it is missing: the operators compute their plain meaning then.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

try:
    from padfree.kernels import _native as native
except ImportError:
    native = None  # type: ignore[assignment]

__all__ = [
    "available",
    "describe",
    "empty_map",
    "has_memory",
    "has_tangent",
    "is_dense_map",
    "native",
    "sizes",
    "threads",
]

THREADED_NUMEL = 1 << 16  # elements of a map from which torch's number of threads is taken


def available() -> bool:
    """Whether the C extension was built and can be loaded."""
    return native is not None


def describe() -> str:
    """One line for `padfree-convert --version`."""
    if native is None:
        return "C kernels: missing (no compiler when padfree was installed); its operators run on torch's own"
    return "C kernels: available" if native.POINTWISE else "C kernels: available, without 1x1 convolutions"


def is_dense_map(x: torch.Tensor) -> bool:
    """Whether `x` is float32, (N, C, H, W), not empty, and contiguous or channels_last but not both."""
    if x.dtype is not torch.float32 or x.dim() != 4 or x.numel() == 0:
        return False
    if x.is_contiguous():
        _, channels, height, width = x.shape
        return channels > 1 and height * width > 1
    return x.is_contiguous(memory_format=torch.channels_last)


def empty_map(x: torch.Tensor, channels: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A map of as many images and of the same layout as the dense map `x`: (N, channels, rows, columns)."""
    if x.is_contiguous():
        strides = (channels * rows * columns, rows * columns, columns, 1)
    else:
        strides = (channels * rows * columns, 1, columns * channels, channels)
    return x.new_empty_strided((x.shape[0], channels, rows, columns), strides, dtype=dtype)


def sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Planes, height, width of such a map, and how many values lie beside each other in a plane."""
    count, channels, height, width = x.shape
    return (count * channels, height, width, 1) if x.is_contiguous() else (count, height, width, channels)


def threads(x: torch.Tensor) -> int:
    """How many threads to work on a map with: torch's number, or one for a small map."""
    return torch.get_num_threads() if x.numel() >= THREADED_NUMEL else 1


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward-mode AD follows it."""
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def has_memory(x: torch.Tensor) -> bool:
    """Whether a tensor lies in memory: those that `torch.func` wraps do not; they are `F.max_pool2d`'s."""
    try:
        return x.data_ptr() != 0
    except RuntimeError:
        return False

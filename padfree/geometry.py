"""Integer arithmetic of sizes and paddings (the paper, Rewrites).

Sizes are pixels along one axis. Nothing here knows about tensors or modules.
"""

from __future__ import annotations

from collections.abc import Iterable


def size_text(size: Iterable[int]) -> str:
    """A size in messages: 3x224x224."""
    return "x".join(map(str, size))


def effective_kernel(kernel: int, dilation: int = 1) -> int:
    """Pixels that a dilated kernel spans: d(k - 1) + 1."""
    return dilation * (kernel - 1) + 1


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1, ceil_mode: bool = False) -> int:
    """Output size of a convolution or pool with `padding` on both sides (torch's own formula)."""
    span = size + 2 * padding - effective_kernel(kernel, dilation)
    if not ceil_mode:
        return span // stride + 1
    out = -(-span // stride) + 1
    # torch drops a last window that would start inside the right padding
    return out - 1 if (out - 1) * stride >= size + padding else out


def share_text(value: float | None) -> str:
    """A share as a percentage: "12.3%", "0", and "unknown" where there is none."""
    return "unknown" if value is None else f"{value:.1%}" if value else "0"


def padfree_size(size: int) -> int:
    """What padding-free downsampling maps `size` to: floor((n - 3) / 2) + 1."""
    return (size - 3) // 2 + 1


def padfree_padding(kernel: int, dilation: int = 1) -> int:
    """The padding left to a stride-2 kernel so that it maps n to `padfree_size(n)`: (k - 3) / 2.

    Raises:
        ValueError: the effective kernel is even or smaller than 3, so no padding does it.
    """
    span = effective_kernel(kernel, dilation)
    if span < 3 or span % 2 == 0:
        raise ValueError(f"a padding-free form needs an odd kernel of at least 3, not {span}")
    return (span - 3) // 2

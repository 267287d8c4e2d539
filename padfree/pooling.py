"""The two max-pools of a padding-free network, as functions.

`shortcut_pool` stands beside a strided conv (MaxPool2d(3, 2, 0) in most families), `max_pool` in the stem tail
(3x3, stride 1 or 2, padding 1). Both return exactly what `torch.nn.MaxPool2d` returns.
"""

import torch
import torch.nn.functional as F

__all__ = ["max_pool", "shortcut_pool"]


def shortcut_pool(x: torch.Tensor, kernel: int = 3, padding: int = 0) -> torch.Tensor:
    """Max-pool `x` with stride 2: (N, C, H, W) -> (N, C, floor((H + 2p - k) / 2) + 1, ...)."""
    return F.max_pool2d(x, kernel, 2, padding)


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Max-pool `x`: (N, C, H, W) -> (N, C, floor((H + 2p - k) / s) + 1, ...)."""
    return F.max_pool2d(x, kernel, stride, padding)

"""Operators of padding-free networks with kernels in C: the max-pools, and the strided chain of a fused network.

They know torch and nothing else of padfree. Each is registered with `torch.library` and has a meaning in torch's own
operations, which other devices, dtypes and exporters use, and CPUs where the C extension is missing (`available`).

    max_pool, shortcut_pool   `F.max_pool2d`, differentiable (`padfree.kernels.pool`)
    chain                     activation, depthwise conv, pool, sum, 1x1 conv, for inference (`padfree.kernels.chain`)
    DECOMPOSITIONS            `program.run_decompositions(DECOMPOSITIONS)` leaves none of them in an exported program
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from padfree.kernels.chain import activation, chain, chain_meaning, fused_chain
from padfree.kernels.extension import available, describe
from padfree.kernels.pool import backward_meaning, max_pool, shortcut_pool, taps_meaning, values_meaning

__all__ = [
    "DECOMPOSITIONS",
    "POOLS",
    "activation",
    "available",
    "chain",
    "chain_meaning",
    "describe",
    "fused_chain",
    "max_pool",
    "shortcut_pool",
]

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.padfree.chain.default: chain_meaning,
    torch.ops.padfree.max_pool_values.default: values_meaning,
    torch.ops.padfree.max_pool_taps.default: taps_meaning,
    torch.ops.padfree.max_pool_backward.default: backward_meaning,
}

POOLS = frozenset({torch.ops.padfree.max_pool_values.default, torch.ops.padfree.max_pool_taps.default})
"""Those of them that take (x, kernel, stride, padding), as `F.max_pool2d` does."""

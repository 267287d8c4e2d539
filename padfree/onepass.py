"""A depthwise convolution, its norm and activation, the max-pool beside it and their sum in one pass over the map.

Four or five operations of torch's read and write the map anew. Where the C extension is there and somebody plainly
computes (float32 on a CPU, eval mode, no gradient, no hook on the modules concerned, nobody tracing), one function of
it takes their place (`_depthwise.c`); its results differ from theirs by rounding. Everybody else gets the modules,
called one after another, and `padfree.pooling`. The pass takes as much of a chain as it understands (`padfree.chains`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from padfree import native
from padfree.chains import Chain, Modules, listed, read
from padfree.native import Extra, Merge
from padfree.pooling import add_shortcut, shortcut_pool, watched

__all__ = ["downsample", "quick", "reduce", "stem_tail"]


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
        behind: what follows the sum (ShuffleNetV2's norm; a 1x1 convolution, its norm and activation).
    """
    chain, found, mixed = _passed(x, before, behind, (2, kernel, padding))
    if isinstance(found, tuple):
        found = add_shortcut(_called(chain.rest, found[0]), found[1])
    if found is not None:
        return _called(chain.after if mixed else chain.behind, found)
    pooled = shortcut_pool(x, kernel, padding)
    return _called(behind, add_shortcut(_called(before, x), pooled))


def reduce(x: torch.Tensor, modules: Modules) -> torch.Tensor:
    """`modules(x)`: a strided depthwise convolution and what follows it, without a pool."""
    if quick():
        chain, found, _ = _passed(x, modules, (), (2, 0, 0))
        if isinstance(found, torch.Tensor):
            return _called(chain.rest, found)
    return _called(modules, x)


def stem_tail(
    x: torch.Tensor,
    before: Modules,
    pool: nn.Module,
    window: tuple[int, int, int],
    behind: Modules,
    extra: Extra = Extra.NOTHING,
) -> torch.Tensor | None:
    """`behind(cat(before(x), pool(x)))`, a stem tail: (N, C, H, W) -> (N, C, h, w); None where it has to run in parts.

    For who has asked `quick` before.

    Args:
        x: the stem's own output.
        before: the depthwise convolution, its norm and its activation.
        pool: the max-pool beside it.
        window: its kernel, stride and padding, pixels.
        behind: the 1x1 convolution, its norm and its activation.
        extra: the residual that is added in the end.
    """
    kernel, stride, padding = window
    chain, found, mixed = _passed(x, before, behind, (stride, kernel, padding), (pool,), extra)
    if not isinstance(found, torch.Tensor):
        return None
    if mixed:
        return _called(chain.after, found)
    out = _called(chain.behind, found)
    if extra is not Extra.NOTHING:
        out = out + (x if extra is Extra.INPUT else found[:, x.shape[1] :])
    return out


def _plainly_computing() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or native.extension is None
        or native.TABLE is None
        or torch._C._is_any_autocast_enabled()
        or watched()
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def _passed(
    x: torch.Tensor,
    before: Modules,
    behind: Modules,
    pool: tuple[int, int, int],
    beside: tuple[nn.Module, ...] = (),
    extra: Extra = Extra.NOTHING,
) -> tuple[Chain, torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None, bool]:
    """What was read of the modules, what the pass over this map gives, if it can be run, and whether it mixed channels.

    Two maps, yet to be added, where modules are left to call before the sum; with a module `beside` them, whose result
    shall be joined to theirs, one map of both, and None where modules are left. With a 1x1 convolution in it the pass
    gives one map, to which the residual has been added.
    """
    modules, joined = listed(before, behind, beside), bool(beside)
    for again in (False, True):
        chain = read(before, behind, beside, again=again)
        mixed = chain.mixes and not (extra and chain.after)
        merge = Merge.BEFORE_NORM if chain.late else Merge.AFTER_ACTIVATION
        if joined or not pool[1] or chain.rest:
            merge = Merge.NOTHING if joined and chain.rest else Merge.BESIDE
        found = native.one_pass(chain.watch, x, modules, pool, merge, joined, mixed, extra if mixed else Extra.NOTHING)
        if found is not native.CHANGED:
            return chain, found, mixed
    return chain, None, False


def _called(modules: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x

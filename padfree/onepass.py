"""A depthwise convolution, its norm and activation, the max-pool beside it and their sum in one pass over the map.

So are a norm and an activation ahead of it and a 1x1 convolution behind the sum, and the whole tail of a stem. Each of
these operations of torch's reads and writes the map anew. Where the C extension is there and somebody plainly
computes (float32 on a CPU, eval mode, no gradient, no hook on the modules concerned, nobody tracing), one function of
it takes their place (`_depthwise.c`); its results differ from theirs by rounding. Everybody else gets the modules,
called one after another, and `padfree.pooling`. The pass takes as much of a chain as it understands (`padfree.chains`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from padfree import native
from padfree.chains import CHAIN, Chain, Modules, listed, read
from padfree.native import Extra, Merge
from padfree.pooling import add_shortcut, shortcut_pool, watched

__all__ = ["downsample", "quick", "reduce", "sequence", "stem_tail"]

BESIDE_A_BLOCK = 3  # children of a Sequential behind such a block that may be part of its pass: a norm, an SE, a 1x1


def quick() -> bool:
    """Whether somebody plainly computes here, in inference: no gradients, nobody who traces, compiles or looks on."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    else:  # which the compiler of TorchScript skips
        return _plainly_computing()


def downsample(
    x: torch.Tensor, kernel: int, padding: int, before: Modules, behind: Modules = (), ahead: Modules = ()
) -> torch.Tensor:
    """`behind(before(y) + pool(y))`, `y` being `ahead(x)`: (N, C, H, W) -> (N, C, h, w), a strided chain and its pool.

    For who has asked `quick` before, as generated forwards do.

    Args:
        x: what `ahead` reads, or the strided convolution where there is none.
        kernel: the pool's, pixels; its stride is 2.
        padding: the pool's, pixels.
        before: the convolution and what follows it, up to the sum.
        behind: what follows the sum (ShuffleNetV2's norm; a 1x1 convolution, its norm and activation).
        ahead: what comes before the convolution (the norm and the activation of an expansion).
    """
    passed = _passed(x, before, behind, (2, kernel, padding), ahead=ahead)
    found = _completed(passed)
    if found is not None:
        return found
    y = _called(passed.ahead, passed.x)
    pooled = shortcut_pool(y, kernel, padding)
    return _called(behind, add_shortcut(_called(before, y), pooled))


def sequence(container: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """What a Sequential's forward returns, with the neighbours of a rewritten block in the block's pass.

    For who has asked `quick` before. An expansion in a container of its own, as torchvision's, ends in a norm and an
    activation that the strided chain may begin with, and a 1x1 convolution may follow.

    Args:
        container: children of it are blocks whose forward is a strided chain and its pool (`padfree.quicken`).
        x: its input.
    """
    modules = tuple(container._modules.values())
    blocks = [index for index, module in enumerate(modules) if CHAIN in vars(type(module))]
    done = 0
    for block, following in zip(blocks, [*blocks[1:], len(modules) + 1], strict=False):
        start, end = max(done, block - 1), max(block + 1, min(block + 1 + BESIDE_A_BLOCK, following - 1))
        x = _called(modules[done:start], x)
        x = _along(x, modules[start:block], modules[block], modules[block + 1 : end])
        done = end
    return _called(modules[done:], x)


def _along(x: torch.Tensor, ahead: Modules, block: nn.Module, after: Modules) -> torch.Tensor:
    """`after(block(ahead(x)))`."""
    kernel, padding, before, behind = vars(type(block))[CHAIN](block)
    passed = _passed(x, before, (*behind, *after), (2, kernel, padding), ahead=ahead, block=block)
    found = _completed(passed)
    return _called((block, *after), _called(passed.ahead, passed.x)) if found is None else found


def reduce(x: torch.Tensor, modules: Modules, behind: Modules = ()) -> torch.Tensor:
    """`behind(modules(x))`: a strided depthwise convolution and what follows it, without a pool.

    For who has asked `quick` before.

    Args:
        x: (N, C, H, W).
        modules: the convolution and what follows it.
        behind: what follows that (a projection shortcut's 1x1 convolution and its norm).
    """
    passed = _passed(x, modules, behind, (2, 0, 0), summed=False)
    found = _completed(passed)
    return _called((*modules, *behind), x) if found is None else found


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
    passed = _passed(x, before, behind, (stride, kernel, padding), (pool,), extra)
    found = passed.found
    if not isinstance(found, torch.Tensor):
        return None
    if passed.mixed:
        return _called(passed.chain.after, found)
    # Its other half is what is left to call's, which may work on it in place.
    residual = found[:, x.shape[1] :].clone() if extra is Extra.MAXIMA else x
    out = _called(passed.chain.behind, found)
    return out if extra is Extra.NOTHING else out + residual


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


class _Passed(NamedTuple):
    found: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None  # None: the pass could not be run
    mixed: bool  # whether the 1x1 convolution was in it
    chain: Chain
    x: torch.Tensor  # what the rest of the modules ahead are to be called on, where it could not
    ahead: Modules


def _completed(passed: _Passed) -> torch.Tensor | None:
    """The result, once the modules that are no part of the pass have been called; None where it could not be run."""
    found, chain = passed.found, passed.chain
    if isinstance(found, tuple):
        found = add_shortcut(_called(chain.rest, found[0]), found[1])
    return None if found is None else _called(chain.after if passed.mixed else chain.behind, found)


def _passed(
    x: torch.Tensor,
    before: Modules,
    behind: Modules,
    pool: tuple[int, int, int],
    beside: tuple[nn.Module, ...] = (),
    extra: Extra = Extra.NOTHING,
    ahead: Modules = (),
    block: nn.Module | None = None,
    summed: bool = True,
) -> _Passed:
    """What the pass over this map gives, if it can be run, and what was read of the modules.

    Two maps, yet to be added, where modules are left to call before the sum; with a module `beside` them, whose result
    shall be joined to theirs, one map of both, and None where modules are left. With a 1x1 convolution in it the pass
    gives one map, to which the residual has been added. A `block` is who would call `before` and the pool; where
    nothing is `summed`, what is left of `before` comes first in `behind`.
    """
    modules, joined = listed(before, behind, beside, ahead, block), bool(beside)
    begun, led = False, ahead
    for again in (False, True):
        chain = read(before, behind, beside, ahead, block, summed, again=again)
        # Modules ahead that are no part of the pass are called. Where it shows afterwards that something has changed
        # since it was read, so are all others: they have their turn.
        if begun:
            first, led = led, ()
        elif not chain.parted:
            first, led = ahead[: chain.start], ahead[chain.start :]
        elif again or not native.has_changed(chain.gate, x, ahead):  # nobody else would see a Sequential's hook
            first, led = chain.first, chain.led
        else:
            continue
        x, begun = _called(first, x), bool(first)
        mixed = chain.mixes and not (extra and chain.after)
        merge = Merge.BEFORE_NORM if chain.late else Merge.AFTER_ACTIVATION
        if joined or not pool[1] or chain.rest:
            merge = Merge.NOTHING if joined and chain.rest else Merge.BESIDE
        added = extra if mixed else Extra.NOTHING
        found = native.one_pass(chain.watch, x, modules, pool, merge, joined, bool(led), mixed, added)
        if found is not native.CHANGED:
            return _Passed(found, mixed, chain, x, led)
    return _Passed(None, False, chain, x, led)


def _called(modules: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    for module in modules:
        x = module(x)
    return x

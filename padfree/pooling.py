"""The two max-pools of a padding-free network, as functions that know how to be fast.

`shortcut_pool` stands beside a strided conv (3x3, stride 2, no padding in most families), `max_pool` in the
stem tail (3x3, stride 1 or 2, padding 1). Both return the values of `torch.nn.functional.max_pool2d` (NaN
included; where -0.0 and 0.0 tie, the sign may differ outside training) and send gradients where it sends
them: to the first maximum of each window.

Why not simply call it: on a CPU in contiguous layout it is a scalar loop that also writes 64-bit indices,
often 20 times slower than the depthwise conv beside it, and training keeps those indices, 8 bytes an output.
Whoever is not plainly computing (`torch.compile`, export, ONNX, FX, TorchScript, `torch.func`, fake and meta
tensors, tensor subclasses, dispatch modes, other devices) sees the plain operator and nothing else.

The paths (`_choose` picks one; its constants come from `python -m benchmarks.pool`):

    native         float32: the C extension, one pass over the map; absent where no compiler was at hand
    plain          F.max_pool2d
    channels_last  convert, F.max_pool2d (whose channels_last kernel is vectorised), convert back
    separable      maxima of strided views, rows first, then columns: no indices at all
    MaxPool        training: `pooling_training`, which keeps one byte an output
"""

from typing import Literal

import torch
import torch.nn.functional as F

from padfree import native
from padfree.pooling_training import MaxPool, cacheful, out_side, watched

__all__ = ["max_pool", "ordinary", "shortcut_pool", "watched"]

Path = Literal["native", "plain", "channels_last", "separable"]

# Crossover points, one thread, AVX-512 x86 CPU; `python -m benchmarks.pool` measures them anew.
NARROW_WIDTH = 16  # contiguous maps up to this wide, and ...
NARROW_NUMEL = 140_000  # ... up to this large are converted: rows are too short for separable maxima
TINY_WIDTH = 8  # contiguous maps up to this wide are always converted
# In channels_last the built-in is one short call, and the separable path a dozen, which run slower between the
# layers of a network than in a loop of their own: it begins where it wins by more than that, some 50 us.
SEPARABLE_TAPS = 800_000  # outputs x kernel^2 from which separable maxima win, ...
SEPARABLE_TAPS_THIN = 400_000  # ... and with fewer channels than the next line's,
THIN_CHANNELS = 48  # where the built-in, vectorised over channels, is slow

_LOWEST = float("-inf")
_FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shortcut_pool(x: torch.Tensor, kernel: int = 3, padding: int = 0) -> torch.Tensor:
    """Max-pool with stride 2: (N, C, H, W) -> (N, C, floor((H + 2p - k) / 2) + 1, the same of W).

    Args:
        x: the strided conv's own input, any floating dtype, layout and device.
        kernel: k, pixels; 3, or (GhostNet) the conv's own.
        padding: p, pixels; 0, or (GhostNet) the conv's reduced padding.

    Raises:
        RuntimeError: the map is smaller than the kernel (as `F.max_pool2d`).
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.max_pool2d(x, kernel, 2, padding)
    else:  # the compiler of TorchScript skips this branch, which it could not read
        return _pool(x, kernel, 2, padding)


def max_pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Max-pool: (N, C, H, W) -> (N, C, floor((H + 2p - k) / s) + 1, the same of W).

    Args:
        x: any floating dtype, layout and device.
        kernel: k, pixels.
        stride: s, pixels.
        padding: p, pixels.

    Raises:
        RuntimeError: the map is smaller than the kernel (as `F.max_pool2d`).
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return F.max_pool2d(x, kernel, stride, padding)
    else:
        return _pool(x, kernel, stride, padding)


def _pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Send `x` down its path; whenever somebody else is looking that is the plain operator."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or watched():
        return F.max_pool2d(x, kernel, stride, padding)
    if not ordinary(x, kernel, padding):
        return F.max_pool2d(x, kernel, stride, padding)
    if x.requires_grad and torch.is_grad_enabled():
        pooled: torch.Tensor = MaxPool.apply(x, kernel, stride, padding)
        return pooled
    path = _choose(x, kernel, stride, padding)
    if path == "native":
        return native.max_pool(x, kernel, stride, padding)
    if path == "separable":
        return _separable(x, kernel, stride, padding)
    if path == "channels_last":
        return _through_channels_last(x, kernel, stride, padding)
    return F.max_pool2d(x, kernel, stride, padding)


def ordinary(x: torch.Tensor, kernel: int, padding: int) -> bool:
    """Whether `x` is a dense batch of maps on the CPU, of one unmistakable layout, that windows fit into."""
    return (
        x.is_cpu
        and x.dtype in _FAST_DTYPES
        and x.layout is torch.strided
        and x.dim() == 4
        and x.numel() > 0
        and kernel >= 2
        and 0 <= 2 * padding < kernel
        and min(x.shape[2], x.shape[3]) >= kernel
        and x.is_contiguous() != x.is_contiguous(memory_format=torch.channels_last)
    )


def _choose(x: torch.Tensor, kernel: int, stride: int, padding: int) -> Path:
    """The fastest path for an ordinary map outside training: the one place where that is decided."""
    if native.takes(x, kernel, stride):
        return "native"
    _, channels, height, width = x.shape
    if x.is_contiguous():
        narrow = width <= TINY_WIDTH or (width <= NARROW_WIDTH and x.numel() <= NARROW_NUMEL)
        return "channels_last" if narrow else "separable"
    rows, columns = out_side(height, kernel, stride, padding), out_side(width, kernel, stride, padding)
    taps = x.shape[0] * channels * rows * columns * kernel * kernel
    enough = SEPARABLE_TAPS_THIN if channels < THIN_CHANNELS else SEPARABLE_TAPS
    return "separable" if taps >= enough else "plain"


def _through_channels_last(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    pooled = F.max_pool2d(x.contiguous(memory_format=torch.channels_last), kernel, stride, padding)
    return pooled.clone(memory_format=torch.contiguous_format)


def _separable(x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
    """Pool by maxima of strided views, a cacheful of planes at a time; contiguous or channels_last."""
    count, channels, height, width = x.shape
    h, w = out_side(height, kernel, stride, padding), out_side(width, kernel, stride, padding)
    if x.is_contiguous():
        pooled = x.new_empty((count, channels, h, w))
        planes, out = x.view(-1, height, width, 1), pooled.view(-1, h, w, 1)
    else:
        out = x.new_empty((count, h, w, channels))
        planes, pooled = x.permute(0, 2, 3, 1), out.permute(0, 3, 1, 2)
    step = cacheful(planes)
    for start in range(0, planes.shape[0], step):
        chunk, target = planes[start : start + step], out[start : start + step]
        rows = _rows_maximum(chunk, kernel, stride, padding, h)
        _columns_maximum(rows, target, kernel, stride, width + padding)
    return pooled


def _rows_maximum(planes: torch.Tensor, kernel: int, stride: int, padding: int, h: int) -> torch.Tensor:
    """Maximum over each window's rows: contiguous (P, H, W, U) -> flat ((P * h * (W + p) + k) * U).

    Each row begins with p columns of -inf, which also end the row before it. The last k columns are slack:
    the first p of them -inf, the others read but never chosen.
    """
    count, height, width, unit = planes.shape
    wide = (width + padding) * unit
    flat = planes.new_empty(count * h * wide + kernel * unit)
    rows = flat[: count * h * wide].view(count, h, wide)
    if padding:
        rows[..., : padding * unit] = _LOWEST
        flat[count * h * wide : count * h * wide + padding * unit] = _LOWEST
    body, source = rows[..., padding * unit :], planes.reshape(count, height, width * unit)
    # Window row p is inside the map everywhere, row p + 1 everywhere but perhaps at the end: these two begin.
    stop = min(h, (height - 2) // stride + 1)
    last = stride * (stop - 1) + 1
    torch.maximum(source[:, 0:last:stride], source[:, 1 : last + 1 : stride], out=body[:, :stop])
    if stop < h:
        body[:, stop:] = source[:, stride * stop :: stride][:, : h - stop]
    for row in range(kernel):
        if row in (padding, padding + 1):
            continue
        begin = max(0, -((row - padding) // stride))
        end = min(h, (height - 1 + padding - row) // stride + 1)
        first = stride * begin + row - padding
        part = body[:, begin:end]
        torch.maximum(part, source[:, first : first + stride * (end - begin - 1) + 1 : stride], out=part)
    return flat


def _columns_maximum(flat: torch.Tensor, out: torch.Tensor, kernel: int, stride: int, wide: int) -> None:
    """Maximum over each window's columns of what `_rows_maximum` made, rows of `wide` columns, into `out`."""
    _, h, _, unit = out.shape
    strides = (h * wide * unit, wide * unit, stride * unit, 1)
    if unit > 1 and stride > 1:  # channels_last: strided columns are as fast as dense ones
        torch.maximum(flat.as_strided(out.shape, strides), flat.as_strided(out.shape, strides, unit), out=out)
        for column in range(2, kernel):
            torch.maximum(out, flat.as_strided(out.shape, strides, column * unit), out=out)
        return
    # Dense: the maximum over 2, 4, ... neighbours at every position, a sweep each; strided only at the end.
    covered = 1
    while 2 * covered < kernel:
        flat = torch.maximum(flat[: -covered * unit], flat[covered * unit :])
        covered *= 2
    shifted = flat.as_strided(out.shape, strides, (kernel - covered) * unit)
    torch.maximum(flat.as_strided(out.shape, strides), shifted, out=out)

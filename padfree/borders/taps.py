"""The positions that a window operation reads along one axis: convolutions, pools, pads and resizes as one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padfree.analysis.kinds import AVG_POOLS, MAX_POOLS, pair, plain_kind
from padfree.record.recorder import Op, Value
from padfree.record.trees import Ref
from padfree.verify.resizing import RESAMPLING

ADAPTIVE = frozenset({"_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})
ZERO, LEFT_OUT, MIRRORED, REPEATED = "zero", "left out", "reflect", "replicate"


@dataclass(frozen=True)
class Taps:
    """One axis of a window operation.

    Attributes:
        at: (M, K) integers: the source positions that each of the M outputs reads; those outside 0..N-1 are padding.
        read: (M, K): whether the tap exists at all.
        size: N, positions of the source.
        pace: source positions from one output to the next.
    """

    at: Tensor
    read: Tensor
    size: int
    pace: float

    @property
    def whole(self) -> bool:
        """Whether each output reads the one position that it stands for, as 1x1 convolutions do."""
        return self.at.shape == (self.size, 1) and bool(
            (self.at[:, 0] == torch.arange(self.size)).all() & self.read.all()
        )

    @property
    def before(self) -> Tensor:
        """(M, K): taps in front of the first position."""
        return self.read & (self.at < 0)

    @property
    def behind(self) -> Tensor:
        """(M, K): taps past the last position."""
        return self.read & (self.at >= self.size)

    @property
    def inside(self) -> Tensor:
        """(M, K): taps at positions of the source."""
        return self.read & (self.at >= 0) & (self.at < self.size)

    def matrix(self) -> Tensor:
        """(M, N): how often each output reads each position of the source."""
        table = torch.zeros(len(self.at), self.size, dtype=torch.float64)
        return table.scatter_add_(1, self.at.clamp(0, self.size - 1), self.inside.double())

    def unread(self) -> tuple[int, int]:
        """Positions before the first and behind the last that any output reads."""
        found = self.matrix().any(0).nonzero()
        if not len(found):
            return self.size, 0
        return int(found[0]), self.size - 1 - int(found[-1])

    def through(self, pad: Taps) -> Taps:
        """The same windows on what lies before a pad: `pad` is the pad as an operation of its own."""
        known = self.inside
        at = torch.where(known, pad.at[self.at.clamp(0, self.size - 1), 0], _past(self.at, self.size, pad))
        return Taps(at, self.read, pad.size, self.pace)


def _past(at: Tensor, size: int, pad: Taps) -> Tensor:
    """Where taps past a padded map lie on the map before the pad: as far out again."""
    return torch.where(at < 0, at + torch.clamp(pad.at[0, 0], max=0), at - size + max(pad.size, int(pad.at[-1, 0]) + 1))


def windows(
    size: int,
    out: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    clip: bool = False,
) -> Taps:
    """Windows that start at -padding. `clip`: taps past the padding (of `ceil_mode`) do not exist."""
    at = torch.arange(out)[:, None] * stride - padding + torch.arange(kernel) * dilation
    read = at < size + padding if clip else torch.ones_like(at, dtype=torch.bool)
    return Taps(at, read, size, float(stride))


def transposed(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Taps:
    """A transposed convolution: which inputs reach each output. It reads no padding; its `padding` crops the output."""
    scaled = torch.arange(out)[:, None] + padding - torch.arange(kernel) * dilation
    at = torch.div(scaled, stride, rounding_mode="floor")
    read = (scaled % stride == 0) & (at >= 0) & (at < size)
    return Taps(at, read, size, 1 / stride)


def adaptive(size: int, out: int) -> Taps:
    """Adaptive pools: output i reads floor(iN/M) to ceil((i+1)N/M), exclusive."""
    i = torch.arange(out)
    first, end = i * size // out, -(-(i + 1) * size // out)
    at = first[:, None] + torch.arange(int((end - first).max()))
    return Taps(at, at < end[:, None], size, size / out)


def resized(size: int, out: int, kind: str, align: bool, scale: float | None) -> Taps | None:
    """Interpolations; None for those whose taps are not known. Taps past an edge repeat it, as torch's do."""
    step = 1 / scale if scale else size / out
    i = torch.arange(out, dtype=torch.float64)
    if "nearest_exact" in kind:
        return _clamped(((i + 0.5) * step).floor()[:, None], size, step)
    if "nearest" in kind:
        return _clamped((i * step).floor()[:, None], size, step)
    if "aa" in kind or not ("bilinear" in kind or "bicubic" in kind):
        return None
    if align:
        step = (size - 1) / (out - 1) if out > 1 else 0.0
        centre = i * step
    else:
        centre = (i + 0.5) * step - 0.5
    low = centre.floor()
    offsets = torch.arange(-1, 3) if "bicubic" in kind else torch.arange(2)
    taps = _clamped(low[:, None] + offsets, size, step)
    exact = (centre == low)[:, None]  # on a pixel: the others' weights are zero
    return Taps(taps.at, ~exact | (offsets == 0), size, step or 1.0)


def _clamped(at: Tensor, size: int, step: float) -> Taps:
    at = at.long().clamp(0, size - 1)
    return Taps(at, torch.ones_like(at, dtype=torch.bool), size, step or 1.0)


def padded(size: int, before: int, behind: int, mode: str) -> Taps:
    """A pad as an operation: each output reads one position, outside the map where zeros are filled in."""
    at = torch.arange(-before, size + behind)
    if mode == MIRRORED:
        at = (size - 1) - ((size - 1) - at.abs()).abs()
    elif mode == REPEATED:
        at = at.clamp(0, size - 1)
    return Taps(at[:, None], torch.ones(len(at), 1, dtype=torch.bool), size, 1.0)


def sliced(size: int, start: int, step: int, out: int) -> Taps:
    """Every `step`-th position from `start`."""
    at = (start + step * torch.arange(out))[:, None]
    return Taps(at, torch.ones_like(at, dtype=torch.bool), size, float(step))


@dataclass(frozen=True)
class Window:
    """A window operation of a recording, both axes.

    Attributes:
        axes: rows and columns.
        kind: "conv", "depthwise conv", "transposed conv", "max pool", "average pool", "adaptive pool", "pad", "resize".
        fill: what taps outside the map read: "zero" counts as a tap, "left out" does not (max-pools,
            `count_include_pad=False`); "reflect" and "replicate" never lie outside.
        kernel, stride, dilation: (rows, columns).
    """

    kind: str
    axes: tuple[Taps, Taps]
    fill: str
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> Taps:
        """The taps along columns of pixels: which rows are read."""
        return self.axes[0]

    @property
    def columns(self) -> Taps:
        """Which columns are read."""
        return self.axes[1]


def _both(axes: Iterable[Taps]) -> tuple[Taps, Taps]:
    rows, columns = axes
    return rows, columns


def window_of(op: Op, values: Sequence[Value]) -> Window | None:
    """A recorded operation on maps (N, C, H, W) as windows; None if it is none, or its taps are not known."""
    kind, (source, out) = plain_kind(op), (values[index].shape for index in (op.inputs[0], op.outputs[0]))
    if len(source) != 4 or len(out) != 4 or not isinstance(op.args[0][0], Ref) or op.args[0][0].value != op.inputs[0]:
        return None
    sides = [*zip(source[2:], out[2:], strict=True)]
    if kind == "convolution":
        return _convolution(op, source, values[op.args[0][1].value].shape[2:], sides)
    if kind in MAX_POOLS | AVG_POOLS:
        return _pool(op, kind in MAX_POOLS, sides)
    if kind in ADAPTIVE:
        return Window("adaptive pool", _both(adaptive(size, side) for size, side in sides), LEFT_OUT)
    if kind == "constant_pad_nd" or kind in ("reflection_pad2d", "replication_pad2d"):
        return _pad(op, kind, sides)
    if kind.startswith(RESAMPLING):
        return _resize(op, kind, sides)
    return None


def _convolution(op: Op, source: tuple[int, ...], sides: tuple[int, ...], maps: list[tuple[int, int]]) -> Window:
    _, _, _, stride, padding, dilation, turned, _, groups = op.args[0]
    kernel = pair(sides)
    settings = [*zip(maps, kernel, pair(stride), pair(padding), pair(dilation), strict=True)]
    shape = (kernel, pair(stride), pair(dilation))
    if turned:
        axes = [transposed(size, out, k, s, p, d) for (size, out), k, s, p, d in settings]
        return Window("transposed conv", _both(axes), LEFT_OUT, *shape)
    axes = [windows(size, out, k, s, p, d) for (size, out), k, s, p, d in settings]
    return Window("depthwise conv" if groups == source[1] > 1 else "conv", _both(axes), ZERO, *shape)


def _pool(op: Op, largest: bool, sides: list[tuple[int, int]]) -> Window:
    given: list[Any] = [*op.args[0][1:], *[None] * 6]
    kernel = pair(given[0])
    stride = pair(given[1]) if given[1] else kernel
    padding = pair(given[2] or 0)
    dilation = pair(given[3] or 1) if largest else (1, 1)
    counted = not largest and given[4] is not False
    settings = zip(sides, kernel, stride, padding, dilation, strict=True)
    axes = [windows(size, out, k, s, p, d, clip=counted) for (size, out), k, s, p, d in settings]
    kind = "max pool" if largest else "average pool"
    return Window(kind, _both(axes), ZERO if counted else LEFT_OUT, kernel, stride, dilation)


def _pad(op: Op, kind: str, sides: list[tuple[int, int]]) -> Window | None:
    pads = tuple(op.args[0][1])
    if len(pads) > 4 and any(pads[4:]):
        return None  # of channels or batches
    pads = (*pads, 0, 0, 0, 0)[:4]  # (left, right, top, bottom)
    value = op.args[0][2] if len(op.args[0]) > 2 else dict(op.args[1]).get("value", 0)
    mode = {"reflection_pad2d": MIRRORED, "replication_pad2d": REPEATED}.get(kind, ZERO)
    lowest = mode == ZERO and isinstance(value, (int, float)) and value <= -1e4  # before a max-pool: never chosen
    ends = ((pads[2], pads[3]), (pads[0], pads[1]))
    axes = [padded(size, before, behind, mode) for (size, _), (before, behind) in zip(sides, ends, strict=True)]
    return Window("pad", _both(axes), LEFT_OUT if lowest else mode)


def _resize(op: Op, kind: str, sides: list[tuple[int, int]]) -> Window | None:
    nearest = "nearest" in kind
    given = [*op.args[0][2:], *[None] * 4] if nearest else [*op.args[0][3:], *[None] * 4]
    align = False if nearest else bool(op.args[0][2]) if len(op.args[0]) > 2 else False
    scales = given[:2]
    if len(scales) == 2 and isinstance(scales[0], tuple):  # the form that takes both factors as a list
        scales = [*scales[0]]
    axes = [
        resized(size, out, kind, align, float(scale) if isinstance(scale, (int, float)) else None)
        for (size, out), scale in zip(sides, scales, strict=True)
    ]
    rows, columns = axes
    return None if rows is None or columns is None else Window("resize", (rows, columns), LEFT_OUT)

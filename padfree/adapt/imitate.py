"""The layers that write the last map imitate what the original's wrote there, resampled to the smaller map.

What a conversion costs a trained network lies in the last map, which loses a row and a column. Layer by layer, from the
last strided one on, a convolution's weights are solved for so that it gives of the converted network's map what the
original's gave, resampled by area: each new pixel is the mean of the part that it covers, so that the mean of the map
is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padfree.adapt.absorb import solve
from padfree.adapt.merge import conv_step
from padfree.adapt.places import Layer, Places
from padfree.adapt.solve import Moments, by_group, grouped, images_to_unfold, pixels_read
from padfree.adapt.work import Norm, Outcome, Stream, Work, named
from padfree.layers.new import new_layers
from padfree.layers.preserve import running_norm
from padfree.record.recording import record

RIDGE = 0.1
_MOST_FEATURES = 4608  # 512 channels of 3x3
_MOST_WORK = 2e11  # multiply-adds for the sums of one layer


def imitate(work: Work) -> Outcome:
    """Solve the convolutions that write the last map for what the original writes there."""
    assert work.original is not None
    before = Places(record(work.original, work.places.recording.input_size))
    layers = {path: layer for path, layer in before.layers().items() if path in work.layers}
    last = _last_size(before, work.places, layers)
    mine, theirs = work.stream(), work.theirs
    merged = {place.conv for place in work.places.found if place.merge != "activation"}
    new = new_layers(work.model)
    errors, left = [], {}
    for path in sorted(layers, key=lambda path: conv_step(mine.tape(0), path)):
        if before.size_of(path) != last or path in new:
            continue
        conv = work.conv(path)
        if conv is None or path in merged:
            why = "a pool is added to what it writes" if conv is not None else "its weight is computed, or shared"
            left[path] = f"does not imitate the original: {why}"
        elif grouped(conv).shape[2] > _MOST_FEATURES:
            left[path] = f"does not imitate the original: {grouped(conv).shape[2]} pixels are too many to solve for"
        else:
            found = _imitate(work, mine, theirs, conv, (layers[path], work.layers[path]))
            if found is None:
                left[path] = "does not imitate the original: it has no norm or bias of its own"
            else:
                errors.append(found)
    return Outcome.of(errors, list(named(left)))


def _last_size(before: Places, after: Places, layers: dict[str, Layer]) -> tuple[int, int] | None:
    """The original's smallest map that the conversion made smaller."""
    sizes = (before.size_of(path) for path in layers if before.size_of(path) != after.size_of(path))
    return min((size for size in sizes if size != (1, 1)), default=None)


def _imitate(
    work: Work, mine: Stream, theirs: Stream, conv: nn.Conv2d, layers: tuple[Layer, Layer]
) -> tuple[float, float] | None:
    assert work.original is not None
    old, new = layers
    norm = work.norm(new.norm)
    if norm is None and (conv.bias is None or old.norm):
        return None
    module = running_norm(work.original.get_submodule(old.norm)) if old.norm else None
    if norm is not None and module is None:
        return None
    norms = None if norm is None or module is None else (Norm(module), norm)
    learnt, held = Moments(), Moments()
    rows = 0
    for batch in work.enough(grouped(conv).shape[2], 1):
        _take(learnt, conv, norms, new.conv, mine, theirs, batch)
        rows = rows or learnt.rows
        features = learnt.features
        most = _MOST_WORK / (features**2 * conv.groups)
        if batch + 1 >= len(work.enough(features, rows)) or learnt.rows >= most:
            break
    _take(held, conv, norms, new.conv, mine, theirs, work.first_held)
    return solve(work, conv, norm, learnt, held, RIDGE)


def _take(
    into: Moments,
    conv: nn.Conv2d,
    norms: tuple[Norm, Norm] | None,
    path: str,
    mine: Stream,
    theirs: Stream,
    batch: int,
) -> None:
    tape = mine.tape(batch)
    step = conv_step(tape, path)
    x = mine.fork(batch, step, step)[tape.source(step)]
    target = _written(theirs, path, batch)
    size = _out_size(conv, x)
    few = images_to_unfold(conv, x, size)
    target = resampled(target[:few], size).double()
    if norms is not None:
        old, new = norms
        scale = (new.deviation / old.deviation)[:, None, None]
        target = (target - old.mean.double()[:, None, None]) * scale + new.mean.double()[:, None, None]
    if conv.bias is not None:
        target = target - conv.bias.double()[:, None, None]
    into.add(pixels_read(conv, x[:few]), by_group(target, conv.groups))


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    out = nn.Conv2d.forward(conv, x[:1])
    return (out.shape[2], out.shape[3])


def _written(stream: Stream, path: str, batch: int) -> Tensor:
    """What a convolution writes."""
    tape = stream.tape(batch)
    step = conv_step(tape, path)
    env = stream.fork(batch, step, step + 1)
    tape.run(env, step, step + 1)
    return env[tape.steps[step].writes[0]]


def resampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (N, C, H, W) by area: each pixel of the new map is the mean of the part of the old one that it covers."""
    rows, columns = (_overlaps(old, new, x) for old, new in zip(x.shape[2:], size, strict=True))
    return rows @ x @ columns.mT


def _overlaps(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): the share of each old pixel in each new one."""
    edges = torch.arange(new + 1, dtype=torch.float64) * (old / new)
    left = torch.arange(old, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return (covered.clamp_min(0) * (new / old)).to(like)

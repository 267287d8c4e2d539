"""A convolution of the converted network solved for what the original's writes, resampled to the map that there is.

Where what the convolution gives is added to something that is there already, the sum is what counts: the convolution
also makes up for what is wrong with the other part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padfree.adapt.absorb import solve
from padfree.adapt.places import Layer
from padfree.adapt.solve import Moments, by_group, grouped, images_to_unfold, pixels_read
from padfree.adapt.steps import conv_step
from padfree.adapt.tape import Tape
from padfree.adapt.work import Norm, Stream, Work
from padfree.layers.preserve import running_norm

RIDGES = (1.0, 0.1, 0.01, 0.001)  # of which the held-back images choose for each layer
MEANS = 4.0  # what the mean over a resampled map counts for, in such maps: it is what comes through resampling unharmed
_LEAST_SCALE = 0.01  # of a norm; what a channel with less lacks cannot be asked of it
_MOST_FEATURES = 4608  # 512 channels of 3x3
_MOST_WORK = 2e11  # multiply-adds for the sums of one layer


def follow(work: Work, mine: Stream, conv: nn.Conv2d, layers: tuple[Layer, Layer]) -> tuple[float, float] | str:
    """Solve a convolution for what the original's layer writes.

    Args:
        work: the calibration, with an original.
        mine: the images on their way through the converted network.
        conv: the convolution.
        layers: the original's layer, and the converted network's.

    Returns:
        the relative errors before and after, or why nothing was done.
    """
    theirs = work.theirs
    old, new = layers
    norm = work.norm(new.norm)
    module = running_norm(theirs.model.get_submodule(old.norm)) if old.norm else None
    if (norm is None and (conv.bias is None or old.norm)) or (norm is not None and module is None):
        return "it has no norm or bias of its own"
    if grouped(conv).shape[2] > _MOST_FEATURES:
        return f"{grouped(conv).shape[2]} pixels are too many to solve for"
    norms = None if norm is None or module is None else (Norm(module), norm)
    learnt, held = Moments(), Moments()
    most = _MOST_WORK / (grouped(conv).shape[2] ** 2 * conv.groups)
    for batch in range(work.first_held):
        _take(learnt, conv, norms, layers, mine, theirs, batch)
        if learnt.rows >= most:
            break
    for batch in range(work.first_held, len(mine.batches)):
        _take(held, conv, norms, layers, mine, theirs, batch)
    return solve(work, conv, norm, learnt, held, RIDGES)


def _take(
    into: Moments,
    conv: nn.Conv2d,
    norms: tuple[Norm, Norm] | None,
    layers: tuple[Layer, Layer],
    mine: Stream,
    theirs: Stream,
    batch: int,
) -> None:
    old_layer, layer = layers
    tape = mine.tape(batch)
    step = conv_step(tape, layer.conv)
    env = mine.fork(batch, step, step)
    x = env[tape.source(step)]
    size = _out_size(conv, x)
    few = images_to_unfold(conv, x, size)
    written = _written(theirs, old_layer.conv, batch)[:few]
    resized = tuple(written.shape[2:]) != size
    target = resampled(written, size).double()
    if norms is not None:
        old, new = norms
        scale = (new.deviation / old.deviation)[:, None, None]
        target = (target - old.mean.double()[:, None, None]) * scale + new.mean.double()[:, None, None]
    if layer.added and old_layer.added:
        total = resampled(_written(theirs, old_layer.conv, batch, total=True)[:few], size).double()
        target = _before_norm(total - env[_other(tape, step)][:few].double(), target, norms)
    if conv.bias is not None:
        target = target - conv.bias.double()[:, None, None]
    read, wanted = pixels_read(conv, x[:few]), by_group(target, conv.groups)
    into.add(read, wanted)
    if resized:
        into.add(_means(read, few), _means(wanted, few), MEANS * size[0] * size[1])


def _means(rows: Tensor, images: int) -> Tensor:
    """Of (groups, images H W, features) the means over each image."""
    return rows.reshape(rows.shape[0], images, -1, rows.shape[2]).mean(2)


def _before_norm(wanted: Tensor, target: Tensor, norms: tuple[Norm, Norm] | None) -> Tensor:
    """What a convolution has to write so that the norm behind it gives this; `target` where the norm gives nothing."""
    if norms is None:
        return wanted
    norm = norms[1]
    weight = torch.ones_like(norm.deviation) if norm.weight is None else norm.weight.double()
    bias = torch.zeros_like(norm.deviation) if norm.bias is None else norm.bias.double()
    scale, mean = weight / norm.deviation, norm.mean.double()
    used = (scale.abs() > _LEAST_SCALE)[:, None, None]
    scale, bias, mean = (each[:, None, None] for each in (scale, bias, mean))
    return torch.where(used, (wanted - bias) / torch.where(used, scale, 1.0) + mean, target)


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    out = nn.Conv2d.forward(conv, x[:1])
    return (out.shape[2], out.shape[3])


def _written(stream: Stream, path: str, batch: int, *, total: bool = False) -> Tensor:
    """What a convolution writes, or the sum that it is a part of behind its norm."""
    tape = stream.tape(batch)
    first = conv_step(tape, path)
    step = _sum_step(tape, first) if total else first
    env = stream.fork(batch, first, step + 1)
    tape.run(env, first, step + 1)
    return env[tape.steps[step].writes[0]]


def _sum_step(tape: Tape, conv: int) -> int:
    """The addition that what a convolution writes comes to behind its norm."""
    return tape.reader(tape.steps[conv].writes[0], "add", "add_")


def _other(tape: Tape, conv: int) -> int:
    """The slot of what is added to a convolution's branch."""
    step = tape.steps[_sum_step(tape, conv)]
    behind = {slot for index in range(conv, len(tape.steps)) for slot in tape.steps[index].writes}
    (other,) = (slot for slot in step.reads if slot not in behind)
    return other


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

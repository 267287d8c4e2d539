"""Where the pool is added to something linear in the strided convolution, its kernel takes over a part of the pool.

With `merge="norm"` the sum is norm(conv(x)) + pool(x), with `merge="conv"` conv(x) + pool(x). For each channel the pool
is regressed on the pixels that the kernel reads: pool ~ a . pixels + c. The kernel then loses a (over the norm's
scale), and the norm c. The norm's statistics are estimated again, with weights that keep it the same function: without
that the next recalibration would undo the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padfree.adapt.places import Place
from padfree.adapt.solve import Moments, by_group, images_to_unfold
from padfree.adapt.steps import conv_step, pool_step
from padfree.adapt.tape import Tape
from padfree.adapt.work import Norm, Outcome, Stream, Work, mean_and_variance, named, pooled

_RIDGE = 1e-3
_LEAST_SCALE = 0.01  # of a norm; a channel with less is as good as dead


def absorb_by_conv(work: Work) -> Outcome:
    """Let strided convolutions take over what they can of the pool that is added to them."""
    stream, errors, left = work.stream(), [], {}
    for place in work.places.found:
        if place.merge == "activation":
            continue
        conv, norm = work.conv(place.conv), work.norm(place.norm)
        if conv is None or not place.alone:
            left[place.conv] = "its kernel cannot take over a part of the pool: it is not a plain convolution alone"
        elif norm is None or not norm.affine:
            left[place.conv] = "no norm with running statistics follows, which could take the constant"
        else:
            errors.append(_absorb(work, stream, place, conv, norm))
    return Outcome.of(errors, list(named(left)))


def _absorb(work: Work, stream: Stream, place: Place, conv: nn.Conv2d, norm: Norm) -> tuple[float, float]:
    own = _own_channels(conv, place.repeat)
    learnt, held = Moments(), Moments()
    first = _read(stream, place, 0)
    batches = work.enough(conv.kernel_size[0] ** 2, first[1].shape[0] * first[1].shape[2] * first[1].shape[3])
    for batch in batches:
        _take(learnt, conv, place, *_read(stream, place, batch))
    _take(held, conv, place, *_read(stream, place, work.first_held))
    nothing = torch.zeros(held.means[1].shape[0], 1, held.features, dtype=torch.float64, device=conv.weight.device)
    share = learnt.ridge(nothing, _RIDGE, centred=True)
    constant = learnt.constant(share)
    before, after = held.error(nothing, held.constant(nothing)), held.error(share, constant)
    if not after < before:
        return before, before
    changed = (conv.weight, norm.mean, norm.variance, norm.weight, norm.bias)
    work.unmerged[place.conv] = [(tensor, tensor.clone()) for tensor in changed if tensor is not None]
    scale = torch.ones_like(norm.deviation)
    if place.merge == "norm":
        assert norm.weight is not None
        scale = norm.weight.double() / norm.deviation
    used = scale.abs() > _LEAST_SCALE
    taken = torch.where(used[:, None], share[:, 0] / torch.where(used, scale, 1.0)[:, None], 0.0)
    kernel = taken.reshape(-1, *conv.kernel_size)
    rows = torch.arange(conv.out_channels, device=kernel.device)
    conv.weight[rows, own] -= kernel.to(conv.weight.dtype)
    missing = torch.where(used, constant[:, 0], 0.0)
    if place.merge == "norm":
        assert norm.bias is not None
        norm.bias.sub_(missing.to(norm.bias))
    else:
        norm.mean.add_(missing.to(norm.mean))
    found = [_behind(stream, place, conv, batch) for batch in batches]
    norm.restate(*pooled(found))
    return before, after


def _own_channels(conv: nn.Conv2d, repeat: int) -> Tensor:
    """Which of the channels that an output channel reads is that of the pool added to it."""
    pooled_channel = torch.arange(conv.out_channels, device=conv.weight.device) // repeat
    return pooled_channel % (conv.in_channels // conv.groups)


def _read(stream: Stream, place: Place, batch: int) -> tuple[Tensor, Tensor]:
    """What the convolution reads, and what the pool gives."""
    tape = stream.tape(batch)
    conv, pool = conv_step(tape, place.conv), pool_step(tape, place)
    first, last = min(conv, pool), max(conv, pool)
    env = stream.fork(batch, first, last + 1)
    found = {first: env[tape.source(first)]}
    tape.run(env, first, last)
    found[last] = env[tape.source(last)]
    return found[conv], _pooled(tape, pool, found[pool])


def _pooled(tape: Tape, step: int, x: Tensor) -> Tensor:
    """What a pool's step makes of a map."""
    operation = tape.steps[step]
    made: Any = operation.func(x, *operation.args[1:], **operation.kwargs)
    out: Tensor = made[0] if isinstance(made, tuple) else made
    return out


def _take(into: Moments, conv: nn.Conv2d, place: Place, x: Tensor, pool: Tensor) -> None:
    """Add a batch: the pixels that each output channel reads of its pool's own channel, and the pool."""
    few = images_to_unfold(conv, x, (pool.shape[2], pool.shape[3]))
    assert not isinstance(conv.padding, str)
    taps = F.unfold(x[:few], conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    taps = taps.reshape(few, x.shape[1], -1, taps.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)
    targets = by_group(pool[:few], pool.shape[1])
    into.add(taps.repeat_interleave(place.repeat, 0), targets.repeat_interleave(place.repeat, 0))


def _behind(stream: Stream, place: Place, conv: nn.Conv2d, batch: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the norm reads now."""
    x, pool = _read(stream, place, batch)
    out: Tensor = nn.Conv2d.forward(conv, x)
    if place.merge == "conv":
        out = out + pool.repeat_interleave(place.repeat, 1)
    return mean_and_variance(out)

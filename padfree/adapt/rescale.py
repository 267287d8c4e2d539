"""ReLU rescaling: the pool counts for less, and the network without it stays the same function.

relu(g x) = g relu(x), so where a strided convolution and its pool alone read relu(norm(.)), that norm can be scaled by
g and the convolution's own norm by 1/g, as in cross-layer equalization (arXiv:1906.04721). Exact for ReLU; for ReLU6
except where it is cut off.
"""

from __future__ import annotations

from torch import Tensor

from padfree.adapt.places import Place
from padfree.adapt.steps import conv_step, pool_step, without_pool
from padfree.adapt.work import Norm, Outcome, Stream, Work, named

SCALE = 0.3  # a smaller one is nearer to the original, and the gradient on the norm grows with its inverse square


def rescale(work: Work) -> Outcome:
    """Scale what feeds a place down, and the statistics of the norm behind its convolution alike."""
    stream, errors, left = work.stream(), [], {}
    for place in work.places.found:
        before, behind = work.norm(place.feeds), work.norm(place.norm)
        if place.merge == "conv":
            continue
        if not place.feeds:
            left[place.conv] = "not rescaled: what it reads is not made by a norm and a ReLU for it and its pool alone"
        elif before is None or not before.affine or behind is None:
            left[place.conv] = "not rescaled: a norm before or behind it has no weights or statistics of its own"
        else:
            errors.append(_rescale(work, stream, place, before, behind))
    return Outcome.of(errors, list(named(left)))


def _rescale(work: Work, stream: Stream, place: Place, before: Norm, behind: Norm) -> tuple[float, float]:
    """Rescale one place; the errors are of the sum, against what it was without the pool."""
    assert before.weight is not None and before.bias is not None
    changed = (before.weight, before.bias, behind.mean, behind.variance)
    values = [tensor.clone() for tensor in changed]
    wanted = _total(stream, place, work.first_held, pool=False)
    error = _distance(_total(stream, place, work.first_held, pool=True), wanted)
    for tensor in changed[:3]:
        tensor.mul_(SCALE)
    behind.variance.copy_(((behind.variance.double() + behind.eps) * SCALE**2 - behind.eps).clamp_min(0))
    after = _distance(_total(work.stream(), place, work.first_held, pool=True), wanted)
    if after < error:
        return error, after
    for tensor, value in zip(changed, values, strict=True):
        tensor.copy_(value)
    return error, error


def _total(stream: Stream, place: Place, batch: int, *, pool: bool) -> Tensor:
    """The sum at a place, with its pool or without it."""
    tape = stream.tape(batch)
    step = pool_step(tape, place)
    end = tape.reader(tape.steps[step].writes[0], "add")
    start = min(step, conv_step(tape, place.conv))
    env = stream.fork(batch, start, end + 1)
    tape.run(env, start, end + 1, {} if pool else {step: without_pool(tape.steps[step].func)})
    return env[tape.steps[end].writes[0]].double()


def _distance(found: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum().clamp_min(1e-30)
    return float(((found - wanted).square().sum() / spread).sqrt())

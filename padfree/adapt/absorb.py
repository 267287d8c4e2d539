"""The linear 1x1 convolution behind a sum takes back what the pool adds.

With the network before it as it is now, the convolution's input is looked at twice, without the pool (A) and with it
(P). Its weights are solved for so that it gives of P what it gave of A: least-squares reconstruction as in channel
pruning (He et al. 2017, arXiv:1707.06168), pulled to the weights of before.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from padfree.adapt.places import Place
from padfree.adapt.solve import Moments, by_group, every_few, grouped
from padfree.adapt.steps import conv_step, pool_step, without_pool
from padfree.adapt.work import Norm, Outcome, Stream, Work, named, swapped

RIDGE = 0.01


def absorb_by_point(work: Work) -> Outcome:
    """Let the 1x1 convolution behind each place take back what the pool adds, from the input on."""
    stream, errors, left = work.stream(), [], {}
    for place in sorted(work.places.found, key=lambda place: pool_step(stream.tape(0), place)):
        conv = work.conv(place.point) if place.point else None
        if not place.point:
            left[place.conv] = f"nothing takes back what its pool adds: {place.missing}"
        elif conv is None:
            left[place.point] = "it cannot take back what the pool adds: its weight is computed, or another layer's too"
        elif place.merge != "activation" and "merge" in work.done:
            left[place.point] = "what it gave before the strided convolution took over a part of the pool is not known"
        else:
            errors.append(_absorb(work, stream, place, conv))
    return Outcome.of(errors, list(named(left)))


def _absorb(work: Work, stream: Stream, place: Place, conv: nn.Conv2d) -> tuple[float, float]:
    norm = work.norm(place.point_norm)
    learnt, held = Moments(), Moments()
    unmerged = work.unmerged.get(place.conv, [])
    with_pool, without = _inputs(stream, place, 0, unmerged)
    for batch in work.enough(conv.in_channels, with_pool.shape[0] * with_pool.shape[2] * with_pool.shape[3]):
        _take(learnt, conv, *(_inputs(stream, place, batch, unmerged) if batch else (with_pool, without)))
    _take(held, conv, *_inputs(stream, place, work.first_held, unmerged))
    return solve(work, conv, norm, learnt, held, (RIDGE,))


def solve(
    work: Work, conv: nn.Conv2d, norm: Norm | None, learnt: Moments, held: Moments, strengths: Sequence[float]
) -> tuple[float, float]:
    """Give a convolution the weights that these sums ask for, of the strength that is best on the held-back ones.

    The targets are what it ought to write, without its bias. Returns the relative errors before and after.
    """
    old, shifts = grouped(conv), norm is not None or conv.bias is not None
    before = held.error(old)
    weight, constant, after = learnt.best(held, old, strengths, centred=shifts)
    if not after < before:
        return before, before
    conv.weight.copy_(weight.reshape(conv.weight.shape))
    if constant is not None:
        work.shift(conv, norm, constant.flatten())
    return before, after


def _inputs(stream: Stream, place: Place, batch: int, unmerged: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What the 1x1 convolution reads, with the pool, and without it and what the strided conv took over of it."""
    tape = stream.tape(batch)
    pool, point = pool_step(tape, place), conv_step(tape, place.point)
    start = min(pool, conv_step(tape, place.conv))
    env = stream.fork(batch, start, point)
    other = tape.fork(env, start, point)
    tape.run(env, start, point)
    with swapped(unmerged):
        tape.run(other, start, point, {pool: without_pool(tape.steps[pool].func)})
    slot = tape.source(point)
    return env[slot], other[slot]


def _take(into: Moments, conv: nn.Conv2d, with_pool: Tensor, without: Tensor) -> None:
    read, target = by_group(with_pool, 1), by_group(without, 1)
    few = every_few(read.shape[1])
    read, target = read[:, few].double(), target[:, few].double()
    into.add(read, target @ grouped(conv).double().mT)

"""A stem's tail made an identity where its activation is none.

Identity layers leave act(act(x)), which is act(x) for ReLU and ReLU6 alone. For others the tail is fitted to give what
it reads, from that start, alone: the only step that takes gradients. Its norms then take the statistics of what they
read, with weights that keep them the same function.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from padfree.adapt.statistics import statistics_of
from padfree.adapt.work import Norm, Outcome, Stop, Work, inputs_of, named
from padfree.layers.preserve import running_norm, tensor_of
from padfree.layers.stem import StemTail

LINEAR = 3e-3  # how far from what it reads an activation may give it back, where it counts as linear
_MARGIN = 1.1  # other images may have lower values than those that are looked at
_FARTHEST, _PROBE = 16.0, 64.0
STEPS, RATE = 600, 0.02
_BATCHES = 5
_PIXELS = 1 << 12  # of a batch
_EXACT = 1e-5


def fit_tails(work: Work) -> Outcome:
    """Fit each tail without a residual that is no identity yet to what it reads."""
    errors, left = [], {}
    for path, module in work.modules.items():
        if not isinstance(module, StemTail) or module.residual:
            continue
        if not _is_delta(module.conv_dw):
            left[path] = (
                'its depthwise kernel is not the identity that init="preserve" begins with (init="fresh", or trained '
                "since the conversion), and stays as it is"
            )
            continue
        found = _straightened(work, path, module)
        if found is not None:
            errors.append(found)
            continue
        cached = [_cropped(_read(work, path, module, images)) for images in work.train[:_BATCHES]]
        held = _cropped(_read(work, path, module, work.held[0]))
        before = _error(module, held, work.absorbs)
        if before <= _EXACT:
            continue
        fitted = _fitted(module, cached, work.absorbs)
        after = _error(fitted, held, work.absorbs)
        if after < before:
            _take_over(module, fitted, cached)
        errors.append((before, min(before, after)))
    return Outcome.of(errors, list(named(left)))


def _straightened(work: Work, path: str, tail: StemTail) -> tuple[float, float] | None:
    """Move what a tail reads to where its activation is linear, and back behind its second norm.

    The bias of the layer before the activation grows by a shift for each channel, which the tail passes on as it passes
    on everything, and its second norm takes away again, so that the last activation reads what the stem's own did.

    Returns:
        the relative errors before and after; None where the activation is nowhere linear, or there is nothing to shift.
    """
    feeding = work.places.feeding(path)
    bias = tensor_of(work.modules[feeding], "bias") if feeding and feeding not in work.tied else None
    inner, outer = (f"{path}.{name}" for name in ("norm1", "norm2"))
    norms = {inner: work.norm(inner), outer: work.norm(outer)}
    start = _linear_from(tail.act1, tail.conv_dw.in_channels, tail.conv_dw.weight)
    last = norms[outer]
    if tail.preact or start is None or bias is None or bias.shape != tail.conv_dw.weight.shape[:1] or last is None:
        return None
    if not all(norm.affine if norm else not list(work.modules[name].parameters()) for name, norm in norms.items()):
        return None
    assert last.bias is not None
    wanted = _target(tail, _read(work, path, tail, work.held[0]), work.absorbs)
    before = _distance(_written(work, path), wanted)
    if before <= _EXACT:
        return None
    known = {name: norm for name, norm in norms.items() if norm is not None}
    changed = [bias, *(t for n in known.values() for t in (n.mean, n.variance, n.weight, n.bias) if t is not None)]
    values = [tensor.clone() for tensor in changed]
    bias.add_(_PROBE)
    least = torch.stack([_read(work, path, tail, images).amin((0, 2, 3)) for images in work.train]).amin(0) - _PROBE
    shift = (start - torch.minimum(least, _MARGIN * least)).clamp_min(0)
    bias.copy_(values[0] + shift)
    for name, statistics in statistics_of(work.model, known, work.train).items():
        known[name].restate(*statistics)
    last.bias.sub_(shift)
    after = _distance(_written(work, path), wanted)
    if after < before:
        return before, after
    for tensor, value in zip(changed, values, strict=True):
        tensor.copy_(value)
    return None


def _linear_from(act: nn.Module, channels: int, like: Tensor) -> float | None:
    """From where on an activation gives back what it reads; None where it never does."""
    values = torch.arange(0, _FARTHEST, 0.25, dtype=like.dtype, device=like.device)
    try:
        missing = (act(values.repeat(1, channels, 1)[..., None]) - values[:, None]).abs().amax((0, 1, 3))
    except Exception:  # an activation that takes no map of this size is none that can be asked
        return None
    bent = (~(missing <= LINEAR)).nonzero()
    first = 0 if not len(bent) else int(bent[-1]) + 1
    return float(values[first]) if first < len(values) else None


def _written(work: Work, path: str) -> Tensor:
    """What a tail gives of the first held-back images."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out.clone())
        raise Stop

    handle = work.modules[path].register_forward_hook(note)
    try:
        work.model(work.held[0].clone())
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).double().square().sum() / _spread(wanted)).sqrt())


def _is_delta(conv: nn.Conv2d) -> bool:
    delta = torch.zeros_like(conv.weight)
    delta[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1.0
    return torch.equal(conv.weight, delta)


def _read(work: Work, path: str, tail: StemTail, images: Tensor) -> Tensor:
    """What a tail's new layers read."""
    read = inputs_of(work.model, [path], images)[path]
    out: Tensor = tail.end(read) if tail.has_end else read
    return out.clone()


def _cropped(x: Tensor) -> Tensor:
    """A window from the middle of each map, so that there are not more pixels than a fit needs."""
    side = max(4, math.isqrt(_PIXELS // x.shape[0]))
    top, left = (max(0, (whole - side) // 2) for whole in x.shape[2:])
    return x[:, :, top : top + side, left : left + side].contiguous()


def _alone(tail: StemTail) -> StemTail:
    """A copy of the new layers, without the module whose place the tail took."""
    duplicate = copy.deepcopy(tail)
    if duplicate.has_end:
        del duplicate.end
        duplicate.has_end = False
    return duplicate


def _target(tail: StemTail, x: Tensor, absorbs: bool) -> Tensor:
    target: Tensor = tail.pool(x) if absorbs else x
    return target


def _error(tail: StemTail, x: Tensor, absorbs: bool) -> float:
    return _distance(_alone(tail)(x.clone()), _target(tail, x, absorbs))


def _spread(target: Tensor) -> Tensor:
    target = target.double()
    return (target - target.mean((0, 2, 3), keepdim=True)).square().sum().clamp_min(1e-30)


def _fitted(tail: StemTail, cached: list[Tensor], absorbs: bool) -> StemTail:
    fitted = _alone(tail)
    parameters = [parameter.requires_grad_() for parameter in fitted.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    targets = [_target(tail, x, absorbs) for x in cached]
    with torch.enable_grad():
        for step in range(STEPS):
            x, target = cached[step % len(cached)], targets[step % len(cached)]
            loss = (fitted(x.clone()) - target).square().mean() / target.var()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return fitted.requires_grad_(False)


def _take_over(tail: StemTail, fitted: StemTail, cached: list[Tensor]) -> None:
    """Give the tail the fitted weights, with statistics of what its norms read now."""
    norms = {name: running_norm(getattr(fitted, name)) for name in ("norm1", "norm2")}
    read = statistics_of(fitted, norms, cached)
    for name, norm in norms.items():
        if norm is not None:
            Norm(norm).restate(*read[name])
    values = fitted.state_dict()
    for name, tensor in tail.state_dict().items():
        if name in values:
            tensor.copy_(values[name])

"""A stem's tail made an identity where its activation is none.

Identity layers leave act(act(x)), which is act(x) for ReLU and ReLU6 alone. For others the tail is fitted to give what
it reads, from that start, alone: the only step that takes gradients. Its norms then take the statistics of what they
read, with weights that keep them the same function.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from padfree.adapt.statistics import statistics_of
from padfree.adapt.work import Norm, Outcome, Work, inputs_of, named
from padfree.layers.preserve import running_norm
from padfree.layers.stem import StemTail

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
            left[path] = "the tail has been trained since the conversion, and stays as it is"
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
    target = _target(tail, x, absorbs)
    missing = _alone(tail)(x.clone()) - target
    return float((missing.double().square().sum() / _spread(target)).sqrt())


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

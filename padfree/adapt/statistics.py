"""Statistics of norms: those of new layers, which the network stays the same with, and all of them anew.

Recalibration is the cumulative average of PreciseBN (Wu & Johnson, arXiv:2105.07576).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from padfree.adapt.work import Norm, Outcome, Stop, Work, mean_and_variance, pooled
from padfree.layers.counting import countable, counting, counts
from padfree.layers.new import new_layers
from padfree.layers.preserve import running_norm

Statistics = tuple[Tensor, Tensor]


def calibrate_identities(work: Work) -> Outcome:
    """Give the norms of new layers the statistics of what they read, with weights that keep them what they are.

    An identity norm with statistics 0 and 1 is an identity in eval mode only; with those of its input it is one in
    train mode too, up to the noise of batches.
    """
    paths = [path for path, module in new_layers(work.model).items() if running_norm(module) is module]
    norms = {path: norm for path in paths if (norm := work.norm(path)) is not None and norm.affine}
    if not norms:
        return Outcome()
    found = statistics_of(work.model, norms, work.train[: len(work.enough(1, 1))])
    held = statistics_of(work.model, norms, work.held[:1])
    errors = []
    for path, norm in norms.items():
        before = mismatch(norm, *held[path])
        norm.restate(*found[path])
        errors.append((before, mismatch(norm, *held[path])))
    return Outcome.of(errors)


def recalibrate(work: Work) -> Outcome:
    """Re-estimate the running statistics of every batch norm on the network as it is now."""
    norms = {path: module for path, module in work.modules.items() if counts(module)}
    frozen = [path for path, module in work.modules.items() if running_norm(module) is module and path not in norms]
    notes = [f"`{frozen[0]}` and {len(frozen) - 1} more norms are frozen, and keep their statistics"] if frozen else []
    if not norms:
        return Outcome(notes=tuple(notes))
    measured = {path: Norm(module) for path, module in norms.items()} if not work.expected else {}
    errors = [mismatch(measured[path], *found) for path, found in _held(work, measured)]
    with counting(norms.values()):
        for images in countable(work.train):
            work.model(images.clone())
    after = [mismatch(measured[path], *found) for path, found in _held(work, measured)]
    pairs = list(zip(errors, after, strict=True)) or [(math.nan, math.nan)] * len(norms)
    return Outcome.of(pairs, notes)


def _held(work: Work, norms: dict[str, Norm]) -> Iterable[tuple[str, Statistics]]:
    return statistics_of(work.model, norms, work.held[:1]).items() if norms else ()


def statistics_of(model: nn.Module, paths: Iterable[str], batches: Sequence[Tensor]) -> dict[str, Statistics]:
    """Mean and variance of what modules read, the means over batches.

    From the second batch on a pass ends where the first one read what was asked for last.
    """
    found: dict[str, list[Statistics]] = {path: [] for path in paths}
    modules = dict(model.named_modules())
    left = -1  # reads of this pass to come, unknown in the first

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal left
            found[path].append(mean_and_variance(args[0]))
            left -= 1
            if left == 0:
                raise Stop

        return hook

    handles = [modules[path].register_forward_pre_hook(note(path)) for path in found]
    try:
        for images in batches:
            before = sum(map(len, found.values()))
            with contextlib.suppress(Stop):
                model(images.clone())
            left = sum(map(len, found.values())) - before
    finally:
        for handle in handles:
            handle.remove()
    return {path: pooled(statistics) for path, statistics in found.items() if statistics}


def mismatch(norm: Norm, mean: Tensor, variance: Tensor) -> float:
    """How far a norm's running statistics are from these, in deviations."""
    true = (variance + norm.eps).sqrt()
    shifted = ((norm.mean.double() - mean) / true).square().mean()
    scaled = (norm.deviation / true - 1).square().mean()
    return float((shifted + scaled).sqrt())

"""What every step of a calibration works on: the network, the images, and its way through them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from padfree.adapt.places import Layer, Places
from padfree.adapt.tape import Env, Tape, record_tape
from padfree.layers.preserve import running_norm, tensor_of
from padfree.record.trees import tensors

_ROWS_EACH = 10  # rows of least squares for each feature, if there are so many images
_FEWEST = 4  # batches that are looked at in any case, if there are so many


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        places: number of places that it changed.
        before, after: its own relative error on held-back images, the mean over places; NaN where it has none.
        notes: what was left alone, and why.
    """

    places: int = 0
    before: float = math.nan
    after: float = math.nan
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(errors: Sequence[tuple[float, float]], notes: Sequence[str] = ()) -> Outcome:
        """From the errors of each place before and after."""
        if not errors:
            return Outcome(notes=tuple(notes))
        before, after = (math.sqrt(sum(pair[side] ** 2 for pair in errors) / len(errors)) for side in (0, 1))
        return Outcome(len(errors), before, after, tuple(notes))


class Stream:
    """Batches on their way through a network, each as far as it was needed last.

    Args:
        model: a bare copy of the network.
        batches: the images.
        tapes: those of the model that other streams have made, by the shape of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        tapes: dict[tuple[int, ...], Tape] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self._tapes = {} if tapes is None else tapes
        self._fronts: dict[int, tuple[int, Env]] = {}

    def tape(self, batch: int) -> Tape:
        """The operations for a batch of this shape."""
        images = self.batches[batch]
        shape = tuple(images.shape)
        if shape not in self._tapes:
            self._tapes[shape] = record_tape(self.model, images.clone())
        return self._tapes[shape]

    def outputs(self, batch: int) -> list[Tensor]:
        """What the network returns for a batch: its floating-point tensors."""
        tape = self.tape(batch)
        env = self.fork(batch, len(tape.steps), len(tape.steps))
        return [env[slot] for slot in tape.exits if env[slot].is_floating_point()]

    def fork(self, batch: int, start: int, stop: int) -> Env:
        """What is alive at step `start`, as a copy that may be run up to step `stop`.

        Weights must only change behind the starts of before; a start before them begins anew from the images.
        """
        tape = self.tape(batch)
        position, env = self._fronts.get(batch, (0, {}))
        if position == 0 or position > start:
            position, env = 0, {tape.entry: self.batches[batch].clone()}
        cut = tape.narrowest(position, start)
        tape.run(env, position, cut)
        self._fronts[batch] = (cut, env)
        forked = tape.fork(env, cut, stop)
        tape.run(forked, cut, start)
        return forked


@dataclass
class Work:
    """A calibration under way.

    Attributes:
        model: a copy of the converted network in eval mode, without hooks, whose tensors are the network's own.
        original: the same of the network before conversion, or None.
        train, held: images to learn from, and the held-back ones.
        places: what the converted network's recording says.
        absorbs: whether the stem's tail took a max-pool in.
        expected: the original's outputs for the first of the held-back batches, on which the outputs are measured.
        done: names of the steps that an earlier calibration did.
        unmerged: by strided convolution, tensors and the values that they had before they took over a part of the pool.
    """

    model: nn.Module
    original: nn.Module | None
    train: list[Tensor]
    held: list[Tensor]
    places: Places
    absorbs: bool = False
    expected: list[list[Tensor]] = field(default_factory=list, repr=False)
    done: tuple[str, ...] = ()
    unmerged: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        everywhere = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        count = Counter(id(tensor) for _, tensor in everywhere)
        self.tied = {name.rpartition(".")[0] for name, tensor in everywhere if count[id(tensor)] > 1}
        self.layers: dict[str, Layer] = self.places.layers()

    # -- images ---------------------------------------------------------------------------------

    def stream(self) -> Stream:
        """All batches on their way through the network, those to learn from first, from the beginning."""
        return Stream(self.model, [*self.train, *self.held], self._tapes)

    @functools.cached_property
    def _tapes(self) -> dict[tuple[int, ...], Tape]:
        return {}

    @functools.cached_property
    def theirs(self) -> Stream:
        """The same batches on their way through the original, which nothing changes: one stream for all steps."""
        assert self.original is not None
        return Stream(self.original, [*self.train, *self.held])

    @property
    def first_held(self) -> int:
        """The held-back batch on which a place's own error is measured, by its number in a stream."""
        return len(self.train)

    def enough(self, features: int, rows: int) -> range:
        """How many batches to learn from, for so many features, where the first batch gives so many rows."""
        needed = math.ceil(_ROWS_EACH * features / max(1, rows))
        return range(min(len(self.train), max(_FEWEST, needed)))

    # -- layers ---------------------------------------------------------------------------------

    def conv(self, path: str) -> nn.Conv2d | None:
        """A convolution whose weight can be given other values, alone."""
        module = self.modules.get(path)
        plain = isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None
        fits = plain and module.padding_mode == "zeros" and not isinstance(module.padding, str)  # type: ignore[union-attr]
        return module if fits and path not in self.tied else None

    def norm(self, path: str) -> Norm | None:
        """A norm with running statistics, alone."""
        module = None if not path else running_norm(self.modules[path])
        return None if module is None or path in self.tied else Norm(module)

    def shift(self, conv: nn.Conv2d, norm: Norm | None, amount: Tensor) -> None:
        """Add a constant to what a convolution writes, by its norm's mean or its bias, one of which must be there."""
        if norm is not None:
            norm.mean.sub_(amount.to(norm.mean))
        else:
            assert conv.bias is not None
            conv.bias.add_(amount.to(conv.bias))

    # -- errors ---------------------------------------------------------------------------------

    def errors(self) -> tuple[float, float]:
        """|outputs - original's| / |original's - their mean| on the held-back images; NaN without an original.

        The second is of the outputs as they would be, each times a number and with a constant of its own: what is left
        when the last layer mends scales and means.
        """
        if not self.expected:
            return math.nan, math.nan
        found = [outputs(self.model, images) for images in self.held[: len(self.expected)]]
        missing = scaled = spread = 0.0
        for mine, theirs in zip(zip(*found, strict=True), zip(*self.expected, strict=True), strict=True):
            x, y = (rows(part).double() for part in (mine, theirs))
            missing += float((x - y).square().sum())
            x, y = x - x.mean(0), y - y.mean(0)
            slope = (x * y).sum(0) / x.square().sum(0).clamp_min(1e-30)
            scaled += float((slope * x - y).square().sum())
            spread += float(y.square().sum())
        plain, after = (math.sqrt(part / max(spread, 1e-30)) for part in (missing, scaled))
        return plain, after


@dataclass(frozen=True)
class Norm:
    """The tensors of a norm with running statistics."""

    module: nn.Module

    @property
    def mean(self) -> Tensor:
        """Its running mean."""
        return _needed(self.module, "running_mean")

    @property
    def variance(self) -> Tensor:
        """Its running variance."""
        return _needed(self.module, "running_var")

    @property
    def weight(self) -> Tensor | None:
        """What it multiplies with."""
        return tensor_of(self.module, "weight")

    @property
    def bias(self) -> Tensor | None:
        """What it adds."""
        return tensor_of(self.module, "bias")

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return float(getattr(self.module, "eps", 0.0))

    @property
    def affine(self) -> bool:
        """Whether it has a weight and a bias."""
        return self.weight is not None and self.bias is not None

    @property
    def deviation(self) -> Tensor:
        """sqrt(variance + eps), in double precision."""
        return (self.variance.double() + self.eps).sqrt()

    def restate(self, mean: Tensor, variance: Tensor) -> None:
        """Take other statistics and stay the same function: weight' = w s'/s, bias' = b + w (m' - m)/s.

        A norm that has no weight and bias is left as it is.
        """
        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            return
        old = self.deviation
        scale = weight.double() / old
        new = (variance.double() + self.eps).sqrt()
        bias.copy_(bias.double() + scale * (mean.double() - self.mean.double()))
        weight.copy_(scale * new)
        self.mean.copy_(mean)
        self.variance.copy_(variance)


def _needed(module: nn.Module, name: str) -> Tensor:
    found = tensor_of(module, name)
    assert found is not None
    return found


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The floating-point tensors that a network returns."""
    return [tensor for tensor in tensors((model(images.clone()),)) if tensor.is_floating_point()]


def rows(parts: Sequence[Tensor]) -> Tensor:
    """Outputs of several batches as one tensor, a row for each image.

    Where sides differ among the batches, as those of maps do of images that differ, each of their places is a row.
    """
    differ = [side for side in range(1, parts[0].dim()) if len({part.shape[side] for part in parts}) > 1]
    kept = list(range(1, len(differ) + 1))
    return torch.cat([(part.movedim(differ, kept) if differ else part).flatten(0, len(differ)) for part in parts])


@contextmanager
def swapped(values: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Tensors that hold other values for a while."""
    now = [tensor.clone() for tensor, _ in values]
    for tensor, value in values:
        tensor.copy_(value)
    try:
        yield
    finally:
        for (tensor, _), value in zip(values, now, strict=True):
            tensor.copy_(value)


class Stop(Exception):
    """Ends a forward pass that has gone far enough."""


def inputs_of(model: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What modules are given first; the pass ends when the last of them is reached."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def note(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(path, args[0].clone())
            if len(found) == len(paths):
                raise Stop

        return hook

    handles = [modules[path].register_forward_pre_hook(note(path)) for path in paths]
    try:
        model(images.clone())
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of (N, C, ...), as batch norms keep them."""
    flat = x.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=1 if flat.shape[1] > 1 else 0)


def pooled(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of the statistics of batches, as a cumulative batch norm takes it."""
    means, variances = (torch.stack(column) for column in zip(*found, strict=True))
    return means.mean(0), variances.mean(0)


def named(paths: Mapping[str, str]) -> Iterator[str]:
    """Notes: what was left alone, and why; places of one reason together."""
    reasons: dict[str, list[str]] = {}
    for path, why in paths.items():
        reasons.setdefault(why, []).append(path)
    for why, found in reasons.items():
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        yield f"{', '.join(f'`{path}`' for path in found[:3])}{more}: {why}"

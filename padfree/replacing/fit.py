"""Values for replaced convolutions from unlabelled images: the error of their outputs, layer by layer.

In forward order each pair is fitted to give, on what the network *as replaced so far* feeds it, what the original
convolution gives on the original's maps: so each layer repairs the errors of those before it. (The least-squares
reconstruction of channel pruning, ICCV 2017, sequentially.) Forward passes only, in eval mode; no labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.layers.separable import BSConvS, nearest_s, nearest_u
from padfree.record.copies import bare_copy
from padfree.replacing.solve import Moments, fit_s, fit_u

_VALUES = 1 << 25  # unfolded at a time


@dataclass(frozen=True)
class Fitted:
    """One pair that was fitted: its path, its number of how many, and the relative error of its outputs after it."""

    name: str
    number: int
    total: int
    error: float

    def __str__(self) -> str:
        return f"{self.number}/{self.total} {self.name}: relative error of its outputs {self.error:.3f}"


@torch.no_grad()
def fit_outputs(
    original: nn.Module,
    replaced: nn.Module,
    order: Mapping[str, int],
    batches: Sequence[Tensor],
    progress: Callable[[Fitted], None] | None = None,
) -> tuple[Fitted, ...]:
    """Fit the BSConv pairs at these paths, in place; their values so far do not count.

    Args:
        original: the network before; its convolutions stand at the same paths.
        replaced: the network after. Its hooks do not run.
        order: paths of the pairs and how often each is called, as `called` gives them.
        batches: images, as `image_batches` gives them.
        progress: told after each pair.

    Raises:
        PadfreeError: what a layer passes on is not finite.
    """
    before = bare_copy(original, original.parameters())
    now = bare_copy(replaced, [*replaced.parameters(), *replaced.buffers()])  # their tensors are the same
    done: list[Fitted] = []
    for name, calls in order.items():
        conv, pair = before.get_submodule(name), now.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        maps = _Maps(before, now, name, calls)
        error = _fit(pair, conv, _moments(conv, maps, batches))
        if any(isinstance(part, nn.BatchNorm2d) for part in pair.children()):
            _let_through(pair, maps, batches)
        done.append(Fitted(name, len(done) + 1, len(order), error))
        if progress is not None:
            progress(done[-1])
    return tuple(done)


class _Reached(BaseException):
    """A forward has gone far enough; no model's own `except Exception` stops it."""


@dataclass(frozen=True)
class _Maps:
    """What a convolution reads and writes, called `calls` times in a forward.

    From the second call on what it reads depends on its own values, which are about to change; there the original's
    maps count.
    """

    before: nn.Module
    now: nn.Module
    name: str
    calls: int

    def read(self, images: Tensor) -> list[Tensor]:
        """By the pair, in the network as it is now."""
        (first, _), *_ = _seen(self.now, self.name, 1, images)
        return [first, *(inputs for inputs, _ in _seen(self.before, self.name, self.calls, images)[1:])]

    def written(self, images: Tensor) -> list[Tensor]:
        """By the convolution, in the original."""
        return [outputs for _, outputs in _seen(self.before, self.name, self.calls, images)]


def _seen(model: nn.Module, name: str, calls: int, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a module reads and writes in its first calls of a forward, which ends there."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], out: Tensor) -> None:
        read = args[0] if args else named["input"]
        seen.append((read.detach().clone(), out.detach().clone()))  # what follows may write into them
        if len(seen) == calls:
            raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        with suppress(_Reached):
            model(images.clone())
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def called(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, int]:
    """How often modules at these paths are called for an image, in the order of the first calls.

    Raises:
        PadfreeError: the network does not take such images.
    """
    counts: dict[str, int] = {}
    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, name: str = name) -> None:
            counts[name] = counts.get(name, 0) + 1

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        model(images[:1].clone())
    except Exception as error:  # the model's own code, which may raise anything
        raise PadfreeError(
            f"the network does not take batches of {tuple(images.shape)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return counts


@torch.no_grad()
def _moments(conv: nn.Conv2d, maps: _Maps, batches: Sequence[Tensor]) -> Moments:
    """Of what the pair reads, unfolded, and what the original convolution writes."""
    unfold, (m, n, k) = _unfolding(conv), (conv.in_channels, conv.out_channels, conv.kernel_size)
    taps = k[0] * k[1]
    device = conv.weight.device
    inputs = torch.zeros(m * taps, m * taps, dtype=torch.float64, device=device)
    outputs = torch.zeros(n, m * taps, dtype=torch.float64, device=device)
    total = 0.0
    for images in batches:
        for read, written in zip(maps.read(images), maps.written(images), strict=True):
            if conv.bias is not None:
                written = written - conv.bias[:, None, None]
            step = max(1, _VALUES // (m * taps * written[0, 0].numel()))
            for part, wanted in zip(torch.split(read, step), torch.split(written, step), strict=True):
                x = _rows(unfold(part.to(unfold.weight.dtype)))
                y = _rows(wanted)
                inputs += x.t() @ x
                outputs += y.t() @ x
                total += float(y.square().sum())
    if not bool(inputs.isfinite().all() and outputs.isfinite().all()):
        raise PadfreeError(f"what `{maps.name}` reads or writes on these batches is not finite")
    return Moments(inputs.reshape(m, taps, m, taps), outputs.reshape(n, m, taps), total)


def _rows(maps: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C), in float64."""
    return maps.double().transpose(0, 1).flatten(1).t()


def _unfolding(conv: nn.Conv2d) -> nn.Conv2d:
    """(N, M, H, W) -> (N, M K, H', W'): the pixels that each output of a convolution reads, K for each channel.

    A copy of the convolution itself whose kernels are single ones: it pads as that one does, whatever its class.
    """
    m, kernel = conv.in_channels, conv.kernel_size
    taps = kernel[0] * kernel[1]
    precise = torch.promote_types(conv.weight.dtype, torch.float32)
    ones = torch.eye(taps, dtype=precise, device=conv.weight.device).reshape(taps, 1, *kernel).repeat(m, 1, 1, 1)
    unfold = copy.deepcopy(conv, {id(conv.weight): nn.Parameter(ones, requires_grad=False)})
    unfold.groups, unfold.out_channels, unfold.bias = m, m * taps, None
    return unfold


def _fit(pair: nn.Module, conv: nn.Conv2d, moments: Moments) -> float:
    """Give a pair the values of the best fit, and the convolution's bias; the relative error of its outputs."""
    factors: tuple[Tensor, ...]
    if isinstance(pair, BSConvS):
        basis, _, taps = nearest_s(conv.weight, pair.get_submodule("pw1").get_parameter("weight").shape[0])
        *factors, error = fit_s(moments, basis, taps)  # type: ignore[assignment]
    else:
        *factors, error = fit_u(moments, nearest_u(conv.weight)[1])  # type: ignore[assignment]
    parts = [part for part in pair.children() if isinstance(part, nn.Conv2d)]
    for part, values in zip(parts, factors, strict=True):
        part.weight.copy_(values.reshape(part.weight.shape))
    if conv.bias is not None:
        assert parts[-1].bias is not None
        parts[-1].bias.copy_(conv.bias)
    return error


def _let_through(pair: nn.Module, maps: _Maps, batches: Sequence[Tensor]) -> None:
    """Let new norms scale by what they divide by, and add what they take off, so that the pair stays what it is.

    Their statistics become those of the batches: then it holds in training mode too, but for the noise of a batch.
    """
    parts = list(pair.children())
    for place, norm in enumerate(parts):
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        count, mean, square = 0, torch.zeros_like(norm.weight).double(), torch.zeros_like(norm.weight).double()
        for images in batches:
            for read in maps.read(images):
                rows = _rows(nn.Sequential(*parts[:place])(read))
                count, mean, square = count + len(rows), mean + rows.sum(0), square + rows.square().sum(0)
        mean = mean / count
        var = (square / count - mean.square()).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None
        for tensor, values in (
            (norm.running_mean, mean),
            (norm.running_var, var),
            (norm.weight, (norm.running_var.copy_(var).double() + norm.eps).sqrt()),
            (norm.bias, mean),
        ):
            tensor.copy_(values)

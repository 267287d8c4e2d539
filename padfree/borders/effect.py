"""`padfree.border_effect`: how much a network's features depend on where the border of the image is. Measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from padfree.borders.features import Features, Place, places, run, stride_of
from padfree.borders.results import BorderEffect, LayerEffect, Shift
from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.record.copies import bare_copy, kept_random_state
from padfree.record.inputs import check_input_size, check_model, default_input_size, like_of
from padfree.record.recording import record
from padfree.record.trees import first_line

SHIFTS = tuple(range(1, 9))
_BATCH = 8  # images at a time
_DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))


def border_effect(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    input_size: tuple[int, ...] | None = None,
    *,
    margin: int | None = None,
    shifts: Sequence[int] | None = None,
) -> BorderEffect:
    """How much features at the border differ from those of the same content away from it.

    Each image is a scene: a frame of `input_size` in its middle, and `margin` pixels around. The network sees the frame
    alone, where padding stands for the surroundings, and the whole scene, where the same content lies `margin` pixels
    from the border. `margin` is a multiple of the network's stride, so both are sampled at the same pixels.

    For each map (N, C, H, W), with f of the frame and g of the same content in the scene:

    - `LayerEffect.difference` (H, W): sqrt(mean over N, C of (f - g)^2) at each position, in units of the root mean
      square of g over N, C and all positions. 0: the border changes nothing; 1: as much as the features are large.
      `sides` are its means over the first and last row and column, `centre` over the middle half of both axes. Where
      the network reads the whole map (squeeze-excitation, attention), the centre differs too: the scene holds more.
    - `LayerEffect.asymmetry` (vertical, horizontal): of e = mean over N, C of |f| - |g|, the first row (column) less
      the last, in units of the mean of |g|. Mean feature maps show how unevenly padding feeds the sides ("Mind the
      Pad", Alsallakh et al., ICLR 2021); what the images show at the top and bottom cancels, as g has it too.

    For a classifier (N, classes), and each number s of pixels in `shifts`:

    - `Shift.consistency`: share of pairs (image, direction) whose most likely class is the same for the frame and for
      the frame moved by s pixels up, down, left or right ("Making Convolutional Networks Shift-Invariant Again", Zhang,
      ICML 2019; there both frames are moved at random, and not only along one axis).
    - `Shift.change`: root mean square of the change of the logits, in units of that of the logits less their mean.

    Args:
        model: a network of images, trained or not, converted or not; measured in eval mode, left as it was.
        images: (N, C, H, W), or batches of them, prepared as the model takes them; at least input_size + 2 * margin.
            Larger ones are cropped to their middle.
        input_size: (C, H, W) of the frame; default: `model.pretrained_cfg`'s, or that at which it was converted.
        margin: pixels around the frame on each side; default: half of its larger side, rounded up to the stride.
        shifts: pixels, none more than the margin; default: 1 to 8.

    Raises:
        PadfreeError: no images, images of another shape or with values that are not finite, a margin that is no
            multiple of the stride, a network that does not run on the frame or on the larger scene.
    """
    if not isinstance(model, nn.Module):
        raise PadfreeError(f"border_effect takes a torch.nn.Module, not {type(model).__name__}")
    check_model(model)
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    if len(size) != 3:
        raise PadfreeError(f"border_effect is about images (C, H, W); {size_text(size)} is the size of a video")
    with kept_random_state(), torch.no_grad():
        return _measured(model, images, size, margin, shifts)


def scene_size(model: nn.Module, input_size: tuple[int, ...], margin: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that `border_effect` takes for a frame of that size.

    Raises:
        PadfreeError: as `border_effect`.
    """
    with kept_random_state():
        around = _margin(stride_of(places(record(model, input_size))[0]), input_size, margin)
    return input_size[0], input_size[1] + 2 * around, input_size[2] + 2 * around


def _measured(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    size: tuple[int, ...],
    margin: int | None,
    shifts: Sequence[int] | None,
) -> BorderEffect:
    found, notes = places(record(model, size))
    around = _margin(stride_of(found), size, margin)
    steps = [shift for shift in SHIFTS if shift <= around] if shifts is None else list(shifts)
    wrong = [shift for shift in steps if not (isinstance(shift, int) and 0 < shift <= around)]
    if wrong:
        raise PadfreeError(f"shifts of {wrong} pixels; they are whole numbers from 1 to the margin, {around}")
    copy = bare_copy(model)
    sums = {place: _Sums() for place in found}
    moved, count = _Moved(tuple(steps)), 0
    for scenes in _batches(copy, images, size, around):
        count += len(scenes)
        frame = scenes[..., around : around + size[1], around : around + size[2]]
        _, larger = _run(copy, scenes, found, around)
        out, own = _run(copy, frame, found, 0)
        for place in found:
            if place in larger and place in own and larger[place].shape == own[place].shape:
                sums[place].add(own[place], larger[place])
        moved.add(copy, scenes, out, size, around)
    if not count:
        raise PadfreeError("border_effect was given no images")
    lost = [place.name for place in found if not sums[place].count]
    if lost:
        notes = (*notes, f"maps that do not grow with the image, or not alike, are left out: {', '.join(lost)}")
    layers = tuple(sums[place].result(place.name) for place in found if sums[place].count)
    return BorderEffect(type(model).__name__, size, around, count, layers, moved.result(), notes)


def _margin(stride: int, size: tuple[int, ...], margin: int | None) -> int:
    if margin is None:
        return stride * math.ceil(max(size[1:]) / 2 / stride)
    if not isinstance(margin, int) or margin < 1 or margin % stride:
        raise PadfreeError(f"margin is {margin!r}; it is a positive multiple of the network's stride, {stride} pixels")
    return margin


def _run(model: nn.Module, batch: Tensor, found: Sequence[Place], around: int) -> Features:
    try:
        return run(model, batch, found, around)
    except Exception as error:  # whatever a model raises at a size that it does not take
        raise PadfreeError(
            f"{type(model).__name__} does not run on {size_text(batch.shape[1:])}, which border_effect needs: "
            f"{first_line(error)}"
        ) from error


def _batches(
    model: nn.Module, images: Tensor | Iterable[Tensor], size: tuple[int, ...], around: int
) -> Iterable[Tensor]:
    """Scenes of exactly the size needed, a few at a time, of the model's type and on its device."""
    weight = like_of(model)
    needed = (size[0], size[1] + 2 * around, size[2] + 2 * around)
    for batch in [images] if isinstance(images, Tensor) else images:
        if not isinstance(batch, Tensor) or batch.dim() not in (3, 4) or not batch.is_floating_point():
            found = f"{batch.dtype} {size_text(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise PadfreeError(f"images are batches (N, C, H, W) of floating-point numbers, not {found}")
        scenes = batch if batch.dim() == 4 else batch[None]
        if scenes.shape[1] != needed[0] or any(
            have < need for have, need in zip(scenes.shape[2:], needed[1:], strict=True)
        ):
            raise PadfreeError(
                f"images are {size_text(scenes.shape[1:])}; a frame of {size_text(size)} with {around} pixels around "
                f"it takes {size_text(needed)} or more. Hint: resize them, or pass a smaller input_size or margin"
            )
        if not bool(scenes.isfinite().all()):
            raise PadfreeError("images hold values that are not finite")
        top, left = ((have - need) // 2 for have, need in zip(scenes.shape[2:], needed[1:], strict=True))
        scenes = scenes[..., top : top + needed[1], left : left + needed[2]]
        for few in scenes.split(_BATCH):  # type: ignore[no-untyped-call]
            yield few.to(weight.device, weight.dtype)


class _Sums:
    """Running sums over images of one map."""

    def __init__(self) -> None:
        self.count = 0
        self.squares = self.larger = self.magnitudes = self.expected = torch.zeros(())

    def add(self, own: Tensor, larger: Tensor) -> None:
        f, g = own.double(), larger.double()
        self.squares = self.squares + (f - g).square().sum((0, 1)).cpu()
        self.larger = self.larger + g.square().sum((0, 1)).cpu()
        self.magnitudes = self.magnitudes + (f.abs() - g.abs()).sum((0, 1)).cpu()
        self.expected = self.expected + g.abs().sum((0, 1)).cpu()
        self.count += f.shape[0] * f.shape[1]

    def result(self, name: str) -> LayerEffect:
        scale = self.larger.mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        difference = self.squares.sqrt() / scale
        level = self.expected.mean().clamp(min=torch.finfo(torch.float64).tiny)
        excess = self.magnitudes / level
        asymmetry = (
            float(excess[0].mean() - excess[-1].mean()),
            float(excess[:, 0].mean() - excess[:, -1].mean()),
        )
        return LayerEffect(name, (difference.shape[0], difference.shape[1]), difference, asymmetry)


class _Moved:
    """Predictions for frames that were moved."""

    def __init__(self, shifts: tuple[int, ...]) -> None:
        self.shifts = shifts
        self.pairs = self.squares = self.scale = 0.0
        self.same = dict.fromkeys(shifts, 0.0)
        self.changed = dict.fromkeys(shifts, 0.0)

    def add(self, model: nn.Module, scenes: Tensor, out: object, size: tuple[int, ...], around: int) -> None:
        if not (isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1):
            return  # no classifier
        self.pairs += len(out) * len(_DIRECTIONS)
        self.scale += float((out - out.mean(1, keepdim=True)).double().square().sum())
        for shift in self.shifts:
            for down, right in _DIRECTIONS:
                top, left = around + shift * down, around + shift * right
                other = model(scenes[..., top : top + size[1], left : left + size[2]])
                self.same[shift] += float((other.argmax(1) == out.argmax(1)).sum())
                self.changed[shift] += float((other - out).double().square().sum()) / len(_DIRECTIONS)

    def result(self) -> tuple[Shift, ...]:
        if not self.pairs:
            return ()
        scale = self.scale or torch.finfo(torch.float64).tiny
        return tuple(
            Shift(shift, self.same[shift] / self.pairs, math.sqrt(self.changed[shift] / scale)) for shift in self.shifts
        )

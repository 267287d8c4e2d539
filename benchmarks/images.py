"""The images of the accuracy benchmarks, in memory: photos and mnist5k as the recipes have them, with a margin.

A margin around each image lets a benchmark move the window that a network sees by some pixels, or widen it, without
making up a border. Every window is standardised by itself, as the recipes' transforms do it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from padfree.recipes import bundled
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images (N, C, S + 2 margin, S + 2 margin) from 0 to 1, and their classes (N)."""

    images: Tensor
    labels: Tensor

    def half(self) -> Split:
        """The first half of them; both data sets mix their classes."""
        return Split(self.images[: len(self.labels) // 2], self.labels[: len(self.labels) // 2])


@dataclass(frozen=True)
class Images:
    """Training and test images of one data set.

    Attributes:
        name: photos or mnist5k.
        side: pixels that a network sees, S.
        margin: pixels around them.
        train, test: the images; of fewer pixels where they are enlarged to S + 2 margin before a network sees them.
    """

    name: str
    side: int
    margin: int
    train: Split
    test: Split

    def _enlarged(self, images: Tensor) -> Tensor:
        full = self.side + 2 * self.margin
        return images if images.shape[-1] == full else F.interpolate(images, full, mode="bilinear")

    def window(self, split: Split, down: int = 0, right: int = 0, wider: int = 0) -> Tensor:
        """Standardised windows (N, 3, S + wider, S + wider) whose centre is moved by whole pixels."""
        size = self.side + wider
        top, left = (self.margin - wider // 2 + step for step in (down, right))
        if min(top, left) < 0 or max(top, left) + size > self.side + 2 * self.margin:
            raise ValueError(f"a window of {size} pixels moved by {down}, {right} leaves the margin of {self.margin}")
        return standardise(self._enlarged(split.images)[..., top : top + size, left : left + size]).expand(
            -1, 3, -1, -1
        )

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images as the recipes augment them: half of photos mirrored, digits moved by up to 2 pixels."""
        images = self._enlarged(self.train.images[indices])
        if self.name == "photos":
            start, size = self.margin, self.side
            images = images[..., start : start + size, start : start + size]
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        else:
            steps = torch.randint(-2, 3, (len(images), 2), generator=generator) + self.margin
            pixels = torch.arange(self.side)
            rows, columns = (steps[:, axis, None] + pixels for axis in (0, 1))
            images = images[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            images = images.permute(0, 3, 1, 2)
        return standardise(images).expand(-1, 3, -1, -1), self.train.labels[indices]


def standardise(images: Tensor) -> Tensor:
    """Each image minus its mean, over its standard deviation."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred / centred.flatten(1).std(1, correction=0).clamp_min(1 / 255)[:, None, None, None]


@functools.cache
def images(name: str, side: int, grey: bool = True, crop: int | None = None) -> Images:
    """A data set by name.

    Args:
        name: photos (crops of the size asked for) or mnist5k (28 pixels, resized).
        side: pixels that the networks see.
        grey: photos without their colours.
        crop: pixels of a photograph that are enlarged to `side`; default: as many.
    """
    if name == "photos":
        shown, side = side, crop or side
        margin = side // 8  # block as for crops without a margin, so that training and test stay apart
        train, test = (
            _stacked(
                bundled.Photographs(part, _tensor, side=side + 2 * margin, grey=grey, block=max(2 * side, 64)),
                1 if grey else 3,
            )
            for part in (True, False)
        )
        side, margin = shown, margin * shown // side
    else:
        margin = 8
        train, test = (_stacked(bundled.mnist5k(part, _tensor), 1) for part in (True, False))
        train, test = (
            Split(F.pad(F.interpolate(part.images, side, mode="bilinear", antialias=True), [margin] * 4), part.labels)
            for part in (train, test)
        )
    return Images(name, side, margin, train, test)


def _tensor(image: object) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.to_dtype(functional.to_image(image), torch.float32, scale=True)


def _stacked(dataset: bundled.Photographs | bundled.Pictures, channels: int) -> Split:
    pairs = [dataset[index] for index in range(len(dataset))]
    return Split(torch.stack([image[:channels] for image, _ in pairs]), torch.tensor([target for _, target in pairs]))

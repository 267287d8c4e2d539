"""What a report measures on the test images of a finished run: the confusion matrix, and the border effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from padfree.borders.effect import border_effect, scene_size
from padfree.borders.results import BorderEffect
from padfree.errors import PadfreeError

from .count import Count, count
from .datasets import class_names
from .evaluate import Trained, tested_in
from .loaders import eval_loader

IMAGES = 32  # that the border effect is measured on, evenly chosen
SHIFTS = (1, 2, 4, 8)  # pixels that frames are moved by


@dataclass(frozen=True)
class Measured:
    """Of one run, with the weights of its last epoch.

    Attributes:
        counted: parameters and multiply-adds (fvcore).
        confusion: (classes, classes) numbers of test images, by their class and the class that they were taken for.
        classes: their names, in order.
        border: what `padfree.border_effect` found on `mirrored` test images, or why there is nothing.
    """

    counted: Count
    confusion: Tensor
    classes: tuple[str, ...]
    border: BorderEffect | PadfreeError

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * float(self.confusion.trace()) / max(1, int(self.confusion.sum()))


def measure(found: Trained, cpu: bool = False, counted: Count | None = None) -> Measured:
    """Run a network over the test images of its recipe once, and over some of them in larger scenes.

    Args:
        found: a run's network, with the weights of its last epoch.
        cpu: leave accelerators alone.
        counted: what was counted of an equal network.

    Raises:
        PadfreeError: the data are not right.
    """
    from accelerate import Accelerator
    from torchmetrics.classification import MulticlassConfusionMatrix

    recipe, accelerator = found.recipe, Accelerator(cpu=cpu)
    counted = counted or count(found.model, recipe.model.input_side, "fvcore")
    model = found.model.to(accelerator.device).eval()
    batches = eval_loader(accelerator, recipe)
    matrix = MulticlassConfusionMatrix(recipe.model.num_classes).to(accelerator.device)
    total = found.progress.epochs[-1].test_images
    wanted = {at * total // IMAGES for at in range(IMAGES)}
    chosen: list[Tensor] = []
    precision = tested_in(recipe, found.about, accelerator.device)
    with torch.no_grad(), torch.autocast(accelerator.device.type, dtype=precision, enabled=precision is not None):
        for first, images, targets in _numbered(batches):
            matrix.update(model(images.to(accelerator.device)), targets.to(accelerator.device))
            chosen += [image for at, image in enumerate(images, first) if at in wanted]
    names = class_names(batches.dataset) or [str(number) for number in range(recipe.model.num_classes)]
    border = _border(model, chosen, recipe.model.input_side)
    return Measured(counted, matrix.compute().cpu(), tuple(names), border)


def mirrored(images: Tensor, around: int) -> Tensor:
    """(N, C, H, W) with `around` more pixels on each side, which are the image's own, mirrored at its edges.

    A test image has no surroundings of its own; its mirror image goes on without a seam, as bright and as fine.
    """
    for axis in (2, 3):
        side = images.shape[axis]
        at = torch.arange(-around, side + around) % (2 * side)
        images = images.index_select(axis, torch.where(at < side, at, 2 * side - 1 - at))
    return images


def _border(model: nn.Module, images: list[Tensor], side: int) -> BorderEffect | PadfreeError:
    size = (3, side, side)
    if not images:
        return PadfreeError("there are no test images")
    try:
        around = (scene_size(model, size)[1] - side) // 2
        shifts = [shift for shift in SHIFTS if shift <= around]
        return border_effect(model, mirrored(torch.stack(images), around), size, shifts=shifts)
    except PadfreeError as error:  # such as a network that is tied to one size
        return error


def _numbered(batches: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches with the number of their first image."""
    first = 0
    for images, targets in batches:
        yield first, images, targets
        first += len(images)

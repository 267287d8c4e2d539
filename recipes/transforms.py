"""Image transforms of the recipes: torchvision's, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from padfree.errors import PadfreeError

TRANSFORMS = (
    "CenterCrop",
    "ColorJitter",
    "Normalize",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomHorizontalFlip",
    "RandomResizedCrop",
    "RandomRotation",
    "Resize",
    "Standardize",
    "ToTensor",
    "TrivialAugmentWide",
)


@dataclass(frozen=True)
class Steps:
    """Named transforms in order; one that fails on an image is named.

    Attributes:
        steps: what each is called in an error, and its callable.
    """

    steps: tuple[tuple[str, Any], ...]

    def __call__(self, image: Any) -> Any:
        """What the steps make of an image."""
        for shown, step in self.steps:
            before = image
            try:
                image = step(before)
            except Exception as error:  # torchvision's raise kinds of their own
                reason = " ".join(str(error).split()) or type(error).__name__
                raise PadfreeError(f"transform {shown} fails on {_described(before)}: {reason}") from error
        return image


def compose(steps: Sequence[Mapping[str, Mapping[str, Any]]]) -> Steps:
    """A callable that runs the steps in order on a PIL image.

    `ToTensor` makes a float tensor (3, H, W) with values from 0 to 1, and `Standardize` gives one a mean of 0 and a
    standard deviation of 1, over all of its own values; the other names are classes of torchvision.transforms.v2.

    Raises:
        PadfreeError: a transform does not take the arguments given; when called, that one fails.
    """
    from torchvision.transforms import v2

    made: list[tuple[str, Any]] = []
    for step in steps:
        ((name, arguments),) = step.items()
        maker = _OWN.get(name) or getattr(v2, name)
        try:
            made.append((f"{name} {dict(arguments)}" if arguments else name, maker(**arguments)))
        except (TypeError, ValueError) as error:
            raise PadfreeError(f"transform {name} does not take {dict(arguments)}: {error}") from error
    return Steps(tuple(made))


def _to_tensor() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class Standardize:
    """An image (C, H, W) minus its mean, over its standard deviation; one without contrast becomes zeros."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """The image on its own scale."""
        centred = image - image.mean()
        return centred / centred.std(correction=0).clamp_min(1 / 255)  # of a grey level, where there is no contrast


_OWN: dict[str, Callable[..., Any]] = {"ToTensor": _to_tensor, "Standardize": Standardize}


def _described(image: Any) -> str:
    if isinstance(image, torch.Tensor):
        return f"a tensor {tuple(image.shape)}"
    return f"a PIL image of {image.width}x{image.height}" if hasattr(image, "width") else type(image).__name__

"""Image transforms of the recipes: torchvision's, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    `ToTensor` makes a float tensor (3, H, W) with values from 0 to 1; the other names are classes of
    torchvision.transforms.v2.

    Raises:
        PadfreeError: a transform does not take the arguments given; when called, that one fails.
    """
    from torchvision.transforms import v2

    made: list[tuple[str, Any]] = []
    for step in steps:
        ((name, arguments),) = step.items()
        maker = _to_tensor if name == "ToTensor" else getattr(v2, name)
        try:
            made.append((f"{name} {dict(arguments)}" if arguments else name, maker(**arguments)))
        except (TypeError, ValueError) as error:
            raise PadfreeError(f"transform {name} does not take {dict(arguments)}: {error}") from error
    return Steps(tuple(made))


def _to_tensor() -> Any:
    from torchvision.transforms import v2

    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def _described(image: Any) -> str:
    if isinstance(image, torch.Tensor):
        return f"a tensor {tuple(image.shape)}"
    return f"a PIL image of {image.width}x{image.height}" if hasattr(image, "width") else type(image).__name__

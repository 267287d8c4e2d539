"""Image transforms of the recipes: torchvision's, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def compose(steps: Sequence[Mapping[str, Mapping[str, Any]]]) -> Any:
    """A callable that runs the steps in order on a PIL image.

    `ToTensor` makes a float tensor (3, H, W) with values from 0 to 1; the other names are classes of
    torchvision.transforms.v2.

    Raises:
        PadfreeError: a transform does not take the arguments given.
    """
    from torchvision.transforms import v2

    made: list[Any] = []
    for step in steps:
        ((name, arguments),) = step.items()
        if name == "ToTensor":
            made += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
            continue
        try:
            made.append(getattr(v2, name)(**arguments))
        except (TypeError, ValueError) as error:
            raise PadfreeError(f"transform {name} does not take {dict(arguments)}: {error}") from error
    return v2.Compose(made)

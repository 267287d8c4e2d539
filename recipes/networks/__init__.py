"""Networks of the documents that no library has, one file each; a recipe's `builder: networks` makes them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from padfree.errors import PadfreeError

from .mobilenetv1 import MobileNetV1
from .mobilenetv1_cifar import MobileNetV1Cifar
from .mobilenetv2_cifar import MobileNetV2Cifar
from .mobilenetv3 import MobileNetV3

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mobilenetv1": MobileNetV1,
    "mobilenetv1-cifar": MobileNetV1Cifar,
    "mobilenetv2-cifar": MobileNetV2Cifar,
    "mobilenetv3": MobileNetV3,
}


def create(name: str, num_classes: int, **arguments: Any) -> nn.Module:
    """A network by its name, with fresh values.

    Raises:
        PadfreeError: there is none of that name.
        TypeError: it does not take an argument.
    """
    if name not in NETWORKS:
        raise PadfreeError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](num_classes, **arguments)

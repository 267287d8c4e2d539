"""The layers of a converted network that the conversion put there."""

from __future__ import annotations

from torch import nn

from padfree.layers.preserve import own_tensors
from padfree.layers.stem import StemTail
from padfree.types import NEW


def new_layers(model: nn.Module) -> dict[str, nn.Module]:
    """New modules with parameters or statistics of their own, by path: convolutions and norms."""
    modules = dict(model.named_modules())
    tails = tuple(f"{path}." for path, module in modules.items() if isinstance(module, StemTail))
    found = (path for path in modules if path.startswith(tails) or any(p.startswith(NEW) for p in path.split(".")))
    own = ((path, modules[path]) for path in found)
    return {path: module for path, module in own if own_tensors(module)}


def untrained(model: nn.Module) -> str:
    """One line: how many layers are new, and what to do; "" where there are none."""
    layers = new_layers(model)
    if not layers:
        return ""
    count = sum(p.numel() for module in layers.values() for p in module.parameters(recurse=False))
    return (
        f"{len(layers)} new layers ({count:,} parameters) are untrained: call padfree.calibrate(converted, batches, "
        "original=model) with unlabelled images, or fine-tune, before the network is used"
    )

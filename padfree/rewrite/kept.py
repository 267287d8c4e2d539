"""Children that a user cannot set anew: a layer of the conversion would be lost with them, or be unlike them, unheard.

Such a child carries why as a plain attribute (`KEPT`), so that copies, replicas and wrapped forms of it are known, and
may take its place. The class of its parent looks at it when a child is set; running the network costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from padfree.errors import LockedStateError
from padfree.types import KEPT

_ORIGINAL = "set it on the original model and convert again"
_UNFUSED = "set it on the network that padfree.fuse was given, and fuse that"

PLACED = f"holds a layer that the conversion put in its place, which would be lost; {_ORIGINAL}"
MOVED = f"was moved by the conversion, and what is here only passes on; {_ORIGINAL}"
LIKE = f"is what new layers of the conversion were made like, which would stay as they are; {_ORIGINAL}"
FOLDED = f"and the norm behind it are folded into one in a fused network; {_UNFUSED}"
REST = f"is folded into the convolution before it in a fused network; {_UNFUSED}"
MERGED = f"is merged with others into one layer in a fused network; {_UNFUSED}"


def check_child(parent: nn.Module, name: Any, value: Any) -> None:
    """Refuse to set the child of this name anew.

    Args:
        parent: a module.
        name: of an attribute.
        value: what is to be there.

    Raises:
        LockedStateError: a child is there that must stay, and `value` is neither it, nor a wrapper or a copy of it; or
            the parent only stands for what is elsewhere.
    """
    own = parent.__dict__.get(KEPT)
    if own in (REST, MERGED) and isinstance(parent, nn.Identity) and isinstance(value, (nn.Module, torch.Tensor)):
        raise LockedStateError(f"`{name}` cannot be set here: this module {own}")
    child = parent.__dict__.get("_modules", {}).get(name)
    why = getattr(child, KEPT, None)
    if child is not None and why is not None and not _keeps(child, why, value):
        raise LockedStateError(f"{type(parent).__name__}.{name} {why}")


def _keeps(child: nn.Module, why: str, value: Any) -> bool:
    if not isinstance(value, nn.Module):
        return False
    if any(getattr(module, KEPT, None) == why for module in value.modules()):
        return True
    if why == LIKE and _settings(value) == _settings(child):
        return True
    if child._modules:
        return False
    own = {id(parameter) for parameter in child.parameters()}
    return bool(own) and own <= {id(parameter) for parameter in value.parameters()}


def _settings(activation: nn.Module) -> list[tuple[type[nn.Module], str]]:
    """What two activations have in common that compute the same, in place or not."""
    apart = ("inplace", "training", KEPT)
    return [
        (type(module), repr([(k, v) for k, v in vars(module).items() if not k.startswith("_") and k not in apart]))
        for module in activation.modules()
    ]

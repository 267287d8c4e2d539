"""The entry points that timm finds under the names `padfree_<name>`; timm calls this module "padfree_networks".

timm's registry reads `__all__` and `default_cfgs` of the module that an entry point says it is from.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, get_arch_pretrained_cfgs, is_model, register_model
from torch import nn

from padfree.errors import PadfreeError
from padfree.files.sources import BY_NAME
from padfree.timm.building import MEASURED, build

__all__: list[str] = []
default_cfgs: dict[str, DefaultCfg] = {}


def register(*names: str) -> None:
    """Make `padfree_<name>` known to timm for networks that timm knows, such as those that you registered yourself.

    Names that are known already are passed over. Their weights' tags are known too.

    Raises:
        PadfreeError: timm does not know one of them.
    """
    for name in names:
        if not is_model(name) or "." in name:
            raise PadfreeError(f"timm has no model {name!r}; register it with timm first, and leave out tags")
        if not is_model(BY_NAME + name):
            if found := get_arch_pretrained_cfgs(name):
                default_cfgs[BY_NAME + name] = _described(found)
            register_model(_entry_point(name))


def _described(found: dict[str, PretrainedCfg]) -> DefaultCfg:
    """The original's configurations, by tag, without what is known only when the network has been converted."""
    unknown: dict[str, Any] = dict.fromkeys(MEASURED)
    tags = {full.partition(".")[2]: dataclasses.replace(cfg, **unknown) for full, cfg in found.items()}
    return DefaultCfg(tags=deque(tags), cfgs=tags, is_pretrained=any(cfg.has_weights for cfg in tags.values()))


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build(name, pretrained, kwargs)

    entry_point.__name__ = entry_point.__qualname__ = BY_NAME + name
    entry_point.__doc__ = f"The padding-free form of timm's {name}."
    entry_point.__module__ = __name__
    return entry_point

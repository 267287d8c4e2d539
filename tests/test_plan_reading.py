"""Plans as anybody may write them: format 1, lies, repetitions, far too much of it."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import padfree
from padfree.errors import PlanError
from padfree.rules._downsampling import Downsampling
from padfree.rules._toys import Residual, depthwise, net, unit
from padfree.rules.base import Shortcut, registered, rules
from padfree.rules.projection import Pool, Projection
from padfree.rules.stem import Stem

SIZE = (3, 32, 32)


def build() -> nn.Module:
    """A stem, a strided block whose shortcut is a pool, and a strided depthwise conv."""
    torch.manual_seed(0)
    main = unit(8, 16, stride=2)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16))
    return net(Residual(main, shortcut), depthwise(16), out=16).eval()


FORMAT_1: dict[str, Any] = {
    "format": 1,
    "model": "Sequential",
    "input_size": [3, 32, 32],
    "options": {
        "merge": "activation",
        "pool": "3x3",
        "projection": "depthwise",
        "stem_residual": False,
        "allow_resize": False,
    },
    "matches": MATCHES,
    "skips": [],
    "earlier": None,
}
"""What the version before wrote for `build()`."""

"""What every part of a recipe file has in common: strict numbers, no unknown keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(strict=True, gt=0)]  # `true` is not 1
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]


def _finite(value: Any) -> Any:
    """A value without infinities in it, whatever it holds."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"input should be finite numbers, and {item} is among them")
        if isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))  # YAML's aliases may repeat a value many times over
            waiting += item.values() if isinstance(item, Mapping) else item
    return value


Arguments = Annotated[dict[str, Any], AfterValidator(_finite)]


class Section(BaseModel):
    """A part of a recipe: frozen, without keys that nobody reads, its numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

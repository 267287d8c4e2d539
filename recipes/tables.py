"""Measured figures beside the published ones, row by row.

A row is *off* when the network built here does not have the reference implementation's figures
(parameters exactly; operations exactly, but for `fvcore`, where conv and linear are exact and the total is within
0.5 %), is further from the published figure than an inferred convention may be (`modules` 1 %, `tf-profile` 0.35 %), or
when a figure does not round to the printed one and the recipe gives no reason.

The rows are those of the recipes, and last those of BSConv's own tables (bsconv_table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .bsconv_table import SIDE, networks
from .count import Convention, Count, count
from .figures import Digits, Published, Row
from .files import RecipeError, load, names
from .recipe import Recipe

FVCORE_TOLERANCE = 0.005
INFERRED = {"modules": 0.01, "tf-profile": 0.0035}  # conventions, and how near they come to what is printed
OTHERS: tuple[Convention, ...] = ("fvcore", "bsconv")  # conventions that rows are also counted in
BSCONV = "bsconv"  # the table of BSConv's own networks


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        recipe, variant: which network.
        convention: how operations are counted.
        published: printed figures (millions; top-1 in percent).
        digits: decimals of the printed millions, of params and flops.
        measured: what the network built here has; nothing where it cannot be built.
        reference: the reference implementation's figures.
        off: what is wrong, one sentence each; empty for a good row.
        remarks: measured figures that do not round to the printed ones, each with its reason, and what else a reader
            should know.
    """

    recipe: str
    variant: str
    convention: str
    published: dict[str, float]
    digits: dict[str, int]
    measured: dict[str, int]
    reference: dict[str, int]
    off: tuple[str, ...]
    remarks: tuple[str, ...]

    def differences(self) -> dict[str, float]:
        """Measured less published, in millions."""
        return {
            key: round(self.measured[key.removesuffix("_m")] / 1e6 - value, 6)
            for key, value in self.published.items()
            if key.endswith("_m") and self.measured
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "difference": self.differences()}


def tables() -> tuple[str, ...]:
    """The tables that have published figures: those of recipes in the order of their names, and BSConv's."""
    return (*dict.fromkeys(recipe.table for recipe in _published()), BSCONV)


def lines(table: str | None = None, progress: Callable[[str], None] = lambda text: None) -> Iterator[Line]:
    """Build, count and compare every published row.

    Args:
        table: only this one.
        progress: called with what is being built.

    Raises:
        RecipeError: no such table.
    """
    if table is not None and table not in tables():
        raise RecipeError(f"no table {table!r}; there are {', '.join(tables())}")
    for recipe in _published():
        if table in (None, recipe.table):
            yield from recipe_lines(recipe, progress)
    if table in (None, BSCONV):
        yield from bsconv_lines(progress=progress)


def recipe_lines(recipe: Recipe, progress: Callable[[str], None] = lambda text: None) -> Iterator[Line]:
    """The rows of one recipe."""
    if recipe.figures is None:
        raise RecipeError(f"recipe {recipe.name} has no published figures to compare with")
    for variant, row in recipe.figures.rows.items():
        progress(f"{recipe.name} {variant}")
        network = recipe.build(variant)
        yield compared(recipe.name, variant, row, network, recipe.model.input_side, recipe.figures.count)


def compared(name: str, variant: str, row: Row, network: nn.Module, side: int, convention: Convention) -> Line:
    """Count a network for its row."""
    counted = count(network, side, convention)
    measured = _figures(counted)
    measured |= {key: count(network, side, key).flops for key in OTHERS if getattr(row.reference, key) is not None}
    off, remarks = _compare(row, counted, measured)
    return Line(
        name,
        variant,
        convention,
        row.published.model_dump(exclude_none=True),
        row.digits.model_dump(),
        measured,
        row.reference.model_dump(exclude_none=True),
        off,
        remarks,
    )


def bsconv_lines(
    architectures: Sequence[str] | None = None, progress: Callable[[str], None] = lambda text: None
) -> Iterator[Line]:
    """The networks of BSConv's own tables (or those named), original and padding-free."""
    for network in networks(architectures, progress):
        name = f"{BSCONV}/{network.architecture}"
        row = Row(published=Published(**network.published), digits=Digits(params=2, flops=2))
        yield compared(name, "original", row, network.original, SIDE, "bsconv")
        if network.padfree is not None:
            yield compared(name, "padfree", Row(), network.padfree, SIDE, "bsconv")
        else:
            why = (f"there is no padding-free form: {network.skipped}",)
            yield Line(name, "padfree", "bsconv", {}, Digits().model_dump(), {}, {}, why, ())


def _published() -> Iterator[Recipe]:
    for name in names():
        recipe = load(name)
        if recipe.figures is not None:
            yield recipe


def _figures(counted: Count) -> dict[str, int]:
    figures = {
        "params": counted.params,
        "layer_params": counted.params - counted.bare_params,
        "flops": counted.flops,
        "conv_linear": counted.conv_linear,
        "downsampling_pool_inputs": counted.downsampling_pool_inputs,
    }
    return {key: value for key, value in figures.items() if value is not None}


def _compare(row: Row, counted: Count, measured: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    reference = row.reference.model_dump(exclude_none=True)
    off = []
    for key, wanted in reference.items():
        if key not in measured:
            off.append(f"{key} is not counted by {counted.convention}; take it out of the recipe's figures")
            continue
        got = measured[key]
        exact = key != "fvcore" and (key != "flops" or counted.convention != "fvcore")
        if got != wanted if exact else abs(got - wanted) > FVCORE_TOLERANCE * wanted:
            off.append(f"{key} is {got:,}, the reference implementation has {wanted:,}")
    remarks = []
    for key in ("params", "flops"):
        printed, digits = getattr(row.published, f"{key}_m"), getattr(row.digits, key)
        # a comparison row's parameters are published without the bare ones
        got = measured["layer_params" if key == "params" and "params" not in reference else key]
        if printed is None:
            continue
        nearness = INFERRED.get(counted.convention) if key == "flops" else None
        near = nearness is not None and abs(got / 1e6 - printed) <= nearness * printed
        reason = row.differs.get("params" if key == "params" else "flops")
        if near:
            reason = reason or f"the convention is inferred; within {nearness:.2%}"
        text = f"{key} {got / 1e6:.{digits}f}M is printed as {printed:.{digits}f}M"
        if nearness is not None and not near:
            off.append(f"{text}, and the inferred convention comes within {nearness:.2%}")
        elif round(got / 1e6, digits) == printed:
            continue
        elif reason is None:
            off.append(f"{text}, and the recipe gives no reason")
        else:
            remarks.append(f"{text}: {reason}")
    return tuple(off), (*remarks, *([row.note] if row.note else []))

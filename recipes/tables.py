"""Measured figures beside the published ones, row by row.

A row is *off* when the network built here does not have the reference implementation's figures
(parameters exactly; operations exactly under `bsconv`, conv and linear exactly and the total within
0.5 % under `fvcore`, within 1 % of the published figure under `modules`), or when a figure does not
round to the printed one and the recipe gives no reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .count import Count, count
from .files import RecipeError, load, names
from .recipe import Recipe
from .schema import Row

FVCORE_TOLERANCE = 0.005
MODULES_TOLERANCE = 0.01
PARAMS_DIGITS, FLOPS_DIGITS = 3, 1  # decimals of the printed millions


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        recipe, variant: which network.
        convention: how operations are counted.
        published: printed figures (millions; top-1 in percent).
        measured: what the network built here has.
        reference: the reference implementation's figures.
        off: what is wrong, one sentence each; empty for a good row.
        remarks: measured figures that do not round to the printed ones, each with its reason.
    """

    recipe: str
    variant: str
    convention: str
    published: dict[str, float]
    measured: dict[str, int]
    reference: dict[str, int]
    off: tuple[str, ...]
    remarks: tuple[str, ...]

    def differences(self) -> dict[str, float]:
        """Measured less published, in millions."""
        return {
            key: round(self.measured[key.removesuffix("_m")] / 1e6 - value, 6)
            for key, value in self.published.items()
            if key.endswith("_m")
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "difference": self.differences()}


def tables() -> tuple[str, ...]:
    """The tables that have published figures, in the order of their names."""
    return tuple(dict.fromkeys(recipe.table for recipe in _published()))


def lines(table: str | None = None, progress: Callable[[str], None] = lambda text: None) -> Iterator[Line]:
    """Build, count and compare every published row.

    Args:
        table: only this one.
        progress: called with what is being built.

    Raises:
        RecipeError: no such table.
    """
    if table is not None and table not in tables():
        raise RecipeError(f"no table {table!r}; there are {', '.join((*tables(), 'bsconv'))}")
    for recipe in _published():
        if table in (None, recipe.table):
            yield from recipe_lines(recipe, progress)


def recipe_lines(recipe: Recipe, progress: Callable[[str], None] = lambda text: None) -> Iterator[Line]:
    """The rows of one recipe."""
    if recipe.figures is None:
        raise RecipeError(f"recipe {recipe.name} has no published figures to compare with")
    convention = recipe.figures.count
    for variant, row in recipe.figures.rows.items():
        progress(f"{recipe.name} {variant}")
        counted = count(recipe.build(variant), recipe.model.input_side, convention)
        off, remarks = _compare(row, counted)
        yield Line(
            recipe.name,
            variant,
            convention,
            row.published.model_dump(exclude_none=True),
            _figures(counted),
            row.reference.model_dump(exclude_none=True),
            off,
            remarks,
        )


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


def _compare(row: Row, counted: Count) -> tuple[tuple[str, ...], tuple[str, ...]]:
    measured, reference = _figures(counted), row.reference.model_dump(exclude_none=True)
    off = []
    for key, wanted in reference.items():
        if key not in measured:
            off.append(f"{key} is not counted by {counted.convention}; take it out of the recipe's figures")
            continue
        got = measured[key]
        exact = key != "flops" or counted.convention == "bsconv"
        if got != wanted if exact else abs(got - wanted) > FVCORE_TOLERANCE * wanted:
            off.append(f"{key} is {got:,}, the reference implementation has {wanted:,}")
    remarks = []
    for key, digits in (("params", PARAMS_DIGITS), ("flops", FLOPS_DIGITS)):
        printed = getattr(row.published, f"{key}_m")
        # a comparison row's parameters are published without the bare ones
        got = measured["layer_params" if key == "params" and "params" not in reference else key]
        if printed is None or round(got / 1e6, digits) == printed:
            continue
        text = f"{key} {got / 1e6:.{digits}f}M is printed as {printed:.{digits}f}M"
        reason = row.differs.get("params" if key == "params" else "flops")
        near = abs(got / 1e6 - printed) <= MODULES_TOLERANCE * printed
        if counted.convention == "modules" and key == "flops" and near:
            reason = "the convention is inferred; within 1 %"
        if reason is None:
            off.append(f"{text}, and the recipe gives no reason")
        else:
            remarks.append(f"{text}: {reason}")
    return tuple(off), tuple(remarks)

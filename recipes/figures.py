"""The figures that a recipe is held against: printed ones, and those of a correct network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .count import Convention
from .sections import NonNegativeInt, PositiveInt, Section

Variant = Literal["original", "padfree", "stem-only", "downsampling-only", "efficientformerv2"]


class Published(Section):
    """Figures as printed: millions of parameters and operations, top-1 accuracy in percent."""

    params_m: float | None = None
    flops_m: float | None = None
    top1: float | None = None


class Reference(Section):
    """Figures of the reference implementation that a correct network reproduces; see `Count`.

    Attributes:
        params: all parameters.
        layer_params: parameters without bare ones.
        flops: under the recipe's convention, for one image.
        conv_linear: multiply-adds of conv and linear layers (all conventions but bsconv and modules).
        downsampling_pool_inputs: of `flops`, inputs of strided max-pools (bsconv).
        fvcore, bsconv: operations under these conventions, where the recipe's is another.
    """

    params: PositiveInt | None = None
    layer_params: PositiveInt | None = None
    flops: PositiveInt | None = None
    conv_linear: PositiveInt | None = None
    downsampling_pool_inputs: NonNegativeInt | None = None
    fvcore: PositiveInt | None = None
    bsconv: PositiveInt | None = None


class Digits(Section):
    """Decimals of the printed millions."""

    params: NonNegativeInt = 3
    flops: NonNegativeInt = 1


class Row(Section):
    """One row: a published one, or a form of a published network.

    Attributes:
        published: what is printed.
        digits: with how many decimals.
        reference: what a correct network has.
        differs: why a measured figure does not round to the printed one.
        note: what a reader of the table should know.
    """

    published: Published = Published()
    digits: Digits = Digits()
    reference: Reference = Reference()
    differs: dict[Literal["params", "flops"], str] = Field(default_factory=dict)
    note: str | None = None


class Figures(Section):
    """The paper's figures of a recipe and the convention that its operations are counted in."""

    count: Convention
    rows: dict[Variant, Row]

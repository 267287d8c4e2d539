"""BSConv's own results tables: every network built, counted, converted and counted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import padfree
from padfree import PadfreeError

from .count import count
from .files import read_yaml
from .models import build_model
from .schema import ModelSpec

ROWS = Path(__file__).parent / "bsconv_rows.yaml"
SIDE, CLASSES = 32, 100
DIGITS = 2  # decimals of the printed millions


@dataclass(frozen=True)
class BSConvLine:
    """One network of BSConv's tables.

    Attributes:
        architecture: its name in the bsconv package.
        published: printed figures: params_m, flops_m (millions), top1 (percent).
        original: params and flops of the network as the package builds it, `bsconv` convention.
        padfree: the same of its padding-free form; None where `skipped` says why.
        off: counts of the original that do not round to the printed ones.
        skipped: why there is no padding-free form.
    """

    architecture: str
    published: dict[str, float]
    original: dict[str, int]
    padfree: dict[str, int] | None
    off: tuple[str, ...]
    skipped: str | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def rows() -> dict[str, dict[str, float]]:
    """The published figures by architecture."""
    data: dict[str, dict[str, float]] = read_yaml(ROWS)
    return data


def bsconv_lines(
    architectures: list[str] | None = None, progress: Callable[[str], None] = lambda text: None
) -> Iterator[BSConvLine]:
    """Build and count the networks of the tables (or those named), original and padding-free."""
    for architecture, published in rows().items():
        if architectures is None or architecture in architectures:
            progress(architecture)
            yield _line(architecture, published)


def _line(architecture: str, published: dict[str, float]) -> BSConvLine:
    spec = ModelSpec(builder="bsconv", name=architecture, num_classes=CLASSES, input_side=SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(spec)
        original = _counted(model)
        off = tuple(
            f"{key} is {original[key]:,}, printed as {published[f'{key}_m']:.{DIGITS}f}M"
            for key in ("params", "flops")
            if round(original[key] / 1e6, DIGITS) != published[f"{key}_m"]
        )
        # published with WRN-40-3 alone (paper.md, "Projection shortcut")
        dense = architecture == "cifar_wrn40_3"
        options = padfree.Options(stem_residual=True, projection="dense" if dense else "depthwise")
        converted, skipped = None, None
        try:
            converted = _counted(padfree.convert(model, options=options, input_size=(3, SIDE, SIDE)))
        except PadfreeError as error:
            skipped = str(error)
    return BSConvLine(architecture, published, original, converted, off, skipped)


def _counted(model: torch.nn.Module) -> dict[str, int]:
    counted = count(model, SIDE, "bsconv")
    return {"params": counted.params, "flops": counted.flops}

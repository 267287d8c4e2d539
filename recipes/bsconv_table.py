"""BSConv's own results tables: every network built, and its padding-free form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import padfree
from padfree import PadfreeError

from .files import read_yaml
from .models import build_model
from .schema import ModelSpec

ROWS = Path(__file__).parent / "bsconv_rows.yaml"
SIDE, CLASSES = 32, 100


@dataclass(frozen=True)
class BSConvNetwork:
    """One network of BSConv's tables.

    Attributes:
        architecture: its name in the bsconv package.
        published: printed figures: params_m, flops_m (millions), top1 (percent).
        original: the network as the package builds it.
        padfree: its padding-free form; None where `skipped` says why.
        skipped: why there is no padding-free form.
    """

    architecture: str
    published: dict[str, float]
    original: nn.Module
    padfree: nn.Module | None
    skipped: str | None


def rows() -> dict[str, dict[str, float]]:
    """The published figures by architecture."""
    data: dict[str, dict[str, float]] = read_yaml(ROWS)
    return data


def networks(architectures: Sequence[str] | None, progress: Callable[[str], None]) -> Iterator[BSConvNetwork]:
    """Build the networks of the tables (or those named), one after the other.

    Args:
        architectures: only these.
        progress: called with what is being built.
    """
    for architecture, published in rows().items():
        if architectures is None or architecture in architectures:
            progress(architecture)
            yield _network(architecture, published)


def _network(architecture: str, published: dict[str, float]) -> BSConvNetwork:
    spec = ModelSpec(builder="bsconv", name=architecture, num_classes=CLASSES, input_side=SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(spec)
        # published with WRN-40-3 alone (the paper, "Projection shortcut")
        dense = architecture == "cifar_wrn40_3"
        options = padfree.Options(stem_residual=True, projection="dense" if dense else "depthwise")
        converted, skipped = None, None
        try:
            converted = padfree.convert(model, options=options, input_size=(3, SIDE, SIDE))
        except PadfreeError as error:
            skipped = str(error)
    return BSConvNetwork(architecture, published, model, converted, skipped)

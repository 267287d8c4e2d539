"""`padfree-convert --report`: the page, and the images that it measures on."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

from padfree.borders.effect import scene_size
from padfree.cli.folder import batches, check_readable, image_files
from padfree.errors import PadfreeError
from padfree.files.sources import Source
from padfree.page.content import Request
from padfree.page.writing import check_extra, write_page
from padfree.report.comparison import Comparison
from padfree.types import PlanData

_IMAGES = 32


def check_page(arguments: argparse.Namespace) -> None:
    """Refuse what cannot become a page before any work is done."""
    if arguments.report is not None and Path(arguments.report).suffix not in (".html", ".htm"):
        raise PadfreeError(f"--report {arguments.report}: the name must end in .html")
    if arguments.report is not None:
        check_extra()
    if arguments.images is not None:
        if arguments.report is None:
            raise PadfreeError("--images is about --report, which is not asked for")
        check_readable(image_files(arguments.images, most=_IMAGES, flag="--images", least=1))


def write_report(
    arguments: argparse.Namespace,
    original: nn.Module,
    converted: nn.Module,
    made: PlanData,
    comparison: Comparison,
    source: Source,
    told: str,
) -> None:
    """Write the page that `arguments.report` names."""
    images: list[Tensor] | None = None
    if arguments.images is not None:
        files = image_files(arguments.images, most=_IMAGES, flag="--images", least=1)
        images = batches(original, scene_size(original, made.input_size), files, flag="--images")
    trained = "Weights: the library's" if arguments.pretrained else "Weights: random"
    if source.library == "factory":
        trained = f"Weights: as {source.name} returns them"
    weights = f"Weights: {arguments.checkpoint}" if arguments.checkpoint is not None else trained
    said = f"{weights}; {told}" if told else f"{weights}; new layers are untrained"
    write_page(
        Path(arguments.report),
        Request(original, converted, made, comparison, source, arguments.command, f"{said}.", images),
    )

"""Which of timm's networks can be converted, known without building any."""

from __future__ import annotations

from importlib.resources import files

from timm.models import list_models

from padfree.files.sources import BY_NAME


def convertible() -> list[str]:
    """Names of the installed timm's networks that have something to convert, in timm's order.

    Left out are those in which `python -m benchmarks.coverage` found nothing (vision transformers, ConvNeXts, ...);
    networks of a timm that is newer than that list are taken in, and building one says if there is nothing.
    """
    lacking = set(files(__package__).joinpath("nothing_to_convert.txt").read_text(encoding="utf-8").split())
    return [name for name in list_models() if name not in lacking and not name.startswith(BY_NAME)]

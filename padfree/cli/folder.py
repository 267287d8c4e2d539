"""Images of a folder as a network takes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.trees import first_line

IMAGES, BATCH = 1280, 64
_SIXTEEN_BIT = ("PNG", "PPM")  # formats whose 16-bit values PIL also gives as 32-bit ones
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})


def image_files(
    folder: str | os.PathLike[str], most: int = IMAGES, *, flag: str = "--calibrate", least: int = 2
) -> list[Path]:
    """At most so many images of a folder and those below it, evenly chosen from their sorted names.

    Args:
        folder: where they are.
        most: how many to choose.
        flag: of the command line, for messages.
        least: how many there must be.

    Raises:
        PadfreeError: there is no such folder, or it has no images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PadfreeError(f"{flag} {folder}: there is no such folder")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if len(found) < least:
        has = "one image" if len(found) == 1 else f"{len(found)} images"
        raise PadfreeError(
            f"{flag} {folder}: it has {has} ({', '.join(sorted(_SUFFIXES))}, in folders below it "
            f"too); {'one is' if least == 1 else 'some hundred are'} needed"
        )
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def check_readable(files: list[Path]) -> None:
    """Refuse a file that is no image before any work is done.

    Raises:
        PadfreeError: it cannot be read.
    """
    for file in files:
        with _opened(file) as image:
            _eight_bit(file, image)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PadfreeError(f"{file} is no image that can be read: {first_line(error)}") from error


def _eight_bit(file: Path, image: Any) -> Any:
    """The image with values from 0 to 255: PIL makes other ones white where they are more.

    Raises:
        PadfreeError: its values may be of any range.
    """
    import numpy as np
    from PIL import Image

    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BIT):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise PadfreeError(f"{file} has {kind} pixels, whose range is not known; save it with 8 or 16 bits")
    return image


def batches(model: nn.Module, size: tuple[int, ...], files: list[Path], *, flag: str = "--calibrate") -> list[Tensor]:
    """The images in batches, resized, cropped and normalised as the model's configuration says.

    Networks without one of timm's get ImageNet's mean and standard deviation. Images that lie side by side, of one
    class perhaps, go to different batches.

    Args:
        model: the network; its `pretrained_cfg` is looked at.
        size: (C, H, W) of one image; C is 1 or 3.
        files: of the images.
        flag: of the command line, for messages.

    Raises:
        PadfreeError: a file is no image that can be read, or the network takes other than grey or colour images.
    """
    if size[0] not in (1, 3) or len(size) != 3:
        raise PadfreeError(f"{flag} reads grey and colour images, and the network takes {size[0]} channels")
    transform = _transform(model, size)
    images: list[Tensor] = []
    for file in files:
        with _opened(file) as image:
            images.append(transform(_eight_bit(file, image).convert("L" if size[0] == 1 else "RGB")))
    count = -(-len(images) // BATCH)
    return [torch.stack(images[start::count]) for start in range(count)]


def _transform(model: nn.Module, size: tuple[int, ...]) -> Any:
    import timm

    data: Any = timm.data
    known = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = data.resolve_data_config({"input_size": size}, pretrained_cfg=known if isinstance(known, dict) else {})
    for name in ("mean", "std"):
        if size[0] == 1 and len(config[name]) > 1:
            config[name] = (sum(config[name]) / len(config[name]),)
    return data.create_transform(**config, is_training=False)

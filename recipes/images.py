"""Image files that cannot be read: found before the first epoch, and left out where the recipe says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset

from padfree.cli.status import Tell, silent
from padfree.errors import PadfreeError

from .console import note
from .recipe import Recipe

_MANY = 20_000  # images whose reading takes long enough to be told
_CHUNK = 64  # images that a thread reads in a row
_TOLD = 500  # images between two of the numbers that are told
_SHOWN = 3  # damaged files named in a message


class DataError(PadfreeError):
    """A data set is not there, not whole, or not what the recipe says."""


def open_image(path: str) -> Any:
    """An RGB image from a file.

    Raises:
        DataError: the file is not there, damaged, or no image.
    """
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # Pillow's decoders raise kinds of their own
        raise DataError(f"{path}: cannot be read as an image: {error}; fetch or extract it again") from error


class ReaderImages(Dataset[tuple[Tensor, int]]):
    """The images of one of timm's readers; one that is damaged is an error, and not another one in its place.

    Args:
        reader: of timm.
        transform: of a PIL image.
    """

    def __init__(self, reader: Any, transform: Callable[[Any], Tensor]) -> None:
        self.reader, self.transform = reader, transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.read(index)
        return self.transform(image), -1 if target is None else target

    def path(self, index: int) -> str:
        """What the reader calls an image: the path of its file, where it has one."""
        return str(self.reader.filename(index, absolute=True))

    def read(self, index: int) -> tuple[Any, Any]:
        """An RGB image, and its class.

        Raises:
            DataError: it cannot be read.
        """
        from PIL import Image

        try:
            file, target, *_ = self.reader[index]
            return Image.open(file).convert("RGB"), target
        except Exception as error:  # of the reader's packages and of Pillow's decoders
            raise DataError(
                f"{self.path(index)}: cannot be read as an image: {error}; fetch or extract it again"
            ) from error


def readable(accelerator: Any, recipe: Recipe, dataset: Any, split: str, progress: Tell = silent) -> Any:
    """The data set, once each of its image files has been read; the processes share them out.

    Data sets that are not of files (arrays, streams, archives) are returned as they are: an image of theirs that
    cannot be read ends the run with its name.

    Args:
        accelerator: of this process.
        recipe: `data.check_images` and `data.skip_corrupt` are looked at.
        dataset: map-style, with all processes alike.
        split: what the images are, for messages.
        progress: called with what is being done.

    Raises:
        DataError: some cannot be read, and `data.skip_corrupt` is not set, or none can.
    """
    paths = _paths(dataset)
    if paths is None or not recipe.data.check_images:
        return dataset
    if accelerator.is_main_process and len(paths) > _MANY:
        note(f"reading all {len(paths):,} {split} images once; data.check_images=false leaves that out")
    mine = range(accelerator.process_index, len(paths), accelerator.num_processes)
    with ThreadPool(max(1, (os.cpu_count() or 1) // accelerator.num_processes)) as pool:
        found = []
        for number, item in enumerate(pool.imap(lambda index: (index, _fault(paths[index])), mine, _CHUNK)):
            if number % _TOLD == 0:
                progress(f"reading {split} images, {number:,} of {len(mine):,}")
            found += [item] if item[1] else []
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    faults = dict(sorted(found))
    if not faults:
        return dataset
    shown = ", ".join(paths[index] for index in list(faults)[:_SHOWN]) + (", ..." if len(faults) > _SHOWN else "")
    told = f"{len(faults)} of {len(paths)} {split} images cannot be read: {shown}"
    if not recipe.data.skip_corrupt or len(faults) == len(paths):
        told = next(iter(faults.values())) if len(faults) == 1 else f"{told}; fetch or extract them again"
        raise DataError(f"{told}, or go on without with data.skip_corrupt=true")
    if accelerator.is_main_process:
        note(f"{told}; they are left out")
    return Subset(dataset, [index for index in range(len(paths)) if index not in faults])


def _paths(dataset: Any) -> list[str] | None:
    """The image files of a data set by index, None where it is not made of files."""
    samples = getattr(dataset, "samples", None)  # of torchvision's folders
    names = getattr(dataset, "image_filenames", None)  # of bsconv's Stanford Dogs
    if samples is not None:
        return [str(path) for path, _ in samples]
    if names is not None:
        return [str(name) for name in names]
    if not isinstance(dataset, ReaderImages) or not hasattr(dataset.reader, "samples"):
        return None
    paths = [dataset.path(index) for index in range(len(dataset))]
    return paths if paths and os.path.isfile(paths[0]) else None


def _fault(path: str) -> str:
    try:
        open_image(path)
    except DataError as error:
        return str(error)
    return ""

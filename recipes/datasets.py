"""The recipes' data sets: what lies on disk, made into pairs of an image tensor and a class index.

Whatever is missing, damaged or of another shape is one clear line: what was looked for, where, and how
to get it.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from . import bundled
from .images import DataError, ReaderImages, open_image
from .recipe import Recipe
from .transforms import compose

Transform = Callable[[Any], Tensor]
_READERS = ("hfds", "hfids", "tfds", "torch", "wds")  # timm's that take a name


def build_dataset(recipe: Recipe, train: bool) -> Any:
    """The training or the test images of a recipe.

    Returns:
        A map-style or (timm's streaming readers) iterable dataset of `(image, class)`: a float tensor
        (3, side, side) and an integer below the recipe's `num_classes`.

    Raises:
        DataError: see the module.
    """
    dataset = open_dataset(recipe, train)
    if not isinstance(dataset, IterableDataset):
        check_dataset(recipe, dataset, train)
    return dataset


def open_dataset(recipe: Recipe, train: bool) -> Any:
    """What `build_dataset` returns, before any of its images is looked at."""
    transform = compose(recipe.data.train if train else recipe.data.eval)
    return _SOURCES[recipe.data.dataset](recipe, train, transform)


def _digits(recipe: Recipe, train: bool, transform: Transform) -> Any:
    return bundled.digits(train, transform)


def _mnist5k(recipe: Recipe, train: bool, transform: Transform) -> Any:
    return bundled.mnist5k(train, transform)


def _photos(recipe: Recipe, train: bool, transform: Transform) -> Any:
    data = recipe.data
    number = data.train_samples if train else data.eval_samples
    side = recipe.model.input_side if data.crop_side is None else data.crop_side
    return bundled.Photographs(train, transform, side=side, number=number, grey=data.grey)


def _cifar(recipe: Recipe, train: bool, transform: Transform) -> Any:
    from torchvision import datasets

    root = _root(recipe)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[recipe.data.dataset]
    folder = root / kind.base_folder
    if not folder.is_dir() and not recipe.data.download:
        raise DataError(
            f"no {kind.__name__}: looked for its python version in {folder}; data.download=true fetches it, "
            f"or extract {kind.url} there"
        )
    try:
        return kind(root, train=train, transform=transform, download=recipe.data.download)
    except (RuntimeError, OSError, KeyError, ValueError, EOFError) as error:
        raise DataError(
            f"{folder}: {kind.__name__} is there but not whole (a file is missing or its checksum is wrong); "
            f"remove the folder and fetch it again with data.download=true"
        ) from error


def _stanford_dogs(recipe: Recipe, train: bool, transform: Transform) -> Any:
    from bsconv.datasets import StanfordDogs

    root = _root(recipe)
    if recipe.data.download:
        fetch_stanford_dogs(root, StanfordDogs.sources)
    wanted = [name for source in StanfordDogs.sources for name in source["extracted_filenames"]]
    missing = [name for name in wanted if not (root / name).exists()]
    if missing:
        raise DataError(
            f"no Stanford Dogs: {root} has no {', '.join(missing)}; data.download=true fetches images.tar "
            f"and lists.tar from vision.stanford.edu/aditya86/ImageNetDogs and extracts them"
        )
    try:
        return StanfordDogs(root, train=train, transform=transform, loader=open_image)
    except AssertionError as error:
        raise DataError(
            f"{root}: the lists of Stanford Dogs do not name 12,000 training and 8,580 test images; "
            f"extract lists.tar again"
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{root}: the lists of Stanford Dogs are damaged ({error}); extract lists.tar again") from error


def fetch_stanford_dogs(root: Path, sources: Any) -> None:
    """Download (checksummed) and extract the archives that are not extracted yet.

    Members that would land outside of the folder, by name or through a link, are refused by tarfile's data
    filter. An archive is extracted under another name first, so that what is there is whole.
    """
    from torchvision.datasets.utils import download_url

    for source in sources:
        if all((root / name).exists() for name in source["extracted_filenames"]):
            continue
        try:
            download_url(source["url"], str(root), source["filename"], source["md5"])
            with tarfile.open(root / source["filename"]) as archive, tempfile.TemporaryDirectory(dir=root) as part:
                archive.extractall(part, filter="data")
                for name in source["extracted_filenames"]:
                    os.replace(Path(part) / name, root / name)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise DataError(f"{source['url']}: could not be fetched to {root}: {error}") from error


def _folder(recipe: Recipe, train: bool, transform: Transform) -> Any:
    from torchvision.datasets import ImageFolder

    root = _root(recipe)
    splits = {True: root / recipe.data.train_split, False: root / recipe.data.eval_split}
    for folder in splits.values():
        if not folder.is_dir():
            raise DataError(
                f"no images: looked for {folder}/<class>/<image>; put the training images into "
                f"{splits[True]} and the test images into {splits[False]}, one folder per class, "
                f"or set data.root"
            )
    try:
        dataset = ImageFolder(str(splits[train]), transform=transform, loader=open_image)
    except FileNotFoundError as error:
        raise DataError(f"{splits[train]}: {error}") from error
    other = {path.name for path in splits[not train].iterdir() if path.is_dir()}
    if unlike := sorted(set(dataset.classes) ^ other):
        raise DataError(
            f"{splits[True]} and {splits[False]} do not hold the same classes: "
            f"{', '.join(unlike[:3])}{' ...' if len(unlike) > 3 else ''} is in one of them only"
        )
    return dataset


def _timm(recipe: Recipe, train: bool, transform: Transform) -> Any:
    from timm.data.dataset_factory import create_dataset

    data = recipe.data
    split = data.train_split if train else data.eval_split
    root = None if data.root is None else str(_root(recipe))
    kind, slash, _ = str(data.reader).partition("/")
    if slash and kind not in _READERS:  # timm would read it as a folder
        raise DataError(f"data.reader {data.reader}: timm has no reader {kind!r}; there are {', '.join(_READERS)}")
    try:
        dataset = create_dataset(
            str(data.reader),
            root=root,
            split=split,
            is_training=train,
            download=data.download,
            batch_size=recipe.training.batch_size,
            num_samples=data.train_samples if train else data.eval_samples,
        )
    except Exception as error:  # the readers' packages raise kinds of their own
        raise DataError(
            f"timm's reader {data.reader!r} cannot open split {split!r} at {data.root}: {type(error).__name__}: {error}"
        ) from error
    found = getattr(getattr(dataset, "reader", None), "root", None)
    everything = (
        not slash and found is not None and root is not None and Path(str(found)).resolve() == Path(root).resolve()
    )
    if everything and Path(str(root)).is_dir():  # what timm falls back to
        raise DataError(f"{root} has no folder for split {split!r}: put its images into {root}/{split}/<class>")
    if not isinstance(dataset, IterableDataset):
        return ReaderImages(dataset.reader, transform)
    dataset.transform = transform  # type: ignore[attr-defined]
    return dataset


_SOURCES: dict[str, Callable[[Recipe, bool, Transform], Any]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "photos": _photos,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "stanford-dogs": _stanford_dogs,
    "folder": _folder,
    "timm": _timm,
}


def _root(recipe: Recipe) -> Path:
    if recipe.data.root is None:
        raise DataError(f"recipe {recipe.name} names no data.root for {recipe.data.dataset}")
    try:
        return Path(recipe.data.root).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"data.root {recipe.data.root}: {error}") from error


def check_dataset(recipe: Recipe, dataset: Any, train: bool) -> None:
    """Look at the classes and at the first image.

    Raises:
        DataError: there are none, or others than the recipe says.
    """
    split = "training" if train else "test"
    where = recipe.data.root or recipe.data.dataset
    if len(dataset) == 0:
        raise DataError(f"{where}: the {split} set is empty")
    classes = class_names(dataset)
    if classes is not None and len(classes) != recipe.model.num_classes:
        raise DataError(
            f"{where}: the {split} set has {len(classes)} classes and the recipe says "
            f"model.num_classes: {recipe.model.num_classes}"
        )
    image, _ = dataset[0]
    shape = tuple(getattr(image, "shape", ()))
    side = recipe.model.input_side
    if shape != (3, side, side) or image.dtype != torch.float32:
        raise DataError(
            f"{where}: after the {split} transforms an image is {shape or type(image).__name__}, "
            f"and the recipe needs float32 {(3, side, side)}; add ToTensor, and Resize or a crop to {side}"
        )


def class_names(dataset: Any) -> list[str] | None:
    """The classes of a data set in the order of their indices, None where it does not tell."""
    source = dataset
    while isinstance(source, Subset):
        source = source.dataset
    reader = getattr(source, "reader", None)  # of timm's
    kept = getattr(source, "classes", None), getattr(source, "unique_class_names", None)
    found = next(filter(None, (*kept, getattr(reader, "class_to_idx", None))), None)
    if isinstance(found, dict):
        found = sorted(found, key=found.__getitem__)
    return None if found is None else [str(name) for name in found]

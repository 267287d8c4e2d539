"""Data sets that come inside packages, and the small networks for them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from padfree.recipes import RecipeError, bundled, load
from padfree.recipes.bundled import PHOTOGRAPHS, Photographs, checkerboard, open_photograph
from padfree.recipes.datasets import DataError, build_dataset
from padfree.recipes.small import FAMILIES, small_network
from padfree.recipes.transforms import compose

from padfree import PadfreeError

TENSOR = compose([{"ToTensor": {}}])
pytest.importorskip("skimage")
pytest.importorskip("mlxtend")


# -- photos -----------------------------------------------------------------------------------------


def test_the_photographs_are_there_and_fetch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")  # where skimage.data would keep what it downloads
    sizes = {name: open_photograph(name).size for name in PHOTOGRAPHS}
    assert len(sizes) == 16
    assert sizes["astronaut"] == (512, 512) and sizes["cat"] == (451, 300) and sizes["china"] == (640, 427)
    assert all(min(size) >= 300 for size in sizes.values())


@pytest.mark.parametrize("side", [32, 64])
def test_training_and_test_crops_share_no_pixel(side: int) -> None:
    seen: dict[tuple[int, bool], set[tuple[int, int]]] = {}
    for train in (True, False):
        dataset = Photographs(train, TENSOR, side=side)
        assert len(dataset) == len(dataset.boxes) == (4096 if train else 1600)
        for target, (left, top, right, bottom) in dataset.boxes:
            assert (right - left, bottom - top) == (side, side)
            width, height = dataset.photographs[target].size
            assert min(left, top) >= 0 and right <= width and bottom <= height
            corners = {(x, y) for x in (left, right - 1) for y in (top, bottom - 1)}
            blocks = {(x // (2 * side), y // (2 * side)) for x, y in corners}
            assert len(blocks) == 1  # a crop crosses no border between blocks, so corners tell all
            seen.setdefault((target, train), set()).update(blocks)
    for target in range(16):
        assert seen[target, True] and seen[target, False] and not seen[target, True] & seen[target, False]


@pytest.mark.parametrize(
    ("size", "even", "corners"),
    [
        ((9, 6), True, [(0, 0), (6, 0), (3, 3)]),
        ((9, 6), False, [(3, 0), (0, 3), (6, 3)]),
        ((11, 5), True, [(0, 0), (6, 0)]),  # what is left over at the right and below belongs to no block
        ((3, 3), False, []),
    ],
)
def test_a_checkerboard_of_blocks_of_three_pixels(
    size: tuple[int, int], even: bool, corners: list[tuple[int, int]]
) -> None:
    assert checkerboard(size, 3, even) == corners


def test_crops_are_cut_from_their_photograph_and_classes_take_turns() -> None:
    dataset = Photographs(False, TENSOR, side=32, number=50)
    assert Counter(target for target, _ in dataset.boxes) == Counter(index % 16 for index in range(50))
    for index in (0, 17, 49):
        image, target = dataset[index]
        left, top, right, bottom = dataset.boxes[index][1]
        pixels = np.asarray(open_photograph(list(PHOTOGRAPHS)[target]))[top:bottom, left:right]
        torch.testing.assert_close(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)


def test_the_same_crops_every_time_and_others_for_the_test() -> None:
    first, again = (Photographs(True, TENSOR, side=32, number=40).boxes for _ in range(2))
    assert first == again
    assert first[:3] == Photographs(True, TENSOR, side=32).boxes[:3]  # more crops go on after the same first ones


def test_grey_photographs_have_no_colours() -> None:
    colour, grey = (Photographs(True, TENSOR, side=32, number=16, grey=grey) for grey in (False, True))
    images = [(colour[index][0], grey[index][0]) for index in range(16)]
    assert sum(bool((image[0] != image[2]).any()) for image, _ in images) == 10  # six photographs are grey themselves
    for image, without in images:
        assert torch.equal(without[0], without[1]) and torch.equal(without[0], without[2])
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R 601-2 luma
        torch.testing.assert_close(without[0], (weights * image).sum(0), atol=1.01 / 255, rtol=0)


def test_crops_too_large_for_the_photographs_are_told() -> None:
    with pytest.raises(
        DataError, match=r"photos: cat has 451x300 pixels, and .* crops of 160 pixels need a block of 320"
    ):
        Photographs(True, TENSOR, side=160)
    with pytest.raises(DataError, match=r"a block of 16 pixels holds no crop of 32"):
        Photographs(True, TENSOR, side=32, block=16)


@pytest.mark.parametrize(("package", "name"), [("skimage", "scikit-image"), ("mlxtend", "mlxtend")])
def test_a_missing_package_is_told_with_the_extra(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bundled.find_spec
    monkeypatch.setattr(bundled, "find_spec", lambda wanted: None if wanted == package else found(wanted))
    recipe = load("photos/resnet" if package == "skimage" else "mnist5k/resnet")
    with pytest.raises(DataError, match=re.escape(f'needs the package {name}: pip install ".[recipes,data]"')):
        build_dataset(recipe, train=True)


def test_a_photograph_that_is_not_in_the_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_need", lambda package, dataset: tmp_path)
    with pytest.raises(DataError, match=r"moon.png: a photograph .* cannot be read: .*; install scikit-image"):
        open_photograph("moon")


def test_recipes_see_standardised_crops_of_the_sides_asked_for() -> None:
    recipe = load("photos/resnet", ["data.eval_samples=20", "data.train_samples=32"])
    assert (len(build_dataset(recipe, train=True)), len(build_dataset(recipe, train=False))) == (32, 20)
    image, target = build_dataset(recipe, train=False)[3]
    assert image.shape == (3, 32, 32) and target == 3
    torch.testing.assert_close(image.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(image.std(correction=0), torch.tensor(1.0))
    steps = "[{Resize: {size: [48, 48]}}, {ToTensor: {}}]"
    larger = load("photos/resnet", ["model.input_side=48", "data.crop_side=24", f"data.eval={steps}"])
    dataset = build_dataset(larger, train=False)
    assert dataset[0][0].shape == (3, 48, 48) and dataset.boxes[0][1][2] - dataset.boxes[0][1][0] == 24


@pytest.mark.parametrize("change", ["data.grey=true", "data.crop_side=24"])
def test_settings_of_photos_are_for_photos(change: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.crop_side and data\.grey are settings of dataset photos alone"):
        load("mnist5k/resnet", [change])


def test_an_image_without_contrast_is_standardised_to_zeros() -> None:
    (_, standardise) = compose([{"Standardize": {}}]).steps[0]
    assert torch.equal(standardise(torch.full((3, 4, 4), 0.25)), torch.zeros(3, 4, 4))
    torch.testing.assert_close(standardise(torch.tensor([[[0.0, 1.0]]])), torch.tensor([[[-1.0, 1.0]]]))


# -- MNIST ------------------------------------------------------------------------------------------


def test_mnist_is_split_once_and_evenly() -> None:
    recipe = load("mnist5k/resnet")
    train, test = (build_dataset(recipe, train=part) for part in (True, False))
    assert (len(train), len(test)) == (4000, 1000)
    assert set(Counter(train.targets).values()) == {400} and set(Counter(test.targets).values()) == {100}
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) == 0
    assert train.images[0].size == (28, 28) and test[0][0].shape == (3, 32, 32)


# -- small networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_small_networks_convert_whole(family: str) -> None:
    recipe = load(f"photos/{family}")
    original, made = recipe.build("original", seed=3).eval(), recipe.build("padfree", seed=3).eval()
    known = original.state_dict()
    assert all(torch.equal(made.state_dict()[key], value) for key, value in known.items())
    assert 24_000 <= sum(value.numel() for value in original.parameters()) <= 45_000
    assert not made.padfree_plan.skips
    last: list[Any] = []
    for network in (original, made):
        network.get_submodule("blocks").register_forward_hook(lambda module, given, out: last.append(out.shape[2:]))
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 16)
    assert last == [(4, 4), (3, 3)]
    assert load(f"mnist5k/{family}").model.num_classes == 10


def test_a_family_that_is_not_there_is_told() -> None:
    with pytest.raises(PadfreeError, match=r"no small network 'vgg'; there are resnet, mobilenetv2, "):
        small_network("vgg", 10)
    with pytest.raises(PadfreeError, match=r"builder small cannot make vgg"):
        load("photos/resnet", ["model.name=vgg"]).build()

"""Data sets in their real on-disk formats, written small; and what is said when one is not right."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from padfree.recipes import load
from padfree.recipes.datasets import DataError, build_dataset, fetch_stanford_dogs, open_image
from padfree.recipes.recipe import Recipe
from padfree.recipes.train import Run, train
from PIL import Image

from padfree import PadfreeError


def recipe(name: str, root: Path, *changes: str) -> Recipe:
    return load(name, [f"data.root={root}", "data.workers=0", *changes])


def picture(path: Path, seed: int, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# -- digits -----------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    found = load("digits/resnet20")
    train, test = build_dataset(found, train=True), build_dataset(found, train=False)
    assert (len(train), len(test)) == (1437, 360)
    image, target = test[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and 0 <= target < 10
    assert image.min() >= 0 and 0.9 < image.max() <= 1
    counts = torch.bincount(torch.tensor(test.targets))
    assert counts.min() >= 34 and counts.max() <= 37  # even over the classes
    seen = {item.tobytes() for item in train.images}
    shared = sum(item.tobytes() in seen for item in test.images)
    assert shared == 0


@pytest.mark.parametrize("side", [32, 224])
def test_digits_come_in_the_size_of_the_network(side: int) -> None:
    steps = f"[{{Resize: {{size: [{side}, {side}]}}}}, {{ToTensor: {{}}}}]"
    found = load("digits/resnet20", [f"model.input_side={side}", f"data.eval={steps}"])
    assert build_dataset(found, train=False)[5][0].shape == (3, side, side)


# -- CIFAR ------------------------------------------------------------------------------------------


@pytest.fixture
def cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The python version of CIFAR-100 with 200 training and 100 test images."""
    from torchvision.datasets import CIFAR100

    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    sums = {}
    for name, number in (("train", 200), ("test", 100)):
        pixels = np.random.default_rng(number).integers(0, 256, (number, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [index % 100 for index in range(number)]}
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    data = pickle.dumps({"fine_label_names": [f"class{index}" for index in range(100)]}, protocol=2)
    (folder / "meta").write_bytes(data)
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": hashlib.md5(data).hexdigest()})
    return tmp_path


def test_cifar100_is_read(cifar100: Path) -> None:
    found = recipe("cifar100-second/ghostnet", cifar100)
    train, test = build_dataset(found, train=True), build_dataset(found, train=False)
    assert (len(train), len(test)) == (200, 100)
    image, target = test[42]
    raw = torch.from_numpy(test.data[42]).permute(2, 0, 1) / 255
    mean = torch.tensor([0.5071, 0.4865, 0.4409]).reshape(3, 1, 1)
    std = torch.tensor([0.2673, 0.2564, 0.2762]).reshape(3, 1, 1)
    torch.testing.assert_close(image, (raw - mean) / std)
    assert target == 42


def test_missing_cifar_says_where_it_was_looked_for_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build_dataset(recipe("cifar100-first/resnet20", tmp_path), train=True)
    message = str(caught.value)
    assert f"{tmp_path}/cifar-100-python" in message and "data.download=true" in message
    assert message.startswith("no CIFAR100: looked for") and "\n" not in message


@pytest.mark.parametrize("harm", ["truncated", "gone"])
def test_damaged_cifar_is_told(cifar100: Path, harm: str) -> None:
    path = cifar100 / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:1000]) if harm == "truncated" else path.unlink()
    with pytest.raises(DataError, match=r"is there but not whole .* data.download=true"):
        build_dataset(recipe("cifar100-first/resnet20", cifar100), train=True)


# -- Stanford Dogs ----------------------------------------------------------------------------------


@pytest.fixture
def dogs(tmp_path: Path) -> Path:
    """120 breeds of one picture each; the lists name them as often as the real ones name images."""
    from scipy.io import savemat

    names = [f"n{2085620 + index:08}-breed/n{2085620 + index:08}_{index}.jpg" for index in range(120)]
    for index, name in enumerate(names):
        picture(tmp_path / "Images" / name, index, side=20)
    for title, number in (("file_list", 20580), ("train_list", 12000), ("test_list", 8580)):
        cells = np.empty((number, 1), dtype=object)
        for index in range(number):
            cells[index, 0] = names[index % 120]
        savemat(tmp_path / f"{title}.mat", {"file_list": cells})
    return tmp_path


def test_stanford_dogs_are_read(dogs: Path) -> None:
    found = recipe("stanford-dogs/mobilenetv3-large", dogs)
    train, test = build_dataset(found, train=True), build_dataset(found, train=False)
    assert (len(train), len(test)) == (12000, 8580)
    image, target = train[121]
    assert image.shape == (3, 224, 224) and target == 1
    (dogs / "Images" / "n02085620-breed" / "n02085620_0.jpg").write_bytes(b"\xff\xd8 cut short")
    with pytest.raises(DataError, match=r"n02085620_0.jpg: cannot be read as an image"):
        test[0]


def test_missing_or_shortened_dogs_are_told(dogs: Path, tmp_path: Path) -> None:
    from scipy.io import loadmat, savemat

    found = recipe("stanford-dogs/mobilenetv3-large", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere has no Images, file_list.mat.*data.download=true"):
        build_dataset(found, train=True)
    short = loadmat(dogs / "train_list.mat")["file_list"][:100]
    savemat(dogs / "train_list.mat", {"file_list": short})
    with pytest.raises(DataError, match=r"do not name 12,000 training and 8,580 test images"):
        build_dataset(recipe("stanford-dogs/mobilenetv3-large", dogs), train=True)


def archive(path: Path, member: str) -> dict[str, Any]:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(member)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return {"url": path.as_uri(), "md5": md5, "filename": path.name, "extracted_filenames": (member,)}


def test_fetching_extracts_but_never_outside_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    fetch_stanford_dogs(root, [archive(root / "good.tar", "list.mat")])
    assert (root / "list.mat").read_bytes() == b"data"
    with pytest.raises(DataError, match=r"could not be fetched"):
        fetch_stanford_dogs(root, [archive(root / "bad.tar", "../escaped.mat")])
    assert not (tmp_path / "escaped.mat").exists()


# -- folders ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, number in (("train", 3), ("val", 2)):
        for index in range(3):
            for item in range(number):
                picture(tmp_path / split / f"class{index}" / f"{item}.png", 10 * index + item)
    return tmp_path


@pytest.mark.parametrize("name", ["imagenet/mobilenetv3-large", "vegfru-292/ghostnet"])
def test_folders_are_read(name: str, folders: Path) -> None:
    found = recipe(name, folders, "model.num_classes=3")
    train, test = build_dataset(found, train=True), build_dataset(found, train=False)
    assert (len(train), len(test)) == (9, 6)
    assert test[5][0].shape == (3, 224, 224) and test[5][1] == 2


def test_other_split_names_are_taken(folders: Path) -> None:
    (folders / "val").rename(folders / "test")
    found = recipe("vegfru-292/ghostnet", folders, "model.num_classes=3", "data.eval_split=test")
    assert len(build_dataset(found, train=False)) == 6


def test_what_is_wrong_with_folders_is_told(folders: Path, tmp_path: Path) -> None:
    name = "vegfru-292/ghostnet"
    with pytest.raises(DataError, match=r"has 3 classes and the recipe says model.num_classes: 292"):
        build_dataset(recipe(name, folders), train=True)
    with pytest.raises(DataError, match=r"looked for .*none/train/<class>/<image>"):
        build_dataset(recipe(name, tmp_path / "none"), train=True)
    path = folders / "train" / "class0" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    train = build_dataset(recipe(name, folders, "model.num_classes=3"), train=True)
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        train[1]
    picture(folders / "train" / "class9" / "0.png", 0)
    with pytest.raises(DataError, match=r"do not hold the same classes: class9 is in one of them only"):
        build_dataset(recipe(name, folders, "model.num_classes=4"), train=True)
    for item in (folders / "train" / "class9").iterdir():
        item.unlink()
    with pytest.raises(DataError, match=r"class9"):
        build_dataset(recipe(name, folders, "model.num_classes=4"), train=True)


def test_images_of_another_shape_are_told(folders: Path) -> None:
    changes = ["model.num_classes=3", "data.train=[{Resize: {size: [60, 60]}}, {ToTensor: {}}]"]
    with pytest.raises(DataError, match=r"an image is \(3, 60, 60\), and the recipe needs float32 \(3, 224"):
        build_dataset(recipe("vegfru-292/ghostnet", folders, *changes), train=True)
    with pytest.raises(DataError, match=r"an image is Image, and the recipe needs"):
        build_dataset(
            recipe("vegfru-292/ghostnet", folders, changes[0], "data.eval=[{Resize: {size: 224}}]"),
            train=False,
        )


def test_a_transform_with_wrong_arguments_is_told(folders: Path) -> None:
    found = recipe("vegfru-292/ghostnet", folders, "data.train=[{Resize: {sides: 3}}]")
    with pytest.raises(PadfreeError, match=r"transform Resize does not take {'sides': 3}"):
        build_dataset(found, train=True)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("[{RandomCrop: {size: 64}}]", r"transform RandomCrop {'size': 64} fails on a PIL image of 8x8: Required crop"),
        ("[{Resize: {size: 0}}]", r"transform Resize {'size': 0} fails on a PIL image of 8x8: height and width"),
        ("[{Resize: {size: -3}}]", r"transform Resize {'size': -3} fails on .*: height and width must be > 0"),
        ("[{Normalize: {mean: [0], std: [1]}}]", r"transform Normalize .* fails on .*: .* does not support PIL images"),
        ("[{ToTensor: {}}, {Normalize: {mean: [0, 1], std: [1, 1]}}]", r"Normalize .* fails on a tensor \(3, 8, 8\)"),
        ("[{ToTensor: {}}, {Normalize: {mean: [0], std: [0]}}]", r"Normalize .* fails on a tensor .*division by zero"),
        ("[{ToTensor: {x: 1}}]", r"transform ToTensor does not take {'x': 1}"),
    ],
)
def test_a_transform_that_fails_is_named(steps: str, words: str) -> None:
    with pytest.raises(PadfreeError, match=words):
        build_dataset(load("digits/resnet20", [f"data.train={steps}"]), train=True)


def test_every_kind_of_broken_image_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.ppm"
    path.write_bytes(b"P6\n32")  # Pillow raises ValueError
    with pytest.raises(DataError, match=r"image\.ppm: cannot be read as an image: Reached EOF while reading header"):
        open_image(str(path))
    picture(path, 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # DecompressionBombError
    with pytest.raises(DataError, match=r"image\.ppm: cannot be read as an image: Image size \(1600 pixels\) exceeds"):
        open_image(str(path))


# -- timm's readers ---------------------------------------------------------------------------------


def stream(root: Path, reader: str, *changes: str) -> Recipe:
    data = [
        "data.dataset=timm",
        f"data.reader={reader}",
        "data.train_split=train",
        "data.eval_split=validation",
    ]
    return recipe("vegfru-292/ghostnet", root, "model.num_classes=3", *data, *changes)


def shards(root: Path) -> None:
    """WebDataset shards: 8 training images in two, 5 validation images in one."""
    info: dict[str, Any] = {"name": "small", "splits": {}}
    for split, lengths in (("train", [4, 4]), ("validation", [5])):
        names = [f"{split}-{index:04}.tar" for index in range(len(lengths))]
        for name, number in zip(names, lengths, strict=True):
            with tarfile.open(root / name, "w") as tar:
                for index in range(number):
                    buffer = io.BytesIO()
                    Image.new("RGB", (40, 40), (index, 0, 0)).save(buffer, "PNG")
                    for suffix, data in (("png", buffer.getvalue()), ("cls", str(index % 3).encode())):
                        member = tarfile.TarInfo(f"{index:04}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        info["splits"][split] = {"name": split, "num_samples": sum(lengths), "filenames": names}
        info["splits"][split]["shard_lengths"] = lengths
    (root / "_info.json").write_text(json.dumps(info))


def test_shards_are_streamed(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shards(tmp_path)
    found = list(build_dataset(stream(tmp_path, "wds/small"), train=False))
    assert [target for _, target in found] == [0, 1, 2, 0, 1]
    assert all(image.shape == (3, 224, 224) for image, _ in found)


def test_a_stream_is_trained_on(tmp_path: Path, small: Path) -> None:
    pytest.importorskip("webdataset")
    shards(tmp_path)
    data = ["data.dataset=timm", "data.reader=wds/small", f"data.root={tmp_path}", "data.eval_split=validation"]
    recipe = load(small, [*data, "training.epochs=1", "training.batch_size=4", "model.num_classes=3"])
    progress = train(Run(recipe, "original", folder=tmp_path / "run", cpu=True, quiet=True))
    assert (progress.epochs[0].train_images, progress.epochs[0].test_images) == (8, 5)


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_hugging_face_datasets_are_read(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for index in range(6):
        picture(tmp_path / "small" / "train" / "abc"[index % 3] / f"{index}.png", index)
        picture(tmp_path / "small" / "validation" / "abc"[index % 3] / f"{index}.png", index)
    found = stream(tmp_path / "cache", f"{reader}/{tmp_path / 'small'}", "data.eval_samples=6")
    dataset = build_dataset(found, train=False)
    items = list(dataset) if reader == "hfids" else [dataset[index] for index in range(len(dataset))]
    assert sorted(target for _, target in items) == [0, 0, 1, 1, 2, 2]
    assert all(image.shape == (3, 224, 224) for image, _ in items)


def test_a_reader_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"timm's reader 'wds/none' cannot open split 'train' at .*: \w+:"):
        build_dataset(stream(tmp_path / "none", "wds/none"), train=True)

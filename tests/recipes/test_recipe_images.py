"""Image files that cannot be read: told before the first epoch, or left out; and archives that reach outside."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from padfree.recipes import load
from padfree.recipes.checkpoints import Progress
from padfree.recipes.cli import main
from padfree.recipes.datasets import DataError, build_dataset, fetch_stanford_dogs
from padfree.recipes.images import readable
from padfree.recipes.train import Run, train
from PIL import Image

ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
STEPS = "[{Resize: {size: [8, 8]}}, {ToTensor: {}}]"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for index in range(2):
            for item in range(count):
                path = tmp_path / "images" / split / f"class{index}" / f"{item}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 20), (index * 99, item, 0)).save(path)
    return tmp_path / "images"


def changes(root: Path, *more: str) -> list[str]:
    data = ["data.dataset=folder", f"data.root={root}", "data.drop_last=false", "model.num_classes=2"]
    small = ["training.batch_size=4", "training.epochs=1", "model.input_side=8"]
    return [*data, *small, f"data.train={STEPS}", f"data.eval={STEPS}", *more]


TIMM = ("data.dataset=timm", "data.reader=image_folder")


def spoil(path: Path) -> Path:
    """Cut a file after its header: opening it goes well, and reading it does not."""
    path.write_bytes(path.read_bytes()[:-30])
    return path


def go(small: Path, root: Path, *more: str, resume: bool = False) -> Progress:
    recipe = load(small, changes(root, *more))
    return train(Run(recipe, "original", folder=root.parent / "run", cpu=True, quiet=True, resume=resume))


@pytest.mark.parametrize("kind", [(), TIMM], ids=["folder", "timm"])
@pytest.mark.parametrize(("split", "index"), [("train", 0), ("train", 3), ("val", 0), ("val", 1)])
def test_one_damaged_image_is_told_before_there_is_a_run(
    kind: tuple[str, ...], split: str, index: int, small: Path, root: Path
) -> None:
    path = spoil(root / split / "class0" / f"{index}.png")
    with pytest.raises(DataError, match=rf"^{path}: cannot be read as an image: .*data.skip_corrupt=true$"):
        go(small, root, *kind)
    assert not (root.parent / "run").exists()


@pytest.mark.parametrize("kind", [(), TIMM], ids=["folder", "timm"])
def test_damaged_images_are_left_out(
    kind: tuple[str, ...], small: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [spoil(root / "train" / "class0" / "0.png"), spoil(root / "train" / "class1" / "2.png")]
    spoil(root / "val" / "class1" / "1.png")
    (epoch,) = go(small, root, *kind, "data.skip_corrupt=true").epochs
    assert (epoch.train_images, epoch.test_images) == (6, 3)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and f"2 of 8 training images cannot be read: {paths[0]}, {paths[1]}" in said[0]
    assert "1 of 4 test images cannot be read" in said[1]


def test_a_run_goes_on_without_an_image_that_became_damaged(small: Path, root: Path) -> None:
    go(small, root)
    spoil(root / "train" / "class0" / "0.png")
    more = ["training.epochs=2", "schedule.name=cosine"]
    with pytest.raises(DataError, match=r"0\.png"):
        go(small, root, *more, resume=True)
    progress = go(small, root, *more, "data.skip_corrupt=true", resume=True)
    assert [item.train_images for item in progress.epochs] == [8, 7]
    assert main(["evaluate", str(root.parent / "run"), "--cpu"]) == 0


def test_several_are_counted_and_the_first_named(small: Path, root: Path) -> None:
    for path in sorted((root / "train").rglob("*.png")):
        spoil(path)
    recipe = load(small, changes(root))
    with pytest.raises(
        DataError, match=r"^8 of 8 training images cannot be read: .*0\.png, .*1\.png, .*2\.png, \.{3};"
    ):
        readable(ALONE, recipe, dataset(recipe), "training")
    recipe = load(small, changes(root, "data.skip_corrupt=true"))
    with pytest.raises(DataError, match="8 of 8 training images"):
        readable(ALONE, recipe, dataset(recipe), "training")


def dataset(recipe: Any) -> Any:
    from padfree.recipes.datasets import open_dataset

    return open_dataset(recipe, train=True)


@pytest.mark.parametrize("kind", [(), TIMM], ids=["folder", "timm"])
def test_without_the_check_the_image_is_told_when_its_turn_comes(
    kind: tuple[str, ...], small: Path, root: Path
) -> None:
    path = spoil(root / "train" / "class1" / "3.png")
    recipe = load(small, changes(root, *kind, "data.check_images=false"))
    images = build_dataset(recipe, train=True)
    assert readable(ALONE, recipe, images, "training") is images
    with pytest.raises(DataError, match=rf"{path}: cannot be read as an image"):
        _ = images[7]
    with pytest.raises(Exception, match=r"skip_corrupt needs data\.check_images"):
        load(small, changes(root, "data.check_images=false", "data.skip_corrupt=true"))


def test_data_that_are_no_files_are_left_as_they_are(small: Path) -> None:
    recipe = load(small)
    images = dataset(recipe)
    assert readable(ALONE, recipe, images, "training") is images


# -- archives ---------------------------------------------------------------------------------------


def archive(path: Path, *members: tarfile.TarInfo) -> dict[str, Any]:
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"data"[: member.size]))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return {"url": path.as_uri(), "md5": md5, "filename": path.name, "extracted_filenames": ("list.mat",)}


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 0 if "linkname" in fields else 4
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "evil",
    [
        [member("../escaped")],
        [member("link", type=tarfile.SYMTYPE, linkname=".."), member("link/escaped")],
        [member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [member("link", type=tarfile.LNKTYPE, linkname="../secret")],
        [member("pipe", type=tarfile.FIFOTYPE, linkname="")],
    ],
    ids=["name", "through a link", "absolute link", "hard link", "pipe"],
)
def test_an_archive_does_not_reach_outside_and_leaves_nothing_half_extracted(
    evil: list[tarfile.TarInfo], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(DataError, match="could not be fetched"):
        fetch_stanford_dogs(root, [archive(root / "bad.tar", member("list.mat"), *evil)])
    assert [path.name for path in root.iterdir()] == ["bad.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "secret"]
    fetch_stanford_dogs(root, [archive(root / "good.tar", member("list.mat"))])
    assert (root / "list.mat").read_bytes() == b"data"

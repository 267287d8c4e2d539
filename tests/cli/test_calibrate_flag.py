"""`padfree-convert --calibrate FOLDER` and `--init`: which images are read, how, and what is told."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import padfree
from padfree.cli.convert import main
from padfree.cli.folder import batches, check_readable, image_files
from padfree.errors import PadfreeError

NAME, SIDE = "mobilenetv3_small_050", 32
SIZE = ["--input-size", "3", str(SIDE), str(SIDE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several kinds, in folders, among other files."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(0, 256, (40, 50 + number, 3), dtype=torch.uint8, generator=generator).numpy()
        place = root / f"class{number % 3}"
        place.mkdir(exist_ok=True)
        mode = ("RGB", "L", "P", "RGBA")[number % 4]
        Image.fromarray(pixels).convert(mode).save(place / f"{number:02}.{('png', 'PNG')[number % 2]}")
    (root / "labels.txt").write_text("nothing of interest")
    return root


NETWORK = """
import torch
from torch import nn
from padfree.rules._toys import depthwise, net, unit

def fresh():
    return net(nn.Sequential(unit(8, 12, 1), depthwise(12), unit(12, 8, 1, act=False)))

def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fresh().train()
        model(torch.randn(16, 3, 32, 32))
    return model.eval()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A user's module with a trained network, and one that is not."""
    (tmp_path / "networks_of_mine.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("networks_of_mine")
    sys.modules.pop("networks_of_mine", None)


def test_it_calibrates_and_saves(folder: Path, module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    trained = ["--model", "networks_of_mine:trained", *SIZE]
    assert main([*trained, "--calibrate", str(folder), "--output", str(output), "--json", str(report)]) == 0
    told = capsys.readouterr().out
    assert "calibrated Sequential on 10 images, 2 held back" in told
    assert "new layers       4, init preserve" in told and "fine-tune it" in told
    content = json.loads(report.read_text())
    assert content["init"] == "preserve" and content["new_layers"] == 4
    assert [step["name"] for step in content["calibration"]["steps"]][-1] == "classifier"
    loaded = padfree.load(output, factory=module.trained)
    expected = padfree.convert(module.trained(), input_size=(3, SIDE, SIDE), init="preserve")
    images = batches(expected, (3, SIDE, SIDE), image_files(folder))
    padfree.calibrate(expected, images, original=module.trained())
    torch.testing.assert_close(dict(loaded.state_dict()), dict(expected.state_dict()))


def test_without_images_it_says_what_to_do(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "networks_of_mine:trained", *SIZE]) == 0
    told = capsys.readouterr().out
    assert "4 new layers (232 parameters) are untrained: call padfree.calibrate(" in told
    assert main(["--model", "networks_of_mine:fresh", *SIZE]) == 0
    assert "untrained" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--calibrate", "no/such/folder"], "there is no such folder"),
        (["--calibrate", "FOLDER"], "fits a trained network, and this one begins fresh"),
        (["--calibrate", "FOLDER", "--plan-only"], "nothing to calibrate"),
        (["--calibrate", "EMPTY"], "it has 0 images ("),
        (["--calibrate", "ONE"], "it has one image ("),
        (["--calibrate", "BROKEN", "--init", "preserve"], "broken.png is no image that can be read"),
        (["--init", "old"], "init is 'old'"),
    ],
)
def test_wrong_requests_are_one_line(
    given: list[str], words: str, folder: Path, module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("EMPTY", "ONE", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "ONE" / "one.png").write_text("no image")
    (tmp_path / "BROKEN" / "broken.png").write_text("no image")
    (tmp_path / "BROKEN" / "other.png").write_text("no image")
    places = {"FOLDER": str(folder), **{name: str(tmp_path / name) for name in ("EMPTY", "ONE", "BROKEN")}}
    assert main(["--model", "networks_of_mine:fresh", *SIZE, *(places.get(word, word) for word in given)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_files_are_chosen_evenly(folder: Path) -> None:
    files = image_files(folder)
    assert len(files) == 12 and all(file.suffix.lower() == ".png" for file in files)
    assert image_files(folder, 3) == [files[0], files[4], files[8]]


def test_images_are_read_as_the_network_takes_them(folder: Path) -> None:
    """The network's own mean, deviation and crop, and images of one class in different batches."""
    model = timm.create_model(NAME)
    files = image_files(folder)
    (batch,) = batches(model, (3, SIDE, SIDE), files)
    data: Any = timm.data
    config = data.resolve_data_config({"input_size": (3, SIDE, SIDE)}, model=model)
    transform = data.create_transform(**config, is_training=False)
    torch.testing.assert_close(batch[5], transform(Image.open(files[5]).convert("RGB")))
    many = batches(nn.Identity(), (1, 8, 8), files * 11)
    assert [tuple(batch.shape) for batch in many] == [(44, 1, 8, 8)] * 3
    (grey,) = batches(nn.Identity(), (1, 8, 8), files)
    torch.testing.assert_close(many[1][0], grey[1])
    with pytest.raises(PadfreeError, match="takes 4 channels"):
        batches(model, (4, 8, 8), files)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_sixteen_bits_are_read_as_those_of_eight(name: str, channels: int, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (8, 8), generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(pixels.astype("uint8")).save(tmp_path / "plain.png")
    deep = (pixels * 257).astype("uint16")  # 255 becomes 65535
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(tmp_path / name)
    files = [tmp_path / name, tmp_path / "plain.png"]
    check_readable(files)
    ((one, other),) = batches(nn.Identity(), (channels, 8, 8), files)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("kind", "words"), [("float32", "floating-point pixels"), ("int32", "32-bit pixels")])
def test_images_of_an_unknown_range_are_refused_by_name(kind: str, words: str, tmp_path: Path) -> None:
    Image.fromarray(torch.rand(8, 8).numpy().astype(kind)).save(tmp_path / "unknown.tif")
    with pytest.raises(PadfreeError, match=rf"unknown\.tif has {words}, whose range is not known"):
        check_readable([tmp_path / "unknown.tif"])

"""`padfree-convert --onnx FILE --int8 FOLDER`, and `--time-limit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from padfree.cli.convert import main

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SIDE = 24
OWN = ["--model", "padfree_int8_network:fresh", "--input-size", "3", str(SIDE), str(SIDE)]
NETWORK = """
import torch
from torch import nn
from padfree.rules._toys import depthwise, net, unit

def fresh():
    torch.manual_seed(0)
    return net(nn.Sequential(unit(8, 12, 1), depthwise(12), unit(12, 8, 1, act=False)))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of the user's and folders of images."""
    (tmp_path / "padfree_int8_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for folder in ("images", "broken", "empty"):
        (tmp_path / folder).mkdir()
    for number in range(10):
        pixels = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "broken" / name).write_text("no image")
    return tmp_path


def test_it_writes_integers_and_says_how_far_they_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--onnx", "int8.onnx", "--int8", "images", "--json", "report.json"]
    assert main([*OWN, *files, "--fixed-sides"]) == 0
    told = capsys.readouterr().out
    assert "int8: calibrated on 8 images, 2 held back: outputs " in told and "wrote int8.onnx" in told
    found = json.loads((place / "report.json").read_text())["int8"]
    assert set(found) == {"calibrated", "held", "decibels", "same_class"} and found["decibels"] > 10
    session = ort.InferenceSession(str(place / "int8.onnx"), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"input": torch.zeros(2, 3, SIDE, SIDE).numpy()})
    assert out.shape == (2, 4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--int8", "images"], "--int8 is about --onnx, which is not asked for"),
        (["--int8", "images", "--onnx", "a.onnx", "--plan-only"], "nothing to write for --onnx"),
        (["--int8", "images", "--onnx", "a.onnx", "--advise", "eager"], "leave out --onnx"),
        (["--int8", "nowhere", "--onnx", "a.onnx"], "--int8 nowhere: there is no such folder"),
        (["--int8", "images/0.png", "--onnx", "a.onnx"], "there is no such folder"),
        (["--int8", "empty", "--onnx", "a.onnx"], "--int8 empty: it has 0 images"),
        (["--int8", "broken", "--onnx", "a.onnx"], "a.png is no image that can be read"),
        (["--onnx", "a.onnx", "--time-limit", "-1"], "--time-limit -1"),
        (["--onnx", "a.onnx", "--time-limit", "nan"], "--time-limit nan"),
        (["--onnx", "a.onnx", "--time-limit", "1e-6"], "took longer than 1e-06 s, while tracing"),
        (["--int8", "images", "--onnx", "a.onnx", "--time-limit", "1e-6"], "the int8 export of Sequential took longer"),
    ],
)
def test_wrong_requests_are_one_line(
    given: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert main([*OWN, "--json", "a.json", *given]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert [path for path in sorted(place.rglob("*")) if "__pycache__" not in str(path)] == before

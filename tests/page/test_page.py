"""The page of a conversion: everything in it, nothing from outside, and names that are hostile."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import padfree
from padfree.cli.convert import main
from padfree.errors import PadfreeError
from padfree.files.sources import Source
from padfree.page.content import Request, content
from padfree.page.pictures import palette, picture
from padfree.page.writing import render, write_page
from padfree.report.comparison import compare

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"


class Net(nn.Module):
    """Two strided depthwise convolutions in blocks whose names are somebody's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({HOSTILE: self.block(), "plain": self.block()})
        self.stem = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 5)

    def block(self) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x.mean((2, 3)))


@functools.cache
def conversion() -> Request:
    torch.manual_seed(0)
    model = Net()
    plan = padfree.plan(model, input_size=(3, 32, 32))
    converted = plan.apply(model)
    comparison = compare(model, converted, (3, 32, 32))
    source = Source("factory", f"{HOSTILE}:{HOSTILE}", {})
    return Request(model, converted, plan, comparison, source, HOSTILE, HOSTILE)


def request(images: Tensor | None = None) -> Request:
    return dataclasses.replace(conversion(), images=images)


class Parsed(HTMLParser):
    """Tags with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text[data] += 1

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return render(content(request(images)))


def test_names_are_text_whatever_is_in_them(page: str) -> None:
    parsed = Parsed(page)
    assert len(parsed.all("script")) == 1
    assert all(key not in attributes for _, attributes in parsed.tags for key in ("onerror", "onclick", "onload"))
    assert any(HOSTILE in text for text in parsed.text)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"iframe", "object", "link", "base"})


def test_nothing_comes_from_outside(page: str) -> None:
    parsed = Parsed(page)
    addresses = [
        value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href") and value
    ]
    assert len(addresses) > 10
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert "url(" not in page and "@import" not in page
    (policy,) = [meta for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] is not None and policy["content"].startswith("default-src 'none'")
    assert len(page.encode()) < 2_000_000


def test_it_can_be_read_without_eyes_and_without_a_mouse(page: str) -> None:
    parsed = Parsed(page)
    assert parsed.all("html")[0]["lang"] == "en"
    assert len(parsed.all("h1")) == 1
    images = parsed.all("img")
    assert len(images) >= 8
    assert all(image.get("alt") for image in images)
    assert len(parsed.all("svg")) == 2  # the strip before and after
    assert all(picture.get("aria-label") for picture in parsed.all("svg"))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a["href"] for a in parsed.all("a")]
    assert {"#maps", "#places", "#costs", "#footprint", "#effect", "#again", "#content"} == set(links)
    assert all(link is not None and link[1:] in ids for link in links)
    scrolled = [div for div in parsed.all("div") if div.get("class") == "scroll"]
    assert len(scrolled) >= 5
    assert all(div.get("tabindex") == "0" and div.get("aria-label") for div in scrolled)
    assert page.count("<label>") == len(parsed.all("input")) == 3
    assert all(cell.get("scope") for cell in parsed.all("th"))


def test_it_says_what_was_found(page: str) -> None:
    parsed = Parsed(page)
    assert len(parsed.all("table")) >= 6
    for text in ("converted", "depthwise", "32x32 to 16x16, now 15x15", "16x16", "7x7"):
        assert parsed.text[text], text
    assert "Predictions for moved frames" in page
    assert "Measured on 2 images" in page
    assert re.search(r"patchify stem", page)  # a skip with its reason


def test_without_images_there_is_no_border_effect() -> None:
    assert 'id="effect"' not in render(content(request()))


def test_the_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("before")
    with pytest.raises(PadfreeError, match="images are 3x32x32"):
        write_page(path, request(torch.rand(1, 3, 32, 32)))
    assert path.read_text() == "before"
    write_page(path, request())
    assert path.read_text().startswith("<!doctype html>")
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(PadfreeError, match="there is no folder"):
        write_page(tmp_path / "none" / "page.html", request())


def test_pictures_are_exact() -> None:
    import base64
    import io

    address = picture(torch.tensor([[0.0, 0.5], [1.0, 2.0], [-1.0, 0.0]]))
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert image.size == (2, 3)
    colours = palette()
    assert (colours[0], colours[255]) == ((68, 1, 84), (253, 231, 37))
    pixels = [image.convert("RGB").getpixel((x, y)) for y in range(3) for x in range(2)]
    assert pixels == [colours[at] for at in (0, 128, 255, 255, 0, 0)]
    wide = picture(torch.zeros(300, 10))
    assert Image.open(io.BytesIO(base64.b64decode(wide.partition(",")[2]))).size == (10, 128)


# the command

OWN = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4)
    )
"""
SMALL = ["--model", "own_of_page:make", "--input-size", "3", "32", "32"]


def test_the_command_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_of_page.py").write_text(OWN)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (90, 70), "teal").save(tmp_path / name)
    assert main([*SMALL, "--report", "page.html", "--images", "."]) == 0
    assert capsys.readouterr().out.endswith("wrote page.html\n")
    text = Path("page.html").read_text()
    assert "Measured on 2 images" in text
    assert "padfree-convert --model own_of_page:make --input-size 3 32 32 --report page.html --images ." in text
    assert "Weights: as own_of_page:make returns them; new layers are untrained." in text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--report", "page.txt"], "the name must end in .html"),
        (["--report", "none/page.html"], "there is no folder none"),
        (["--report", "-"], "--report -: only the report can go to stdout"),
        (["--report", "page.html", "--plan-only"], "nothing to write for --report"),
        (["--images", "pictures"], "--images is about --report"),
        (["--report", "page.html", "--images", "none"], "--images none: there is no such folder"),
        (["--report", "page.html", "--images", "empty"], "--images empty: it has 0 images"),
        (["--report", "page.html", "--images", "damaged", "--output", "a.safetensors"], "no image that can be read"),
        (["--report", "page.html", "--output", "page.html"], "must end in .safetensors"),
    ],
)
def test_a_wrong_request_is_one_line(
    more: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_of_page.py").write_text(OWN)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_text("no picture")
    assert main([*SMALL, *more]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "damaged",
        "empty",
        "own_of_page.py",
    ]


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main([*SMALL, "--report", "page.html"]) == 2
    assert "pip install 'padfree[report]'" in capsys.readouterr().err

"""The page in a real browser, headless: nothing in its console, controls that work, and something to see."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch
from browser import BROWSER, MISSING, browse
from PIL import Image
from torch import nn

import padfree
from padfree.files.sources import Source
from padfree.page.content import Request
from padfree.page.writing import write_page
from padfree.report.comparison import compare

pytestmark = pytest.mark.skipif(BROWSER is None, reason=MISSING)

# A page around the page: it turns the controls and writes down what it sees.
AROUND = """<!doctype html><iframe id="page" src="page.html" width="{width}" height="800"></iframe><pre id="seen"></pre>
<script>
document.getElementById("page").addEventListener("load", event => {{
  const page = event.target.contentDocument, view = event.target.contentWindow, seen = {{}};
  const shown = kind => view.getComputedStyle(page.querySelector("figure ." + kind)).display;
  seen.first = [shown("padded"), shown("outside")];
  page.querySelector("input[value=outside]").click();
  seen.second = [shown("padded"), shown("outside")];
  const rows = () => [...page.querySelectorAll("#places ~ div tbody tr.left, #places ~ div tbody tr.not")]
    .filter(row => view.getComputedStyle(row).display !== "none").length;
  seen.rows = rows();
  page.getElementById("only").click();
  seen.only = rows();
  seen.wide = page.documentElement.scrollWidth;
  seen.tables = page.querySelectorAll("table").length;
  seen.broken = [...page.images].filter(image => !image.naturalWidth).length;
  seen.closed = page.querySelectorAll("details:not([open]):not(.data)").length;
  view.dispatchEvent(new view.Event("beforeprint"));
  seen.printed = page.querySelectorAll("details:not([open]):not(.data)").length;
  const dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
  seen.dark = dark;
  seen.back = view.getComputedStyle(page.body).backgroundColor;
  document.getElementById("seen").textContent = JSON.stringify(seen);
}});
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = padfree.plan(model, input_size=(3, 32, 32))
    converted = plan.apply(model)
    comparison = compare(model, converted, (3, 32, 32))
    images = torch.rand(1, 3, 64, 64)
    write_page(
        path / "page.html", Request(model, converted, plan, comparison, Source("factory", "a:b"), "a", "b", images)
    )
    return path


def test_the_console_is_empty(folder: Path) -> None:
    done = browse(folder, "--enable-logging=stderr", "--dump-dom", (folder / "page.html").as_uri())
    assert "<h1>a:b: padding before and after</h1>" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_the_console_would_show_an_error(folder: Path) -> None:
    (folder / "wrong.html").write_text("<script>nothing.at.all()</script>")
    done = browse(folder, "--enable-logging=stderr", "--dump-dom", (folder / "wrong.html").as_uri())
    assert "CONSOLE" in done.stderr


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_controls_work_and_nothing_sticks_out(folder: Path, width: int, dark: bool) -> None:
    (folder / "around.html").write_text(AROUND.format(width=width))
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    address = (folder / "around.html").as_uri()
    done = browse(folder, *flags, "--allow-file-access-from-files", "--dump-dom", address)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout)
    assert found, done.stdout[:500]
    seen = json.loads(unescape(found[1]))
    assert seen["first"] == ["block", "none"]
    assert seen["second"] == ["none", "block"]
    assert seen["rows"] >= 1
    assert seen["only"] == 0
    assert seen["wide"] <= width
    assert seen["tables"] >= 6
    assert seen["broken"] == 0
    assert seen["closed"] >= 3
    assert seen["printed"] == 0
    assert seen["dark"] is dark
    assert seen["back"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")


def test_a_picture_of_it_is_not_blank(folder: Path) -> None:
    file = folder / "picture.png"
    browse(folder, f"--screenshot={file}", "--window-size=1280,1600", (folder / "page.html").as_uri())
    with Image.open(file) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100
    assert max(count for count, _ in colours) < 0.98 * 1280 * 1600

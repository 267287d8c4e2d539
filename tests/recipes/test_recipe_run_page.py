"""The page about finished runs: what it shows of runs whose figures are known, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from importlib import resources
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from browser import BROWSER, MISSING, browse
from padfree.recipes import load
from padfree.recipes.charts import HEIGHT, WIDTH, Curve, chart
from padfree.recipes.checkpoints import Epoch, Progress, RunError, save_checkpoint
from padfree.recipes.cli import main
from padfree.recipes.compare import Outcome, show
from padfree.recipes.count import Count
from padfree.recipes.evaluate import Trained
from padfree.recipes.measures import Measured, mirrored
from padfree.recipes.run_folder import open_run
from padfree.recipes.run_page import page, spread
from padfree.recipes.runs import FinishedRun, Group, run_folders
from PIL import Image
from torch import nn

from padfree.borders.results import BorderEffect, LayerEffect, Shift
from padfree.errors import PadfreeError
from padfree.page.writing import render

RECIPE = """
about: two colours
model: {builder: small, name: mobilenetv2, num_classes: 2, input_side: 32}
data:
  dataset: folder
  root: data
  train: [{ToTensor: {}}]
  eval: [{ToTensor: {}}]
optimizer: {name: sgd, lr: 0.1}
schedule: {name: cosine}
training: {epochs: 2, batch_size: 4}
"""
HOSTILE = "<img src=x onerror=alert(1)>"
TEST = {"dark": 3, HOSTILE: 2}  # images by class; folders are in the order of their names
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its images."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "two.yaml").write_text(RECIPE)
    for split in ("train", "val"):
        for (name, count), colour in zip(TEST.items(), ("black", "teal"), strict=True):
            (folder / "data" / split / name).mkdir(parents=True)
            for at in range(count):
                Image.new("RGB", (32, 32), colour).save(folder / "data" / split / name / f"{at}.png")
    return folder


def epoch(number: int, top1: float, images: int = 5) -> Epoch:
    return Epoch(number, 0.1, 1.0 / number, 50.0, images, 2.0 / number, top1, images, 100.0, 0.05)


@pytest.fixture
def make(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Write a run whose network takes every image for the second class, as if it had been trained."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "two.yaml", tmp_path)
    (tmp_path / "data").symlink_to(place / "data")

    def run(
        folder: str, *changes: str, variant: str = "original", seed: int = 0, top1: tuple[float, ...] = (20.0, 40.0)
    ) -> Path:
        recipe, path = load("two.yaml", changes), tmp_path / folder
        path.mkdir(parents=True)
        about = {"variant": variant, "seed": seed, "processes": 1, "mixed_precision": "no"}
        open_run(path, recipe, about, resume=False)
        network = recipe.build(variant, seed=seed)
        with torch.no_grad():
            network.get_parameter("head.weight").zero_()
            network.get_parameter("head.bias").copy_(torch.tensor([0.0, 1.0]))
        for at in range(len(top1)):
            progress = Progress(tuple(epoch(number, value) for number, value in enumerate(top1[: at + 1], 1)))
            save_checkpoint(Accelerator(cpu=True), network, path, progress)
        return path

    return run


def cells(text: str, caption: str) -> list[list[str]]:
    """The rows of the table with that label, as text."""
    table = re.search(rf'aria-label="{re.escape(caption)}">\s*<table.*?</table>', text, re.DOTALL)
    assert table, caption
    rows = re.findall(r"<tr>(.*?)</tr>", table[0], re.DOTALL)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[unescape(cell).replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in found]


def test_a_page_of_two_networks_and_two_seeds(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the second epoch takes three of five images wrong, as the networks that were saved do
    make("runs/a", seed=0, top1=(20.0, 40.0))
    make("runs/b", seed=1, top1=(60.0, 40.0))
    make("runs/c", seed=0, variant="padfree", top1=(0.0, 20.0))
    assert main(["report", "runs", "--out", "page.html", "--cpu"]) == 0
    assert capsys.readouterr().out == "wrote page.html\n"
    text = Path("page.html").read_text()

    original, converted = cells(text, "Means over the seeds, ± sample standard deviation where there are several")[1:]
    assert original[:4] == ["original", "2", "40.00 ± 0.00", "50.00 ± 14.14"]  # best: 40 and 60
    assert converted[:4] == ["padfree", "1", "20.00", "20.00"]
    recipe = load("two.yaml")
    for row, variant in ((original, "original"), (converted, "padfree")):
        assert row[4] == f"{sum(p.numel() for p in recipe.build(variant).parameters()):,}"

    runs = {Path(row[0]).name: row for row in cells(text, "All runs")[1:]}
    assert runs["b"][1:8] == ["two.yaml", "original", "1", "60.00", "1", "40.00", "2"]

    # three dark images and two teal ones, all taken for the teal one, over two seeds and one
    order = sorted(TEST)  # of the folders
    wrong = [[str(2 * TEST[name] if taken == 1 else 0) for taken in range(2)] for name in order]
    assert [row[1:] for row in cells(text, "Confusion matrix of original")[1:]] == wrong
    assert cells(text, "Confused most by padfree")[1:] == [[order[0], order[1], str(TEST[order[0]]), "100.0%"]]

    caption = "Border effect: means over the seeds, ± sample standard deviation where there are several"
    heading, *effect = cells(text, caption)
    assert [row[0] for row in effect] == ["original", "padfree"] and heading[-1] == "same class after 8 px, %"
    assert [row[3:] for row in effect] == [["100.00 ± 0.00"] * 4, ["100.00"] * 4]
    assert "Measured on 5 test images" in text
    moved = cells(text, "Predictions for moved frames")
    assert [row[1:3] for row in moved[1:]] == [["100.0%", "100.0%"]] * 4  # the logits are always the same
    assert HOSTILE not in text and "onerror" in text
    assert "20.00 % when it was trained" in text  # of c: its network is right for 40 %
    assert len(re.findall(r"<polyline", text)) == 6 and len(re.findall(r"<polygon", text)) == 3
    assert "two.yaml padfree" not in text  # one recipe: the variant alone tells networks apart
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)


def test_settings_tell_groups_apart(make: Make) -> None:
    make("one/a", "optimizer.lr=0.2")
    make("one/b")
    assert main(["report", "one", "--out", "page.html", "--cpu"]) == 0
    rows = cells(Path("page.html").read_text(), "All runs")
    assert [Path(row[0]).name for row in rows[1:]] == ["a", "b"]
    summary = re.findall(r"original, optimizer\.lr=0\.[12]", Path("page.html").read_text())
    assert set(summary) == {"original, optimizer.lr=0.1", "original, optimizer.lr=0.2"}


def shown(place: Path, monkeypatch: pytest.MonkeyPatch, classes: int, border: BorderEffect | PadfreeError) -> str:
    """The page of two runs that never were: every third image is taken for the next class."""
    monkeypatch.chdir(place)
    matrix = 2 * torch.eye(classes, dtype=torch.long) + torch.eye(classes, dtype=torch.long).roll(1, 1)
    measured = Measured(Count("fvcore", 7, 0, 9, 9), matrix, tuple(f"class {at}" for at in range(classes)), border)
    groups = []
    for variant in ("original", "padfree"):
        runs = []
        for seed in range(2):
            progress = Progress(tuple(epoch(number, 10.0 * number + seed, 3 * classes) for number in range(1, 10)))
            about = {"variant": variant, "seed": seed, "command": ["a/b/padfree-recipes", "train", "x y"]}
            found = Trained(load("two.yaml"), about, progress, 9, nn.Identity())
            runs.append(FinishedRun(Path(f"runs/{variant}-{seed}"), found, {}))
        groups.append(Group(variant, tuple(runs)))
    template = (resources.files("padfree.recipes") / "runs.html").read_text()
    return render(page(groups, [[measured, measured]] * 2, "padfree-recipes report runs"), template)


def effect_of(sides: int) -> BorderEffect:
    layer = LayerEffect("blocks", (sides, sides), torch.rand(sides, sides), (0.1, -0.1))
    return BorderEffect("Net", (3, 32, 32), 16, 5, (layer,), tuple(Shift(at, 0.5, 0.25) for at in range(1, 9)))


def test_many_classes_are_a_picture(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(place, monkeypatch, 21, PadfreeError("<b>tied to one size"))
    assert '<table class="matrix">' not in text and len(re.findall(r'<img class="wide"', text)) == 2
    assert "66.67 % on its diagonal" in text
    first, *rest = cells(text, "Confused most by original")[1:]
    assert first[2:] == ["2", "33.3%"] and len(rest) == 9  # of two runs
    assert "Not measured: &lt;b&gt;tied to one size" in text and "Predictions for moved frames" not in text
    assert "padfree-recipes train &#39;x y&#39;" in text  # the place of the program is nobody's business


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_it_opens_in_a_browser(
    width: int, dark: bool, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.html").write_text(shown(place, monkeypatch, 16, effect_of(4)))
    (tmp_path / "around.html").write_text(AROUND.format(width=width))
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    flags += ["--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"]
    done = browse(tmp_path, *flags, (tmp_path / "around.html").as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout)
    assert found, done.stdout[:500]
    seen = json.loads(unescape(found[1]))
    assert seen["wide"] <= width
    assert seen["tables"] >= 12 and seen["broken"] == 0
    assert seen["charts"] == 3 and all(300 <= side <= 480 for side in seen["sides"])
    assert len(set(seen["colours"])) == 2 and seen["dark"] is dark


AROUND = """<!doctype html><iframe id="page" src="page.html" width="{width}" height="800"></iframe><pre id="seen"></pre>
<script>
document.getElementById("page").addEventListener("load", event => {{
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const charts = [...page.querySelectorAll("svg.chart")], lines = charts[0].querySelectorAll("polyline");
  document.getElementById("seen").textContent = JSON.stringify({{
    wide: page.documentElement.scrollWidth,
    tables: page.querySelectorAll("table").length,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    charts: charts.length,
    sides: charts.map(chart => chart.getBoundingClientRect().width),
    colours: [...lines].map(line => view.getComputedStyle(line).stroke),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
  }});
}});
</script>"""


def wrong(what: str, make: Make) -> list[str]:
    if what == "no run":
        Path("empty").mkdir()
        return ["empty"]
    if what == "no folder":
        return ["nowhere"]
    make("a")
    if what == "not finished":
        make("b", seed=1, top1=(20.0,))
    elif what == "other data":
        Path("other").symlink_to("data")
        make("b", "data.root=other")
    elif what == "other number":
        make("b", "data.eval_split=train")
    elif what == "twice":
        return ["a", "./a"]
    elif what == "copied":
        shutil.copytree("a", "b")
    elif what == "damaged":
        shutil.copytree("a", "b")
        for path in Path("b").rglob("weights.safetensors"):
            path.write_bytes(b"")
    elif what == "no data":
        Path("data").unlink()
        return ["a"]
    return ["a", "b"]


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no run", "empty is no run folder of padfree-recipes train"),
        ("no folder", "nowhere is no run folder of padfree-recipes train"),
        ("not finished", "b is not finished: 1 of 2 epochs; go on with padfree-recipes train --resume"),
        ("other data", "b and a are of different data sets: root is other and data; make a report of each; where"),
        ("other number", "b and a are of different data sets: eval_split is train and val"),
        ("twice", "a is named twice"),
        ("copied", "b and a are the same run, with seed 0; leave one of them out"),
        ("damaged", "epoch-0001 is damaged"),
        ("no data", "no images: looked for data/train"),
    ],
)
def test_what_is_no_report_is_one_line(what: str, reason: str, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folders = wrong(what, make)
    Path("page.html").write_text("before")
    assert main(["report", *folders, "--out", "page.html", "--cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err
    assert [line for line in err.splitlines() if line.startswith("padfree-recipes: ") and ": note:" not in line] != []
    assert err.rstrip().count("\n") == err.count("padfree-recipes: note:")
    assert Path("page.html").read_text() == "before"
    assert not list(Path().glob(".page*"))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("page.txt", "--out page.txt: the name must end in .html"),
        ("none/page.html", "there is no folder none"),
        ("folder.html", "it is a folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_told_before_any_work(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    assert main(["report", "nowhere", "--out", target]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and reason in err


def test_data_that_moved_are_found(make: Make) -> None:
    make("a")
    Path("data").rename("elsewhere")
    assert main(["report", "a", "--out", "page.html", "--cpu", "--data-root", "elsewhere"]) == 0
    assert "--data-root elsewhere" in Path("page.html").read_text()


def test_compare_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    show((Outcome("original", 1, 2, (50.0,), 50.0, 0.0, 9.0),), 1, Path("runs/a b"))
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("padfree-recipes report 'runs/a b' --out 'runs/a b/report.html'")
    )


@pytest.mark.parametrize(("side", "around"), [(5, 3), (4, 4), (3, 8)])
def test_scenes_are_mirrored_at_their_edges(side: int, around: int) -> None:
    images = torch.rand(2, 3, side, side + 1)
    wanted = numpy.pad(images.numpy(), [(0, 0), (0, 0), (around, around), (around, around)], mode="symmetric")
    torch.testing.assert_close(mirrored(images, around), torch.from_numpy(wanted), rtol=0, atol=0)


def test_charts_are_to_scale() -> None:
    found = chart("accuracy", [Curve("one", ((0.0, 50.0, 100.0), (100.0, 50.0, 100.0))), Curve("two", ((0.0, 0.0),))])
    one, two = found["lines"]
    left, right, bottom = found["left"], found["right"], found["bottom"]
    across = [float(point.split(",")[0]) for point in one["points"].split()]
    up = [float(point.split(",")[1]) for point in one["points"].split()]
    assert across == [left, (left + right) / 2, right] and 0 < left < right < WIDTH
    assert up[0] == up[1] == (up[2] + bottom) / 2  # 50 lies between 100 and 0, where the axis begins
    assert bottom < HEIGHT and two["points"].split()[0] == f"{float(left)},{float(bottom)}"
    assert len(one["band"].split()) == 6 and two["band"] == ""
    assert [label for _, label in found["across"]] == ["1", "2", "3"]
    assert found["table"][1] == ("1", "50 (0 to 100)", "0") and found["table"][3] == ("3", "100 (100 to 100)", "")


def test_one_epoch_of_one_value_is_a_chart() -> None:
    found = chart("loss", [Curve("one", ((0.5,),))])
    assert found["across"] == [(found["left"], "1")] and json.dumps(found)


def test_spreads() -> None:
    assert spread([1.0]) == "1.00"
    assert spread([1.0, 3.0]) == "2.00\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.41"


def test_the_error_is_the_family_s() -> None:
    with pytest.raises(RunError, match="named twice"):
        run_folders([Path("x"), Path("x/.")])


def test_the_ticks_of_a_single_value_are_round() -> None:
    up = chart("test loss", [Curve("padfree", ((1.703225,),))])["up"]
    assert len(up) >= 3
    assert all(len(text) <= 4 for _, text in up)
    assert len({text for _, text in up}) == len(up)

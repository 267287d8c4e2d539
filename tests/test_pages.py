"""The README and the pages of docs/: their Python runs, their links lead somewhere, and they build as a site.

A page's blocks are run in order, in one namespace and an empty folder. A block that needs what is not here (weights,
somebody's script) has `<!-- not run: reason -->` right above it, and is compiled at least.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import padfree

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LANGUAGES = {"", "console", "python", "text", "yaml"}  # of fenced blocks; another spelling of python would not be run

# What a page's blocks print, as far as the page speaks of it.
PRINTED = {
    "README.md": [
        r"parameters +5,483,032 -> 5,483,752",
        r"^calibrated",
    ],
    "padding.md": [
        r"^footprint of MobileNetV3 at 3x64x64\n",
        r"^footprint of MobileNetV3 at 3x64x64, before -> after\n",
        r"^border effect of MobileNetV3 at 3x64x64 with 32 pixels around, 2 images\n",
        *(
            rf"^  .*\b{column}\b"
            for column in ("taps", "top", "padded", "worst", "outside", "unread", "centre", "vertical", "horizontal")
        ),
    ],
}


class Block(NamedTuple):
    """A Python block: its line in the page, and why it is not run, "" if it is."""

    line: int
    code: str
    reason: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(
        r"(?:^<!-- not run: (.+?) -->\n\n?)?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        yield Block(text.count("\n", 0, found.start(2)), found[2], found[1] or "")


WITH_PYTHON = [page for page in PAGES if any(True for _ in blocks(page))]


@pytest.mark.filterwarnings("ignore")  # of the libraries that pages use
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_its_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        code = compile("\n" * block.line + block.code, str(page), "exec")  # an error names the page's own line
        if not block.reason:
            exec(code, names)
    out = capsys.readouterr().out
    for pattern in PRINTED.get(page.name, []):
        assert re.search(pattern, out, re.MULTILINE), pattern


def test_every_python_block_is_seen() -> None:
    assert {page.name for page in WITH_PYTHON} >= {
        "README.md",
        "padding.md",
        "recipes.md",
        "replace.md",
        "warm-start.md",
    }
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        fences = re.findall(r"^ *(`{3,}|~{3,})(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert {language.strip() for _, language in fences} <= LANGUAGES, page
        assert sum(language.strip() == "python" for _, language in fences) == len(list(blocks(page))), page


def test_blocks_that_are_not_run_say_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n\n```python\n1\n```\n\n<!-- not run: no weights -->\n```python\n2\n```\n\n<!-- b -->\n```python\n3\n```\n"
    )
    assert list(blocks(page)) == [Block(3, "1\n", ""), Block(8, "2\n", "no weights"), Block(13, "3\n", "")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_its_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_index_and_the_site_name_every_page() -> None:
    index, site = (ROOT / "docs" / "index.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    for page in DOCS:
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
        assert f"- {page.name}" in site, page.name


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = [getattr(padfree, name) for name in padfree.__all__ if not name.startswith("__")]
    wanted = [each.__name__ if inspect.ismodule(each) else f"{each.__module__}.{each.__qualname__}" for each in public]
    assert sorted(listed) == sorted(wanted)


def test_the_paper_s_figures_in_the_readme_are_the_printed_ones() -> None:
    rows = json.loads((ROOT / "tests" / "data" / "paper_rows.json").read_text())
    printed: dict[tuple[float, ...], int] = {}
    better = {1: 0, 0: 0, -1: 0}
    for before in rows:
        for after in rows:
            same = all(before[key] == after[key] for key in ("table", "model"))
            if not same or (before["variant"], after["variant"]) != ("original", "padfree"):
                continue
            if before["table"].endswith("ablation"):
                continue  # the second set's rows again
            pair = [each["published"][key] for key in ("top1", "flops_m") for each in (before, after)]
            printed[tuple(pair)] = round(100 * (pair[3] / pair[2] - 1))
            better[(pair[1] > pair[0]) - (pair[1] < pair[0])] += 1
    text = (ROOT / "README.md").read_text()
    shown = re.findall(r"\| ([\d.]+), ([\d.]+) \| ([\d.]+), ([\d.]+) \((-\d+) %\) \| the paper's \|", text)
    assert len(shown) == 5 == text.count("| the paper's |")
    for *figures, percent in shown:
        assert printed[tuple(map(float, figures))] == int(percent)
    assert (sum(better.values()), better[1], better[0], better[-1]) == (17, 15, 1, 1)
    assert "Of the paper's 17 such pairs, 15 are better after, one is equal and one worse" in text


def test_the_readme_s_first_sentence_counts_right() -> None:
    from torch import nn

    reads = padfree.footprint(nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1)), (1, 4, 4)).layers[-1].reads
    assert reads is not None
    assert reads.taps == pytest.approx(
        11 / 36
    )  # 2x2 windows of 9, of which 3 + 3 lie above, 3 + 3 at the left, 1 in both
    assert [side > 0 for side in reads.sides] == [True, False, True, False]
    assert "11 of the 36 values that it reads on a 4x4 map" in (ROOT / "README.md").read_text()


def test_the_opening_picture_is_what_its_command_draws() -> None:
    from benchmarks import opening

    before, after = (opening.taps(model) for model in opening.networks())
    assert before == [-1, *range(8)]  # padding in front alone
    assert after == [*range(7)]
    assert opening.TARGET.read_text() == opening.draw()


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason='no mkdocs here (pip install ".[docs]")',
)
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="padfree.convert.convert"' in reference and "PadfreeError" in reference
    assert (tmp_path / "site" / "source" / "examples" / "new_rule.py").is_file()
    assert 'href="../options/"' in (tmp_path / "site" / "overview" / "index.html").read_text()

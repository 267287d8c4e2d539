"""Every example runs as it is written, and the README's output is what is printed."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from padfree.cli.convert import main

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def launched(path: Path, cwd: Path) -> str:
    """What it prints in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", str(path)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(path: Path, cwd: Path, patch: pytest.MonkeyPatch) -> str:
    """What it prints as the main module of this process, which spares the imports."""
    patch.chdir(cwd)
    patch.setattr(sys, "argv", [str(path)])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:  # of one that is left out
            assert not end.code, end.code
    return out.getvalue()


def test_there_are_three_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"convert_own_module.py", "convert_timm.py", "new_rule.py"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the libraries that examples use
def test_an_example_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registers = "register(" in path.read_text()  # what it registers would be there in other tests
    said = (launched(path, tmp_path) if registers else run(path, tmp_path, monkeypatch)).strip()
    assert said
    assert list(tmp_path.iterdir()) == []
    if said.startswith("left out:"):
        pytest.skip(said)


def test_the_output_in_the_readme_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = blocks("text")
    assert main(["--timm", "mobilenetv3_large_100"]) == 0
    assert capsys.readouterr().out == text


def test_the_command_line_page_names_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", (ROOT / "docs" / "command-line.md").read_text()))
    assert len(documented) >= 16
    assert documented <= flags
    assert flags - documented <= {"--help", "--version", "--timm", "--torchvision", "--bsconv", "--model"}

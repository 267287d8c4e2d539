"""Output that cannot be written: one line on stderr, and an exit status that is not that of a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = f"{sys.executable} -m padfree.recipes.cli"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", command], env=kept | environment, capture_output=True, text=True, timeout=600, check=False
    )


TABLE = "table --recipe cifar100-first/resnet20"


@pytest.mark.parametrize(
    ("command", "where", "words"),
    [
        (TABLE, "> /dev/full", "No space left on device"),
        ("list", "> /dev/full", "No space left on device"),
        ("list", ">&-", "standard output is closed"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(command: str, where: str, words: str) -> None:
    done = shell(f"{CLI} {command} {where}")
    assert (done.returncode, done.stderr) == (2, f"padfree-recipes: {words}\n")


def test_a_reader_that_goes_away_is_not_a_table_that_is_off() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [*CLI.split(), *TABLE.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_error_that_cannot_be_written_is_known_by_its_exit_status() -> None:
    assert shell(f"{CLI} show nothing 2> /dev/full").returncode == 2


def test_text_beyond_the_output_s_encoding_is_one_line(small: Path) -> None:
    small.write_text(small.read_text().replace("digits of", "digits «of»"), encoding="utf-8")
    done = shell(f"{CLI} show {small}", PYTHONIOENCODING="ascii")
    words = "the output's encoding ascii cannot say '\\xab'; set PYTHONIOENCODING=utf-8"
    assert (done.returncode, done.stderr) == (2, f"padfree-recipes: {words}\n")

"""A run that is over can be given more epochs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from padfree.recipes import load
from padfree.recipes.checkpoints import Progress, RunError
from padfree.recipes.train import Run, train

FAST = (
    "training.batch_size=479",
    "model.input_side=8",
    "data.train=[{ToTensor: {}}]",
    "data.eval=[{ToTensor: {}}]",
)


def go(small: Path, folder: Path, *changes: str, **settings: Any) -> Progress:
    return train(Run(load(small, [*FAST, *changes]), "original", folder=folder, cpu=True, quiet=True, **settings))


def cosine(epoch: int, epochs: int) -> float:
    return 0.01 + (0.1 - 0.01) * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def test_a_cosine_is_computed_anew_and_that_is_said(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = go(small, folder, "training.epochs=2")
    assert [item.lr for item in first.epochs] == pytest.approx([cosine(1, 2), cosine(2, 2)])
    assert capsys.readouterr().err == ""
    more = go(small, folder, "training.epochs=4", resume=True)
    assert [item.lr for item in more.epochs[2:]] == pytest.approx([cosine(number, 4) for number in (3, 4)])
    said = capsys.readouterr().err
    assert "was a run of 2 epochs, and goes on to 4" in said
    assert f"computed anew for 4 epochs: it goes on at {cosine(3, 4):g}, and was at 0.01" in said
    assert go(small, folder, "training.epochs=4", resume=True).done == 4
    assert capsys.readouterr().err == ""
    with pytest.raises(RunError, match=r"training\.epochs is 3 and was 4 \(training\.epochs can only grow\)"):
        go(small, folder, "training.epochs=3", resume=True)


def test_steps_go_on_as_they_were(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = "schedule={name: step, milestones: [1, 2], gamma: 0.1}"
    go(small, tmp_path / "run", "training.epochs=1", schedule)
    more = go(small, tmp_path / "run", "training.epochs=3", schedule, resume=True)
    assert [item.lr for item in more.epochs] == pytest.approx([0.1, 0.01, 0.001])
    said = capsys.readouterr().err
    assert "goes on to 3" in said and "cosine" not in said
    with pytest.raises(RunError, match=r"schedule.milestones is \(1,\) and was \(1, 2\)"):
        go(small, tmp_path / "run", "training.epochs=4", schedule.replace(", 2", ""), resume=True)

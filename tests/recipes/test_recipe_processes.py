"""Two processes on one CPU machine train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.checkpoints import Progress, read_progress
from padfree.recipes.loaders import train_loader
from padfree.recipes.train import Run, train

from padfree import PadfreeError

RECIPE = "digits/resnet20"
SMALLER = [  # a network of a second an epoch
    "model={builder: small, name: resnet, num_classes: 10, input_side: 16}",
    "data.train=[{Resize: {size: [16, 16]}}, {RandomCrop: {size: 16, padding: 1}}, {ToTensor: {}}]",
    "data.eval=[{Resize: {size: [16, 16]}}, {ToTensor: {}}]",
    "training.epochs=4",
]


def launch(processes: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "padfree.recipes.cli"]
    command += ["train", RECIPE, "--out", str(folder), "--cpu", "--quiet", *SMALLER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Progress]:
    """Of this process alone, and of two that are launched."""
    folder = tmp_path_factory.mktemp("processes")
    torch.set_num_threads(1)
    alone = train(Run(load(RECIPE, SMALLER), folder=folder / "1", cpu=True, quiet=True))
    result = launch(2, folder / "2")
    assert result.returncode == 0, result.stderr
    assert [json.loads((folder / name / "run.json").read_text())["processes"] for name in "12"] == [1, 2]
    return {1: alone, 2: read_progress(folder / "2")}


def test_every_image_is_seen_once_and_counted_once(runs: dict[int, Progress]) -> None:
    for progress in runs.values():
        assert [item.train_images for item in progress.epochs] == [1408] * 4  # 22 batches of 64
        assert [item.test_images for item in progress.epochs] == [360] * 4


def test_metrics_agree_within_noise(runs: dict[int, Progress]) -> None:
    """Batch norm sees half a batch in each of two processes, so equal seeds are close and no more."""
    one, two = runs[1].epochs, runs[2].epochs
    assert one[0].train_loss == pytest.approx(two[0].train_loss, rel=0.15)
    assert one[-1].train_top1 == pytest.approx(two[-1].train_top1, abs=4)
    assert one[-1].test_top1 == pytest.approx(two[-1].test_top1, abs=5)
    assert min(one[-1].test_top1, two[-1].test_top1) > 90


def test_a_batch_that_cannot_be_shared_is_told() -> None:
    recipe = load(RECIPE, ["training.batch_size=125"])
    with pytest.raises(PadfreeError, match=r"batch_size 125 cannot be shared by 2 processes; .* multiple of 2"):
        train_loader(SimpleNamespace(num_processes=2), recipe)

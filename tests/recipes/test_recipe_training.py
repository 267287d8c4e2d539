"""The training loop: what it leaves behind, going on after a kill, and when it stops."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.checkpoints import (
    Epoch,
    Progress,
    RunError,
    checkpoints,
    read_progress,
)
from padfree.recipes.evaluate import Scores, evaluate_run
from padfree.recipes.run_folder import read_run
from padfree.recipes.train import Run, TrainingError, train
from safetensors.torch import load_file

from padfree import PadfreeError

CLI = [sys.executable, "-m", "padfree.recipes.cli"]


def run(small: Path, folder: Path, *changes: str, **settings: Any) -> Progress:
    recipe = load(small, changes)
    return train(Run(recipe, folder=folder, cpu=True, quiet=True, **settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder)[-1] / "weights.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_text: str) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(small_text)
    torch.set_num_threads(1)
    run(folder / "small.yaml", folder / "run", "training.ema_decay=0.9", "training.clip_norm=5")
    return folder / "run"


def test_everything_of_a_run_lies_in_its_folder(finished: Path) -> None:
    progress = read_progress(finished)
    assert [item.epoch for item in progress.epochs] == [1, 2]
    with (finished / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["test_top1"]) for row in rows] == [item.test_top1 for item in progress.epochs]
    assert rows[0]["train_images"] == "1408" and rows[0]["test_images"] == "360"
    assert float(rows[0]["lr"]) == 0.1 and float(rows[1]["lr"]) == pytest.approx(0.055)
    recipe, about = read_run(finished)
    assert (about["variant"], about["seed"], about["processes"]) == ("padfree", 0, 1)
    assert torch.__version__.startswith(about["versions"]["torch"]) and about["command"]
    assert recipe.training.ema_decay == 0.9
    plan = json.loads((finished / "plan.json").read_text())
    assert {match["rule"] for match in plan["matches"]} == {"dense", "projection", "stem"}
    assert list((finished / "tensorboard").rglob("events*"))
    saved = {path.name for path in checkpoints(finished)[-1].iterdir()}
    assert {
        "weights.safetensors",
        "model.safetensors",
        "optimizer.bin",
        "scheduler.bin",
        "progress.json",
    } <= saved
    assert {"random_states_0.pkl", "custom_checkpoint_0.pkl"} <= saved


def test_the_last_two_checkpoints_are_kept(finished: Path) -> None:
    assert [path.name for path in checkpoints(finished)] == ["epoch-0001", "epoch-0002"]
    assert not list((finished / "checkpoints").glob(".part-*"))


def test_a_tie_is_won_by_the_earlier_epoch() -> None:
    def at(number: int, top1: float) -> Epoch:
        return Epoch(number, 0.1, 0, 0, 1, 0, top1, 1, 1, 1)

    best = Progress((at(1, 90), at(2, 95), at(3, 95), at(4, 94))).best
    assert best is not None and best.epoch == 2
    assert Progress().best is None


def test_evaluating_a_run_gives_the_accuracy_it_was_saved_with(finished: Path) -> None:
    progress = read_progress(finished)
    for checkpoint, epoch in (("best", progress.best), ("last", progress.epochs[-1])):
        assert epoch is not None
        found = evaluate_run(finished, checkpoint, cpu=True)
        assert (found["epoch"], found["top1"]) == (epoch.epoch, epoch.test_top1)
        assert found["loss"] == pytest.approx(epoch.test_loss, rel=1e-5)
        assert found["images"] == 360


def test_averaged_weights_are_the_ones_evaluated(finished: Path) -> None:
    trained = load_file(checkpoints(finished)[-1] / "model.safetensors")
    averaged = weights(finished)
    assert trained.keys() == averaged.keys()
    assert any(not torch.equal(trained[key], averaged[key]) for key in trained)


def test_a_folder_with_a_run_is_not_overwritten(small: Path, finished: Path) -> None:
    with pytest.raises(RunError, match=r"holds a run already; go on with --resume"):
        run(small, finished, "training.ema_decay=0.9", "training.clip_norm=5")
    with pytest.raises(
        RunError, match=r"is another run: seed is 1 and was 0, optimizer.lr is 0.2 and was 0.1"
    ) as caught:
        run(small, finished, "optimizer.lr=0.2", seed=1, resume=True)
    assert "\n" not in str(caught.value)


def test_a_finished_run_resumed_trains_no_more(small: Path, finished: Path) -> None:
    before = (checkpoints(finished)[-1] / "progress.json").stat().st_mtime_ns
    figures = (finished / "metrics.csv").read_text()
    (finished / "metrics.csv").unlink()
    progress = run(small, finished, "training.ema_decay=0.9", "training.clip_norm=5", resume=True)
    assert progress.done == 2
    assert (checkpoints(finished)[-1] / "progress.json").stat().st_mtime_ns == before
    assert (finished / "metrics.csv").read_text() == figures


KILLED = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = iter(range(10**6))
def hook(*_):
    if next(steps) == 15:  # an epoch has 11: some way into the second
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_post_hook(hook)
from padfree.recipes.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_equal(workers: int, small: Path, tmp_path: Path) -> None:
    changes = ["training.epochs=3", "training.ema_decay=0.9", f"data.workers={workers}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(small, whole, *changes)
    command = [sys.executable, "-c", KILLED, "train", str(small), "--out", str(killed), "--cpu", "--quiet", *changes]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_progress(killed).done == 1
    progress = run(small, killed, *changes, resume=True)
    assert progress.done == 3
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    timed = ("images_per_s", "seconds")
    for one, two in zip(read_progress(whole).epochs, progress.epochs, strict=True):
        assert {k: v for k, v in vars(one).items() if k not in timed} == {
            k: v for k, v in vars(two).items() if k not in timed
        }


def test_a_half_written_checkpoint_is_no_checkpoint(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(small, folder, "training.epochs=1")
    part = folder / "checkpoints" / ".part-0002"
    part.mkdir()
    (part / "progress.json").write_text("{")
    assert [path.name for path in checkpoints(folder)] == ["epoch-0001"]
    run(small, folder, "training.epochs=1", resume=True)
    assert not part.exists()
    optimizer = checkpoints(folder)[-1] / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    with pytest.raises(RunError, match=r"epoch-0001 is damaged \(.*\); there is none before it, so train into another"):
        run(small, folder, "training.epochs=1", resume=True)
    (checkpoints(folder)[-1] / "progress.json").write_text("{")
    with pytest.raises(RunError, match=r"epoch-0001 is damaged"):
        read_progress(folder)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"no longer finite in epoch 1, by step .* no epoch was finished"):
        run(small, folder, "optimizer.lr=1e30")
    assert checkpoints(folder) == []
    folder = tmp_path / "later"
    schedule = "schedule={name: step, milestones: [1], gamma: 1}"
    run(small, folder, "training.epochs=1", schedule)
    good = weights(folder)
    _poison(folder)
    with pytest.raises(TrainingError, match=r"epoch 2, by step .*the last good checkpoint is .*epoch-0001"):
        run(small, folder, "training.epochs=2", schedule, resume=True)
    torch.testing.assert_close(weights(folder), good, rtol=0, atol=0)


def _poison(folder: Path) -> None:
    """Make the saved momentum so large that the next step leaves the finite numbers."""
    path = checkpoints(folder)[-1] / "optimizer.bin"
    state = torch.load(path, weights_only=True)
    for item in state["state"].values():
        item["momentum_buffer"].fill_(1e38)
    torch.save(state, path)
    progress = path.with_name("progress.json")  # as one of before there were checksums
    progress.write_text(json.dumps({"epochs": json.loads(progress.read_text())["epochs"]}))


def test_the_learning_rate_falls_after_its_milestones(small: Path, tmp_path: Path) -> None:
    schedule = "schedule={name: step, milestones: [1, 2], gamma: 0.1}"
    progress = run(small, tmp_path / "run", "training.epochs=3", schedule, variant="original")
    assert [item.lr for item in progress.epochs] == pytest.approx([0.1, 0.01, 0.001])
    assert not (tmp_path / "run" / "plan.json").exists()


def test_the_bsconvs_loss_is_added_in_training(small: Path, tmp_path: Path) -> None:
    network = ["model.builder=bsconv", "model.name=cifar_mobilenetv3_small_w7d20_bsconvs_p1d6"]
    losses = {}
    for weight in (0.1, 0.0):
        changes = [*network, f"training.orthonormal_weight={weight}", "training.epochs=1", "training.batch_size=479"]
        progress = run(small, tmp_path / str(weight), *changes, variant="original")
        losses[weight] = progress.epochs[0].train_loss
    assert losses[0.1] > losses[0.0] + 1


def test_bf16_trains_and_records_it(small: Path, tmp_path: Path) -> None:
    changes = ["training.epochs=1", "training.batch_size=479"]
    progress = run(small, tmp_path / "run", *changes, variant="original", mixed_precision="bf16")
    assert progress.epochs[0].train_images == 1437
    assert read_run(tmp_path / "run")[1]["mixed_precision"] == "bf16"
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32, torch.int64}


def test_scores_are_means_over_images_not_batches() -> None:
    scores = Scores(3, torch.device("cpu"))
    scores.update(torch.eye(3)[[0, 1, 2]], torch.tensor([0, 1, 2]), torch.tensor(1.0))
    scores.update(torch.eye(3)[[0]], torch.tensor([1]), torch.tensor(5.0))
    assert scores.compute() == (2.0, 75.0, 4)


def test_a_folder_without_a_run_cannot_be_evaluated(tmp_path: Path, small: Path) -> None:
    with pytest.raises(RunError, match=r"is no run folder of padfree-recipes train"):
        evaluate_run(tmp_path, cpu=True)


def test_a_batch_larger_than_the_data_is_told(small: Path, tmp_path: Path) -> None:
    with pytest.raises(PadfreeError, match=r"1437 training images make no batch of 2000"):
        run(small, tmp_path / "run", "training.batch_size=2000")
    assert not (tmp_path / "run" / "run.json").exists()

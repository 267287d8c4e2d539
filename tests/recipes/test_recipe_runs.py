"""Run folders: one process at a time, and what is said about damaged ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.checkpoints import Progress, RunError, checkpoints, read_progress
from padfree.recipes.run_folder import read_run
from padfree.recipes.train import SEEDS, Run, TrainingError, epoch_seed, train
from safetensors.torch import load_file, save_file

HOLD = """
import sys
from pathlib import Path
from padfree.recipes.locks import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def go(small: Path, folder: Path, *changes: str, **settings: Any) -> Progress:
    return train(Run(load(small, changes), "original", folder=folder, cpu=True, quiet=True, **settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_text: str) -> Path:
    """A run of one epoch of two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(small_text)
    torch.set_num_threads(1)
    go(folder / "small.yaml", folder / "run", "training.epochs=1", "schedule={name: step, milestones: [9]}")
    return folder / "run"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def resume(small: Path, folder: Path) -> Progress:
    return go(small, folder, "training.epochs=1", "schedule={name: step, milestones: [9]}", resume=True)


# -- one at a time ----------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(small: Path, folder: Path) -> None:
    part = folder / "checkpoints" / ".part-0002"
    part.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=rf"^{folder} is in use by another run; wait for its end, or give another"):
            resume(small, folder)
        assert part.is_dir()
        holder.kill()
        holder.wait()
    assert resume(small, folder).done == 1  # a killed process keeps nothing
    assert not part.exists()


@pytest.mark.parametrize("seed", [-1, SEEDS, 2**32 - 1, 10**30])
def test_a_seed_that_not_every_library_takes_is_told_before_there_is_a_run(
    seed: int, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=rf"--seed is {seed}; give 0 to 2147483647"):
        go(small, tmp_path / "run", seed=seed)
    assert not (tmp_path / "run").exists()


def test_the_seeds_of_epochs_stay_in_range() -> None:
    assert epoch_seed(0, 1) == 1_000_003
    assert all(0 <= epoch_seed(seed, number) < SEEDS for seed in (0, SEEDS - 1) for number in (1, 2148, 4295, 10**6))


# -- damaged checkpoints ----------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def listed(path: Path) -> None:
    torch.save([1, 2], path)


def renamed(path: Path) -> None:
    save_file({f"x.{key}": value for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin"])
@pytest.mark.parametrize("harm", [cut, Path.unlink])
@pytest.mark.parametrize("sizes", [True, False], ids=["sizes", "no-sizes"])
def test_a_damaged_checkpoint_is_told(
    name: str, harm: Callable[[Path], None], sizes: bool, small: Path, folder: Path
) -> None:
    path = checkpoints(folder)[-1]
    if not sizes:
        forget_sizes(path)
    harm(path / name)
    with pytest.raises(RunError, match=r"epoch-0001 is damaged \(.+\); there is none before it, so train into another"):
        resume(small, folder)


@pytest.mark.parametrize(
    ("name", "harm"),
    [("optimizer.bin", listed), ("scheduler.bin", listed), ("weights.safetensors", renamed)],
)
def test_a_checkpoint_of_another_content_is_told(
    name: str, harm: Callable[[Path], None], small: Path, folder: Path
) -> None:
    path = checkpoints(folder)[-1]
    forget_sizes(path)
    harm(path / name)
    with pytest.raises(RunError, match=r"epoch-0001 is damaged"):
        resume(small, folder)


def forget_sizes(path: Path) -> None:
    """The checks of the content alone."""
    progress = path / "progress.json"
    progress.write_text(json.dumps({"epochs": json.loads(progress.read_text())["epochs"]}))


def test_the_checksums_of_all_files_are_kept(folder: Path) -> None:
    path = checkpoints(folder)[-1]
    files = json.loads((path / "progress.json").read_text())["files"]
    assert files == {
        item.name: {"bytes": item.stat().st_size, "sha256": hashlib.sha256(item.read_bytes()).hexdigest()}
        for item in path.iterdir()
        if item.name != "progress.json"
    }
    assert {"weights.safetensors", "random_states_0.pkl", "optimizer.bin"} <= files.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda epoch: [], "does not tell the epochs up to this one"),
        (lambda epoch: None, "epochs: Input should be a valid array"),
        (lambda epoch: [{**epoch, "test_top1": "x"}], "epochs: 0: test_top1: Input should be a valid number"),
        (lambda epoch: [{**epoch, "test_top1": None}], "epochs: 0: test_top1: Input should be a valid number"),
        (lambda epoch: [{**epoch, "epoch": 9}], "does not tell the epochs up to this one"),
        (lambda epoch: [epoch, epoch], "does not tell the epochs up to this one"),
    ],
)
def test_progress_that_cannot_be_is_told(change: Callable[[Any], Any], words: str, folder: Path) -> None:
    path = checkpoints(folder)[-1] / "progress.json"
    (epoch,) = json.loads(path.read_text())["epochs"]
    path.write_text(json.dumps({"epochs": change(epoch)}))
    with pytest.raises(RunError, match=rf"epoch-0001 is damaged \(progress.json:? ?{words}\); there is none before"):
        read_progress(folder)


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(
    small: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "checkpoints" / "epoch-0002").mkdir()
    assert resume(small, folder).done == 1
    said = capsys.readouterr().err
    assert "epoch-0002 is damaged (" in said and "the run goes on from" in said and said.count("\n") == 1
    assert [path.name for path in checkpoints(folder)] == ["epoch-0001"]
    assert (folder / "checkpoints" / "damaged-epoch-0002").is_dir()


def test_files_where_folders_belong(small: Path, folder: Path) -> None:
    path = folder / "checkpoints" / "epoch-0002"
    path.write_text("")
    (folder / "checkpoints" / ".part-0002").write_text("")
    with pytest.raises(RunError, match=r"epoch-0002 is a file where a checkpoint's folder belongs; remove it"):
        resume(small, folder)
    path.unlink()
    assert resume(small, folder).done == 1
    assert [item.name for item in (folder / "checkpoints").iterdir()] == ["epoch-0001"]


# -- damaged run files ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"name": 3, "variant": "original"}', "{"])
def test_a_damaged_record_is_told(text: str, small: Path, folder: Path) -> None:
    (folder / "run.json").write_text(text)
    for reader in (read_run, lambda folder: resume(small, folder)):
        with pytest.raises(
            RunError, match=rf"^{folder} is no run folder of padfree-recipes train: .*put the file back$"
        ):
            reader(folder)


def test_a_missing_recipe_is_told(folder: Path) -> None:
    (folder / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"is no run folder .*No such file .*recipe.yaml'; give another folder, or put"):
        read_run(folder)


# -- a full disk ------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_run_goes_on_later(small: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the weights are larger
    try:
        with pytest.raises(RunError, match=r"cannot write .*epoch-0001: .*\(os error 27\); --resume goes on"):
            go(small, folder, "training.epochs=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((folder / "checkpoints").iterdir()) == []
    assert go(small, folder, "training.epochs=1", resume=True).done == 1

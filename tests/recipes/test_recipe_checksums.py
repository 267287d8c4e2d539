"""Checkpoints that changed after they were written are found, and the one before is gone on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from padfree.recipes import load
from padfree.recipes.checkpoints import Progress, RunError, check_checkpoint, checkpoints, last_whole
from padfree.recipes.cli import main
from padfree.recipes.evaluate import evaluate_run
from padfree.recipes.train import Run, train

TINY = ["model.input_side=8", "data.train=[{ToTensor: {}}]", "data.eval=[{ToTensor: {}}]"]
CHANGES = [*TINY, "training.batch_size=479", "training.ema_decay=0.9", "schedule={name: step, milestones: [9]}"]


def go(small: Path, folder: Path, **settings: Any) -> Progress:
    return train(Run(load(small, CHANGES), "original", folder=folder, cpu=True, quiet=True, **settings))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_text: str) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "small.yaml").write_text(small_text)
    torch.set_num_threads(1)
    go(folder / "small.yaml", folder / "run")
    return folder / "run"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


NAMES = (
    *("weights.safetensors", "model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"),
    *("custom_checkpoint_0.pkl", "progress.json"),
)


def flip(path: Path, place: float = 0.6) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_of_any_file_is_found(name: str, place: float, folder: Path) -> None:
    path = checkpoints(folder)[-1]
    check_checkpoint(path)
    flip(path / name, place)
    with pytest.raises(RunError, match=r"epoch-0002 is damaged \(.*(checksum|progress|codec)"):
        check_checkpoint(path)
    found, progress, faults = last_whole(folder)
    assert found is not None and found.name == "epoch-0001" and progress.done == 1 and len(faults) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 9), lambda path: os.truncate(path, 0)])
def test_a_missing_or_short_file_is_found(name: str, harm: Any, folder: Path) -> None:
    harm(checkpoints(folder)[-1] / name)
    with pytest.raises(RunError, match="epoch-0002 is damaged"):
        check_checkpoint(checkpoints(folder)[-1])


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so(
    small: Path, whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(checkpoints(folder)[-1] / "weights.safetensors")
    assert go(small, folder, resume=True).done == 2
    said = capsys.readouterr().err
    assert "note: " in said and "epoch-0002 is damaged (weights.safetensors has another checksum" in said
    assert "it is now damaged-epoch-0002, and the run goes on from" in said
    again, before = (item / "checkpoints" / "epoch-0002" / "weights.safetensors" for item in (folder, whole))
    assert again.read_bytes() == before.read_bytes()  # the epoch that was lost is trained again


def test_where_none_is_whole_nothing_is_trained(small: Path, folder: Path) -> None:
    for path in checkpoints(folder):
        flip(path / "optimizer.bin")
    with pytest.raises(
        RunError, match=r"epoch-0001 is damaged \(optimizer.bin .*; there is none before it, so train into"
    ):
        go(small, folder, resume=True)
    with pytest.raises(RunError, match="epoch-0001 is damaged"):
        evaluate_run(folder, cpu=True)
    assert len(checkpoints(folder)) == 2


def test_evaluation_checks_the_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(checkpoints(folder)[-1] / "weights.safetensors", 0.9)
    assert main(["evaluate", str(folder), "--checkpoint", "last", "--cpu", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["epoch"] == 1
    assert err.count("\n") == 1 and "epoch-0002 is damaged" in err and "epoch-0001" in err


def test_a_damaged_best_checkpoint_is_not_replaced_by_another(folder: Path) -> None:
    progress = checkpoints(folder)[-1] / "progress.json"
    content = json.loads(progress.read_text())
    content["epochs"][0]["test_top1"] = 100.0  # the first is the best
    progress.write_text(json.dumps({"epochs": content["epochs"]}))
    flip(checkpoints(folder)[0] / "weights.safetensors")
    with pytest.raises(RunError, match="epoch-0001 is damaged"):
        evaluate_run(folder, "best", cpu=True)


@pytest.mark.parametrize("form", ["sizes", "nothing"])
def test_checkpoints_of_before_load_with_a_note(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoints(folder)[-1]
    content = json.loads((path / "progress.json").read_text())
    sizes = {name: item["bytes"] for name, item in content["files"].items()}
    (path / "progress.json").write_text(
        json.dumps({"epochs": content["epochs"], **({"files": sizes} if form == "sizes" else {})})
    )
    assert check_checkpoint(path).done == 2
    said = capsys.readouterr().err
    assert "epoch-0002 was written before checkpoints had checksums" in said and said.count("\n") == 1
    (path / "random_states_0.pkl").write_bytes(b"\x80" * (path / "random_states_0.pkl").stat().st_size)
    with pytest.raises(RunError, match="epoch-0002 is damaged") as caught:
        check_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_what_reading_would_run_is_refused_and_not_recommended(folder: Path, tmp_path: Path) -> None:
    path = checkpoints(folder)[-1]
    content = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({"epochs": content["epochs"]}))
    torch.save({"state": Path(tmp_path)}, path / "optimizer.bin")
    with pytest.raises(RunError, match=r"holds something other than tensors, numbers and names\)") as caught:
        check_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_links_are_removed_and_what_they_point_to_stays(small: Path, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(checkpoints(folder)[0], elsewhere)
    (folder / "checkpoints" / "epoch-0001").symlink_to(elsewhere)
    (folder / "checkpoints" / ".part-0003").symlink_to(elsewhere)
    recipe = load(small, [*CHANGES, "training.epochs=3"])
    assert train(Run(recipe, "original", folder=folder, cpu=True, quiet=True, resume=True)).done == 3
    assert (elsewhere / "weights.safetensors").is_file()
    assert not (folder / "checkpoints" / ".part-0003").exists()

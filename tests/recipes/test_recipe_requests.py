"""Requests to `padfree-recipes` that strangers make: each right, or one line and status 2 before a run is opened."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from padfree.recipes import cli, load
from padfree.recipes.cli import main
from padfree.recipes.train import Run, TrainingError, train
from PIL import Image

QUIET = ["--cpu", "--quiet"]
FOLDER = ["data.dataset=timm", "data.drop_last=false", "training.batch_size=4", "model.num_classes=3"]
STEPS = [f"data.{part}=[{{Resize: {{size: [16, 16]}}}}, {{ToTensor: {{}}}}]" for part in ("train", "eval")]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for split, count in (("train", 5), ("val", 3)):
        for kind in "abc":
            for index in range(count):
                path = tmp_path / "images" / split / kind / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["optimizer.momentum=0", "optimizer.nesterov=true"], "nesterov needs a momentum over 0"),
        (["model.num_classes=1"], "model.num_classes"),
        (["data.dataset=folder", "data.root=~nobody-of-this-name/x"], "home directory"),
    ],
)
def test_settings_that_cannot_be_used(
    change: list[str], words: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert words in refused(["train", str(small), *change, *QUIET, "--out", str(out)], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["data.eval_split=nope"], "has no folder for split 'nope'"),
        (["data.reader=nope/x"], "timm has no reader 'nope'"),
        (["model.num_classes=2"], "3 classes and the recipe says model.num_classes: 2"),
    ],
)
def test_folders_that_timm_would_read_otherwise(
    change: list[str], words: str, images: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*FOLDER, "data.reader=image_folder", f"data.root={images}", *STEPS, *change]
    assert words in refused(["train", str(small), *given, *QUIET, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_folders_are_read_by_timm(images: Path, small: Path, tmp_path: Path) -> None:
    given = [*FOLDER, "data.reader=image_folder", f"data.root={images}", *STEPS, "training.epochs=1"]
    assert main(["train", str(small), *given, *QUIET, "--out", str(tmp_path / "run")]) == 0
    row = next(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert (row["train_images"], row["test_images"]) == ("15", "9")


def test_a_network_that_is_broken_by_the_last_step_is_not_kept(small: Path, tmp_path: Path) -> None:
    recipe = load(small, ["training.epochs=1", "training.batch_size=1400", "optimizer.lr=1e30"])
    with pytest.raises(TrainingError, match=r"after its last step .*no epoch was finished"):
        train(Run(recipe, folder=tmp_path / "run", cpu=True, quiet=True))
    assert not list((tmp_path / "run").glob("checkpoints/epoch-*"))


@pytest.mark.parametrize("averaged", [False, True])
def test_evaluation_in_the_precision_of_the_training(
    averaged: bool, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["training.epochs=1", "optimizer.lr=0.05", *(["training.ema_decay=0.5"] if averaged else [])]
    folder = tmp_path / "run"
    progress = train(
        Run(load(small, changes), folder=folder, cpu=True, quiet=True, mixed_precision="bf16", seed=1)
    ).epochs[-1]
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--cpu", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["top1"] == progress.test_top1
    assert found["loss"] == pytest.approx(progress.test_loss, rel=1e-5)


def test_variants_named_twice(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", str(small), "--variants", "original,original", *QUIET, "--out", str(tmp_path / "run")]
    assert "names one twice" in refused(command, capsys)


def test_flags_are_written_out(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seed" in refused(["compare", str(small), "--seed", "7"], capsys)


def test_what_an_interrupt_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    for command, words in (("train", "--resume"), ("compare", "the same command"), ("table", "interrupted")):
        assert main([command]) == 130
        said = capsys.readouterr().err
        assert words in said and ("--resume" in said) == (command == "train")


def test_merge_keys_of_yaml(small_text: str, tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        small_text.replace("training: {epochs: 2, batch_size: 128}", "training: {<<: {batch_size: 64}, epochs: 2}")
    )
    assert load(path).training.batch_size == 64
    path.write_text(small_text.replace("epochs: 2, batch_size", "epochs: 2, epochs: 3, batch_size"))
    with pytest.raises(Exception, match="given twice"):
        load(path)


FIGURES = "figures: {count: bsconv, rows: {padfree: {published: {params_m: 1.0}, reference: {conv_linear: 5}}}}\n"


def test_figures_that_are_not_counted(small_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net[v2].yaml"
    path.write_text(small_text + FIGURES.replace("}}}}", "}, differs: {params: 'see [/ref] there'}}}}"))
    assert main(["table", "--recipe", str(path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "conv_linear is not counted by bsconv" in out
    assert "net[v2].yaml" in out and "see [/ref] there" in out


def test_networks_that_cannot_be_counted(small_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grey.yaml"
    grey = "{builder: timm, name: lcnet_035, arguments: {in_chans: 1}, num_classes: 10, input_side: 32}"
    named = "{builder: small, name: resnet, num_classes: 10, input_side: 16}"
    assert named in small_text
    path.write_text(small_text.replace(named, grey) + "figures: {count: fvcore, rows: {original: {published: {}}}}\n")
    assert "cannot be counted by fvcore on 3 channels" in refused(["table", "--recipe", str(path)], capsys)


def test_a_recipe_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x01")
    command = ["copy", str(tmp_path / "bin.yaml"), str(tmp_path / "b.yaml")]
    assert "cannot be read" in refused(command, capsys) and not (tmp_path / "b.yaml").exists()

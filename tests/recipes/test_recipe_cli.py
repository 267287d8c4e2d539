"""`padfree-recipes`: what its commands print, write and return."""

from __future__ import annotations

import errno
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from padfree.recipes import cli, load, names
from padfree.recipes.checkpoints import Epoch, Progress
from padfree.recipes.cli import main
from padfree.recipes.train import Run, ending


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.split()[0] for line in lines if not line.startswith(" ")) == names()
    assert main(["list", "--json"]) == 0
    assert tuple(json.loads(capsys.readouterr().out)) == names()


def test_show_and_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    assert main(["copy", "cifar100-first/wrn40-3", str(target)]) == 0
    assert main(["show", "cifar100-first/wrn40-3"]) == 0
    assert capsys.readouterr().out == target.read_text()
    # every command takes a file in place of a name
    assert main(["show", str(target)]) == 0
    assert "projection: dense" in capsys.readouterr().out
    assert load(target).model_dump(exclude={"name"}) == load("cifar100-first/wrn40-3").model_dump(exclude={"name"})


def test_table_as_json_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--recipe", "cifar100-first/resnet20", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in rows] == ["original", "padfree"]
    assert rows[1]["measured"]["params"] == 282_138 and rows[1]["convention"] == "bsconv"
    assert rows[1]["difference"] == {"params_m": 0.000138, "flops_m": 0.002324}
    path = tmp_path / "wrong.yaml"
    main(["copy", "cifar100-first/resnet20", str(path)])
    path.write_text(path.read_text().replace("params: 282138", "params: 282139"))
    assert main(["table", "--recipe", str(path)]) == 1
    out = capsys.readouterr().out
    assert "OFF" in out and "params is 282,138, the reference implementation has 282,139" in out


def test_table_shows_every_figure_uncut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--table", "imagenet", "--wide"]) == 0
    out = capsys.readouterr().out
    assert "5,480,932" in out and "214,950,772" in out and "…" not in out
    assert "* imagenet/mobilenetv3-large padfree: flops 215.0M is printed as 214.9M: printed cut" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND (see padfree-recipes --help)"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: NAME, key=value (see padfree-recipes train --help)"),
        (["train", "a", "--fast"], "unrecognized arguments: --fast"),
        (["list", "x=1"], "unrecognized arguments: x=1"),
        (["show", "nothing"], "no recipe and no file 'nothing'"),
        (["copy", "digits/resnet20", "/nowhere/x.yaml"], "/nowhere is no folder; make it first"),
        (["table", "--table", "x"], "no table 'x'"),
        (["table", "--recipe", "digits/resnet20"], "has no published figures"),
        (["table", "--recipe", "digits/resnet20", "--table", "x"], "--table: not allowed with argument --recipe"),
        (["table", "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json: there is no folder /nowhere"),
        (["evaluate", "/nowhere", "--json", "/"], "cannot write /: it is a folder"),
        (["train", "digits/resnet20", "--variant", "x", "--cpu"], "no variant 'x'; it has original, padfree"),
        (["train", "digits/resnet20", "optimizer.lr=fast"], "optimizer.lr: "),
        (["train", "digits/resnet20", "--seed", "1", "training.epoch=3"], "training.epoch: "),
        (["train", "cifar100-first/resnet20", "--cpu", "data.root=/nowhere"], "no CIFAR100: looked for"),
        (["train", "digits/resnet20", "--cpu", "--mixed-precision", "fp16"], "fp16 needs an accelerator"),
        (["train", "digits/resnet20", "--cpu", "--out", "/dev/null/x"], "cannot make the run folder /dev/null/x: Not"),
        (["train", "digits/resnet20", "--seed", "4294967295"], "--seed is 4294967295; give 0 to 2147483647"),
        (["train", "digits/resnet20", "--seed", "9" * 30], "give 0 to 2147483647"),
        (["evaluate", "/nowhere"], "/nowhere is no run folder"),
        (["compare", "digits/resnet20", "--seeds", "0"], "--seeds is 0; give 1 or more"),
        (["compare", "digits/resnet20", "--variants", "a,b"], "no variant 'a'; there are original"),
        (["compare", "digits/resnet20", "--cpu", "--out", "/dev/null"], "cannot make the run folder /dev/null/orig"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("padfree-recipes: ")
    assert words in lines[-1]
    assert all(line.startswith("padfree-recipes: note: ") for line in lines[:-1])  # such as which run of several


def test_whatever_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(arguments: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", "some/file")

    monkeypatch.setattr(cli, "_list", refuse)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "padfree-recipes: some/file: Read-only file system\n"


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    assert main(["copy", "digits/resnet20", str(target)]) == 2
    assert "is there already; give another name" in capsys.readouterr().err
    assert target.read_text() == "mine"


def test_train_evaluate_and_compare(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    common = [str(small), "--cpu", "--quiet"]
    run = folder / "padfree-seed0"
    assert main(["train", *common, "training.epochs=1", "--out", str(run)]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()  # the one line that --quiet leaves
    assert captured.err == ""
    figures = r"best (\d+\.\d\d) % \(epoch 1\), last (\d+\.\d\d) % \(epoch 1\) in (\S+); next: (.*)"
    best, last, where, command = re.fullmatch(figures, line).groups()  # type: ignore[union-attr]
    assert best == last and where == str(run) and shlex.split(command)[0] == "padfree-recipes"
    assert main([*shlex.split(command)[1:], "--cpu"]) == 0
    assert f"top-1 {best} % of 360 images" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--cpu", "--json", "-"]) == 0
    captured = capsys.readouterr()
    evaluated = json.loads(captured.out)
    assert (evaluated["variant"], evaluated["epoch"], evaluated["images"]) == ("padfree", 1, 360)
    assert captured.err == ""

    assert main(["compare", *common, "--seeds", "2", "--out", str(folder), "training.epochs=1"]) == 0
    report = json.loads((folder / "comparison.json").read_text())
    original, padfree = report["variants"]
    assert (original["variant"], padfree["variant"], report["seeds"]) == ("original", "padfree", 2)
    assert padfree["top1"][0] == evaluated["top1"]  # the run that was there is not trained again
    assert padfree["mean"] == pytest.approx(sum(padfree["top1"]) / 2, abs=1e-4)
    low, high = sorted(padfree["top1"])
    assert padfree["spread"] == pytest.approx((high - low) / 2**0.5, abs=1e-3)
    assert padfree["macs"] < original["macs"] and padfree["params"] > original["params"]
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "top-1 % (2 seeds)" in out and f"{padfree['mean']:.2f} ± {padfree['spread']:.2f}" in out
    assert out.count("next: ") == 0  # the table is the end, not each run's line


def test_an_epoch_is_a_line_where_no_bar_can_be_drawn(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", str(small), "--cpu", "--out", str(tmp_path / "run"), "training.epochs=2"]
    assert main(run) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line.partition(", loss")[0] for line in lines] == ["run: epoch 1/2", "run: epoch 2/2"]
    assert all(re.search(r"loss \d+\.\d{3}, test \d+\.\d\d %, [\d,]+ images/s$", line) for line in lines)
    assert not set(captured.err) & {"\r", "\x1b"}
    assert captured.out.startswith("best ") and "last " in captured.out


def test_the_best_epoch_is_told_beside_the_last() -> None:
    epochs = [Epoch(n, 0.1, 1.0, 50.0, 10, 1.0, top1, 5, 10.0, 1.0) for n, top1 in ((1, 50.0), (2, 62.5), (3, 61.25))]
    run = Run(load("digits/resnet20"), folder=Path("a run"))
    assert ending(run, Progress(tuple(epochs))) == (
        "best 62.50 % (epoch 2), last 61.25 % (epoch 3) in a run; next: padfree-recipes evaluate 'a run'"
    )


def test_a_damaged_image_in_a_loading_process_is_one_line(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for index in range(2):
            folder = tmp_path / split / f"class{index}"
            folder.mkdir(parents=True)
            for item in range(4):
                Image.new("RGB", (20, 20), (index * 99, item, 0)).save(folder / f"{item}.png")
    (tmp_path / "train" / "class1" / "2.png").write_bytes(b"\x89PNG cut")
    data = ["data.dataset=folder", f"data.root={tmp_path}", "data.workers=1", "model.num_classes=2"]
    command = ["train", str(small), "--cpu", "--quiet", "--variant", "original", "--out", str(tmp_path / "r")]
    assert main([*command, *data, "training.batch_size=2"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    path = tmp_path / "train" / "class1" / "2.png"
    assert len(lines) == 1 and lines[0].startswith(f"padfree-recipes: {path}: cannot be read as an image")


@pytest.mark.parametrize(("package", "command"), [("pydantic", "list"), ("accelerate", "train digits/resnet20")])
def test_a_missing_package_is_one_line(package: str, command: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from padfree.recipes.cli import main; "
    code += f"sys.exit(main({command.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == f'padfree-recipes: needs the package {package}: pip install ".[recipes]" in the source folder of padfree\n'
    )

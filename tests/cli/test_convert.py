"""`padfree-convert`: every wrong request is one line and status 2; then what it prints and writes."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import padfree
from padfree.cli.convert import main
from padfree.errors import PadfreeError

SMALL = ["--timm", "lcnet_035", "--input-size", "3", "64", "64"]


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something is being downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


# wrong requests


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "one of the arguments --timm --torchvision --bsconv --model is required"),
        (["--timm", "a", "--bsconv", "b"], "not allowed with argument --timm"),
        (["--timm"], "expected one argument"),
        ([*SMALL, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--timm", "mobilnetv3_large_100"], "did you mean mobilenetv3_large_100"),
        (["--torchvision", "mobilenet_v3_larg"], "did you mean mobilenet_v3_large"),
        (["--bsconv", "mobilenetv4_w1"], "bsconv has no model 'mobilenetv4_w1'"),
        (["--model", "no_such_package:net"], "cannot import no_such_package"),
        (["--model", "torch.nn"], "write package.module:factory"),
        (["--model", "torch.nn:ReLU"], "nothing to convert in ReLU at 3x224x224"),
        (["--timm", "lcnet_035", "--input-size", "3", "64"], "expected 3 arguments"),
        (["--timm", "lcnet_035", "--input-size", "3", "x", "64"], "invalid int value: 'x'"),
        (["--timm", "lcnet_035", "--input-size", "3", "0", "64"], "three positive integers"),
        (["--timm", "lcnet_035", "--input-size", "3", "-8", "64"], "three positive integers"),
        (["--timm", "resnet18", "--input-size", "3", "64", "64", "--num-classes", "-1"], "is not negative"),
        (["--torchvision", "resnet18", "--input-size", "4", "64", "64"], "does not run on a 4x64x64 input"),
        ([*SMALL, "--rules", "depthwise", "pooling"], "pooling"),
        ([*SMALL, "--include", "no.such.module"], "no.such.module"),
        ([*SMALL, "--exclude", "re:("], "re:("),
        ([*SMALL, "--merge", "relu"], "Options.merge is 'relu'"),
        ([*SMALL, "--pool", "5x5"], "Options.pool is '5x5'"),
        ([*SMALL, "--projection", "conv"], "Options.projection is 'conv'"),
        (["--timm", "vit_tiny_patch16_224"], "nothing to convert in VisionTransformer at 3x224x224"),
        ([*SMALL, "--checkpoint", "missing.pt"], "missing.pt: no such file"),
        ([*SMALL, "--checkpoint", "text.pt"], "neither safetensors nor a torch file"),
        ([*SMALL, "--checkpoint", "other.safetensors"], "keys 147 missing"),
        ([*SMALL, "--output", "none/a.safetensors"], "there is no folder none"),
        ([*SMALL, "--output", "a.bin"], "must end in .safetensors"),
        ([*SMALL, "--json", "none/a.json"], "there is no folder none"),
        ([*SMALL, "--json", "."], "it is a folder"),
        ([*SMALL, "--onnx", "none/a.onnx"], "there is no folder none"),
        ([*SMALL, "--plan-only", "--output", "a.safetensors"], "nothing to write for --output"),
        ([*SMALL, "--fixed-sides"], "neither is asked for"),
        ([*SMALL, "--output", "a.safetensors", "--json", "a.safetensors"], "the same file"),
        ([*SMALL, "--onnx", "a", "--exported-program", "../{here}/a"], "the same file"),
        ([*SMALL, "--onnx", "-"], "--onnx -: only the report can go to stdout"),
        (["--bsconv", "cifar_resnet20", "--pretrained"], "no pretrained weights"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(
    argv: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert main([argument.format(here=tmp_path.name) for argument in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("padfree-convert: ")
    assert err.count("\n") == 1
    assert reason in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "text.pt"]


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("padfree.cli.convert._run", interrupted)
    assert main(SMALL) == 130
    assert capsys.readouterr().err == "padfree-convert: interrupted\n"


OWN = """
import sys
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1))

def noisy():
    print("building")
    return Net()

class Ends(Net):
    def forward(self, x):
        sys.exit(0)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield ["--input-size", "3", "32", "32", "--model"]
    sys.modules.pop("own_models", None)


def test_a_model_that_ends_the_program_is_an_error(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own, "own_models:Ends"]) == 2
    assert capsys.readouterr() == ("", "padfree-convert: the code of factory:own_models:Ends ended the program (0)\n")
    assert main([*own, "sys:exit"]) == 2
    assert "factory cannot build 'sys:exit': SystemExit" in capsys.readouterr().err


def test_what_a_model_prints_stays_out_of_the_report(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own, "own_models:noisy", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "own_models:noisy"
    assert err == "building\n"


def test_a_pipe_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for flag in ("--json", "--onnx", "--exported-program"):
        assert main([*SMALL, flag, str(tmp_path / "pipe")]) == 2
        assert "it is a device, a pipe or a socket, not a plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_all_results_are_written_or_none(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise PadfreeError("this one fails")

    monkeypatch.setattr("padfree.deploy.onnx.to_onnx", fail)
    (tmp_path / "a.safetensors").write_text("old")
    before = sorted(os.listdir())
    assert main([*own, "own_models:Net", "--output", "a.safetensors", "--onnx", "a.onnx", "--json", "a.json"]) == 2
    assert capsys.readouterr().err == "padfree-convert: this one fails\n"
    assert sorted({*os.listdir()} - {"__pycache__"}) == before
    assert (tmp_path / "a.safetensors").read_text() == "old"


def test_a_signal_to_end_leaves_no_file(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def terminated(*args: object, **kwargs: object) -> None:
        assert len(list(tmp_path.glob(".a.safetensors.*"))) == 1  # written, and not in place yet
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal ended nothing")

    monkeypatch.setattr("padfree.deploy.onnx.to_onnx", terminated)
    assert main([*own, "own_models:Net", "--output", "a.safetensors", "--onnx", "a.onnx"]) == 143
    assert capsys.readouterr().err == "padfree-convert: terminated\n"
    assert sorted({*os.listdir()} - {"__pycache__"}) == ["own_models.py"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_signals_of_a_program_around_it_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("padfree.cli.convert._run", lambda arguments: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(SMALL) == 0
        thread = threading.Thread(target=main, args=(SMALL,))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        thread.start()
        thread.join()
        assert main(SMALL) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen[:2] == [signal.SIG_IGN, signal.SIG_DFL]
    assert callable(seen[2])


@pytest.mark.parametrize("argv", [[*SMALL, "--plan-only"], [*SMALL, "--plan-only", "--json", "-"], ["--help"]])
def test_a_stdout_that_takes_nothing(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(argv) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == "padfree-convert: cannot write to stdout: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert main(argv) == 2
    assert capsys.readouterr().err == "padfree-convert: cannot write to stdout: it is closed\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert main(argv) == 2


def test_a_stdout_of_few_characters(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([*own, "own_models:Net", "--plan-only", "--json", "\xfc.json"]) == 0
    assert stdout.buffer.getvalue().endswith(b"wrote \\xfc.json\n")
    assert stdout.errors == "strict"


# what it prints


def test_the_json_alone_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--rules", "depthwise,stem", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == "lcnet_035"
    assert report["library"] == "timm"
    assert report["input_size"] == [3, 64, 64]
    assert report["params"]["original"] == sum(p.numel() for p in timm.create_model("lcnet_035").parameters())
    assert report["params"]["converted"] > report["params"]["original"]
    assert report["macs"]["converted"] != report["macs"]["original"]
    assert report["minimum_input"] <= 63
    assert {match["rule"] for match in report["matches"]} == {"depthwise", "stem"}
    assert all({"rule", "name", "block", "size"} <= match.keys() for match in report["matches"])
    assert report["maps"]["before"] == [[32, 32], [16, 16], [8, 8], [4, 4], [2, 2]]
    assert report["maps"]["after"] == [[32, 32], [15, 15], [7, 7], [3, 3], [1, 1]]


def test_skips_carry_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--exclude", "blocks.1.0.*", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [skip["name"] for skip in report["skips"]] == ["blocks.1.0.conv_dw"]
    assert "exclude" in report["skips"][0]["reason"]


def test_plan_only_converts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padfree.Plan, "apply", None)
    assert main([*SMALL, "--plan-only"]) == 0
    assert "5 places to convert" in capsys.readouterr().out
    assert main([*SMALL, "--plan-only", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["matches"]) == 5
    assert report["params"]["converted"] is None
    assert report["macs"] == {"original": None, "converted": None}


def test_the_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--merge", "norm", "--pool", "kernel", "--projection", "dense", "--stem-residual"]
    assert main([*SMALL, *flags, "--plan-only", "--json", "-"]) == 0
    expected = {"merge": "norm", "pool": "kernel", "projection": "dense", "stem_residual": True}
    assert expected.items() <= json.loads(capsys.readouterr().out)["options"].items()


@pytest.mark.parametrize(
    ("argv", "size"),
    [
        (["--bsconv", "cifar_mobilenetv1_w1d4"], [3, 32, 32]),
        (["--torchvision", "shufflenet_v2_x0_5", "--num-classes", "10"], [3, 224, 224]),
        (["--timm", "lcnet_035", "--input-size", "1", "64", "64"], [1, 64, 64]),
        (["--model", "torchvision.models:mobilenet_v3_small"], [3, 224, 224]),
    ],
)
def test_every_library(argv: list[str], size: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--plan-only", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["input_size"] == size
    assert len(report["matches"]) >= 3


# what it writes


def test_output_and_json_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = timm.create_model("lcnet_035", num_classes=7).state_dict()
    torch.save(weights, tmp_path / "original.pt")
    output, report = tmp_path / "converted.safetensors", tmp_path / "report.json"
    argv = [*SMALL, "--num-classes", "7", "--checkpoint", str(tmp_path / "original.pt")]
    assert main([*argv, "--output", str(output), "--json", str(report)]) == 0
    assert f"wrote {output}\nwrote {report}" in capsys.readouterr().out
    assert json.loads(report.read_text())["params"]["converted"] > 0
    state = padfree.load(output).state_dict()
    assert len(state) > len(weights)
    for key, value in weights.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 3
    assert main([*argv[:-1], str(output)]) == 2
    assert "holds a converted network already" in capsys.readouterr().err


def test_exports_are_wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def export(model: nn.Module, path: Path, size: tuple[int, ...], *, dynamic_sides: bool, time_limit: float) -> None:
        assert time_limit == 3600
        calls.append((path.name, size, dynamic_sides, model.training, padfree.is_converted(model)))

    monkeypatch.setattr("padfree.deploy.onnx.to_onnx", export)
    monkeypatch.setattr("padfree.deploy.program.to_exported_program", export)
    argv = [*SMALL, "--onnx", str(tmp_path / "a.onnx"), "--exported-program", str(tmp_path / "a.pt2")]
    assert main(argv) == 0
    assert main([*argv, "--fixed-sides"]) == 0
    size = (3, 64, 64)
    assert calls == [(name, size, free, False, True) for free in (True, False) for name in ("a.onnx", "a.pt2")]


# as a command


def test_the_command_in_a_pipe(own: list[str]) -> None:
    command = [sys.executable, "-m", "padfree.cli", *own, "own_models:Net", "--plan-only"]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert piped.stdout.startswith("factory:own_models:Net at 3x32x32: 2 places to convert")
    assert piped.stderr == ""
    assert "\x1b" not in piped.stdout

    unread = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | true', "_", *command], capture_output=True, text=True, timeout=600
    )
    assert (unread.returncode, unread.stderr) == (0, "")


TERMINALS = [
    ({"COLUMNS": "200"}, True),
    ({"NO_COLOR": "1"}, False),
    ({"COLUMNS": "0"}, True),
    ({"COLUMNS": "20"}, False),
]
ON_TERMINALS = f"""
import os, sys
from padfree.cli.convert import main
for settings, _ in {TERMINALS}:
    os.environ.update(settings)
    assert main(sys.argv[1:]) == 0
    print("(end)", flush=True)
    for name in settings:
        del os.environ[name]
"""


def test_the_command_on_a_terminal(own: list[str]) -> None:
    leader, follower = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-c", ON_TERMINALS, *own, "own_models:Net", "--plan-only"]
    shown = subprocess.Popen(command, stdout=follower, env={**environment, "TERM": "xterm-256color"})
    os.close(follower)
    screen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        screen += chunk
    os.close(leader)
    assert shown.wait(timeout=600) == 0
    *screens, rest = screen.split(b"(end)")
    assert len(screens) == len(TERMINALS) and not rest.strip()
    for text, (_, escapes) in zip(screens, TERMINALS, strict=True):
        assert (b"\x1b[1m" in text, b"\x1b" in text) == (escapes, escapes)
        assert b"2 places to convert" in text

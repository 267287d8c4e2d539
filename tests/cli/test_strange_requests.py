"""Requests to `padfree-convert` and files that strangers have, and what must come of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import padfree
from padfree.cli.convert import main
from padfree.files.checkpoint import load_weights, read_checkpoint
from padfree.files.sources import Source

SMALL = ["--timm", "lcnet_035", "--input-size", "3", "64", "64"]


def test_flags_given_again_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--plan-only", "--json", "-", "--rules", "depthwise", "--rules", "stem"]) == 0
    rules = {match["rule"] for match in json.loads(capsys.readouterr().out)["matches"]}
    assert rules == {"depthwise", "stem"}


def test_an_empty_name_of_a_checkpoint_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--checkpoint", "", "--output", str(tmp_path / "a.safetensors")]) == 2
    assert "'' is not the path of a file" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_unknown_tag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--timm", "resnet18.nope", "--input-size", "3", "64", "64"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_size_beyond_all_memory_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--timm", "lcnet_035", "--input-size", "3", "9" * 11, "64", "--plan-only"]) in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) <= 1


WRAPPED = {
    "counts of batches missing": lambda sd: {key: value for key, value in sd.items() if "num_batches" not in key},
    "compiled": lambda sd: {f"_orig_mod.{key}": value for key, value in sd.items()},
    "compiled, distributed": lambda sd: {f"module._orig_mod.{key}": value for key, value in sd.items()},
    "averaged": lambda sd: {"n_averaged": torch.tensor(3)} | {f"module.{key}": value for key, value in sd.items()},
    "averaged, inside": lambda sd: {"model_ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": sd[k] for k in sd}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_as_others_keep_them(kind: str, tmp_path: Path) -> None:
    original, fresh = (torchvision.models.mobilenet_v3_small(num_classes=3) for _ in range(2))
    torch.save(WRAPPED[kind](original.state_dict()), tmp_path / "w.pth")
    load_weights(fresh, read_checkpoint(tmp_path / "w.pth"), tmp_path / "w.pth", any_age=True)
    for mine, theirs in zip(original.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_weights_that_lack_more_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    torch.save({"n_averaged": torch.tensor(1), **model.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(padfree.PadfreeError, match=r"1 unknown \(n_averaged\)"):
        load_weights(model, read_checkpoint(tmp_path / "w.pth"), tmp_path / "w.pth")


def test_a_network_whose_first_conv_reads_no_image_channels_is_saved(tmp_path: Path) -> None:
    """TResNet folds pixels into channels before its first convolution."""
    converted = padfree.convert(timm.create_model("tresnet_m", num_classes=5), input_size=(3, 64, 64)).eval()
    padfree.save(converted, tmp_path / "a.safetensors")
    again, x = padfree.load(tmp_path / "a.safetensors"), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), converted(x))


def test_other_channels_are_kept(tmp_path: Path) -> None:
    converted = padfree.convert(timm.create_model("lcnet_035", in_chans=1), input_size=(1, 64, 64))
    padfree.save(converted, tmp_path / "a.safetensors")
    assert padfree.load(tmp_path / "a.safetensors").conv_stem.in_channels == 1


def test_arguments_of_factories() -> None:
    Source("factory", "module:function", {"profile": "x", "weighted": 1})
    for name in ("weights", "weights_backbone", "pretrained_cfg", "checkpoint_path", "file", "filename"):
        with pytest.raises(padfree.PadfreeError, match="without weights"):
            Source("factory", "module:function", {name: "x"})

"""Where the weights lie in files that training scripts write, and what their keys begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from padfree.errors import FileError
from padfree.files.checkpoint import load_checkpoint, read_checkpoint


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2)))


STATE = net().state_dict()
OTHER = {key: value + 1 for key, value in STATE.items()}


def prefixed(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "content",
    [
        {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}, "epoch": 3},
        {"net": STATE, "acc": 93.1, "epoch": 7},
        {"network": STATE},
        {"ema": STATE, "epoch": 3},
        {"net_ema": STATE},
        {"net": STATE, "ema": OTHER},
        {"params": STATE, "params_ema": OTHER},
        {"state_dict": STATE, "state_dict_ema": OTHER, "arch": "resnet18"},
        {"model": {"state_dict": STATE}},
        {"state_dict": STATE, "model": {"name": "resnet18", "depth": 18}},
        {"model_state_dict": prefixed("module.")},
        {"state_dict": prefixed("model.")},
        {"ema": {"module": STATE, "updates": 5}},
        prefixed("backbone."),
        prefixed("encoder."),
        prefixed("module.model."),
        prefixed("model._orig_mod."),
        prefixed("a.name.of.ones.own."),
    ],
)
def test_weights_are_found(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    model = net()
    load_checkpoint(model, tmp_path / "a.pt")
    torch.testing.assert_close(dict(model.state_dict()), dict(STATE), rtol=0, atol=0)


def test_a_prefix_of_the_network_itself_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 3)})
    state = {key: value + 1 for key, value in model.state_dict().items()}
    for start in ("", "module.", "backbone."):
        save_file(prefixed(start, state), tmp_path / "a.safetensors")
        load_checkpoint(model, tmp_path / "a.safetensors")
        torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {**prefixed("model."), "criterion.weight": torch.ones(2)},
            r"keys 8 missing .* 10 unknown \(criterion.weight, mod",
        ),
        (prefixed("model.", {**STATE, "fc.weight": torch.ones(2)}), r"keys 1 unknown \(fc.weight\)"),
        ({"x.weight": torch.ones(2), "x.bias": torch.ones(2)}, r"keys 8 missing"),
        ({"net": STATE, "model": OTHER}, r"holds several networks \(model, net\); save .* of the one you mean"),
        ({"state_dict": STATE, "module": STATE}, r"holds several networks \(state_dict, module\)"),
        ({"ema": STATE, "model_ema": OTHER}, r"holds several networks \(model_ema, ema\)"),
        ({"net": {"a": 1}}, "holds more than tensors"),
        ({"generator": STATE, "discriminator": OTHER}, "holds more than tensors"),
        ({"net": {}}, "holds more than tensors"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FileError, match=words):
        load_checkpoint(model, tmp_path / "a.pt")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_counts_of_batches_may_be_missing_behind_a_prefix(tmp_path: Path) -> None:
    torch.save(prefixed("model.", {key: STATE[key] for key in STATE if "num_batches" not in key}), tmp_path / "a.pt")
    load_checkpoint(net(), tmp_path / "a.pt")


def test_a_network_within_itself_is_read_to_its_end(tmp_path: Path) -> None:
    content: dict[str, Any] = dict(STATE)
    for _ in range(50):
        content = {"model": content}
    torch.save(content, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").keys() == STATE.keys()
    circle: dict[str, Any] = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "a.pt")
    with pytest.raises(FileError, match=r"a\.pt .*"):
        read_checkpoint(tmp_path / "a.pt")

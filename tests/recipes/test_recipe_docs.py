"""What docs/recipes.md shows works."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from padfree.recipes import load
from padfree.recipes.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_recipe_shown_is_the_one_in_the_library() -> None:
    (text,) = blocks("yaml")
    shown = load("cifar100-first/resnet20").model_dump(mode="json", exclude={"name", "figures"})
    for section, settings in yaml.safe_load(text).items():
        found = shown[section]
        assert found == settings or {key: found[key] for key in settings} == settings


def test_the_commands_and_flags_shown_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for command in (
        [],
        ["train"],
        ["table"],
        ["evaluate"],
        ["compare"],
        ["report"],
        ["benchmark"],
        ["show"],
        ["copy"],
        ["list"],
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known += capsys.readouterr().out
    commands = set(re.findall(r"`padfree-recipes (\w+)", PAGE))
    assert commands == {"list", "show", "copy", "table", "train", "evaluate", "compare", "report", "benchmark"}
    assert all(f" {command} " in known for command in commands)
    others = {"--num", "--nproc-per-node", "--logdir", "--model", "--data-dir", "--grad-checkpointing"}
    flags = set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - others
    assert len(flags) >= 7 and [flag for flag in flags if flag not in known] == []


def test_a_converted_model_can_be_had_by_name_as_timms_train_script_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's two files, with a stand-in for train.py that makes and runs its model the same way."""
    module, script = blocks("python")[1:]
    (tmp_path / "padfree_models.py").write_text(module)
    (tmp_path / "train_padfree.py").write_text(script)
    (tmp_path / "train.py").write_text(
        "import timm, torch\n"
        "from timm.data import resolve_data_config\n"
        "from timm.optim import create_optimizer_v2\n"
        "from timm.utils import ModelEmaV3\n"
        "model = timm.create_model('padfree_mobilenetv3_large_100', pretrained=False, num_classes=7,\n"
        "                          drop_rate=0.1, drop_path_rate=0.1)\n"
        "size = resolve_data_config({}, model=model)['input_size']\n"
        "average = ModelEmaV3(model, decay=0.9)\n"
        "optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)\n"
        "logits = model(torch.randn(2, 3, 64, 64))\n"
        "logits.square().mean().backward()\n"
        "optimizer.step()\n"
        "average.update(model)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "padfree_models", raising=False)
    found = runpy.run_path("train_padfree.py")
    assert "padfree_models" in found
    made = runpy.run_path("train.py")
    assert made["size"] == (3, 224, 224) and made["logits"].shape == (2, 7)
    plan = made["model"].padfree_plan
    assert len([match for match in plan.matches if match.rule == "depthwise"]) == 4
    assert isinstance(made["logits"], torch.Tensor)

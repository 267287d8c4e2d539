"""Networks of the documents in training: condensing stages on their schedule, kills in the middle, averages."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from padfree.recipes import RecipeError, load
from padfree.recipes.checkpoints import Progress, checkpoints, read_progress
from padfree.recipes.condensing import begin_epoch
from padfree.recipes.evaluate import evaluate_run
from padfree.recipes.train import Run, Step, train
from safetensors.torch import load_file
from torch import nn

from padfree import PadfreeError
from padfree.layers.learned_groups import LearnedGroupConv2d, condensed, learned_group_convs

LGC = "digits/mobilenetv2-lgc"
# images as they are, three steps an epoch, and a rate that does not depend on how many epochs there are
FAST = (
    *("model.input_side=8", "data.train=[{ToTensor: {}}]", "data.eval=[{ToTensor: {}}]", "training.batch_size=479"),
    "schedule={name: step, milestones: [9], gamma: 1}",
)


def go(name: str, folder: Path, *changes: str, **settings: Any) -> Progress:
    return train(Run(load(name, changes), folder=folder, cpu=True, quiet=True, **settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(folder)[-1] / "weights.safetensors")


def test_a_learned_group_network_trains_condenses_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages before epochs 1, 2 and 2; a run that is stopped between them ends as one that was not."""
    changes = [*FAST, "training.condense_before=[1, 2, 2]", "training.ema_decay=0.5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(LGC, whole, *changes, "training.epochs=2")
    assert capsys.readouterr().err == ""
    go(LGC, parts, *changes, "training.epochs=1")
    assert "note: 1 of 3 condensing stages come within 1 epochs" in capsys.readouterr().err
    recipe = load(LGC, FAST)
    model = recipe.build("padfree")
    model.load_state_dict(weights(parts))
    assert {layer.stage for layer in learned_group_convs(model)} == {1}
    progress = go(LGC, parts, *changes, "training.epochs=2", resume=True)
    expected, found = weights(whole), weights(parts)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert progress.epochs[1].test_loss == read_progress(whole).epochs[1].test_loss

    model.load_state_dict(found)
    assert {layer.stage for layer in learned_group_convs(model)} == {3}
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(condensed(model.eval())(images), model(images))
    assert progress.epochs[1].train_loss < progress.epochs[0].train_loss

    tested = [evaluate_run(whole, "last", cpu=True, as_condensed=condense) for condense in (False, True)]
    assert tested[1]["loss"] == pytest.approx(tested[0]["loss"], rel=1e-5)
    assert [found["top1"] for found in tested] == [progress.epochs[1].test_top1] * 2


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = LearnedGroupConv2d(8, 8)
        self.second = LearnedGroupConv2d(8, 8, condense_factor=2)


def test_stages_come_before_their_epochs_in_the_average_too() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = Toy()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)
    settings = load(LGC, ["training.condense_before=[2, 4, 4]"]).training
    stages = []
    for epoch in range(1, 5):
        begin_epoch(model, average, settings, epoch)
        average.update_parameters(model)
        stages.append((model.first.stage, model.second.stage))
        torch.testing.assert_close(average.module.first.mask, model.first.mask)
        torch.testing.assert_close(average.module.second.mask, model.second.mask)
    assert stages == [(0, 0), (1, 1), (1, 1), (3, 1)]


def test_the_lasso_is_added_to_the_loss() -> None:
    plain, weighted = (load(LGC, [f"training.lasso_weight={weight}"]) for weight in (0, 0.01))
    model, accelerator = plain.build("padfree").eval(), SimpleNamespace(unwrap_model=lambda model: model)
    images, targets = torch.rand(2, 3, 16, 16), torch.tensor([3, 4])
    losses = [
        Step(recipe, accelerator, model, None, None, None, Path(), 1).losses(images, targets)[0]  # type: ignore[arg-type]
        for recipe in (plain, weighted)
    ]
    wanted = 0.01 * sum(layer.lasso() for layer in learned_group_convs(model))
    torch.testing.assert_close(losses[1] - losses[0], wanted, rtol=1e-4, atol=1e-5)
    assert wanted > 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (LGC, "training.condense_before=[1, 1, 2, 3]", "lists 4 condensing stages and MobileNetV2Cifar has 3"),
        ("digits/resnet20", "training.condense_before=[1]", "condense_before is for learned .* and ResNet has none"),
        ("digits/resnet20", "training.lasso_weight=0.1", "lasso_weight is for learned .*, and ResNet has none; leave"),
    ],
)
def test_stages_that_a_network_does_not_have_are_refused(name: str, change: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(PadfreeError, match=words):
        go(name, tmp_path / "run", change, variant="original")
    assert not (tmp_path / "run").exists()


def test_stages_are_in_order() -> None:
    with pytest.raises(RecipeError, match=r"condense_before: stages come in the order of their epochs, not \[3, 2\]"):
        load(LGC, ["training.condense_before=[3, 2]"])


KILLED = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = iter(range(10**6))
def hook(*_):
    if next(steps) == 13:  # an epoch has 11: some way into the second
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_post_hook(hook)
from padfree.recipes.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "further"),
    [
        ("mobilenets-cifar100/mobilenetv1-w0.25", 32, ()),
        (
            "mobilenets-cifar100/mobilenetv2-t1",
            16,
            (
                "model.arguments={expansion: 1, stem_channels: 16, expand: learned, project: learned}",
                "training.condense_before=[1, 2, 2]",
                "training.lasso_weight=0.00001",
            ),
        ),
        ("mobilenet123/mobilenetv3-small-w1", 64, ()),
    ],
)
def test_a_killed_run_of_the_documents_resumes_bit_equal(
    name: str, side: int, further: tuple[str, ...], tmp_path: Path
) -> None:
    """Two epochs on real images, killed in the second."""
    steps = f"[{{Resize: {{size: [{side}, {side}]}}}}, {{ToTensor: {{}}}}]"
    changes = [
        *("data.dataset=digits", "data.root=null", f"data.train={steps}", f"data.eval={steps}", "data.workers=0"),
        *("data.drop_last=true", "model.num_classes=10", f"model.input_side={side}"),
        *("training.epochs=2", "training.batch_size=128", "optimizer.lr=0.05", *further),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    go(name, whole, *changes)
    command = [sys.executable, "-c", KILLED, "train", name, "--out", str(killed), "--cpu", "--quiet", *changes]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=7200, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_progress(killed).done == 1
    progress = go(name, killed, *changes, resume=True)
    expected, found = weights(whole), weights(killed)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    first, last = progress.epochs
    if "mobilenetv2" not in name:
        assert last.train_loss < first.train_loss
    else:  # what two stages take away at once is not learned again in an epoch
        assert first.train_loss < math.log(10)
        model = load(name, changes).build("padfree")
        model.load_state_dict(found)
        assert {layer.stage for layer in learned_group_convs(model)} == {3}

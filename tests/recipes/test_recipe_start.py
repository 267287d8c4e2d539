"""Fine-tuning from a trained original: which weights are taken, how they are converted, and the rate of each step."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from padfree.recipes import RecipeError, load, start
from padfree.recipes.checkpoints import WEIGHTS, Progress, RunError
from padfree.recipes.start import calibration_images, peak, rate, started, weights_file
from padfree.recipes.train import Run, train
from safetensors.torch import load_file, save_file

import padfree
from padfree import PadfreeError
from padfree.errors import FileError

CPU = SimpleNamespace(  # what is asked of Accelerate's, in one process without accelerators
    device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True
)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, small_text: str) -> Path:
    """The recipe that the other tests train, of a small ResNet."""
    path = tmp_path_factory.mktemp("start") / "small.yaml"
    path.write_text(small_text)
    return path


@pytest.fixture(scope="module")
def trained(recipe_file: Path) -> Path:
    """A run of the original, two epochs."""
    torch.set_num_threads(1)
    go(recipe_file, recipe_file.parent / "original", "original")
    return recipe_file.parent / "original"


def go(recipe: Path, folder: Path, variant: str, *changes: str, **settings: Any) -> Progress:
    return train(Run(load(recipe, changes), variant, folder=folder, cpu=True, quiet=True, **settings))


def weights(folder: Path, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"epoch-{epoch:04}" / "weights.safetensors")


# -- which weights ----------------------------------------------------------------------------------


def test_the_originals_best_weights_are_kept_by_the_conversion(recipe_file: Path, trained: Path) -> None:
    progress = json.loads((trained / "checkpoints" / "epoch-0002" / "progress.json").read_text())
    best = max(progress["epochs"], key=lambda item: item["test_top1"])["epoch"]
    recipe = load(recipe_file, [f"start.checkpoint={trained}"])
    made, before = started(recipe, "padfree", 0, CPU), weights(trained, best)
    state = made.state_dict()
    assert before.keys() < state.keys()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert made.training and made.padfree_plan.init == "preserve"
    # where nothing is downsampled, a stem with ReLU and a residual starts as the original exactly
    original, stem = (started(recipe, variant, 0, CPU).eval() for variant in ("original", "stem-only"))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(stem(images), original(images))


def test_a_run_a_checkpoint_and_a_file_are_the_same(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "epoch-0001"
    assert weights_file(checkpoint) == checkpoint / "weights.safetensors"
    assert weights_file(trained).parent.parent == trained / "checkpoints"
    assert weights_file(tmp_path / "any.pth") == tmp_path / "any.pth"


def test_weights_that_cannot_be_taken_are_told(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    def begun(path: Path, variant: str = "padfree") -> None:
        started(load(recipe_file, [f"start.checkpoint={path}"]), variant, 0, CPU)

    with pytest.raises(FileError, match=r"nothing\.pth: no such file"):
        begun(tmp_path / "nothing.pth")
    save_file({"head.weight": torch.zeros(10, 48)}, tmp_path / "part.safetensors")
    with pytest.raises(FileError, match=r"do not fit Classifier: keys \d+ missing"):
        begun(tmp_path / "part.safetensors")
    with pytest.raises(RunError, match=r"is no run folder"):
        begun(tmp_path)
    with pytest.raises(PadfreeError, match=r"start: variant efficientformerv2 has no way to keep what was trained"):
        begun(trained, "efficientformerv2")
    other = Path(shutil.copytree(trained, tmp_path / "run"))
    about = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**about, "variant": "padfree"}))
    for path in (other, other / "checkpoints" / "epoch-0001"):
        with pytest.raises(RunError, match=r"is a run of variant padfree, and start\.checkpoint takes the original's"):
            begun(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("start.calibrate=true", "start.checkpoint: field required"),
        ("start={checkpoint: x, init: fresh, calibrate: true}", "start.calibrate goes on from start.init: preserve"),
        ("start={checkpoint: x, init: keep}", "start.init: no 'keep'; there are preserve, fresh"),
        ("start={checkpoint: x, lr: 0}", "start.lr: input should be greater than 0"),
        ("start={checkpoint: x, warmup: 3}", "start.warmup: did you mean start.warmup_steps?"),
    ],
)
def test_wrong_settings_are_told(change: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("photos/resnet", [change])
    assert words in str(caught.value)


# -- calibration ------------------------------------------------------------------------------------


def test_calibration_sees_training_images_as_they_are_tested(recipe_file: Path) -> None:
    recipe = load(recipe_file, ["start.checkpoint=x"])
    first, again, other = (calibration_images(recipe, 2, seed, CPU) for seed in (0, 0, 1))
    assert [tuple(batch.shape) for batch in first] == [(64, 3, 16, 16)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    assert [len(batch) for batch in calibration_images(recipe, 100, 0, CPU)] == [64] * 22 + [29]
    plain = load(recipe_file, ["data.train=[{Resize: {size: [16, 16]}}, {ToTensor: {}}]"])
    dataset = start.open_dataset(plain, train=True)
    seen = {dataset[index][0].numpy().tobytes() for index in range(1437)}
    assert all(image.contiguous().numpy().tobytes() in seen for image in first[0])


def test_a_run_is_calibrated_before_it_is_trained_and_not_again(
    recipe_file: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    calibrated = padfree.calibrate

    def calibrate(converted: Any, batches: Any, **settings: Any) -> Any:
        calls.append({"batches": batches, **settings})
        return calibrated(converted, batches, **settings)

    monkeypatch.setattr(padfree, "calibrate", calibrate)
    changes = [f"start.checkpoint={trained}", "start.calibrate=true", "start.batches=2", "training.epochs=1"]
    go(recipe_file, tmp_path / "run", "padfree", *changes)
    (call,) = calls
    assert len(call["batches"]) == 2 and call["original"].state_dict().keys() == weights(trained, 1).keys()
    assert "plan.json" in {path.name for path in (tmp_path / "run").iterdir()}
    assert go(recipe_file, tmp_path / "run", "padfree", *changes, resume=True).done == 1
    go(recipe_file, tmp_path / "other", "original", *changes)
    assert len(calls) == 1  # a run that goes on has its weights, and an original needs none


# -- the learning rate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "given", "expected"), [(1, None, 0.01), (2, None, 0.1 / 3), (10, None, 0.1 / 3), (1, 0.02, 0.02)]
)
def test_the_highest_rate(epochs: int, given: float | None, expected: float) -> None:
    changes = ["start.checkpoint=x", f"training.epochs={epochs}", *([f"start.lr={given}"] if given else [])]
    assert peak(load("photos/resnet", changes)) == pytest.approx(expected)


def test_the_rate_rises_in_a_line_and_falls_by_half_a_cosine() -> None:
    recipe = load("photos/resnet", ["start.checkpoint=x", "start.lr=0.8", "start.warmup_steps=4"])
    found = [rate(recipe, step, 12) for step in range(12)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert found[8] == pytest.approx(0.4)  # half of the way down
    assert found[11] == pytest.approx(0.4 * (1 + math.cos(math.pi * 7 / 8)))
    assert rate(recipe, 0, 1) == pytest.approx(0.8)  # a warm-up longer than the training leaves its last step


def test_every_step_has_its_rate_and_a_resumed_run_goes_on_with_it(
    recipe_file: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self, *a, **k))[1],
    )
    changes = (f"start.checkpoint={trained}", "start.warmup_steps=3")
    go(recipe_file, tmp_path / "run", "padfree", *changes, "training.epochs=2")
    recipe = load(recipe_file, [*changes, "training.epochs=2"])
    steps = 1437 // 128
    assert rates == pytest.approx([rate(recipe, index, 2 * steps) for index in range(2 * steps)])
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([rates[steps - 1], rates[-1]])
    rates.clear()
    go(recipe_file, tmp_path / "run", "padfree", *changes, "training.epochs=3", resume=True)
    recipe = load(recipe_file, [*changes, "training.epochs=3"])
    assert rates == pytest.approx([rate(recipe, index, 3 * steps) for index in range(2 * steps, 3 * steps)])


def test_a_resumed_run_keeps_the_plan_that_it_began_with(recipe_file: Path, trained: Path, tmp_path: Path) -> None:
    change = f"start.checkpoint={trained}"
    go(recipe_file, tmp_path / "run", "padfree", change, "training.epochs=1")
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    assert json.loads(plan)["init"] == "preserve"
    go(recipe_file, tmp_path / "run", "padfree", change, "training.epochs=2", resume=True)
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan


def test_a_checkpoint_is_found_from_within_its_folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "checkpoints")
    (first, *_) = sorted(Path().iterdir())
    assert weights_file(first) == first / WEIGHTS


def test_numbers_of_images_are_for_data_sets_that_have_them(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="settings of datasets photos and timm"):
        load(recipe_file, ["data.train_samples=64"])

"""The accuracy benchmarks beside their training: what networks see, which cells are measured, how figures are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("skimage")

from benchmarks import ablation_page, training, warm_start_page
from benchmarks.images import Images, Split, images, standardise


def ramp(name: str = "photos", number: int = 8) -> Images:
    """Images of 4 pixels with a margin of 2, whose values tell their place: 10 * row + column, 100 * index added."""
    places = 10 * torch.arange(8.0)[:, None] + torch.arange(8.0)
    stack = torch.stack([places + 100 * index for index in range(number)])[:, None]
    split = Split(stack, torch.arange(number))
    return Images(name, 4, 2, split, split)


@pytest.mark.parametrize(
    ("where", "top", "left", "size"),
    [({}, 2, 2, 4), ({"down": 1, "right": -2}, 3, 0, 4), ({"wider": 2}, 1, 1, 6), ({"wider": 3}, 1, 1, 7)],
)
def test_windows(where: dict[str, int], top: int, left: int, size: int) -> None:
    data = ramp()
    expected = standardise(data.test.images[..., top : top + size, left : left + size])
    found = data.window(data.test, **where)
    assert found.shape == (8, 3, size, size)
    torch.testing.assert_close(found[:, 1:2], expected)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)


def test_small_images_are_enlarged_with_their_margin() -> None:
    small = ramp(number=64)
    data = Images("photos", 12, 6, small.train, small.test)  # 8 pixels for 24
    found = data.window(data.test, down=-6, right=0)
    assert found.shape == (64, 3, 12, 12)
    steps = found[:, 0].diff(dim=1)[:, 3:], found[:, 0].diff(dim=2)[:, 3:]  # of a ramp, but at the border
    assert float(steps[0].std()) < 1e-4 and float(steps[1].std()) < 1e-4
    torch.testing.assert_close(steps[0].mean(), 10 * steps[1].mean(), rtol=1e-3, atol=0)
    batch, _ = data.batch(torch.arange(64), torch.Generator().manual_seed(0))
    plain = data.window(data.train)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(batch, plain, strict=True))


def test_a_window_beyond_the_margin_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a window of 4 pixels moved by 3, 0 leaves the margin of 2"):
        ramp().window(ramp().test, down=3)


def test_batches_of_photos_are_mirrored_or_not() -> None:
    data = ramp(number=64)
    found, labels = data.batch(torch.arange(64), torch.Generator().manual_seed(0))
    plain = data.window(data.train)
    mirrored = [torch.equal(image, other.flip(2)) for image, other in zip(found, plain, strict=True)]
    assert all(flipped or torch.equal(a, b) for flipped, a, b in zip(mirrored, found, plain, strict=True))
    assert 16 < sum(mirrored) < 48 and torch.equal(labels, torch.arange(64))


def test_batches_of_digits_are_moved_by_up_to_two_pixels() -> None:
    split = Split(torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(50))
    data = Images("mnist5k", 4, 2, split, split)
    found, _ = data.batch(torch.arange(50), torch.Generator().manual_seed(0))
    choices = torch.stack([data.window(split, y, x) for y in range(-2, 3) for x in range(-2, 3)])
    hits = ((choices - found).abs() < 1e-5).flatten(2).all(2)
    assert torch.equal(hits.sum(0), torch.ones(50, dtype=torch.long))  # each is one of the windows
    assert int(hits.any(1).sum()) > 15  # and most of the 25 are drawn


def test_photos_for_the_benchmarks_lie_in_the_recipes_blocks() -> None:
    data = images("photos", 32)
    assert data.train.images.shape == (4096, 1, 40, 40) and data.test.images.shape == (1600, 1, 40, 40)
    assert torch.equal(torch.bincount(data.test.half().labels), torch.full((16,), 50))


def test_the_rate_of_a_step() -> None:
    found = [training.rate(step, 10, 1.0, 2) for step in range(10)]
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert found[6] == pytest.approx(0.5) and found[9] < 0.05


def test_training_gives_its_curve_and_is_the_same_again() -> None:
    data = ramp(number=128)
    data = Images("photos", 4, 2, Split(torch.rand(128, 1, 8, 8), torch.arange(128) % 2), data.test)
    data = Images("photos", 4, 2, data.train, data.train)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        curve = training.fit(model, data, 4, lr=0.1, seed=3, marks=training.marks(4))
        runs.append((curve, model[1].weight))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert list(runs[0][0]) == [0, 1, 2, 3, 4]
    assert runs[0][0][4] == training.accuracy(model, data.window(data.test), data.test.labels)


def measured(key: dict[str, Any]) -> dict[str, Any]:
    return {"key": key, "value": key["seed"] ** 2, "told": "done"}


def test_cells_are_measured_once(tmp_path: Path) -> None:
    path, keys = tmp_path / "runs" / "cells.json", [{"seed": seed} for seed in range(3)]
    assert len(training.cells(keys[:2], measured, path, "settings", jobs=1)) == 2

    def again(key: dict[str, Any]) -> dict[str, Any]:
        assert key == {"seed": 2}
        return measured(key)

    found = training.cells(keys, again, path, "settings", jobs=1)
    assert [cell["value"] for cell in found] == [0, 1, 4]
    assert [cell["value"] for cell in json.loads(path.read_text())["cells"]] == [0, 1, 4]
    with pytest.raises(SystemExit, match=r"holds cells of other settings \(settings\); give another --json"):
        training.cells(keys, measured, path, "other settings", jobs=1)


def test_differences_are_taken_seed_by_seed() -> None:
    found = []
    for seed, (before, after) in enumerate([(60.0, 62.0), (70.0, 71.0)]):
        for variant, clean in (("original", before), ("padfree", after)):
            key = {"data": "photos", "family": "resnet", "variant": variant, "seed": seed, "steps": 5}
            figures = dict.fromkeys(ablation_page.CONDITIONS, clean)
            found.append({"key": key, "clean": clean, "parameters": 10, "curve": {"0": 1.0}, **figures})
    text = ablation_page.page(found, {"cpu": "", "capability": "", "cores": 1, "threads": 1, "torch": ""}, None)
    assert "| resnet | 2 | 65.0 ± 7.1 |  |  | +1.5 ± 0.7 | 10 -> 10 |" in text
    # the published table stands beside it, as differences from its original
    assert "| shufflenetv2-x1.0 | 70.9 | +1.1 | -0.5 | +0.6 |" in text


def test_what_is_kept_is_told_against_the_same_original(tmp_path: Path) -> None:
    before = {row: 30.0 for row in warm_start_page.ROWS} | {"original": 60.0, "calibrate": 57.0}
    curves = {
        "naive": {"0": 6.0, "96": 50.0},
        "calibrate": {"0": 57.0, "96": 59.0},
        "original": {"0": 60.0, "96": 61.5},
    }
    key = {"set": "photos32", "family": "resnet", "seed": 0, "steps": 5}
    controls = dict.fromkeys(warm_start_page.CONTROLS, 54.0)
    cells: list[dict[str, Any]] = [
        {"key": {**key, "epochs": "0"}, "before": before, "wider_side": 38, "controls": controls},
        {"key": {**key, "epochs": "1.5"}, "tuned": curves},
    ]
    about = {"cpu": "", "capability": "", "cores": 1, "threads": 1, "torch": ""}
    text = warm_start_page.page(cells, about, "curves.png")
    assert "| resnet | 1 | 60.0 | 0.500 | 0.500 | 0.500 | 0.500 | 0.950 | 0.500 | 0.500 |" in text
    assert "| resnet | 0.900 | 0.900 | 0.900 | 0.900 |" in text
    assert "| resnet | 1 | -10.0 | -1.0 | +1.5 | +9.0 |" in text
    assert "images of 38 pixels" in text and "(curves.png)" in text
    warm_start_page.picture(cells, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

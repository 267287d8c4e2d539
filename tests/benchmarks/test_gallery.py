"""The gallery beside its networks: which maps are drawn, what is said of a network that nothing is done to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import padfree
from benchmarks import gallery

OWN = """
from torch import nn

def strided():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.ReLU())

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
"""


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_gallery.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gallery, "SIZE", (3, 16, 16))


def test_a_network_before_and_after(tmp_path: Path) -> None:
    row, part = gallery.entry("factory:own_of_gallery:strided", tmp_path)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # a stride-2 window of 8 positions reads 1 of 24 taps above and 1 left; (1 - (23/24)^2) of all paths
    assert cells[1] == "8.2% → 0"
    assert cells[2] == "4.2% 0 4.2% 0 → 0 0 0 0"
    assert cells[3] == "none → 31 pixels: 1 row at the bottom and 1 column at the right"
    assert "before and after" in part
    (file,) = tmp_path.glob("*.png")
    with Image.open(file) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None and len(colours) > 50


def test_a_network_that_nothing_is_done_to(tmp_path: Path) -> None:
    row, part = gallery.entry("factory:own_of_gallery:plain", tmp_path)
    assert "→" not in row
    assert "Nothing to convert in" in part and "stride" in part


def test_the_last_map_of_each_size() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, 1, 1), nn.Conv2d(1, 1, 3, 1, 1), nn.Conv2d(1, 1, 3, 2, 1))
    found = gallery.last_maps(padfree.footprint(model, (1, 8, 8)))
    assert [layer.name for layer in found] == ["1", "2"]


def test_scenes_are_the_same_at_every_call() -> None:
    first, again = (gallery.scenes((3, 48, 40)) for _ in range(2))
    assert first.shape == (2, 3, 48, 40)
    torch.testing.assert_close(first, again)

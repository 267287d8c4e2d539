"""Small recipes that train in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SMALL = """
about: a small ResNet on digits of 16 pixels
model: {builder: small, name: resnet, num_classes: 10, input_side: 16}
conversion: {stem_residual: true}
data:
  dataset: digits
  train:
    - Resize: {size: [16, 16]}
    - RandomCrop: {size: 16, padding: 2}
    - ToTensor: {}
  eval:
    - Resize: {size: [16, 16]}
    - ToTensor: {}
  drop_last: true
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.0005}
schedule: {name: cosine, final_fraction: 0.1}
training: {epochs: 2, batch_size: 128}
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_text() -> str:
    """What `small` holds."""
    return SMALL


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe file that trains for two epochs of a second or two."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path

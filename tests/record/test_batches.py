"""What batches of images are accepted, with labels and without."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padfree.errors import PadfreeError
from padfree.record.batches import image_batches

MODEL = nn.Linear(1, 1, dtype=torch.float64)
IMAGES = [torch.rand(4, 3, 8, 8) for _ in range(3)]


def spoilt(value: float) -> Tensor:
    images = torch.zeros(2, 3, 8, 8)
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("given", [IMAGES, "a loader", tuple(IMAGES), IMAGES[0]])
def test_images_come_in_the_type_of_the_network(given: Any, labels: bool) -> None:
    found = image_batches(iter(IMAGES) if isinstance(given, str) else given, MODEL, labels=labels)
    assert {batch.dtype for batch in found} == {torch.float64}
    torch.testing.assert_close(found[0].float(), IMAGES[0])


def test_labels_are_left_out_or_refused() -> None:
    pairs = [(batch, torch.zeros(len(batch))) for batch in IMAGES]
    assert len(image_batches(pairs, MODEL, labels=True)) == 3
    with pytest.raises(PadfreeError, match=r"batch 0 is a tuple of 2 .*; pass \(images for images, labels in loader\)"):
        image_batches(pairs, MODEL, labels=False)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "batches is empty.*a dozen"),
        (iter(()), "batches is empty"),
        (7, "batches is int"),
        ("a.png", "batches is str"),
        ({"image": IMAGES[0]}, "batches is dict"),
        (["a.png"], "batch 0 is a str"),
        ([IMAGES[0], {"image": 1}], "batch 1 is a dict with 'image'"),
        ([torch.zeros(3, 16, 16)], r"has the shape \(3, 16, 16\); pass images as \(N, C, H, W\)"),
        ([torch.zeros(0, 3, 16, 16)], r"has the shape \(0, 3, 16, 16\)"),
        ([torch.zeros(4, 3, 16, 16, dtype=torch.uint8)], "holds uint8"),
        ([torch.zeros(4, 3, 16, 16, device="meta")], "meta device"),
        ([IMAGES[0], spoilt(math.nan)], "batch 1 holds NaN"),
        ([spoilt(math.inf)], "batch 0 holds NaN or infinite"),
        ([IMAGES[0], torch.zeros(4, 1, 16, 16)], "1 and 3 channels"),
        ([IMAGES[0][:1]], "batches hold one image, .* take 2 in one batch.*a dozen"),
        (IMAGES[0].split(1), "batches hold one image each"),
        ([()], "batch 0 is a.* tuple"),
    ],
)
def test_what_is_no_batch_is_named(given: Any, words: str, labels: bool) -> None:
    with pytest.raises(PadfreeError, match=words):
        image_batches(given, MODEL, labels=labels, together=2, advice="a dozen")
